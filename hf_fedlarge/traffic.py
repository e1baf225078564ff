"""Bytes on the wire: what is sent down, and whether what is planned fits a run's byte budget.

What an update takes is `update.update_bytes`, known before it is trained. Down go only the tensors of an adapter that
differ from the version that a client has: none of A where an aggregator leaves A alone, all of both under `exact`,
which turns them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import CONTROL_WEIGHTS, MANIFEST_NAME, SERVER_FILES, AdapterManifest, read_manifest
from hf_fedlarge.errors import BudgetError
from hf_fedlarge.tensors import file_bytes, read_header


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
    infos, had = read_header(path), read_header(before)
    changed = {}
    for name, info in infos.items():
        same_kind = name in had and (had[name].dtype, had[name].shape) == (info.dtype, info.shape)
        if not (same_kind and torch.equal(*(_bits(each, name) for each in (path, before)))):
            changed[name] = (info.dtype, info.shape)
    return file_bytes(changed)


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
                f"{max(0, self.allowed - self.spent)} left: raise --budget, or choose a smaller codec or cohort."
            )
        return Budget(self.allowed, self.spent + needed)


def _bits(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).view(torch.uint8)
