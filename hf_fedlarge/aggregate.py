"""Combining clients' adapters: pure tensor functions, one module's factors at a time.

What a client trained is the product `scale` · B A, so products are what has to be averaged. `exact` does that and
carries on what doesn't fit into the rank. `fedavg` averages the factors, the common recipe, and is here to be compared
with; where one factor is the same for all clients it is exact as well. Everything is computed in fp64 (sums of very
many columns in fp32) and returned in fp32. Nothing here trusts or checks a client: its tensors were validated when its
update was read. `docs/aggregation.md` compares all aggregators.

Every aggregator takes the clients' changes and the adapter they are changes of, so that clipped, stale or rescaled
changes need no aggregator of their own: the result stands for parent + Σ share · (client − what it started from).

Shapes: O out-features, I in-features, R a rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from hf_fedlarge.errors import ConfigError
from hf_fedlarge.products import Probes, Term, distance, inner, is_estimated, merged, stacks, truncate
from hf_fedlarge.tensors import Factors, StoredFactors

Trained = Literal["both", "A", "B"]
_PART = 8192  # values that are summed in fp64 at a time, so that they stay in a processor's cache


class Change(NamedTuple):
    """What one client did to a module.

    Attributes:
        share: how much its change counts; those of a cohort sum to 1, unless some were clipped, came late or a server
            learning rate is set.
        scale: what its product is multiplied by, `LoraSettings.scale`.
        factors: its A (R_i, I) and B (O, R_i).
        base: what it started from, of the same scale; None: from nothing.
    """

    share: float
    scale: float
    factors: Factors | StoredFactors
    base: Factors | None = None


class Aggregate(NamedTuple):
    """One module's aggregated factors, and how far they are from the weighted sum of the clients' products.

    Attributes:
        factors: fp32 A_RI and B_OR of the rank and for the scale asked for.
        energy: squared Frobenius norm of the exact sum, parent + Σ share_i · (scale_i B_i A_i − base_i).
        dropped: squared Frobenius norm of the exact sum less the product of `factors` and `carry`: what truncation
            dropped in `exact`, what averaging the factors lost in `fedavg`.
        carry: fp32 factors of what is carried on beyond the rank, for the same scale; None: nothing.
        carried: their squared Frobenius norm.
    """

    factors: Factors
    energy: float
    dropped: float
    carry: Factors | None = None
    carried: float = 0.0


def exact(
    changes: Sequence[Change],
    rank: int,
    scale: float,
    *,
    parent: Factors | None = None,
    more: Sequence[Term] = (),
    carry_rank: int | None = None,
    carry_energy: float = 0.0,
) -> Aggregate:
    """The sum of the products, best approximated in `rank`; the rest is carried on, so that nothing is lost.

    Clients get the first `rank` directions (`products.truncate` says how). The rest stays with the server as factors
    of their own, and is given to the next round's sum in `more`: error feedback (arXiv 1901.09847) for a truncation,
    in place of the dense residual that FedEx-LoRA (arXiv 2410.09432) adds to the base. State = `factors` + `carry`.
    Linear in the clients' products; ranks and scales may differ.

    Args:
        changes: of the clients that have this module.
        rank: the result's rank.
        scale: what the result's product will be multiplied by.
        parent: the adapter before; None: there is none, so clients started from nothing.
        more: what is added to the sum as it is, such as the carry of the round before.
        carry_rank: the largest rank of the carry; None: any.
        carry_energy: the carry ends where what is left is this share of the sum's energy.

    Raises:
        ConfigError: rank or scale is not positive.
    """
    _check(rank, scale)
    factors, carry, energy, carried, dropped = truncate(
        merged([*product_terms(changes, parent, scale), *more]),
        rank,
        scale,
        carry_rank,
        carry_energy,
        # The carry has no coordinates that clients know.
        like=parent.A_RI if parent is not None and len(parent.A_RI) == rank else None,
    )
    return Aggregate(factors, energy, dropped, carry, carried)


def fedavg(
    changes: Sequence[Change],
    rank: int,
    scale: float,
    *,
    parent: Factors | None = None,
    trained: Trained = "both",
) -> Aggregate:
    """The weighted means of the clients' A and of their B, each averaged by itself (McMahan 2017, arXiv 1602.05629).

    Their product is not the mean of the products: mean(B A) - mean(B) mean(A) = mean((B - mean B)(A - mean A)):
    nothing where the clients agree on A or on B, and hardly nothing elsewhere. `dropped` measures that disagreement.

    Where clients train one factor of two, and the other is the same for all, the mean is that of the products and
    nothing is lost: `ffa` trains B alone (FFA-LoRA, arXiv 2403.12313), `alternate` A and B in turn (RoLoRA,
    arXiv 2409.02346). The factor that isn't trained comes back bit for bit.

    Args:
        changes: of the clients that have this module, all of one rank.
        rank: the clients' rank.
        scale: the clients' scale.
        parent: the adapter before; None: there is none, so clients started from nothing.
        trained: which factors are; the other one must be the same for all.

    Raises:
        ConfigError: as `exact`, a client's rank or scale is another than the result's, or factors differ that nobody
            was to train.
    """
    _check(rank, scale)
    changes = [change for change in changes if change.share]
    for change in changes:
        if change.factors.rank != rank or change.scale != scale:
            raise ConfigError(
                f"This aggregator averages factors of one rank and scale, {rank} and {scale:g} here, but a client has "
                f"{change.factors.rank} and {change.scale:g}; use the aggregator exact."
            )
    if trained != "both":
        result = averaged(changes, parent, trained)
        whole = [Term(scale, result)]
        energy, dropped = inner(whole, whole), 0.0
    elif is_estimated(merged(product_terms(changes, parent, scale))):
        # Which takes another scale: squares of it.
        probes = Probes(changes[0].factors.width)
        result = averaged(changes, parent, probes=probes)
        energy, dropped = (scale**2 * square for square in probes.distance(Term(1.0, result)))
    else:
        changes = [change._replace(factors=Factors(*change.factors)) for change in changes]  # looked at several times
        result = averaged(changes, parent)
        energy, dropped = distance(merged(product_terms(changes, parent, scale)), Term(scale, result))
    return Aggregate(Factors(result.A_RI.float(), result.B_OR.float()), energy, dropped)


def averaged(
    changes: Sequence[Change],
    parent: Factors | None = None,
    trained: Trained = "both",
    probes: Probes | None = None,
) -> Factors:
    """parent + Σ share · (client − base) of A and of B, each by itself, in fp64, each client read once.

    Of very many, some at a time are summed in fp32.

    A factor that wasn't trained comes back as it is, bit for bit.

    Args:
        changes, parent, trained: see `fedavg`.
        probes: gets the same sum of products, for an estimate of its norm.

    Raises:
        ConfigError: a factor that wasn't to be trained is not the same for all.
    """
    first = parent or Factors(*changes[0].factors)
    frozen = None if trained == "both" else "BA".index(trained)
    totals = [torch.zeros_like(factor, dtype=torch.float64) for factor in first]
    terms = merged(_deviations(changes, parent))
    many = is_estimated(terms)
    for stack in stacks(terms):
        weights_G = torch.tensor(stack.coefficients, dtype=torch.float64)
        for index, (total, factors) in enumerate(zip(totals, (stack.A_GRI, stack.B_GOR), strict=True)):
            if index != frozen:
                _add_mean(total, weights_G, factors, many)
            elif not torch.equal(factors, first[index].expand_as(factors)):
                raise ConfigError(f"Clients' {'AB'[index]} differ, though only {trained} was to be trained; use exact.")
        if probes is not None:
            probes.add(stack)
    if frozen is not None:
        totals[frozen] = first[frozen].double()
    return Factors(*totals)


def _add_mean(total: torch.Tensor, weights_G: torch.Tensor, factors: torch.Tensor, many: bool) -> None:
    """Add the weighted sum over the first dimension; computed in fp32 where there are `many` and they are that."""
    sums, values_GX = total.view(-1), factors.flatten(1)
    if many or values_GX.dtype == torch.float64:
        sums += weights_G.to(values_GX.dtype) @ values_GX
        return
    for part, values in zip(sums.split(_PART), values_GX.split(_PART, dim=1), strict=True):
        part.addmv_(values.T.double(), weights_G)


def trained_in(aggregator: str | None, round_number: int) -> Trained:
    """Which factors the clients of a round train: `alternate` begins with B, for a fresh adapter's B is zero."""
    if aggregator == "ffa":
        return "B"
    if aggregator == "alternate":
        return "B" if round_number % 2 else "A"
    return "both"


def shares(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; alike where all are zero.

    Raises:
        ConfigError: the weights are negative or not finite.
    """
    total = sum(weights)
    if not 0 <= total < math.inf or min(weights) < 0:
        found = ", ".join(f"{weight:g}" for weight in weights)
        raise ConfigError(f"The clients' weights are [{found}]; expected finite ones, none negative.")
    if total == 0:
        return [1 / len(weights)] * len(weights)
    return [weight / total for weight in weights]


def product_terms(changes: Sequence[Change], parent: Factors | None, scale: float) -> list[Term]:
    """parent + Σ share · (client − base) as a sum of products; a client of share 0 is not in it at all."""
    scales = {id(change.factors): change.scale for change in changes}
    scales |= {id(change.base): change.scale for change in changes}
    scales[id(parent)] = scale
    return [Term(coefficient * scales[id(factors)], factors) for coefficient, factors in _deviations(changes, parent)]


def _deviations(changes: Sequence[Change], parent: Factors | None) -> list[Term]:
    terms = [Term(1.0, parent)] if parent is not None else []
    for change in changes:
        if change.share:
            terms.append(Term(change.share, change.factors))
            if change.base is not None:
                terms.append(Term(-change.share, change.base))
    return terms


def _check(rank: int, scale: float) -> None:
    if rank < 1 or not 0 < scale < math.inf:
        raise ConfigError(f"The aggregate's rank is {rank} and its scale {scale:g}; expected positive numbers.")
