"""Rounding to NF4 so that a matrix' errors make up for one another on calibration text: GPTQ (arXiv 2210.17323).

Columns are rounded one after the other, those with the largest inputs first, and what each one loses is taken out of
the columns to come, as far as their inputs go together: the optimal brain surgeon's step, as in `neurons`. Scales stay
those of plain rounding, and the largest value of every block keeps its own, so that what comes out is an ordinary
matrix: rounded once more, as a package stores it, it has the same codes.

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import torch

from hf_fedlarge.quantize import BLOCK, NF4_CODE

DAMPING = 0.01  # of each input's own size
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST = 1e-6  # of the largest input's
_TOKENS = 1024  # at a time
_ROWS = 4096  # of a matrix at a time
_COLUMNS = 64  # whose errors reach the columns after them together


def add_inputs(gram_II: torch.Tensor, x_NI: torch.Tensor, w_N1: torch.Tensor) -> None:
    """Add Σ wₙ xₙᵀ xₙ of more tokens to `gram_II`, in fp32."""
    for x, w in zip(x_NI.split(_TOKENS), w_N1.split(_TOKENS), strict=True):
        x = x.float()
        gram_II.addmm_((x * w).T, x)


def compensated(W_OI: torch.Tensor, gram_II: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Values near `W_OI` that NF4 stores as they are but for its scales' rounding; W itself where rows aren't blocks.

    They come near the minimum of tr((V − W) H (V − W)ᵀ) among all that have the scales of W's blocks.

    Args:
        W_OI: the matrix, any float dtype.
        gram_II: H, the inputs' second moments in fp32.
        damping: what is added to its diagonal, as a share of it.

    Returns:
        V (O, I) in fp32.
    """
    V_OI = W_OI.float().clone(memory_format=torch.contiguous_format)
    if V_OI.shape[1] % BLOCK:
        return V_OI
    order_I, U_II = _spread(gram_II, damping)
    for rows in V_OI.split(_ROWS):
        _round_rows(rows, order_I, U_II)
    return V_OI


def _spread(gram_II: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns, and the upper Cholesky factor U of H⁻¹ in it: row j spreads column j's error."""
    diagonal = gram_II.diagonal() * (1 + damping)
    diagonal.clamp_min_((_SMALLEST * diagonal.max()).clamp_min(_TINY))
    order_I = diagonal.argsort(descending=True)
    gram_II = gram_II[order_I].index_select(1, order_I)
    gram_II.diagonal().copy_(diagonal[order_I])
    torch.linalg.cholesky(gram_II, out=gram_II)
    torch.cholesky_inverse(gram_II, out=gram_II)
    return order_I, torch.linalg.cholesky(gram_II, upper=True)


def _round_rows(V_OI: torch.Tensor, order_I: torch.Tensor, U_II: torch.Tensor) -> None:
    """Round some rows in place."""
    outputs, inputs = V_OI.shape
    blocks = V_OI.view(outputs, -1, BLOCK)
    largest = blocks.abs().argmax(dim=2, keepdim=True)
    scale_OB = blocks.gather(2, largest).abs_().squeeze(2)
    stays_OI = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, largest, True).view(outputs, inputs)
    codes = NF4_CODE.to(V_OI.device)
    bounds = (codes[:-1] + codes[1:]) / 2
    wanted_OI = V_OI[:, order_I]
    for first in range(0, inputs, _COLUMNS):
        last = min(first + _COLUMNS, inputs)
        errors = torch.empty(outputs, last - first, device=V_OI.device)
        for j, column in enumerate(order_I[first:last].tolist(), first):
            scale = scale_OB[:, column // BLOCK]
            nearest = codes[torch.bucketize(wanted_OI[:, j] / scale.clamp_min(_TINY), bounds)] * scale
            V_OI[:, column] = torch.where(stays_OI[:, column], V_OI[:, column], nearest)
            error = (wanted_OI[:, j] - V_OI[:, column]) / U_II[j, j]
            wanted_OI[:, j + 1 : last].addr_(error, U_II[j, j + 1 : last], alpha=-1)
            errors[:, j - first] = error
        wanted_OI[:, last:].addmm_(errors, U_II[first:last, last:], alpha=-1)
