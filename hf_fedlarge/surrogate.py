"""Linear surrogates for dropped layers, fitted in closed form.

An adapter that was trained on a model with layers missing works on the full model only as far as the two compute alike.
So where a run of consecutive layers was dropped stands h + h Wᵀ + b, fitted by ridge regression on public calibration
text: from the hidden states that enter the run in the *small* model, with its quantized blocks and earlier surrogates,
to those that leave it in the full model. Each run thereby also corrects what the blocks before it lost. Frozen at
clients, gone after merging, where the layers themselves stand again. Related: ReplaceMe (arXiv 2505.02819) fits such a
map for one run on the full model's own states.

A map may also be of low rank, as two matrices, the best of that rank for the same regression.

A few tokens have hidden states a hundred times as large as the others'; every token counts by 1 / ‖x‖².

Shapes: N tokens, D hidden, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from hf_fedlarge.entries import SurrogateEntry
from hf_fedlarge.linear import FrozenLinear
from hf_fedlarge.quantize import FrozenWeight
from hf_fedlarge.rounding import dense, round_trip

RIDGE = 0.1
_SMALLEST = 1e-12
_ROWS = 1024  # in fp64 at a time


class Regression:
    """Weighted ridge regression of changes Δ = Y − X on states X, from sums that take their rows in pieces, in fp64.

    It minimizes Σₙ wₙ ‖Δₙ − Xₙ T − b‖² + Σⱼ λⱼ ‖Tⱼ‖² with wₙ = 1 / ‖Xₙ‖² and λⱼ in proportion to the variance of X's
    coordinate j, so that nothing depends on the coordinates' scales, which differ a hundredfold.

    Args:
        width: D.
        device: where the rows are.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._xx_DD, self._xd_DD = zeros(width, width), zeros(width, width)
        self._x_D, self._d_D = zeros(width), zeros(width)
        self._weight, self._dd = zeros(), zeros()

    @classmethod
    def between(cls, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> Regression:
        """Of the states (B, S, D) of any number of batches, before and after."""
        regression = cls(before[0].shape[-1], before[0].device)
        for x, y in zip(before, after, strict=True):
            regression.add(x.flatten(0, 1), y.flatten(0, 1))
        return regression

    def add(self, x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        """Take in the states before and after."""
        for x, y in zip(x_ND.split(_ROWS), y_ND.split(_ROWS), strict=True):
            x, y = x.double(), y.double()
            d = y - x
            w_N1 = 1 / x.square().sum(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
            weighted = x * w_N1
            self._xx_DD.addmm_(weighted.T, x)
            self._xd_DD.addmm_(weighted.T, d)
            self._x_D += weighted.sum(dim=0)
            self._d_D += (d * w_N1).sum(dim=0)
            self._dd += (d.square() * w_N1).sum()
            self._weight += w_N1.sum()

    def solve(self, ridge: float = RIDGE) -> torch.Tensor:
        """T (D, D) in fp64; λⱼ is `ridge` times the weighted sum of squares of X's centred coordinate j."""
        covariance_DD, products_DD = self._centred(ridge)
        return torch.cholesky_solve(products_DD, torch.linalg.cholesky(covariance_DD))

    def reduce(self, T_DD: torch.Tensor, rank: int, ridge: float = RIDGE) -> torch.Tensor:
        """U (D, R) of the best map U V of a rank, by the same objective: reduced-rank regression (Izenman, 1975).

        With H = Xᵀ w X + λ the objective is tr (T − T*)ᵀ H (T − T*) more than its least, so that the best map of rank R
        is T* V Vᵀ with the R largest eigenvectors V of T*ᵀ H T*: it gives what counts most of the fitted values.

        Args:
            T_DD: T*, from `solve` with the same ridge.
            rank: R.
            ridge: see `solve`.
        """
        fitted_DD = T_DD.T @ self._centred(ridge)[0] @ T_DD
        return T_DD @ torch.linalg.eigh((fitted_DD + fitted_DD.T) / 2).eigenvectors[:, -rank:]

    def behind(self, U_DR: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
        """The V (R, D) with which U V is best, for any U."""
        covariance_DD, products_DD = self._centred(ridge)
        U = U_DR.double()
        return torch.linalg.pinv(U.T @ covariance_DD @ U, hermitian=True) @ (U.T @ products_DD)

    def _centred(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Xᵀ w X + λ and Xᵀ w Δ, both (D, D), of centred X."""
        mean = self._x_D / self._weight
        covariance = self._xx_DD - torch.outer(mean, self._x_D)
        # The last term is for coordinates that never change.
        covariance.diagonal().mul_(1 + ridge).add_(_SMALLEST * covariance.trace() / len(mean))
        return covariance, self._xd_DD - torch.outer(mean, self._d_D)

    def bias(self, T_DD: torch.Tensor) -> torch.Tensor:
        """The best b (D,) for this T."""
        return (self._d_D - self._x_D @ T_DD.double()) / self._weight

    def unexplained(self, T_DD: torch.Tensor, b_D: torch.Tensor) -> float:
        """The weighted squared error of T and b, as a share of that of dropping: above 1, they do harm."""
        T, b = T_DD.double(), b_D.double()
        error = self._dd - 2 * (T * self._xd_DD).sum() - 2 * b @ self._d_D
        error += (T * (self._xx_DD @ T)).sum() + 2 * (self._x_D @ T) @ b + self._weight * (b @ b)
        # Rounding can take an exact fit below zero, and a layer that changes nothing leaves nothing to explain.
        return max(0.0, float(error / self._dd)) if self._dd else 0.0


def weight_name(first_layer: int) -> str:
    """What W of the run that begins at `first_layer` is called in a package; of low rank, the one that comes first."""
    return f"surrogates.{first_layer}.weight"


def second_name(first_layer: int) -> str:
    """Likewise, the one behind it."""
    return f"surrogates.{first_layer}.second.weight"


def bias_name(first_layer: int) -> str:
    """Likewise, b."""
    return f"surrogates.{first_layer}.bias"


def store_surrogate(
    regression: Regression,
    run: list[int],
    codec: str,
    dtype: torch.dtype,
    ridge: float = RIDGE,
    rank: int | None = None,
) -> tuple[SurrogateEntry, dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The surrogate for a run of layers as it is stored, and as it computes once it is.

    Args:
        regression: from the states that enter the run to those that leave it.
        run: the layers, consecutive.
        codec: how matrices are stored: `nf4`, `int8` or `dense` (bf16).
        dtype: of the computation.
        ridge: see `Regression.solve`.
        rank: R, for two matrices (R, D) and (D, R) in the place of W; None, or D and more: W (D, D).

    Returns:
        What the manifest says of it; its stored tensors by name, matrices' as `quantize.encode` makes them and b (D,)
        in bf16; and the function of the hidden states.
    """
    T = regression.solve(ridge)
    rank = None if rank is None or rank >= len(T) else rank
    first = T if rank is None else regression.reduce(T, rank, ridge)
    # Rounding can spoil a map that explains little: then nothing stands there.
    for U in (first, torch.zeros_like(first)):
        tensors, weight = round_trip(weight_name(run[0]), codec, U.T.float().cpu())
        matrices = [dense(weight, torch.float32)]
        if rank is not None:  # the second makes up for what rounding did to the first
            V = regression.behind(matrices[0].T.to(T.device), ridge)
            more, weight = round_trip(second_name(run[0]), codec, V.T.float().cpu())
            tensors |= more
            matrices.append(dense(weight, torch.float32))
        stored = matrices[0] if rank is None else matrices[1] @ matrices[0]
        # The bias makes up for what rounding W has moved on average.
        b = regression.bias(stored.T.to(T.device)).to(torch.bfloat16) if U.any() else T.new_zeros(len(T))
        share = regression.unexplained(stored.T.to(T.device), b)
        if share <= 1:
            break
    *before, last = (W.to(T.device, dtype) for W in matrices)
    b = b.to(T.device, dtype)
    entry = SurrogateEntry(layers=run, codec=codec, unexplained=share, rank=rank)
    tensors[bias_name(run[0])] = b.to("cpu", torch.bfloat16)

    def stand_in(hidden: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.linear(hidden, before[0]) if before else hidden
        return hidden + nn.functional.linear(inner, last, b)

    return entry, tensors, stand_in


def put_behind(block: nn.Module, weights: list[FrozenWeight], bias: torch.Tensor) -> list[FrozenLinear]:
    """Make `block` end with h + h Wᵀ + b, which stands for the layers that were dropped behind it.

    Args:
        block: a decoder block whose `forward` isn't streamed yet.
        weights: W (D, D), or the two whose product it is, the one that comes first at first.
        bias: b (D,), on the device and in the dtype of the computation.
    """
    linears = [nn.Linear(*weight.shape[::-1], bias=False, device="meta").requires_grad_(False) for weight in weights]
    linears[-1].bias = nn.Parameter(bias, requires_grad=False)
    surrogate, forward = nn.Sequential(*linears), block.forward

    @wraps(forward)
    def with_surrogate(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + surrogate(output[0]), *output[1:])
        return output + surrogate(output)

    block.surrogate, block.forward = surrogate, with_surrogate
    return [FrozenLinear(linear, weight, transposed=False) for linear, weight in zip(linears, weights, strict=True)]
