"""RMSNorm with its gradient in closed form (arXiv 1910.07467).

transformers spells it out in six operations whose graph keeps three fp32 copies of the input, more than all else that a
small block keeps. Here the input itself and one number a token are saved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from hf_fedlarge.kernels import kernels_for


def replace_norms(block: nn.Module) -> int:
    """Make the block's frozen RMSNorms compute by `rms_norm`; those that give another value are left as they are.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for module in block.modules():
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not type(module).__name__.endswith("RMSNorm") or epsilon is None or weight is None or weight.requires_grad:
            continue
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype)
        with torch.no_grad():
            # Families differ in details: Gemma's multiplies by 1 + weight.
            if torch.allclose(module(x), rms_norm(x, weight, epsilon), rtol=2 * torch.finfo(x.dtype).eps):
                module.forward = partial(rms_norm, weight=weight, epsilon=epsilon)
                replaced += 1
    return replaced


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + epsilon) · weight over the last axis, in fp32 and rounded before the weight, like Llama.

    Args:
        x: (…, D).
        weight: (D,), not differentiated.
        epsilon: added to the mean.
    """
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        compiled = kernels_for(x, weight)
        if compiled is not None:
            out, inverse = compiled.rms_norm(x, weight, epsilon)
            ctx.save_for_backward(x, inverse, weight)
            return out
        x_32 = x.float()
        inverse = x_32.square().mean(dim=-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        # Products of mixed dtypes would take twice as long. What `float` made anew may be changed.
        scaled = x_32.mul(inverse) if x_32 is x else x_32.mul_(inverse)
        return scaled.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        compiled = kernels_for(x, weight, grad)
        if compiled is not None:
            return compiled.rms_norm_gradient(x, inverse, weight, grad), None, None
        slope, x_32 = (grad * weight).float(), x.float()
        along = (slope * x_32).mean(dim=-1, keepdim=True).mul_(inverse**3)
        return slope.mul_(inverse).addcmul_(x_32, along, value=-1).to(x.dtype), None, None
