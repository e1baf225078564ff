"""Products with matrices that stay in NF4: they become dense in pieces that fit into a core's cache (`linear.c`).

So a dense matrix need not go through memory, which costs as much as multiplying by it, and there is no arena. It takes
AMX and a C compiler. Where they aren't, matrices are made dense in an arena (`hf_fedlarge.arena`).
"""

from __future__ import annotations

import torch

from hf_fedlarge.kernels import kernels
from hf_fedlarge.quantize import BLOCK, NF4_CODE, FrozenWeight, Nf4Weight


def can_multiply(weight: FrozenWeight, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` with a stored matrix can be computed so."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not isinstance(weight, Nf4Weight):
        return False
    compiled = kernels()
    return weight.shape[1] % BLOCK == 0 and compiled is not None and compiled.has_tiles


def work_bytes(widest: int) -> int:
    """What a product takes of memory for a token, beside its result; `widest` are the values of a token at most."""
    together = 512
    return kernels().nf4_linear_bytes(together, widest, widest) // together


def multiply(
    x_NK: torch.Tensor,
    weight: Nf4Weight,
    turned: bool,
    u_NR: torch.Tensor | None = None,
    more: torch.Tensor | None = None,
    bias_P: torch.Tensor | None = None,
) -> torch.Tensor:
    """x W + u E, or with `turned` x Wᵀ + u Eᵀ + bias, (N, P) in bf16, summed in fp32 and rounded once.

    Args:
        x_NK: bf16.
        weight: W, for which `can_multiply` holds.
        turned: whether it is multiplied by W's transpose.
        u_NR: bf16; None: there is no second product.
        more: E, bf16 (R, P), or (P, R).
        bias_P: bf16; None: none.
    """
    scales = weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, NF4_CODE
    left, u_NR, more = (None if part is None else part.contiguous() for part in (x_NK, u_NR, more))
    return kernels().nf4_linear(left, scales, weight.offset, weight.shape, turned, u_NR, more, bias_P)
