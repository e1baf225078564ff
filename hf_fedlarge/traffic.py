"""Bytes on the wire: what is sent down, and whether what is planned fits a run's byte budget.

What an update takes is `update.update_bytes`, known before it is trained. Down go only the tensors of an adapter that
differ from the version that a client has: none of A where an aggregator leaves A alone, all of both under `exact`,
which turns them. `write_changes` makes the files of that, `apply_change` puts one to use.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import (
    CONTROL_WEIGHTS,
    MANIFEST_NAME,
    SERVER_FILES,
    AdapterManifest,
    file_entry,
    read_manifest,
    writing,
)
from hf_fedlarge.entries import FileEntry
from hf_fedlarge.errors import ArtifactError, BudgetError
from hf_fedlarge.tensors import SafetensorsWriter, TensorInfo, file_bytes, read_header


def changed_bytes(adapter: Path, previous: Path | None) -> int:
    """Bytes that a client needs to have `adapter` when it has `previous`.

    That is the manifest, the adapter's config where it differs, and a safetensors file of the tensors whose bits do,
    of the weights and of SCAFFOLD's control variate; never what is the server's alone, such as a carry.
    One tensor of each is in memory at a time.

    Args:
        adapter: a federation's adapter, whose files were checked.
        previous: an earlier one; None: the client has none.

    Raises:
        ArtifactError: one of the two is not an adapter.
    """
    new = read_manifest(adapter, AdapterManifest)
    size = (adapter / MANIFEST_NAME).stat().st_size
    if previous is None:
        return size + sum(entry.size for name, entry in new.files.items() if name not in SERVER_FILES)
    old = read_manifest(previous, AdapterManifest)
    if new.files[ADAPTER_CONFIG] != old.files[ADAPTER_CONFIG]:
        size += new.files[ADAPTER_CONFIG].size
    return size + sum(
        _changed_in(adapter / name, previous / name)
        for name in (ADAPTER_WEIGHTS, CONTROL_WEIGHTS)
        if name in new.files and new.files[name] != old.files.get(name)
    )


def _changed_in(path: Path, before: Path) -> int:
    """Bytes of a file of those tensors of `path` that are others in `before`."""
    return file_bytes(_changed_tensors(path, before))


def _changed_tensors(path: Path, before: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    had, changed = read_header(before), {}
    for name, info in read_header(path).items():
        if not (_same_kind(info, had.get(name)) and torch.equal(*(_bits(each, name) for each in (path, before)))):
            changed[name] = (info.dtype, info.shape)
    return changed


def _same_kind(info: TensorInfo, other: TensorInfo | None) -> bool:
    return other is not None and (other.dtype, other.shape) == (info.dtype, info.shape)


def write_changes(adapter: Path, previous: Path, output: Path) -> dict[str, FileEntry]:
    """Write into `output`, under its own name, what changed in each file of an adapter of which some tensors did not.

    Files of which all tensors changed have no place there; nor do those that are the same. What is there stays.

    Args:
        adapter, previous: as for `changed_bytes`.
        output: a directory, made if it isn't there.

    Raises:
        ArtifactError: one of the two is not an adapter.
        OutputError: `output` can't be written.
    """
    new, old = read_manifest(adapter, AdapterManifest).files, read_manifest(previous, AdapterManifest).files
    entries = {}
    for name in (ADAPTER_WEIGHTS, CONTROL_WEIGHTS):
        if name not in new or name not in old or new[name] == old[name]:
            continue
        infos = _changed_tensors(adapter / name, previous / name)
        if _head(adapter / name) != _head(previous / name) or len(infos) == len(read_header(adapter / name)):
            continue
        if not (output / name).exists():
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
                partial = output / f".{name}.partial"
                with SafetensorsWriter(partial, infos) as writer:
                    for tensor in infos:
                        writer.write(tensor, _bits(adapter / name, tensor))
                partial.replace(output / name)
        entries[name] = file_entry(output / name)
    return entries


def apply_change(previous: Path, change: Path, output: Path) -> None:
    """Make of a safetensors file and of what changed in it the file as it is now.

    Raises:
        ArtifactError: the change is no safetensors file, or of other tensors than `previous` has.
    """
    had, changed = read_header(previous), read_header(change)
    shutil.copyfile(previous, output)
    with output.open("r+b") as file:
        head = _head(previous)
        entries = json.loads(head)
        for name, info in changed.items():
            if not _same_kind(info, had.get(name)):
                raise ArtifactError(f"{change} holds {name!r:.200} as {previous} does not; expected its changes.")
            file.seek(8 + len(head) + entries[name]["data_offsets"][0])
            file.write(_bits(change, name).numpy().data)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


@dataclass(frozen=True)
class Budget:
    """The bytes that a run may send, both ways together, and has sent. `budget.parse_bytes` reads what a user gives."""

    allowed: int
    spent: int = 0

    def spend(self, needed: int, what: str) -> Budget:
        """The budget after `what`, which takes `needed` bytes.

        Raises:
            BudgetError: it would take more than is left; then it must not be sent.
        """
        if self.spent + needed > self.allowed:
            raise BudgetError(
                f"{what} needs {needed} bytes, but {self.spent} of the budget's {self.allowed} are spent and "
                f"{max(0, self.allowed - self.spent)} left: raise `budget`, or choose a smaller codec or cohort."
            )
        return Budget(self.allowed, self.spent + needed)


def _bits(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).flatten().view(torch.uint8)
