"""A block's frozen matrix with its LoRA adapter, as one differentiable product.

y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen (LoRA: arXiv 2106.09685). What is saved for backward is x and x Aᵀ and never W, so
that W need be dense only while a product with it is computed. A and B are fp32 masters and are cast to the
products' dtype here; plain autograd would keep W alive, and peft's own forward casts the whole input to fp32.

Shapes: N tokens, I inputs, O outputs, R rank; a stored matrix has P rows and Q columns, (O, I) or (I, O).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_fedlarge import packed
from hf_fedlarge.gated import Activation, Gated, differentiate_gate, multiply_gate
from hf_fedlarge.quantize import FrozenWeight

Pieces = Iterable[tuple[slice, torch.Tensor]]
_KEPT_BYTES = 2**26  # of a buffer for casts, beyond a visit: 1,500 tokens of a 7B model's widest matrix in fp32


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


class Casts:
    """Where products are of another dtype than what surrounds them: buffers for what they take and give.

    They are used over and over. Fresh tensors would come and go between those that stay, and leave the heap in pieces.
    One that many tokens at once made large, as an evaluation may, is kept for a visit only.

    Args:
        dtype: of products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[str, torch.Tensor] = {}
        self._inputs: tuple[torch.Tensor, int] | None = None

    def inputs(self, x_NI: torch.Tensor) -> torch.Tensor:
        """`x_NI` in the products' dtype, until the next call; matrices that take the same follow each other."""
        if x_NI.dtype == self.dtype:
            return x_NI
        if self._inputs is not None and _is_same(x_NI, *self._inputs):
            return self._buffers["inputs"][: x_NI.numel()].view(x_NI.shape)
        self._inputs = None if x_NI.is_inference() else (x_NI, x_NI._version)
        return self.room(x_NI.shape, "inputs", x_NI).copy_(x_NI)

    def gated(self, activation: Activation, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
        """act(gate) · up in the products' dtype, likewise."""
        value_NI = self.gated_room(gate_NI)
        multiply_gate(activation, gate_NI, up_NI, value_NI)
        return value_NI

    def gated_room(self, gate_NI: torch.Tensor) -> torch.Tensor:
        """Where that is written to."""
        self._inputs = None
        room_NI = self.room(gate_NI.shape, "inputs", gate_NI)
        return torch.empty_like(gate_NI) if room_NI is None else room_NI

    def gradient(self, g_NO: torch.Tensor) -> torch.Tensor:
        """`g_NO` in the products' dtype, until the next call."""
        return g_NO if g_NO.dtype == self.dtype else self.room(g_NO.shape, "gradient", g_NO).copy_(g_NO)

    def room(self, shape: Sequence[int], place: str, like: torch.Tensor) -> torch.Tensor | None:
        """For a result of this shape; None where `like`, what it will be cast to, has the products' dtype."""
        if like.dtype == self.dtype:
            return None
        count = math.prod(shape)
        if place not in self._buffers or len(self._buffers[place]) < count:
            self._buffers.pop(place, None)
            with torch.inference_mode(False):  # else it could not be used outside of it
                self._buffers[place] = torch.empty(count, dtype=self.dtype, device=like.device)
        return self._buffers[place][:count].view(shape)

    def forget(self) -> None:
        """Hold on to no input, and to no large buffer."""
        self._inputs = None
        for place in [place for place, buffer in self._buffers.items() if buffer.nbytes > _KEPT_BYTES]:
            del self._buffers[place]


def _is_same(x: torch.Tensor, other: torch.Tensor, version: int) -> bool:
    """Whether x has the values that `other`, still held, had at its `version`."""
    return not x.is_inference() and (x.data_ptr(), x.shape, x.stride(), x._version) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        version,
    )


class FrozenLinear:
    """One frozen matrix of a block: its layer, its stored form, and where it is dense when it is.

    Args:
        module: the `nn.Linear` or `Conv1D`; its `forward` becomes the product here.
        weight: the stored form, (O, I), or (I, O) for what a `Conv1D` stores dense.
        transposed: whether the layer has it the other way round than it is stored.

    Attributes:
        stored_as_IO: whether the stored form is (I, O).
    """

    def __init__(self, module: nn.Module, weight: FrozenWeight, transposed: bool) -> None:
        self.module, self.weight, self.transposed = module, weight, transposed
        # A Conv1D's own weight is (I, O), which is what `transposed` turns (O, I) into.
        self.stored_as_IO = not isinstance(module, nn.Linear) and not transposed
        self.adapter: Adapter | None = None
        self.value_unused = False
        module.forward, module.takes_gated = self.forward, True

    @property
    def count(self) -> int:
        """How many values it has."""
        return self.weight.shape[0] * self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """O."""
        return self.weight.shape[1] if self.stored_as_IO else self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """I."""
        return self.count // self.outputs

    def can_stay_packed(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether products of `dtype` take the matrix as it is stored."""
        return not self.stored_as_IO and packed.can_multiply(self.weight, dtype, device)

    def place(
        self,
        slot: torch.Tensor | None,
        nothing: torch.Tensor,
        casts: Casts,
        pieces: Callable[..., Pieces],
        stays_packed: bool = False,
    ) -> None:
        """Say where the matrix is dense.

        Args:
            slot: its values in an arena of whole blocks, a vector; None: there is no such arena.
            nothing: (1,), what the layer shows as its weight otherwise.
            casts: for products of another dtype than the computation's.
            pieces: gives a matrix as it is stored, some rows (p, Q) at a time, in the products' dtype.
            stays_packed: it is multiplied as it is stored, as it `can_stay_packed`, and `pieces` gives nothing.
        """
        self.slot = None if slot is None else slot.view(self.weight.shape)
        self.casts, self._pieces, self._stays_packed = casts, pieces, stays_packed
        shape = self.weight.shape[::-1] if self.transposed else self.weight.shape
        self.placeholder = nothing.expand(shape)
        self.module.weight = nn.Parameter(self.placeholder, requires_grad=False)

    def show(self) -> None:
        """Point the layer at the dense matrix."""
        self.module.weight.data = self.slot.t() if self.transposed else self.slot

    def hide(self) -> None:
        """Point the layer at the placeholder."""
        self.module.weight.data = self.placeholder

    def dense(self) -> torch.Tensor:
        """The dense matrix (I, O) within a visit, in an arena of whole blocks."""
        return self.slot if self.stored_as_IO else self.slot.t()

    def multiply(
        self,
        x_NI: torch.Tensor,
        like: torch.Tensor,
        u_NR: torch.Tensor | None = None,
        B_OR: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x Wᵀ + bias + u Bᵀ, (N, O), of an `x_NI` in the products' dtype.

        Args:
            x_NI: from `casts`.
            like: what the caller will cast the result to; until then it may lie in a buffer that is used again.
            u_NR: in the products' dtype, as B is; None: there is no adapter.
            B_OR: the adapter's.
        """
        bias = None if self.module.bias is None else self.module.bias.to(x_NI.dtype)
        pieces = self._pieces(self)
        if self._stays_packed:
            return packed.multiply(x_NI, self.weight, True, u_NR, B_OR, bias)
        out = self.casts.room((len(x_NI), self.outputs), "product", like)
        y_NO = (_to_columns if self.stored_as_IO else _to_rows)(x_NI, pieces, self.outputs, bias, out)
        return y_NO if u_NR is None else y_NO.addmm_(u_NR, B_OR.t())

    def multiply_back(
        self,
        g_NO: torch.Tensor,
        like: torch.Tensor,
        v_NR: torch.Tensor | None = None,
        A_RI: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """g W + v A, (N, I), likewise."""
        pieces = self._pieces(self)
        if self._stays_packed:
            return packed.multiply(g_NO, self.weight, False, v_NR, A_RI)
        out = self.casts.room((len(g_NO), self.inputs), "product", like)
        x_NI = (_to_rows if self.stored_as_IO else _to_columns)(g_NO, pieces, self.inputs, None, out)
        return x_NI if v_NR is None else x_NI.addmm_(v_NR, A_RI)

    def forward(self, x: torch.Tensor | Gated) -> torch.Tensor:
        """What the layer computes, without its adapter."""
        return _Product.apply(*_parts(x), None, None, None, self)

    def forward_with_adapter(self, x: torch.Tensor | Gated) -> torch.Tensor:
        """What the layer and its adapter compute."""
        adapter = self.adapter
        dropped = None
        if adapter.dropout is not None:
            x = x.value() if isinstance(x, Gated) else x
            dropped = adapter.dropout(x)
        return _Product.apply(*_parts(x), None if dropped is x else dropped, adapter.A, adapter.B, self)


@contextmanager
def unused(linears: Sequence[FrozenLinear]) -> Iterator[None]:
    """Within it, nothing is computed for the values of these matrices' products, which are zeros."""
    for linear in linears:
        linear.value_unused = True
    try:
        yield
    finally:
        for linear in linears:
            linear.value_unused = False


def _parts(x: torch.Tensor | Gated) -> tuple[torch.Tensor, torch.Tensor | None, Activation | None]:
    return (x.gate, x.up, x.activation) if isinstance(x, Gated) else (x, None, None)


class _Product(torch.autograd.Function):
    """Of x, or of act(x) · up. `ctx.linear` lets `output_products` recognize the node in a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor | None,
        activation: Activation | None,
        dropped: torch.Tensor | None,
        A: nn.Parameter | None,
        B: nn.Parameter | None,
        linear: FrozenLinear,
    ) -> torch.Tensor:
        casts, adapted = linear.casts, A is not None
        ctx.linear, ctx.activation, ctx.shape = linear, activation, x.shape
        ctx.adapted, ctx.dropped = adapted, dropped is not None
        given_NI = x.reshape(-1, x.shape[-1])
        up_NI = None if up is None else up.reshape(given_NI.shape)
        x_NI = u_NR = None
        if adapted or not linear.value_unused:
            x_NI = casts.inputs(given_NI) if up is None else casts.gated(activation, given_NI, up_NI)
        adapter_input_NI = given_NI if dropped is None else dropped.reshape(given_NI.shape)
        if adapted:
            u_NR = ((x_NI if dropped is None else adapter_input_NI.to(casts.dtype)) @ A.to(casts.dtype).t()).mul_(
                linear.adapter.scale
            )
        # Without an adapter nothing but W is needed; with dropout, x itself isn't. A frozen factor asks for nothing.
        trains_A, trains_B = ctx.needs_input_grad[4:6]
        keeps_input = trains_A or (up is not None and any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(
            adapter_input_NI if keeps_input else None, up_NI if keeps_input else None, u_NR if trains_B else None, A, B
        )
        # What is given is no view, as Falcon adds to it in place.
        if linear.value_unused:
            return x.new_zeros(*x.shape[:-1], linear.outputs)
        y_NO = linear.multiply(x_NI, x, u_NR, None if B is None else B.to(casts.dtype))
        return torch.ops.aten._unsafe_view(y_NO.to(x.dtype), [*x.shape[:-1], linear.outputs])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        linear, casts = ctx.linear, ctx.linear.casts
        given_NI, up_NI, u_NR, A, B = ctx.saved_tensors
        wants_x, wants_up, _, wants_dropped, wants_A, wants_B, _ = ctx.needs_input_grad
        g_NO = casts.gradient(grad.reshape(-1, grad.shape[-1]))
        grad_x = grad_up = grad_dropped = grad_A = grad_B = v_NR = x_NI = None
        if ctx.adapted and (wants_x or wants_up or wants_dropped or wants_A):
            v_NR = (g_NO @ B.to(casts.dtype)).mul_(linear.adapter.scale)
        if wants_B:
            grad_B = g_NO.t() @ u_NR
        if wants_x or wants_up:
            adds = v_NR is not None and not ctx.dropped
            grad_NI = linear.multiply_back(g_NO, grad, *((v_NR, A.to(casts.dtype)) if adds else ()))
            if ctx.activation is None:
                grad_x = grad_NI.to(grad.dtype).view(ctx.shape)
            else:
                x_NI = casts.gated_room(given_NI) if wants_A else None
                found = differentiate_gate(ctx.activation, given_NI, up_NI, grad_NI, x_NI)
                grad_x, grad_up = (gradient.view(ctx.shape) for gradient in found)
        if ctx.dropped and wants_dropped:
            grad_dropped = (v_NR @ A.to(casts.dtype)).to(grad.dtype).view(ctx.shape)
        if wants_A:
            if x_NI is None:
                x_NI = casts.inputs(given_NI) if up_NI is None else casts.gated(ctx.activation, given_NI, up_NI)
            grad_A = v_NR.t() @ x_NI
        return grad_x, grad_up, None, grad_dropped, grad_A, grad_B, None


def _to_rows(
    x_NQ: torch.Tensor, pieces: Pieces, rows: int, bias_P: torch.Tensor | None, out_NP: torch.Tensor | None
) -> torch.Tensor:
    """x Wᵀ + bias for a stored matrix W (P, Q); into `out_NP` where it is given."""
    for at, W_pQ in pieces:
        if len(W_pQ) == rows:
            return _multiply(x_NQ, W_pQ.t(), bias_P, out_NP)
        if out_NP is None:
            out_NP = x_NQ.new_empty(len(x_NQ), rows)
        _multiply(x_NQ, W_pQ.t(), None if bias_P is None else bias_P[at], out_NP[:, at])
    return out_NP


def _to_columns(
    x_NP: torch.Tensor, pieces: Pieces, columns: int, bias_Q: torch.Tensor | None, out_NQ: torch.Tensor | None
) -> torch.Tensor:
    """x W + bias for a stored matrix W (P, Q), likewise. Products of pieces add up in fp32 at least."""
    total_NQ = None
    for at, W_pQ in pieces:
        if len(W_pQ) == x_NP.shape[1]:
            return _multiply(x_NP, W_pQ, bias_Q, out_NQ)
        if total_NQ is None:
            total_NQ = _multiply(x_NP[:, at], W_pQ, bias_Q, out_NQ).to(torch.promote_types(x_NP.dtype, torch.float32))
        elif total_NQ.dtype == x_NP.dtype:
            total_NQ.addmm_(x_NP[:, at], W_pQ)
        else:
            total_NQ += x_NP[:, at] @ W_pQ
    return total_NQ.to(x_NP.dtype)


def _multiply(
    left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)


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
        # Nor does the gradient of a product without an adapter, such as a surrogate's, but for one of gate and up.
        is_plain = linear is not None and not node.adapted and node.activation is None
        if node.name() in ("AddBackward0", "ViewBackward0") or is_plain:
            for following, _ in node.next_functions:
                consumers[following] -= 1
                if following is not None and not consumers[following]:
                    stack.append(following)
