"""Causal attention on a CPU that keeps for its backward what it was given, and not what it computes with.

It is computed by torch's flash attention, in what the processor multiplies fastest. In bf16 that takes twice as long to
differentiate as in fp32. So `attention.c` does that where the processor has matrix instructions, and where it hasn't it
is done in fp32. Autograd would keep fp32 copies of queries, keys, values and output for it; here they are kept as they
came, and the output as it went, which the output projection keeps too where sequences are of one length.
(FlashAttention: arXiv 2205.14135.)

Shapes: B sequences, H heads, G heads of keys and values, T tokens, E values a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_fedlarge.kernels import kernels_for
from hf_fedlarge.processor import product_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def causal_attention(
    q_BHTE: torch.Tensor, k_BGTE: torch.Tensor, v_BGTE: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """softmax(scale · q kᵀ, causal) v as (B, T, H, E); H is a multiple of G.

    Args:
        q_BHTE: queries, on the CPU.
        k_BGTE: keys.
        v_BGTE: values.
        scale: None: 1 / sqrt(E).
    """
    return _CausalAttention.apply(q_BHTE, k_BGTE, v_BGTE, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
        ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
        products = product_dtype(q.dtype, q.device)
        out_BHTE, lse_BHT = _flash(*(x.to(products) for x in (q, k, v)), 0.0, True, scale=ctx.scale)
        out_BTHE = out_BHTE.to(q.dtype).transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out_BTHE, lse_BHT)
        return out_BTHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *given, out_BTHE, lse_BHT = ctx.saved_tensors
        as_made = [x.contiguous() for x in (*(x.transpose(1, 2) for x in given), out_BTHE, grad_BTHE)]
        compiled = kernels_for(*as_made)
        if compiled and compiled.has_tiles and grad_BTHE.shape[-1] % 2 == 0:
            lse_BTH = lse_BHT.transpose(1, 2).contiguous()
            found = compiled.attention_gradient(*as_made, lse_BTH, ctx.scale)
            return *(gradient.transpose(1, 2) for gradient in found), None
        exact = torch.promote_types(grad_BTHE.dtype, torch.float32)
        q, k, v, out, grad = (x.transpose(1, 2).to(exact) for x in as_made)
        found = _flash_backward(grad, q, k, v, out, lse_BHT, 0.0, True, scale=ctx.scale)
        return *(gradient.to(x.dtype) for gradient, x in zip(found, given, strict=True)), None
