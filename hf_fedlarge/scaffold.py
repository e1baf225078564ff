"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378): clients correct their steps for how their data differ.

A client whose data are unlike the others' walks towards an optimum of its own, and the mean of such walks ends beside
the federation's. So client i steps along g − cᵢ + c in place of its gradient g: cᵢ, its control variate, is the mean
of its own gradients when it last took part, and c the mean of all clients' cᵢ, zero for those that never did. After
its K steps

    cᵢ⁺ = 1/K Σ g        c⁺ = c + 1/N Σ over the cohort (cᵢ⁺ − cᵢ)        N: all clients, also those not in the cohort

which is the paper's second option where the optimizer is SGD; there cᵢ⁺ is read off the distance that was walked, which
another optimizer scales. Here g is what the optimizer would get, after clipping, and any optimizer may follow.

Gradients are of factors, so the aggregator has to leave the factors' coordinates where they are, as `fedavg` and `ffa`
do. c comes with the round's adapter, cᵢ stays in the client's state, and an update brings cᵢ⁺ − cᵢ: twice the bytes
both ways. Assumed is that updates arrive: what a lost one would have changed in c is missing from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_fedlarge.adapters import AdapterReader, AdapterWriter, factor_name
from hf_fedlarge.artifacts import CONTROL_WEIGHTS
from hf_fedlarge.client_state import read_newest, write_newest
from hf_fedlarge.codec import Shape
from hf_fedlarge.tensors import Factors

KIND = "control"


def read_own(
    state: Path, package: str, round_number: int, shapes: dict[str, tuple[Shape, Shape]]
) -> dict[str, Factors]:
    """A client's own control variate, by module; zero before its first round.

    Args:
        state: the client's directory.
        package: digest of the package.
        round_number: the round to come.
        shapes: module → shapes of A and B.

    Raises:
        ArtifactError: what is there is of another federation, or damaged.
    """
    named = _by_name(shapes)
    found = read_newest(state, KIND, package, round_number, named)
    found = found or {name: torch.zeros(shape) for name, shape in named.items()}
    return {module: Factors(*(found[factor_name(module, letter)] for letter in "AB")) for module in shapes}


def read_common(adapter: Path, modules: list[str]) -> dict[str, Factors]:
    """c of these modules, from an adapter whose files were checked."""
    reader = AdapterReader(adapter, CONTROL_WEIGHTS)
    return {module: reader.read(module) for module in modules}


def write_own(state: Path, package: str, round_number: int, own: dict[str, Factors]) -> None:
    """Keep it for the next round."""
    write_newest(state, KIND, package, round_number, _by_name(own))


def difference(left: dict[str, Factors], right: dict[str, Factors]) -> dict[str, Factors]:
    """left − right, module by module of `left`."""
    return {module: Factors(*map(torch.sub, pair, right[module])) for module, pair in left.items()}


def write_control(directory: Path, control: dict[str, Factors]) -> None:
    """Write a control variate, or its change, beside an adapter's weights."""
    with AdapterWriter(directory, CONTROL_WEIGHTS) as writer:
        for module in sorted(control):
            writer.write(module, control[module])


def write_common(directory: Path, before: Path, updates: Sequence[Path], population: int) -> None:
    """c⁺ into `directory`, a module at a time.

    Args:
        directory: of the next adapter.
        before: the adapter that clients started from.
        updates: those that count, in an order that doesn't depend on their arrival; all have their change of c.
        population: N.
    """
    common, *changes = (AdapterReader(each, CONTROL_WEIGHTS) for each in (before, *updates))
    with AdapterWriter(directory, CONTROL_WEIGHTS) as writer:
        for module in common.modules:
            total = [factor.double() for factor in common.read(module)]
            for change in changes:
                for factor, its in zip(total, change.read(module), strict=True):
                    factor.add_(its, alpha=1 / population)
            writer.write(module, Factors(*total))


def _by_name(pairs: Mapping[str, Iterable[Any]]) -> dict[str, Any]:
    """What belongs to A and to B of each module, by the name in a file."""
    return {
        factor_name(module, letter): value
        for module, pair in pairs.items()
        for letter, value in zip("AB", pair, strict=True)
    }
