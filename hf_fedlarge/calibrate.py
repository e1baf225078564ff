"""What a server learns of its model from calibration text: which layers matter least, and what stands for dropped ones.

Calibration text is public; clients' data is not needed for it. The checkpoint is streamed, so it may be larger than
memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_fedlarge.architectures import load_config
from hf_fedlarge.artifacts import PackageManifest, file_entry, write_json
from hf_fedlarge.config import LayerChoice, PackageSettings, parse_layers
from hf_fedlarge.data import load_examples
from hf_fedlarge.errors import ConfigError, DataError
from hf_fedlarge.evaluation import encode_example
from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
from hf_fedlarge.shrink import ShrinkPlan, plan_shrink
from hf_fedlarge.stdlib_corpus import standard_library_prose
from hf_fedlarge.surrogate import Regression, fit_surrogates
from hf_fedlarge.tensors import SafetensorsWriter
from hf_fedlarge.walk import Walk

TOKENS = 32_768
SURROGATES_NAME = "surrogates.safetensors"
LENGTH = 128
_SCORED = 32  # sequences on which a layer's loss is measured
_CODECS = {"nf4": "nf4", "int8": "int8", "bf16": "dense"}
Progress = Callable[[int], None]


def calibration_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Iterable[dict[str, Any]], tokens: int = TOKENS, length: int = LENGTH
) -> list[torch.Tensor]:
    """Calibration text as sequences of one length, each (1, S), that begin as training examples do.

    The first token draws the attention of all others and has states like no other, so there must be many of them: short
    examples follow each other until S is reached, the next sequence begins with the next example; long ones are cut.

    Args:
        tokenizer: the model's.
        examples: in any of the three forms of `data.load_examples`, taken in order.
        tokens: how many to take, if there are as many.
        length: S.

    Raises:
        DataError: the text is too short for one sequence.
    """
    sequences: list[list[int]] = []
    begun: list[int] = []
    for example in examples:
        ids = begun + encode_example(example, tokenizer, sys.maxsize)["input_ids"]
        pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        sequences += pieces[:1] if begun else pieces
        begun = [] if pieces else ids
        if len(sequences) * length >= tokens:
            break
    if not sequences:
        raise DataError(f"The calibration text has {len(begun)} tokens; expected {length} or more, better {TOKENS}.")
    return [torch.tensor(ids)[None] for ids in sequences[: max(1, tokens // length)]]


def plan_package(
    checkpoint: Path,
    settings: PackageSettings,
    progress: Progress | None = None,
) -> ShrinkPlan:
    """`shrink.plan_shrink`, with the layers chosen by what they do on calibration text if that is asked for.

    Args:
        checkpoint: the full model's directory.
        settings: where `keep_layers` lists layers, there is nothing to choose.
        progress: called with the layers that are done.

    Raises:
        FedLargeError: as `plan_shrink`, or the calibration text can't be used.
    """
    plan = plan_shrink(checkpoint, keep_layers=settings.keep_layers, embeddings=settings.embeddings)
    if settings.surrogate != "none" and plan.kept[0] != 0:
        raise ConfigError(
            "A surrogate stands behind a kept layer, but layer 0 is dropped: keep it, or use no surrogate."
        )
    listed = isinstance(parse_layers(settings.keep_layers, plan.layers), list)
    if settings.layer_choice == "uniform" or listed or not plan.dropped:
        return plan
    scores = layer_scores(checkpoint, _sequences(checkpoint, settings), settings.layer_choice, progress)
    return plan_shrink(checkpoint, keep_layers=settings.keep_layers, embeddings=settings.embeddings, scores=scores)


def _sequences(checkpoint: Path, settings: PackageSettings) -> list[torch.Tensor]:
    examples = load_examples(settings.calibration) if settings.calibration else standard_library_prose()
    longest = getattr(load_config(checkpoint), "max_position_embeddings", None) or LENGTH
    return calibration_sequences(load_tokenizer(checkpoint), examples, length=min(LENGTH, longest))


def layer_scores(
    checkpoint: Path, sequences: Sequence[torch.Tensor], choice: LayerChoice, progress: Progress | None = None
) -> list[float]:
    """How much the model would miss each of its layers; those with the lowest scores should go.

    `influence` is block influence (ShortGPT, arXiv 2403.03853): 1 − cos of the states before and after a layer, mean
    over tokens. `loss` is the rise of the calibration loss where a surrogate stands for that layer alone. The first
    layer scores infinity, as a surrogate stands behind a block.

    Args:
        checkpoint: the full model's directory.
        sequences: from `calibration_sequences`.
        choice: `influence` or `loss`.
        progress: called with the layers that are done.
    """
    teacher = Walk(stream_checkpoint(checkpoint), sequences[0])
    states = [teacher.embed(ids) for ids in sequences]
    scores, without = [], []
    for layer in range(len(teacher)):
        # A model without one earlier layer has its own states from there on.
        without = [[teacher.step(layer, hidden) for hidden in own] for own in without]
        after = [teacher.step(layer, hidden) for hidden in states]
        if choice == "influence":
            alike = [torch.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(states, after, strict=True)]
            scores.append(1 - float(torch.cat(alike, dim=1).mean()))
        else:
            regression = Regression(states[0].shape[-1], states[0].device)
            for x, y in zip(states, after, strict=True):
                regression.add(x[0], y[0])
            T = regression.solve()
            b, T = regression.bias(T).to(states[0].dtype), T.to(states[0].dtype)
            without.append([hidden + hidden @ T + b for hidden in states[:_SCORED]])
        states = after
        if progress:
            progress(layer + 1)
    if choice == "loss":
        scores = [_loss(teacher, own, sequences) - _loss(teacher, states, sequences) for own in without]
    return [float("inf"), *scores[1:]]


def _loss(teacher: Walk, states: Sequence[torch.Tensor], sequences: Sequence[torch.Tensor]) -> float:
    pairs = list(zip(states[:_SCORED], sequences[:_SCORED], strict=True))
    return sum(teacher.loss(hidden, ids) for hidden, ids in pairs) / len(pairs)


def surrogates_for(
    plan: ShrinkPlan, settings: PackageSettings, progress: Progress | None = None
) -> Callable[[Path, PackageManifest], PackageManifest] | None:
    """What `shrink(…, complete=…)` does last: put a fitted surrogate in the place of every run of dropped layers.

    None where nothing is to stand there. The calibration text is read at once.

    Args:
        plan: what is shrunk, from `plan_package`.
        settings: the same.
        progress: called with the layers that are done.

    Raises:
        FedLargeError: the calibration text can't be used.
    """
    if settings.surrogate == "none" or not plan.dropped:
        return None
    sequences = _sequences(plan.checkpoint, settings)
    codec = _CODECS[settings.surrogate_codec]
    return lambda directory, manifest: add_surrogates(directory, manifest, plan, sequences, codec, progress)


def add_surrogates(
    directory: Path,
    manifest: PackageManifest,
    plan: ShrinkPlan,
    sequences: Sequence[torch.Tensor],
    codec: str = "nf4",
    progress: Progress | None = None,
) -> PackageManifest:
    """Fit surrogates for a package that isn't visible yet and write them into it; returns its manifest with them.

    Args:
        directory: the package.
        manifest: as it is so far.
        plan: what it was made by.
        sequences: from `calibration_sequences`.
        codec: `nf4`, `int8` or `dense` (bf16).
        progress: called with the layers that are done.
    """
    teacher = Walk(stream_checkpoint(plan.checkpoint), sequences[0])
    student = Walk(load_package(directory, verify=False), sequences[0])
    fitted = fit_surrogates(teacher, student, list(plan.kept), sequences, codec, progress=progress)
    tensors = {name: tensor for surrogate in fitted for name, tensor in surrogate.tensors.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
    with SafetensorsWriter(directory / SURROGATES_NAME, infos) as writer:
        for name, tensor in ordered.items():
            writer.write(name, tensor)
        entry = writer.close()
    # Stock transformers, which would leave the surrogates out, must refuse the package.
    config = json.loads((directory / "config.json").read_bytes())
    config["quantization_config"] = {"quant_method": "hf_fedlarge", "embeddings": plan.embeddings}
    write_json(directory / "config.json", config)
    files = manifest.files | {SURROGATES_NAME: entry, "config.json": file_entry(directory / "config.json")}
    return manifest.model_copy(update={"files": files, "surrogates": [surrogate.entry for surrogate in fitted]})
