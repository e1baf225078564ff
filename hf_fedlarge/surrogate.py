"""Linear surrogates for dropped layers, fitted in closed form.

An adapter that was trained on a model with layers missing works on the full model only as far as the two compute alike.
So where a run of consecutive layers was dropped stands h + h Wᵀ + b, fitted by ridge regression on public calibration
text: from the hidden states that enter the run in the *small* model, with its quantized blocks and earlier surrogates,
to those that leave it in the full model. Each run thereby also corrects what the blocks before it lost. Frozen at
clients, gone after merging, where the layers themselves stand again. Related: ReplaceMe (arXiv 2505.02819) fits such a
map for one run on the full model's own states.

A few tokens have hidden states a hundred times as large as the others'; every token counts by 1 / ‖x‖².

Shapes: N tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import nn

from hf_fedlarge.artifacts import SurrogateEntry
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
        mean = self._x_D / self._weight
        covariance = self._xx_DD - torch.outer(mean, self._x_D)
        # The last term is for coordinates that never change.
        covariance.diagonal().mul_(1 + ridge).add_(_SMALLEST * covariance.trace() / len(mean))
        return torch.cholesky_solve(self._xd_DD - torch.outer(mean, self._d_D), torch.linalg.cholesky(covariance))

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
    """What W of the run that begins at `first_layer` is called in a package."""
    return f"surrogates.{first_layer}.weight"


def bias_name(first_layer: int) -> str:
    """Likewise, b."""
    return f"surrogates.{first_layer}.bias"


def store_surrogate(
    regression: Regression, run: list[int], codec: str, dtype: torch.dtype, ridge: float = RIDGE
) -> tuple[SurrogateEntry, dict[str, torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The surrogate for a run of layers as it is stored, and as it computes once it is.

    Args:
        regression: from the states that enter the run to those that leave it.
        run: the layers, consecutive.
        codec: how W is stored: `nf4`, `int8` or `dense` (bf16).
        dtype: of the computation.
        ridge: see `Regression.solve`.

    Returns:
        What the manifest says of it; its stored tensors by name, W's as `quantize.encode` makes them and b (D,) in
        bf16; and the function of the hidden states.
    """
    name = weight_name(run[0])
    T = regression.solve(ridge)
    # Rounding can spoil a map that explains little: then nothing stands there.
    for W in (T.T.float().cpu(), torch.zeros(T.shape)):
        tensors, weight = round_trip(name, codec, W)
        stored = dense(weight, torch.float32)
        # The bias makes up for what rounding W has moved on average.
        b = regression.bias(stored.T.to(T.device)).to(torch.bfloat16) if W.any() else T.new_zeros(len(W))
        share = regression.unexplained(stored.T.to(T.device), b)
        if share <= 1:
            break
    W, b = stored.to(T.device, dtype), b.to(T.device, dtype)
    entry = SurrogateEntry(layers=run, codec=codec, unexplained=share)
    tensors[bias_name(run[0])] = b.to("cpu", torch.bfloat16)
    return entry, tensors, lambda hidden: hidden + nn.functional.linear(hidden, W, b)


def put_behind(block: nn.Module, weight: FrozenWeight, bias: torch.Tensor) -> FrozenLinear:
    """Make `block` end with h + h Wᵀ + b, which stands for the layers that were dropped behind it.

    Args:
        block: a decoder block whose `forward` isn't streamed yet.
        weight: W (D, D).
        bias: b (D,), on the device and in the dtype of the computation.
    """
    surrogate = nn.Linear(*weight.shape, device="meta").requires_grad_(False)
    surrogate.bias = nn.Parameter(bias, requires_grad=False)
    forward = block.forward

    @wraps(forward)
    def with_surrogate(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] + surrogate(output[0]), *output[1:])
        return output + surrogate(output)

    block.surrogate, block.forward = surrogate, with_surrogate
    return FrozenLinear(surrogate, weight, transposed=False)
