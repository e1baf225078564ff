"""Gated feed-forward layers against transformers' own."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, Phi3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from hf_fedlarge import gated
from hf_fedlarge.gated import differentiate_gate, multiply_gate, replace_gates

SIZES = {"hidden_size": 6, "intermediate_size": 10, "num_attention_heads": 2}


class OutputMatrix(nn.Linear):
    """What a streamed one is to its layer: it may be called with a product that isn't computed yet."""

    takes_gated = True

    def forward(self, x):
        self.given = x
        return super().forward(x.value() if isinstance(x, gated.Gated) else x)


def feed_forward(activation="silu"):
    module = LlamaMLP(LlamaConfig(**SIZES, hidden_act=activation)).double()
    module.down_proj = OutputMatrix(10, 6, bias=False).double()
    return module


@pytest.mark.parametrize("activation", ["silu", "swish", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("cached", [1, 25, 2**18])
def test_value_and_gradients_are_those_of_autograd(monkeypatch, activation, cached):
    monkeypatch.setattr(gated, "_CACHED", cached)
    module = feed_forward(activation)
    assert replace_gates(module) == 1
    module(torch.randn(7, 6, dtype=torch.float64))
    found = module.down_proj.given.activation
    gate, up = (torch.randn(7, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad, value = torch.randn(7, 10, dtype=torch.float64), torch.empty(7, 10, dtype=torch.float64)
    expected = module.act_fn(gate) * up
    wanted = torch.autograd.grad(expected, [gate, up], grad)
    multiply_gate(found, gate.detach(), up.detach(), value)
    torch.testing.assert_close(value, expected.detach())
    again = torch.empty_like(value)
    for ours, theirs in zip(differentiate_gate(found, gate.detach(), up.detach(), grad, again), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(again, expected.detach())


def test_in_another_dtype_they_are_computed_in_it_and_rounded_once(monkeypatch):
    monkeypatch.setattr(gated, "kernels_for", lambda *tensors: None)
    gate, up, grad = torch.randn(3, 50, 10).unbind()
    activation = next(iter(gated._ACTIVATIONS.values()))
    low = [tensor.bfloat16() for tensor in (gate, up)]
    value = torch.empty(50, 10)
    multiply_gate(activation, *low, value)
    assert torch.equal(value, activation.value(low[0].float()) * low[1].float())
    exact = differentiate_gate(activation, *(tensor.float() for tensor in low), grad, None)
    for ours, theirs in zip(differentiate_gate(activation, *low, grad, None), exact, strict=True):
        assert torch.equal(ours, theirs.bfloat16())


def test_the_layer_gives_what_it_gave():
    module = feed_forward()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = module(x)
    assert replace_gates(module) == 1
    assert torch.equal(module(x), expected)
    assert isinstance(module.down_proj.given, gated.Gated)


def test_an_output_matrix_that_takes_tensors_only_is_given_one():
    module = feed_forward()
    module.down_proj.takes_gated = False
    replace_gates(module)
    module(torch.randn(5, 6, dtype=torch.float64))
    assert module.down_proj.given.shape == (5, 10)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_whoever_watches_the_output_matrix_sees_a_tensor(register):
    module, seen = feed_forward(), []
    replace_gates(module)
    getattr(module.down_proj, register)(lambda module, args, *output: seen.append(args[0]))
    module(torch.randn(5, 6, dtype=torch.float64))
    assert seen[0].shape == (5, 10)


class Scaled(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class Branched(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_what_computes_something_else_is_left_alone():
    llama = LlamaConfig(**SIZES)
    others = [Phi3MLP(Phi3Config(**SIZES)), GPT2MLP(10, GPT2Config(n_embd=6, n_head=2)), Scaled(llama), Branched(llama)]
    assert replace_gates(nn.ModuleList(others)) == 0
    assert replace_gates(LlamaMLP(LlamaConfig(**SIZES, hidden_act="relu"))) == 0
