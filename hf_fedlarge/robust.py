"""Aggregation that some hostile clients can't spoil: on products, for factors have no coordinates of their own.

An adapter's A and B can be turned against each other without changing what they compute, so a median of their entries
means nothing. What is compared here are clients' changes, scale · (B A − the product they started from): their norms
and distances from the factors alone, their coordinates a block of rows at a time. All of these count every client once.

Shapes: O out-features, I in-features, N clients, D rows of a block.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from hf_fedlarge.aggregate import Change, product_terms
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.products import Term, inner, stack
from hf_fedlarge.subspace import subspace
from hf_fedlarge.tensors import Factors

_BLOCK_BYTES = 2**26  # of all clients' changes together, in fp64


def squared_norms(changes: Sequence[Change]) -> torch.Tensor:
    """(N,) fp64: squared norms of the clients' changes to one module; their sum over modules is that of adapters."""
    terms = [_terms(change) for change in changes]
    return torch.tensor([inner(own, own) for own in terms], dtype=torch.float64)


def gram(changes: Sequence[Change]) -> torch.Tensor:
    """(N, N) fp64: inner products of the clients' changes to one module; to be summed over modules likewise."""
    terms = [_terms(change) for change in changes]
    A_SI, B_OS = stack([term for own in terms for term in own], torch.float64)
    columns_N = torch.tensor([sum(factors.rank for _, factors in own) for own in terms])
    owned_SN = torch.eye(len(terms), dtype=torch.float64).repeat_interleave(columns_N, dim=0)
    return owned_SN.T @ ((B_OS.T @ B_OS) * (A_SI @ A_SI.T)) @ owned_SN


def _terms(change: Change) -> list[Term]:
    return product_terms([change._replace(share=1.0)], None, change.scale)


def clip_factors(squares_N: torch.Tensor, bound: float | str) -> list[float]:
    """What to multiply each client's change with, so that its norm over all modules is at most the bound.

    Clipping by norm (arXiv 1911.07963) bounds what one client can do, not which way it pulls: a minority that sends
    the opposite slows the others down.

    Args:
        squares_N: squared norms of the clients' changes.
        bound: a norm, or `median`: the cohort's, the lower of two, so that half of the clients can't raise it.
    """
    norms = squares_N.clamp(min=0).sqrt().tolist()
    limit = statistics.median_low(norms) if bound == "median" else float(bound)
    return [min(1.0, limit / norm) if norm else 1.0 for norm in norms]


def krum(gram_NN: torch.Tensor, byzantine: int, keep: int) -> list[int]:
    """Whom to keep: those nearest to their neighbours (Krum and multi-Krum, Blanchard 2017, arXiv 1703.02757).

    A client's score is the sum of its squared distances to its N - byzantine - 2 nearest; the lowest are kept.

    Args:
        gram_NN: `gram`, summed over all modules.
        byzantine: how many may be hostile.
        keep: 1 for Krum, N - byzantine - 2 for multi-Krum.

    Raises:
        ConfigError: fewer than 2 byzantine + 3 clients, for which nothing is proved.
    """
    count = len(gram_NN)
    check_count("krum", count, 2 * byzantine + 3, byzantine)
    squares_N = gram_NN.diagonal()
    distances_NN = (squares_N[:, None] + squares_N - 2 * gram_NN).clamp(min=0).fill_diagonal_(torch.inf)
    scores_N = distances_NN.sort(dim=1).values[:, : count - byzantine - 2].sum(1)
    return sorted(scores_N.argsort(stable=True)[:keep].tolist())


def median(changes: Sequence[Change], count: int) -> tuple[Change, float]:
    """The median of the clients' changes, coordinate by coordinate (Yin et al. 2018, arXiv 1803.01498).

    Of an even number of clients it is the mean of the two in the middle. Stands fewer than half of them being hostile.

    Args:
        changes: as `aggregate.exact` takes them; shares don't count.
        count: the largest rank of the result: a median of products has any.

    Returns:
        The median as one client's change, and the squared norm of what of it doesn't fit into `count`.
    """
    return _by_coordinate(changes, count, (len(changes) - 1) // 2)


def trimmed_mean(changes: Sequence[Change], count: int, byzantine: int) -> tuple[Change, float]:
    """Coordinate by coordinate the mean without the `byzantine` largest and smallest (arXiv 1803.01498).

    Args:
        changes, count: as for `median`.
        byzantine: how many may be hostile.

    Raises:
        ConfigError: nothing would be left.
    """
    check_count("trimmed_mean", len(changes), 2 * byzantine + 1, byzantine)
    return _by_coordinate(changes, count, byzantine)


def check_count(name: str, count: int, needed: int, byzantine: int) -> None:
    """Refuse a cohort that is too small for so many hostile clients.

    Raises:
        ConfigError: `count` is below `needed`.
    """
    if count < needed:
        raise ConfigError(
            f"{name} needs at least {needed} updates to stand {byzantine} hostile clients, but there are {count}; "
            "ask more clients, or lower byzantine."
        )


def _by_coordinate(changes: Sequence[Change], count: int, trim: int) -> tuple[Change, float]:
    # Read once, for every block of rows looks at them.
    changes = [change._replace(factors=Factors(*change.factors)) for change in changes]
    rows, width = len(changes[0].factors.B_OR), changes[0].factors.A_RI.shape[1]
    step = max(1, _BLOCK_BYTES // (8 * len(changes) * width))

    def blocks() -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, rows, step):
            at = slice(start, start + step)
            dense_NDI = torch.stack([_rows(change, at) for change in changes]).sort(dim=0).values
            yield at, dense_NDI[trim : len(changes) - trim].mean(0)

    def right(X_IK: torch.Tensor) -> torch.Tensor:
        return torch.cat([block_DI @ X_IK for _, block_DI in blocks()])

    def left(Y_OK: torch.Tensor) -> torch.Tensor:
        return sum(block_DI.T @ Y_OK[at] for at, block_DI in blocks())

    U_OK, S_K, V_KI, energy = subspace(right, left, width, torch.float64, count)
    kept = Factors(V_KI[:count], (U_OK * S_K)[:, :count])
    return Change(1.0, 1.0, kept), max(energy - S_K[:count].square().sum().item(), 0.0)


def _rows(change: Change, at: slice) -> torch.Tensor:
    """The rows `at` of a client's change, dense, in fp64."""
    A_RI, B_OR = change.factors
    dense_DI = change.scale * (B_OR[at].double() @ A_RI.double())
    if change.base is not None:
        dense_DI -= change.scale * (change.base.B_OR[at].double() @ change.base.A_RI.double())
    return dense_DI


COORDINATE: dict[str, Callable[..., tuple[Change, float]]] = {"median": median, "trimmed_mean": trimmed_mean}
