"""The leading singular vectors of a matrix that is known by what it does to vectors.

Shapes: O out-features, I in-features, S inner columns of a product, K directions kept or tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

MORE = 8  # directions tried beyond those wanted (Halko et al., arXiv 0909.4061)
PROBES = 16  # random vectors that an estimate takes; its relative error is at most some sqrt(2 / PROBES), mostly less
_SLICE = 512  # inner columns that are multiplied at a time; more of 8192 values take a fifth longer

Multiply = Callable[[torch.Tensor], torch.Tensor]


class Decomposition(NamedTuple):
    """The leading part of a sum, U diag(S) V, and the squared Frobenius norm of the whole.

    Attributes:
        U_OK: fp64, columns orthonormal.
        S_K: fp64, falling, none that is zero but for rounding.
        V_KI: fp64, rows orthonormal.
        energy: of the whole sum.
    """

    U_OK: torch.Tensor
    S_K: torch.Tensor
    V_KI: torch.Tensor
    energy: float


def subspace(right: Multiply, left: Multiply, width: int, dtype: torch.dtype, count: int) -> Decomposition:
    """`decompose` of a matrix M that is known by what it does, by subspace iteration (arXiv 0909.4061, one power).

    What the iteration misses is in the energy: exactly what it finds, and of the rest an estimate (arXiv 2010.09649).

    Args:
        right: X_IK → M X.
        left: Y_OK → M^T Y.
        width: I.
        dtype: to compute in.
        count: how many directions are wanted.
    """
    generator = torch.Generator().manual_seed(0)
    tried = min(count + MORE, width)
    random_IK = torch.randn(width, tried + PROBES, generator=generator, dtype=dtype)
    start_IK, probes_IK = random_IK[:, :tried], random_IK[:, tried:]
    P_IK, _ = torch.linalg.qr(left(torch.linalg.qr(right(start_IK))[0]))
    probes_IK = probes_IK - P_IK @ (P_IK.T @ probes_IK)
    found_O = right(torch.cat([P_IK, probes_IK], dim=1)).double()
    M_OK, missed_OK = found_O[:, : P_IK.shape[1]], found_O[:, P_IK.shape[1] :]
    U_OK, S_K, V_KK = _svd(M_OK) if dtype == torch.float32 else torch.linalg.svd(M_OK, full_matrices=False)
    noise = torch.finfo(dtype).eps * max(len(U_OK), width) ** 0.5 * S_K[:1].sum()
    kept = int(S_K.gt(noise).sum())
    missed = missed_OK.square().sum().item() / PROBES
    found = S_K.square().sum().item()
    if missed < (torch.finfo(dtype).eps * max(len(U_OK), width)) ** 2 * found:
        missed = 0.0
    V_KI = V_KK[:kept] @ P_IK.T.double()
    return Decomposition(U_OK[:, :kept], S_K[:kept], V_KI, S_K[:kept].square().sum().item() + missed)


def _svd(M_OK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`torch.linalg.svd` of fp32 numbers held in fp64, by their Gram matrix: in a quarter of the time for tall ones.

    What is lost of small singular values, some 1e-8 of the largest, is below what fp32 had of them.
    """
    squares_K, V_KK = torch.linalg.eigh(M_OK.T @ M_OK)
    S_K, V_KK = squares_K.clamp(min=0.0).sqrt().flip(0), V_KK.flip(1)
    return M_OK @ V_KK / S_K.clamp(min=torch.finfo(torch.float64).tiny), S_K, V_KK.T


def multiply(terms: Iterable[tuple[float, torch.Tensor, torch.Tensor]], X_IK: torch.Tensor) -> torch.Tensor:
    """Σ c L^T F X of terms c, F_SI, L_SO, each looked at once; in memory of shape (K, O).

    The order of the factors is the one that BLAS is fast with: for L^T Z, L of 1600 x 8192 and Z of 48 columns, MKL
    takes twice as long as for Z^T L (docs/log.md).
    """
    total_KO: torch.Tensor | None = None
    for coefficient, first_SI, last_SO in terms:
        inner_SK = first_SI @ X_IK
        if total_KO is None:
            total_KO = inner_SK.new_zeros(X_IK.shape[1], last_SO.shape[1])
        for inner, last in zip(inner_SK.split(_SLICE), last_SO.split(_SLICE), strict=True):
            total_KO.addmm_(inner.T, last, alpha=coefficient)
    return total_KO.T
