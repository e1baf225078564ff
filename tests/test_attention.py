"""Causal attention and its gradient against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_fedlarge import attention
from hf_fedlarge.attention import causal_attention


def some(heads, groups, dtype, tokens=37):
    generator = torch.Generator().manual_seed(0)
    # As a model has them: (B, T, H, E), turned.
    return [
        torch.randn(2, tokens, count, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    ]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_exact_attention(dtype, groups, scale, tokens, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(attention, "kernels_for", lambda *_: None)
    ours, exact = some(6, groups, dtype, tokens), some(6, groups, dtype, tokens)
    exact = [x.detach().double().requires_grad_() for x in exact]
    grad = torch.randn(2, tokens, 6, 16).to(dtype)
    found = causal_attention(*ours, scale)
    expected = scaled_dot_product_attention(*exact, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)
    assert found.dtype == dtype
    assert found.is_contiguous()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2e-2}
    torch.testing.assert_close(found.double(), expected, **close)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for gradient, truth in zip(torch.autograd.grad(found, ours, grad), wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), truth, **close)


def test_what_is_kept_is_what_came_and_went():
    q, k, v = some(4, 2, torch.bfloat16)
    saved = causal_attention(q, k, v, None).grad_fn.saved_tensors
    assert [x.dtype for x in saved] == [torch.bfloat16] * 4 + [torch.float32]
    assert [x.data_ptr() for x in saved[:3]] == [x.data_ptr() for x in (q, k, v)]


def test_a_gradient_of_the_gradient_is_refused():
    q, k, v = some(4, 2, torch.bfloat16)
    (gradient,) = torch.autograd.grad(causal_attention(q, k, v, None).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
