"""RMSNorm in closed form against transformers' own."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_fedlarge.norm import replace_norms, rms_norm

D = 96


def norm(kind=LlamaRMSNorm, dtype=torch.float64):
    module = kind(D, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.rand(D, generator=torch.Generator().manual_seed(1)) + 0.5)
    return module


def test_the_gradient_is_that_of_the_formula():
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(D, dtype=torch.float64)
    # fp32 inside: gradcheck's tolerances are for that.
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x)[0]
    plain = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(ours, torch.autograd.grad(plain.square().sum(), x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_transformers_own(dtype):
    module = norm(dtype=dtype)
    x = torch.randn(4, 7, D, dtype=dtype, requires_grad=True)
    grad = torch.randn(4, 7, D, dtype=dtype)
    expected = module(x)
    wanted = torch.autograd.grad(expected, x, grad)[0]
    assert replace_norms(nn.ModuleList([module])) == 1
    torch.testing.assert_close(module(x), expected)
    found = torch.autograd.grad(module(x), x, grad)[0]
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted)
        return
    # transformers' rounds on the way, to bf16, and is off by more.
    exact = x.detach().double().requires_grad_()
    truth = (exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * module.weight.double()).mul(grad).sum()
    [truth] = torch.autograd.grad(truth, exact)
    assert (found - truth).norm() <= (wanted - truth).norm()


def test_what_computes_something_else_is_left_alone():
    block = nn.ModuleList([norm(Gemma3RMSNorm, torch.float32), nn.LayerNorm(D)])
    x = torch.randn(2, D)
    expected = [module(x) for module in block]
    assert replace_norms(block) == 0
    for module, value in zip(block, expected, strict=True):
        assert torch.equal(module(x), value)


def test_a_norm_that_trains_is_left_alone():
    assert replace_norms(nn.ModuleList([norm().requires_grad_(True)])) == 0
