"""A block's frozen matrix with its LoRA adapter, as one differentiable product.

y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen (LoRA: arXiv 2106.09685). What is saved for backward is x and x Aᵀ and never W, so
that W need be dense only while a product with it is computed. A and B are fp32 masters and are cast to the
computation's dtype here; plain autograd would keep W alive, and peft's own forward casts the whole input to fp32.

Shapes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_fedlarge.quantize import FrozenWeight


@dataclass
class Adapter:
    """The LoRA of one matrix: y gains `scale` · B A dropout(x).

    Attributes:
        A: trainable (R, I), fp32.
        B: trainable (O, R), fp32.
        scale: alpha / r, or alpha / sqrt(r).
        dropout: applied to the adapter's input; None where there is none.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: nn.Module | None


class FrozenLinear:
    """One frozen matrix of a block: its layer, its stored form, and where it is dense when it is.

    Args:
        module: the `nn.Linear` or `Conv1D`; its `forward` becomes the product here.
        weight: the stored form, (O, I), or (I, O) for what a `Conv1D` stores dense.
        transposed: whether the layer has it the other way round than it is stored.
    """

    def __init__(self, module: nn.Module, weight: FrozenWeight, transposed: bool) -> None:
        self.module, self.weight, self.transposed = module, weight, transposed
        # A Conv1D's own weight is (I, O), which is what `transposed` turns (O, I) into.
        self._stored_as_IO = not isinstance(module, nn.Linear) and not transposed
        self.adapter: Adapter | None = None
        self.value_unused = False
        self._provide: Callable[[FrozenLinear], torch.Tensor] | None = None
        module.forward = self.forward

    @property
    def count(self) -> int:
        """How many values it has."""
        return self.weight.shape[0] * self.weight.shape[1]

    def place(self, slot: torch.Tensor, provide: Callable[[FrozenLinear], torch.Tensor]) -> None:
        """Give the matrix its slice of the arena; `provide` returns that slice with the dense values in it."""
        self.slot, self._provide = slot.view(self.weight.shape), provide
        shown = self._as_layer_has_it()
        self.placeholder = torch.full((1,), torch.nan, dtype=slot.dtype, device=slot.device).expand(shown.shape)
        self.module.weight = nn.Parameter(self.placeholder, requires_grad=False)

    def show(self) -> None:
        """Point the layer at the dense matrix."""
        self.module.weight.data = self._as_layer_has_it()

    def hide(self) -> None:
        """Point the layer at the placeholder."""
        self.module.weight.data = self.placeholder

    def dense(self) -> torch.Tensor:
        """The dense matrix (I, O), valid until the arena is used for another."""
        dense = self._provide(self)
        return dense if self._stored_as_IO else dense.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes, without its adapter."""
        return _Product.apply(x, None, None, None, self)

    def forward_with_adapter(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer and its adapter compute."""
        adapter = self.adapter
        dropped = adapter.dropout(x) if adapter.dropout is not None else x
        return _Product.apply(x, None if dropped is x else dropped, adapter.A, adapter.B, self)

    def _as_layer_has_it(self) -> torch.Tensor:
        return self.slot.t() if self.transposed else self.slot


class _Product(torch.autograd.Function):
    """`ctx.linear` lets `output_products` recognize the node in a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor | None,
        A: nn.Parameter | None,
        B: nn.Parameter | None,
        linear: FrozenLinear,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        dropped_NI = None if dropped is None else dropped.reshape(x_NI.shape)
        u_NR = None
        if A is not None:
            u_NR = ((x_NI if dropped_NI is None else dropped_NI) @ A.to(x.dtype).t()).mul_(linear.adapter.scale)
        ctx.linear, ctx.shape, ctx.adapted = linear, x.shape, A is not None
        # Without an adapter nothing but W is needed; with dropout, x itself isn't. A frozen factor asks for nothing.
        trains_A, trains_B = ctx.needs_input_grad[2:4]
        adapter_input_NI = x_NI if dropped_NI is None else dropped_NI
        ctx.save_for_backward(adapter_input_NI if trains_A else None, u_NR if trains_B else None, A, B)
        ctx.dropped = dropped_NI is not None
        if linear.value_unused:
            return x.new_zeros(()).expand(*x.shape[:-1], _outputs(linear))
        W_IO = linear.dense()
        bias = linear.module.bias
        y_NO = x_NI @ W_IO if bias is None else torch.addmm(bias, x_NI, W_IO)
        if u_NR is not None:
            y_NO.addmm_(u_NR, B.to(x.dtype).t())
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        linear = ctx.linear
        x_NI, u_NR, A, B = ctx.saved_tensors
        g_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_dropped = grad_A = grad_B = v_NR = None
        if A is not None:
            if any(ctx.needs_input_grad[:3]):
                v_NR = (g_NO @ B.to(g_NO.dtype)).mul_(linear.adapter.scale)
            if ctx.needs_input_grad[2]:
                grad_A = v_NR.t() @ x_NI
            if ctx.needs_input_grad[3]:
                grad_B = g_NO.t() @ u_NR
        if ctx.needs_input_grad[0]:
            grad_x = g_NO @ linear.dense().t()
            if v_NR is not None and not ctx.dropped:
                grad_x.addmm_(v_NR, A.to(g_NO.dtype))
            grad_x = grad_x.view(ctx.shape)
        if ctx.dropped and ctx.needs_input_grad[1]:
            grad_dropped = (v_NR @ A.to(g_NO.dtype)).view(ctx.shape)
        return grad_x, grad_dropped, grad_A, grad_B, None


def _outputs(linear: FrozenLinear) -> int:
    return linear.weight.shape[1] if linear._stored_as_IO else linear.weight.shape[0]


def output_products(output: torch.Tensor) -> Iterator[FrozenLinear]:
    """The matrices whose product is only added to something to give `output`: a block's output projections.

    Their values need not be computed again to differentiate the block, as a sum's gradient asks for no value.
    """
    consumers: Counter[Any] = Counter()
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is not None:
                consumers[following] += 1
                stack.append(following)
    # A node that is reached from all of its consumers in this way has a value that nobody asks for.
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        linear = getattr(node, "linear", None)
        if isinstance(linear, FrozenLinear):
            yield linear
        # Nor does the gradient of a product without an adapter, such as a surrogate's.
        if node.name() in ("AddBackward0", "ViewBackward0") or (linear is not None and not node.adapted):
            for following, _ in node.next_functions:
                consumers[following] -= 1
                if following is not None and not consumers[following]:
                    stack.append(following)
