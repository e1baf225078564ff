"""A full model's directory: its configuration, its architecture, where its parameters are, and what else it has.

A configuration may say that the head is the embedding where a fine-tuned head of its own is stored. What is stored
counts, as it does in transformers.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from hf_fedlarge.architectures import Architecture, describe, load_config
from hf_fedlarge.entries import is_file_name
from hf_fedlarge.tensors import CheckpointReader
from hf_fedlarge.untrusted import is_companion

logger = logging.getLogger(__name__)

_COMPARED_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says and holds.

    Attributes:
        config: its configuration, with `tie_word_embeddings` as the stored tensors have it.
        architecture: of the model.
        reader: of its tensors.
        names: parameter → the tensor that it is stored as.
    """

    config: PretrainedConfig
    architecture: Architecture
    reader: CheckpointReader
    names: dict[str, str]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint's configuration and headers; where a tied head is stored as well, it is compared, too.

    Raises:
        ArtifactError: not a whole checkpoint.
        ArchitectureError: a model that can't be shrunk and streamed.
    """
    config = load_config(directory)
    architecture, reader = describe(config), CheckpointReader(directory)
    names = architecture.tensor_names(reader.infos, directory)
    head = architecture.tied_head(reader.infos)
    if head is not None and not _same(reader, head, names[f"{architecture.embedding}.weight"]):
        config.tie_word_embeddings = False
        architecture = describe(config)
        names = architecture.tensor_names(reader.infos, directory)
    return Checkpoint(config, architecture, reader, names)


def _same(reader: CheckpointReader, name: str, other: str) -> bool:
    """Whether two tensors are the same, a few rows in memory at a time."""
    one, two = reader.infos[name], reader.infos[other]
    return (one.dtype, one.shape) == (two.dtype, two.shape) and all(
        torch.equal(reader.read_rows(name, *rows), reader.read_rows(other, *rows))
        for rows in reader.row_ranges(name, _COMPARED_BYTES)
    )


def copy_companions(checkpoint: Path, target: Path) -> None:
    """Copy what a model directory needs besides config and weights; a name that no manifest can list is left out."""
    for path in sorted(checkpoint.iterdir()):
        if not path.is_file() or not is_companion(path.name):
            continue
        if is_file_name(path.name):
            shutil.copyfile(path, target / path.name)
        else:
            logger.warning("%s is left out; expected a name of letters, digits, '.', '_' and '-'.", path)
