"""What a client's codec lost of its changes, kept on the client's own disk and never sent: error feedback.

Seide et al. 2014; Karimireddy et al., arXiv 1901.09847. There the lost part of a gradient is added to the next one.
Here a client takes many steps between two updates and would learn again what is missing, so adding would count it
twice. Instead it *starts* from the federation's adapter plus what it lost, and its change is all since that adapter.

`exact` aggregation gives the rank's directions another basis every round, so what was lost is turned into the new one:
with A and A' the client's last and the federation's new down-projection, the lost part of A by the R x R matrix that
takes A to A', that of B by the one that takes A' to A, both in least squares; what lies outside is dropped. Where
directions stay these are near the identity. Assumed is that the updates arrived. A client that skips rounds keeps its
part until it takes part again. `scripts/bench/feedback.py` compares the ways; figures are in `docs/log.md`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from hf_fedlarge.adapters import factor_name
from hf_fedlarge.client_state import read_newest, write_newest
from hf_fedlarge.tensors import Factors
from hf_fedlarge.wire import Wire

KIND = "lost"


class Lost(NamedTuple):
    """What one module's update lacked: fp32 factors, and A (R, I) as the server has it, whose rows they speak of."""

    factors: Factors
    basis: torch.Tensor


def turn(lost: Lost, new_RI: torch.Tensor) -> Factors:
    """The lost factors for an adapter whose A is `new_RI`: G lost_A and lost_B H, with G A ≈ A' and H A' ≈ A."""
    if torch.equal(lost.basis, new_RI):
        return lost.factors
    old_RI, new_RI = lost.basis.double(), new_RI.double()
    # gelsd, because rows may depend on each other.
    to_new_RR = torch.linalg.lstsq(old_RI.T, new_RI.T, driver="gelsd").solution.T
    to_old_RR = torch.linalg.lstsq(new_RI.T, old_RI.T, driver="gelsd").solution.T
    A_RI, B_OR = lost.factors
    return Factors((to_new_RR @ A_RI.double()).float(), (B_OR.double() @ to_old_RR).float())


def read_lost(state: Path, package: str, round_number: int, wire: Wire) -> dict[str, Factors]:
    """Module → fp32 factors that updates before `round_number` lost, for the parent; none where there was no update.

    Args:
        state: the client's directory, which need not exist.
        package: digest of the package.
        round_number: the round to come.
        wire: of that round.

    Raises:
        ArtifactError: the newest file is of another package or adapter, or damaged.
    """
    shapes = {
        name: shape
        for module, (a_shape, b_shape) in wire.shapes.items()
        for name, shape in zip(_names(module), (a_shape, b_shape, a_shape), strict=True)
    }
    found = read_newest(state, KIND, package, round_number, shapes)
    result = {}
    for module in wire.shapes if found else ():
        A_RI, B_OR, basis = (found[name] for name in _names(module))
        result[module] = turn(Lost(Factors(A_RI, B_OR), basis), wire.parent_factors(module).A_RI)
    return result


def with_lost(factors: dict[str, Factors], lost: dict[str, Factors]) -> dict[str, Factors]:
    """Where training starts: the federation's adapter plus what was lost."""
    return {
        module: Factors(*map(torch.add, pair, lost[module])) if module in lost else pair
        for module, pair in factors.items()
    }


def write_lost(state: Path, package: str, round_number: int, lost: dict[str, Lost]) -> None:
    """Keep what the update of `round_number` lost for the next round."""
    tensors = {
        name: tensor
        for module, (factors, basis) in lost.items()
        for name, tensor in zip(_names(module), (*factors, basis), strict=True)
    }
    write_newest(state, KIND, package, round_number, tensors)


def _names(module: str) -> tuple[str, str, str]:
    """In a file: what was lost of A and of B, and the basis."""
    return factor_name(module, "A"), factor_name(module, "B"), f"{module}.basis"
