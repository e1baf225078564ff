"""A client's own files, which are never sent: what `feedback.py` and `scaffold.py` go on with in its next round.

One file a kind and round, `KIND-0000007.safetensors`, whose header says for which package. A round reads the newest
file *before* it, so a client that was killed and does the round again gives the same update; the two newest are kept.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import safe_open

from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.tensors import SafetensorsWriter, read_header


def read_newest(
    state: Path, kind: str, package: str, round_number: int, shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor] | None:
    """The fp32 tensors that were kept in the last round before `round_number`; None where there was none.

    Args:
        state: the client's directory, which need not exist.
        kind: of file.
        package: digest of the package.
        round_number: the round to come.
        shapes: of the tensors that must be there, and no others.

    Raises:
        ArtifactError: the newest file is of another package or adapter, or damaged.
    """
    before = [path for number, path in _files(state, kind) if number < round_number]
    if not before:
        return None
    found = {name: info.shape for name, info in read_header(before[-1]).items()}
    with safe_open(before[-1], framework="pt") as file:
        of = (file.metadata() or {}).get("package", "none")
        if of != package or found != shapes:
            raise ArtifactError(
                f"{before[-1]} is for an adapter of the package {of[:12]}…; expected one of {package[:12]}… with the "
                "same LoRA settings: give each federation a --state of its own."
            )
        return {name: file.get_tensor(name) for name in shapes}


def write_newest(state: Path, kind: str, package: str, round_number: int, tensors: dict[str, torch.Tensor]) -> None:
    """Keep fp32 tensors for the rounds after `round_number`, and of the files before it only the newest.

    Files of later rounds, left by a run that was started over, go.
    """
    state.mkdir(parents=True, exist_ok=True)
    infos = {name: (torch.float32, tuple(tensor.shape)) for name, tensor in tensors.items()}
    partial = state / f".{kind}.partial"
    with SafetensorsWriter(partial, infos, {"format": "pt", "package": package}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(state / f"{kind}-{round_number:07d}.safetensors")
    files = _files(state, kind)
    kept = [path for number, path in files if number <= round_number][-2:]
    for _, path in files:
        if path not in kept:
            path.unlink()


def _files(state: Path, kind: str) -> list[tuple[int, Path]]:
    """(round, file), oldest first."""
    found = [(re.fullmatch(rf"{kind}-(\d+)\.safetensors", path.name), path) for path in state.glob(f"{kind}-*")]
    return sorted((int(match[1]), path) for match, path in found if match)
