"""Combining clients' adapters: pure tensor functions, one module's factors at a time.

What a client trained is the product `scale` · B A, so products are what has to be averaged. `exact` does that;
`fedavg` averages the factors, the common recipe, and is here to be compared with. Everything is computed in fp64 and
returned in fp32. Nothing here trusts or checks a client: its tensors were validated when its update was read.

Left out: server optimizers (FedAdam and kin), which need a state between rounds that the adapter alone doesn't hold.

Shapes: O out-features, I in-features, R a rank, S all clients' ranks together, K kept singular values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hf_fedlarge.errors import ConfigError
from hf_fedlarge.tensors import Factors

_Client = tuple[float, float, Factors]  # share, scale, factors


class Aggregate(NamedTuple):
    """One module's aggregated factors, and how far their product is from the weighted sum of the clients' products.

    Attributes:
        factors: fp32 A_RI and B_OR of the rank and for the scale asked for.
        energy: squared Frobenius norm of the exact sum, the i-th client counting w_i · scale_i · B_i A_i.
        dropped: squared Frobenius norm of the exact sum less the product of `factors`: what truncation dropped in
            `exact`, what averaging the factors lost in `fedavg`.
    """

    factors: Factors
    energy: float
    dropped: float


def exact(
    factors: Sequence[Factors], weights: torch.Tensor, scales: Sequence[float], rank: int, scale: float
) -> Aggregate:
    """The weighted sum of the clients' products, best approximated in `rank` (Eckart-Young).

    The clients' factors side by side are a factorization of the sum (FLoRA, arXiv 2409.05976). QR of both sides and an
    SVD of the small core between them give its singular vectors; no O x I matrix is ever made. Of U S V^T the result
    keeps `rank` directions as B = U S / scale and A = V^T. The rows of A are orthonormal, so a direction of no weight
    can still learn: its column of B is zero, and its row of A is a fixed pseudo-random one, as in a fresh adapter.
    Each column of B has its largest entry positive, so that the order of the clients changes nothing but rounding.

    Args:
        factors: each client's A (R_i, I) and B (O, R_i); ranks may differ.
        weights: (clients,) fp64, at least 0; normalised here. A client of weight 0 has no influence at all.
        scales: what each client's product is multiplied by, `LoraSettings.scale`.
        rank: the result's rank. Beyond O, columns of B are zero; beyond I, rows of A are of norm 1 but no longer
            orthogonal.
        scale: what the result's product will be multiplied by.

    Raises:
        ConfigError: the weights are negative, not finite or all zero, or rank or scale is not positive.
    """
    clients = _clients(factors, weights, scales, rank, scale)
    U_OK, S_K, V_KI = _svd(clients)
    signs_1K = U_OK.gather(0, U_OK.abs().argmax(0, keepdim=True)).sign()
    kept = min(rank, len(S_K))
    B_OR = torch.zeros(len(U_OK), rank, dtype=torch.float64)
    B_OR[:, :kept] = (U_OK * signs_1K * S_K)[:, :kept] / scale
    A_RI = _with_fresh_rows((V_KI * signs_1K.T)[:kept], rank)
    return Aggregate(Factors(A_RI.float(), B_OR.float()), _squared(S_K), _squared(S_K[rank:]))


def fedavg(
    factors: Sequence[Factors], weights: torch.Tensor, scales: Sequence[float], rank: int, scale: float
) -> Aggregate:
    """The weighted means of the clients' A and of their B, each averaged by itself (McMahan 2017, arXiv 1602.05629).

    Their product is not the mean of the products: mean(B A) - mean(B) mean(A) = mean((B - mean B)(A - mean A)):
    nothing where the clients agree on A or on B, and hardly nothing elsewhere. `dropped` measures that disagreement.

    Args:
        factors: each client's A (R, I) and B (O, R), all of the same rank.
        weights: (clients,) fp64, at least 0; normalised here. A client of weight 0 has no influence at all.
        scales: what each client's product is multiplied by; all the same.
        rank: the clients' rank.
        scale: the clients' scale.

    Raises:
        ConfigError: as `exact`, or a client's rank or scale is another than the result's.
    """
    clients = _clients(factors, weights, scales, rank, scale)
    for _, own, (A_RI, _) in clients:
        if len(A_RI) != rank or own != scale:
            raise ConfigError(
                f"fedavg averages factors of one rank and scale, {rank} and {scale:g} here, but a client has "
                f"{len(A_RI)} and {own:g}; use the aggregator exact."
            )
    mean_A_RI = torch.stack([share * A for share, _, (A, _) in clients]).sum(0)
    mean_B_OR = torch.stack([share * B for share, _, (_, B) in clients]).sum(0)
    centred = [(share, own, Factors(A - mean_A_RI, B - mean_B_OR)) for share, own, (A, B) in clients]
    mean = Factors(mean_A_RI.float(), mean_B_OR.float())
    return Aggregate(mean, energy=_squared(_svd(clients)[1]), dropped=_squared(_svd(centred)[1]))


AGGREGATORS: dict[str, Callable[[Sequence[Factors], torch.Tensor, Sequence[float], int, float], Aggregate]] = {
    "exact": exact,
    "fedavg": fedavg,
}


def _clients(
    factors: Sequence[Factors], weights: torch.Tensor, scales: Sequence[float], rank: int, scale: float
) -> list[_Client]:
    """Share, scale and factors in fp64 of every client that counts; the shares sum to 1."""
    assert len(factors) == len(weights) == len(scales), "one weight and one scale a client"
    weights = weights.double()
    total = weights.sum().item()
    if not (torch.isfinite(weights).all() and (weights >= 0).all() and 0 < total < float("inf")):
        found = ", ".join(f"{weight:g}" for weight in weights.tolist())
        raise ConfigError(f"The clients' weights are [{found}]; expected finite ones, none negative, not all zero.")
    if rank < 1 or not 0 < scale < float("inf"):
        raise ConfigError(f"The aggregate's rank is {rank} and its scale {scale:g}; expected positive numbers.")
    return [
        (weight / total, own, Factors(A.double(), B.double()))
        for (A, B), weight, own in zip(factors, weights.tolist(), scales, strict=True)
        if weight > 0
    ]


def _svd(clients: list[_Client]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U_OK, S_K, V_KI of the weighted sum of products, without singular values that are zero but for rounding."""
    B_OS = torch.cat([share * scale * B for share, scale, (_, B) in clients], dim=1)
    A_SI = torch.cat([A for _, _, (A, _) in clients])
    Q_OM, R_MS = torch.linalg.qr(B_OS)
    Q_IN, R_NS = torch.linalg.qr(A_SI.T)
    U_MK, S_K, V_KN = torch.linalg.svd(R_MS @ R_NS.T, full_matrices=False)
    # Against the factors' norms and not the largest singular value: where clients cancel, that one is noise itself.
    noise = torch.finfo(torch.float64).eps * max(len(B_OS), A_SI.shape[1]) * R_MS.norm() * R_NS.norm()
    kept = int(S_K.gt(noise).sum())
    return Q_OM @ U_MK[:, :kept], S_K[:kept], V_KN[:kept] @ Q_IN.T


def _with_fresh_rows(V_KI: torch.Tensor, rank: int) -> torch.Tensor:
    """`V_KI` and below it further orthonormal rows, up to `rank`; the same ones for the same `V_KI`."""
    kept, width = V_KI.shape
    fresh_XI = torch.randn(rank - kept, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fresh_XI /= fresh_XI.norm(dim=1, keepdim=True)
    room = width - kept
    Q_IX, _ = torch.linalg.qr(torch.cat([V_KI, fresh_XI[:room]]).T)
    return torch.cat([V_KI, Q_IX.T[kept:], fresh_XI[room:]])


def _squared(values: torch.Tensor) -> float:
    return values.square().sum().item()
