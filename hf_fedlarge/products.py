"""Sums of weighted low-rank products, Σ c B A, without dense matrices: norms, inner products, best approximations.

Everything that is said about clients' adapters is said here about such sums: what they add up to, how far two are from
each other, and what of a sum fits into a rank. With few columns all is exact to fp64's rounding. With many (hundreds
of clients) subspace iteration on the factors takes the place of a full SVD, and squared norms are estimated from what
the sum does to a few random vectors; both always draw the same numbers.

Shapes: O out-features, I in-features, R a term's rank, S all terms' ranks together, K directions kept or tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch

from hf_fedlarge.subspace import MORE, PROBES, Decomposition, multiply, subspace
from hf_fedlarge.tensors import Factors, StoredFactors

_FEW = 256  # columns up to which a sum is decomposed exactly
_EXACT_NORMS = 512  # and up to which its norm is computed
_TOGETHER = 128  # columns of stored terms that are read one after the other, while a processor's cache holds them


class Term(NamedTuple):
    """`coefficient` · B A, part of a sum."""

    coefficient: float
    factors: Factors | StoredFactors


class Truncated(NamedTuple):
    """A sum split in three: what fits into the rank, what is carried on, and what is dropped.

    Attributes:
        factors: fp32 A_RI and B_OR of the rank asked for.
        carry: fp32 factors of further directions, to count like `factors`; None: there are none.
        energy: squared Frobenius norm of the sum.
        carried: that of the carry.
        dropped: that of what is in neither.
    """

    factors: Factors
    carry: Factors | None
    energy: float
    carried: float
    dropped: float


def merged(terms: Sequence[Term]) -> list[Term]:
    """The same sum with each factor once; what cancels but for rounding, as shares do that sum to 1, is left out."""
    together: dict[int, Term] = {}
    for coefficient, factors in terms:
        before = together.get(id(factors), Term(0.0, factors)).coefficient
        together[id(factors)] = Term(before + coefficient, factors)
    largest = max((abs(coefficient) for coefficient, _ in terms), default=0.0)
    return [term for term in together.values() if abs(term.coefficient) > 1e-12 * largest]


def truncate(
    terms: Sequence[Term],
    rank: int,
    scale: float,
    carry_rank: int | None = 0,
    carry_energy: float = 0.0,
    like: torch.Tensor | None = None,
) -> Truncated:
    """The best approximation of a sum in `rank` (Eckart-Young), and as much of the rest as the bounds allow.

    The factors side by side are a factorization of the sum (FLoRA, arXiv 2409.05976). QR of both sides and an SVD of
    the small core between them give its singular vectors; beyond some hundred columns subspace iteration does. Of
    U S V^T the result keeps `rank` directions as B = U S / scale and A = V^T. The rows of A are orthonormal, so a
    direction of no weight can still learn: its column of B is zero, and its row of A is a fixed pseudo-random one, as
    in a fresh adapter. Each column of B has its largest entry positive, so that the order of the terms changes nothing
    but rounding.

    Any rotation Q of the rank gives the same product, B Q^T and Q A. With `like`, an A that clients know, it is the one
    whose A is nearest to that (orthogonal Procrustes), with rows as long as that one's are in the mean. So coordinates
    stay where they were as far as they can, and no direction gets one for itself: an optimizer that scales each
    coordinate by itself (Adam) would step as far along singular vectors that are noise as along the leading ones.

    Args:
        terms: at least one; A (R_i, I) and B (O, R_i), ranks may differ.
        rank: of the result. Beyond O, columns of B are zero; beyond I, rows of A are of norm 1 but no longer
            orthogonal.
        scale: what the products of the result and of the carry will be multiplied by.
        carry_rank: the largest rank of the carry; None: any.
        carry_energy: the carry ends where what is left is this share of the sum's energy.
        like: (R, I) of the same rank; None: B has the singular values in falling order, and rows of A the length 1.
    """
    U_OK, S_K, V_KI, energy = decompose(terms, None if carry_rank is None else rank + carry_rank)
    signs_1K = U_OK.gather(0, U_OK.abs().argmax(0, keepdim=True)).sign()
    B_OK, A_KI = U_OK * signs_1K * S_K / scale, V_KI * signs_1K.T
    within = min(rank, len(S_K))
    B_OR = torch.zeros(len(U_OK), rank, dtype=torch.float64)
    B_OR[:, :within] = B_OK[:, :within]
    A_RI = _with_fresh_rows(A_KI[:within], rank)
    if like is not None:
        A_RI, B_OR = _turned(A_RI, B_OR, like.double())
    factors = Factors(A_RI.float(), B_OR.float())
    kept = S_K.square().cumsum(0)
    end = len(S_K) if carry_rank is None else min(len(S_K), rank + carry_rank)
    if carry_energy:
        # How many directions leave more than the share: one more leaves less.
        end = min(end, int((energy - kept > carry_energy * energy).sum()) + 1)
    carry = None
    if end > rank:
        carry = Factors(A_KI[rank:end].float(), B_OK[:, rank:end].float())
    carried = S_K[rank:end].square().sum().item()
    # Where nothing is left, the difference to the energy would be rounding.
    beyond = max(energy - S_K.square().sum().item(), 0.0)
    dropped = S_K[max(end, rank) :].square().sum().item() + (beyond if beyond > 1e-12 * energy else 0.0)
    return Truncated(factors, carry, energy, carried, dropped)


def decompose(terms: Sequence[Term], count: int | None) -> Decomposition:
    """The `count` leading singular values (None: all) of a sum, with their vectors; more where that costs nothing."""
    if are_many(terms, count):
        width = terms[0].factors.width
        return subspace(partial(_times, terms), partial(_transposed_times, terms), width, torch.float32, count)
    A_SI, B_OS = stack(terms, torch.float64)
    Q_OM, R_MS = torch.linalg.qr(B_OS)
    Q_IN, R_NS = torch.linalg.qr(A_SI.T)
    U_MK, S_K, V_KN = torch.linalg.svd(R_MS @ R_NS.T, full_matrices=False)
    # Against the factors' norms and not the largest singular value: where terms cancel, that one is noise itself.
    noise = torch.finfo(torch.float64).eps * max(len(B_OS), A_SI.shape[1]) * R_MS.norm() * R_NS.norm()
    kept = int(S_K.gt(noise).sum())
    return Decomposition(Q_OM @ U_MK[:, :kept], S_K[:kept], V_KN[:kept] @ Q_IN.T, S_K[:kept].square().sum().item())


def are_many(terms: Sequence[Term], count: int | None) -> bool:
    """Whether the `count` leading directions of so many columns are looked for by subspace iteration, in fp32."""
    return count is not None and sum(factors.rank for _, factors in terms) > max(_FEW, 2 * (count + MORE))


def _times(terms: Sequence[Term], X_IK: torch.Tensor) -> torch.Tensor:
    """The sum times X, a term at a time."""
    return multiply(((coefficient, A_RI, B_OR.T) for coefficient, (A_RI, B_OR) in terms), X_IK)


def _transposed_times(terms: Sequence[Term], Y_OK: torch.Tensor) -> torch.Tensor:
    """The transposed sum times Y."""
    return multiply(((coefficient, B_OR.T, A_RI) for coefficient, (A_RI, B_OR) in terms), Y_OK)


class Stack(NamedTuple):
    """Some terms of one rank: Σ c B A over the first dimension.

    Attributes:
        coefficients: c of each of the G terms.
        A_GRI, B_GOR: their factors.
    """

    coefficients: list[float]
    A_GRI: torch.Tensor
    B_GOR: torch.Tensor


def stacks(terms: Sequence[Term]) -> Iterator[Stack]:
    """The terms in their order, each read once; stored ones some at a time.

    Which are together depends on nothing but their order and ranks, so that sums are the same to the last bit whether
    terms are read once or for every look.
    """
    for group in _groups(terms):
        yield _read_stack(group)


def together(terms: Sequence[Term], room: torch.Tensor) -> list[Term]:
    """The same sum in fewer terms: stored ones as one, or as few as fit into `room`; in memory is one at a time.

    A processor multiplies by one large matrix several times as fast as by many narrow ones. The rows of A bear the
    differences in weight. One that holds all stored terms is read once, others whenever they are looked at.

    Args:
        terms: of any ranks.
        room: (X,) fp32; whatever is read lies there, so nothing of it may be kept, and two threads can't share it.
    """
    stored = [term for term in terms if isinstance(term.factors, StoredFactors)]
    found = [term for term in terms if isinstance(term.factors, Factors)]
    largest = max(stored, key=lambda term: abs(term.coefficient)).coefficient if stored else 0.0
    columns = 0
    groups: list[list[Term]] = []
    for term in stored:
        (rank, width), (rows, _) = term.factors.shapes
        if not groups or (columns + rank) * (width + rows) > len(room):
            groups.append([])
            columns = 0
        groups[-1].append(term)
        columns += rank
    for group in groups:
        columns = sum(factors.rank for _, factors in group)
        read = partial(_side_by_side, group, largest, room)
        shapes = ((columns, group[0].factors.width), (group[0].factors.shapes[1][0], columns))
        found.append(Term(largest, StoredFactors(cache(read) if len(groups) == 1 else read, shapes)))
    return found


def _side_by_side(terms: Sequence[Term], largest: float, room: torch.Tensor) -> Factors:
    (_, width), (rows, _) = terms[0].factors.shapes
    columns = sum(factors.rank for _, factors in terms)
    if columns * (width + rows) > len(room):
        room = torch.empty(columns * (width + rows))
    A_SI = room[: columns * width].view(columns, width)
    B_SO = room[columns * width :][: columns * rows].view(columns, rows)
    start = 0
    for group in _groups(terms):
        (rank, _), _ = group[0].factors.shapes
        end = start + rank * len(group)
        stack = _read_stack(group, A_SI[start:end].unflatten(0, (-1, rank)))
        B_SO[start:end].unflatten(0, (-1, rank)).copy_(stack.B_GOR.mT)
        if any(coefficient != largest for coefficient in stack.coefficients):
            weights_G = torch.tensor(stack.coefficients, dtype=torch.float64) / largest
            stack.A_GRI.mul_(weights_G.float()[:, None, None])
        start = end
    return Factors(A_SI, B_SO.T)


def _groups(terms: Sequence[Term]) -> Iterator[list[Term]]:
    """Consecutive stored terms of one rank, up to some columns; any other term alone."""
    group: list[Term] = []
    for term in terms:
        rank = term.factors.rank
        alone = isinstance(term.factors, Factors)
        if group and (alone or rank != group[0].factors.rank or rank * (len(group) + 1) > _TOGETHER):
            yield group
            group = []
        if alone:
            yield [term]
        else:
            group.append(term)
    if group:
        yield group


def _read_stack(group: Sequence[Term], A_GRI: torch.Tensor | None = None) -> Stack:
    """A group's factors; A in the memory that is given, if any."""
    coefficients = [coefficient for coefficient, _ in group]
    first = group[0].factors
    if isinstance(first, Factors):
        return Stack(coefficients, first.A_RI[None], first.B_OR[None])
    if A_GRI is None:
        A_GRI = torch.empty(len(group), *first.shapes[0])
    B_GOR = torch.empty(len(group), *first.shapes[1])
    for (_, factors), A_RI, B_OR in zip(group, A_GRI.numpy(), B_GOR.numpy(), strict=True):
        factors.read_into(A_RI, B_OR)
    return Stack(coefficients, A_GRI, B_GOR)


def inner(left: Sequence[Term], right: Sequence[Term]) -> float:
    """Σ over all entries of the product of two sums: <B A, D C> = Σ (B^T D) ∘ (A C^T), in fp64."""
    if not left or not right:
        return 0.0
    A_SI, B_OS = stack(left, torch.float64)
    C_TI, D_OT = (A_SI, B_OS) if right is left else stack(right, torch.float64)
    return ((B_OS.T @ D_OT) * (A_SI @ C_TI.T)).sum().item()


class Probes:
    """Estimates a sum's norm, and that of its difference to another, from what it does to a few random vectors.

    They take no more than adding all terms once, wherever those come by.

    Args:
        width: I.
    """

    def __init__(self, width: int) -> None:
        self._probes_IK = torch.randn(width, PROBES, generator=torch.Generator().manual_seed(0))
        self._found_OK: torch.Tensor | None = None

    def add(self, terms: Stack) -> None:
        """Add terms to the sum."""
        found_GRX = terms.A_GRI.float() @ self._probes_IK
        found_GRX *= torch.tensor(terms.coefficients)[:, None, None]
        if self._found_OK is None:
            self._found_OK = torch.zeros(terms.B_GOR.shape[1], PROBES)
        self._found_OK.addbmm_(terms.B_GOR.float(), found_GRX)

    def distance(self, result: Term) -> tuple[float, float]:
        """The squared Frobenius norms of the sum, and of the sum less `result`."""
        coefficient, (A_RI, B_OR) = result
        apart_OK = self._found_OK - coefficient * (B_OR.float() @ (A_RI.float() @ self._probes_IK))
        return tuple(found.double().square().sum().item() / PROBES for found in (self._found_OK, apart_OK))


def is_estimated(terms: Sequence[Term]) -> bool:
    """Whether the norm of a sum of so many columns is."""
    return sum(factors.rank for _, factors in terms) > _EXACT_NORMS


def distance(terms: Sequence[Term], result: Term) -> tuple[float, float]:
    """Squared Frobenius norms of a sum, and of the sum less `result`; estimated where the sum has many columns."""
    if is_estimated(terms):
        probes = Probes(result.factors.width)
        for some in stacks(terms):
            probes.add(some)
        return probes.distance(result)
    energy = inner(terms, terms)
    apart = energy - 2 * inner(terms, [result]) + inner([result], [result])
    return max(energy, 0.0), apart if apart > 1e-13 * energy else 0.0


def stack(terms: Sequence[Term], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A_SI and B_OS whose product is the sum."""
    pairs = [(A_RI.to(dtype), B_OR.to(dtype) * coefficient) for coefficient, (A_RI, B_OR) in terms]
    return torch.cat([A_RI for A_RI, _ in pairs]), torch.cat([B_OR for _, B_OR in pairs], dim=1)


def _with_fresh_rows(V_KI: torch.Tensor, rank: int) -> torch.Tensor:
    """`V_KI` and below it further orthonormal rows, up to `rank`; the same ones for the same `V_KI`."""
    kept, width = V_KI.shape
    fresh_XI = torch.randn(rank - kept, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh_XI /= fresh_XI.norm(dim=1, keepdim=True)
    room = width - kept
    Q_IX, _ = torch.linalg.qr(torch.cat([V_KI, fresh_XI[:room]]).T)
    return torch.cat([V_KI, Q_IX.T[kept:], fresh_XI[room:]])


def _turned(A_RI: torch.Tensor, B_OR: torch.Tensor, like_RI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with A rotated to be near `like_RI`, and as long."""
    X_RR, _, Y_RR = torch.linalg.svd(like_RI @ A_RI.T)
    Q_RR = X_RR @ Y_RR
    length = like_RI.square().sum(dim=1).mean().sqrt() or 1.0
    return length * (Q_RR @ A_RI), B_OR @ Q_RR.T / length
