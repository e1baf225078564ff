"""A frozen matrix and its adapter as one product, against the same written out."""

import pytest
import torch
from torch import nn

from hf_fedlarge.linear import Adapter, FrozenLinear, output_products
from hf_fedlarge.quantize import DenseWeight

INPUTS, OUTPUTS, RANK, SCALE = 7, 5, 3, 1.5


@pytest.fixture
def linear():
    torch.manual_seed(0)
    module = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64)
    weight = DenseWeight(module.weight.detach().clone())
    linear = FrozenLinear(module, weight, transposed=False)
    linear.place(weight.values.clone().view(-1), lambda linear: linear.slot)
    A, B = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((RANK, INPUTS), (OUTPUTS, RANK)))
    linear.adapter = Adapter(A, B, SCALE, None)
    return linear


def written_out(linear, x, dropped=None):
    A, B = linear.adapter.A, linear.adapter.B
    plain = x @ linear.weight.values.t() + linear.module.bias
    return plain + SCALE * ((x if dropped is None else dropped) @ A.t()) @ B.t()


def gradients(output, linear, x):
    return torch.autograd.grad((output * torch.arange(OUTPUTS)).sum(), [x, linear.adapter.A, linear.adapter.B])


def assert_same(linear, x, ours, expected):
    torch.testing.assert_close(ours, expected)
    for gradient, wanted in zip(gradients(ours, linear, x), gradients(expected, linear, x), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_value_and_gradients(linear):
    x = torch.randn(2, 4, INPUTS, dtype=torch.float64, requires_grad=True)
    assert_same(linear, x, linear.forward_with_adapter(x), written_out(linear, x))


def test_with_dropout_on_the_adapter_s_input(linear):
    mask = (torch.rand(4, INPUTS) < 0.5).double()
    linear.adapter.dropout = lambda x: x * mask
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    assert_same(linear, x, linear.forward_with_adapter(x), written_out(linear, x, x * mask))


def test_the_dense_matrix_may_be_gone_between_forward_and_backward(linear):
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    expected = gradients(written_out(linear, x), linear, x)
    output = linear.forward_with_adapter(x)
    linear.slot.fill_(torch.nan)
    linear.slot.copy_(linear.weight.values)  # the backward's visit
    for ours, wanted in zip(gradients(output, linear, x), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_gradients_need_no_value(linear):
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    expected = gradients(written_out(linear, x), linear, x)
    linear.value_unused = True
    output = linear.forward_with_adapter(x)
    assert not output.any()
    for ours, wanted in zip(gradients(output, linear, x), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_output_projections_are_those_that_are_only_added(linear):
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, OUTPUTS, dtype=torch.float64, requires_grad=True)
    product = linear.forward_with_adapter(x)
    assert list(output_products(residual + product)) == [linear]
    assert list(output_products((residual + product.view(2, 2, OUTPUTS).flatten(0, 1)) + residual)) == [linear]
    assert list(output_products(residual * product)) == []
    assert list(output_products(torch.relu(residual + product))) == []
    # Added, but something else asks for its value too.
    assert list(output_products(residual + product + product.square())) == []


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("trains", ["A", "B"])
def test_with_a_frozen_factor_only_the_other_s_gradient_is_computed(linear, monkeypatch, trains, dropout):
    mask = (torch.rand(4, INPUTS) < 0.5).double()
    linear.adapter.dropout = (lambda x: x * mask) if dropout else None
    x = torch.randn(4, INPUTS, dtype=torch.float64, requires_grad=True)
    expected = gradients(linear.forward_with_adapter(x), linear, x)
    frozen = {"A": linear.adapter.B, "B": linear.adapter.A}[trains].requires_grad_(False)
    output = linear.forward_with_adapter(x)
    # What only the frozen one's gradient needs isn't kept for it.
    saved = output.grad_fn.saved_tensors
    assert [tensor is None for tensor in saved[:2]] == ([False, True] if trains == "A" else [True, False])
    (output * torch.arange(OUTPUTS)).sum().backward()
    assert frozen.grad is None
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(getattr(linear.adapter, trains).grad, expected[1 if trains == "A" else 2])
