"""Gated feed-forward layers (arXiv 2002.05202) of which gate and branch are kept, and nothing that is made of them.

down(act(gate) · up): a graph of transformers' operations keeps gate, act(gate), up and their product, twice what is
needed, and goes through memory for each. Here the product is made where it is multiplied with the output matrix, on a
CPU some tokens at a time that stay in a core's cache, and again in backward (`hf_fedlarge.linear`).

Shapes: N tokens, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from hf_fedlarge.kernels import kernels_for

_CACHED = 2**18  # values of a tensor that are computed at a time


@dataclass(frozen=True)
class Activation:
    """An activation and its derivative times a gradient; its name among the kernels."""

    name: str
    value: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


_ACTIVATIONS = {
    SiLUActivation: Activation("silu", nn.functional.silu, torch.ops.aten.silu_backward),
    nn.SiLU: Activation("silu", nn.functional.silu, torch.ops.aten.silu_backward),
    GELUTanh: Activation(
        "gelu_tanh",
        partial(nn.functional.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
}


@dataclass(frozen=True)
class Gated:
    """act(gate) · up (…, F), not computed yet: what an output matrix is called with in place of a tensor."""

    gate: torch.Tensor
    up: torch.Tensor
    activation: Activation

    def value(self) -> torch.Tensor:
        """As transformers computes it, with a graph."""
        return self.activation.value(self.gate) * self.up


def multiply_gate(activation: Activation, gate_NF: torch.Tensor, up_NF: torch.Tensor, out_NF: torch.Tensor) -> None:
    """Write act(gate) · up to `out_NF`, computed in its dtype."""
    compiled = kernels_for(gate_NF, up_NF)
    if compiled is not None and out_NF.is_contiguous():
        compiled.gate(activation.name, gate_NF, up_NF, out_NF)
        return
    for gate, up, out in _pieces(gate_NF, up_NF, out_NF):
        torch.mul(activation.value(gate.to(out.dtype)), up.to(out.dtype), out=out)


def differentiate_gate(
    activation: Activation,
    gate_NF: torch.Tensor,
    up_NF: torch.Tensor,
    grad_NF: torch.Tensor,
    value_NF: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, in their dtype, from that of act(gate) · up.

    Args:
        activation: act.
        gate_NF: the gate.
        up_NF: the branch.
        grad_NF: the gradient; its dtype is that of the computation.
        value_NF: where act(gate) · up is written to as well.
    """
    compiled = kernels_for(gate_NF, up_NF)
    if compiled is not None and grad_NF.is_contiguous():
        return compiled.gate_gradient(activation.name, gate_NF, up_NF, grad_NF, value_NF)
    grad_gate_NF, grad_up_NF = torch.empty_like(gate_NF), torch.empty_like(up_NF)
    values = (value_NF,) if value_NF is not None else ()
    for gate, up, grad, grad_gate, grad_up, *value in _pieces(
        gate_NF, up_NF, grad_NF, grad_gate_NF, grad_up_NF, *values
    ):
        gate, up = gate.to(grad.dtype), up.to(grad.dtype)
        activated = activation.value(gate)
        for out in value:
            torch.mul(activated, up, out=out)
        torch.mul(activated, grad, out=grad_up)
        grad_gate.copy_(activation.gradient(up * grad, gate))
    return grad_gate_NF, grad_up_NF


def _pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    count, neurons = tensors[0].shape
    rows = max(1, _CACHED // neurons if tensors[0].device.type == "cpu" else count)
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def replace_gates(block: nn.Module) -> int:
    """Make the block's gated feed-forward layers hand `Gated` to their output matrix; others are left as they are.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for module in block.modules():
        activation = _ACTIVATIONS.get(type(getattr(module, "act_fn", None)))
        if activation is not None and _is_gated(module):
            module.forward = partial(_forward, module, activation)
            replaced += 1
    return replaced


def _is_gated(module: nn.Module) -> bool:
    """Whether its forward is down(act(gate(x)) · up(x)), tried with functions for the three."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    x = torch.linspace(-2, 2, 9)
    stand_in = SimpleNamespace(
        gate_proj=lambda x: x - 0.5, up_proj=lambda x: 2 * x + 1, down_proj=lambda x: 3 * x, act_fn=module.act_fn
    )
    try:
        found = type(module).forward(stand_in, x)
    except (AttributeError, TypeError):  # it asks for more than that
        return False
    return isinstance(found, torch.Tensor) and torch.equal(found, 3 * (module.act_fn(x - 0.5) * (2 * x + 1)))


def _forward(module: nn.Module, activation: Activation, x: torch.Tensor) -> Any:
    gated = Gated(module.gate_proj(x), module.up_proj(x), activation)
    # Whoever wraps the output matrix or watches it expects to see a tensor.
    down = module.down_proj
    watched = down._forward_hooks or down._forward_pre_hooks or down._backward_hooks or down._backward_pre_hooks
    return down(gated if getattr(down, "takes_gated", False) and not watched else gated.value())
