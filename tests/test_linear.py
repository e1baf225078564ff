"""A frozen matrix and its adapter as one product, against the same written out."""

import pytest
import torch
from torch import nn

from hf_fedlarge.gated import Activation, Gated
from hf_fedlarge.linear import Adapter, Casts, FrozenLinear, output_products
from hf_fedlarge.quantize import DenseWeight

INPUTS, OUTPUTS, RANK, SCALE = 7, 5, 3, 1.5


@pytest.fixture
def linear():
    torch.manual_seed(0)
    module = nn.Linear(INPUTS, OUTPUTS, dtype=torch.float64)
    weight = DenseWeight(module.weight.detach().clone())
    linear = FrozenLinear(module, weight, transposed=False)
    linear.place(
        weight.values.clone().view(-1),
        torch.full((1,), torch.nan, dtype=torch.float64),
        Casts(torch.float64),
        lambda linear: [(slice(0, OUTPUTS), linear.slot)],
    )
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
    inputs, _, reduced, *_ = output.grad_fn.saved_tensors
    assert [inputs is None, reduced is None] == ([False, True] if trains == "A" else [True, False])
    (output * torch.arange(OUTPUTS)).sum().backward()
    assert frozen.grad is None
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(getattr(linear.adapter, trains).grad, expected[1 if trains == "A" else 2])


# Of a product of gate and branch that isn't computed yet


def gated_inputs():
    gate, up = (torch.randn(2, 4, INPUTS, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return Gated(gate, up, Activation("silu", nn.functional.silu, torch.ops.aten.silu_backward))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("trains", ["both", "A", "B", "neither"])
def test_a_gated_product_s_value_and_gradients(linear, trains, dropout):
    mask = (torch.rand(2, 4, INPUTS) < 0.5).double()
    linear.adapter.dropout = (lambda x: x * mask) if dropout else None
    linear.adapter.A.requires_grad_(trains in ("both", "A"))
    linear.adapter.B.requires_grad_(trains in ("both", "B"))
    x = gated_inputs()
    value = x.value()
    expected = written_out(linear, value, value * mask if dropout else None)
    output = linear.forward_with_adapter(x)
    torch.testing.assert_close(output, expected)
    wanted = [tensor for tensor in (x.gate, x.up, linear.adapter.A, linear.adapter.B) if tensor.requires_grad]
    weights = torch.arange(OUTPUTS)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), wanted) for y in (output, expected))
    for found, gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, gradient)


def test_a_gated_product_without_an_adapter(linear):
    x = gated_inputs()
    expected = x.value() @ linear.weight.values.t() + linear.module.bias
    output = linear.forward(x)
    torch.testing.assert_close(output, expected)
    ours, theirs = (torch.autograd.grad(y.square().sum(), [x.gate, x.up]) for y in (output, expected))
    for found, gradient in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, gradient)
    assert all(saved is not None for saved in linear.forward(x).grad_fn.saved_tensors[:2])


# Products of another dtype than what surrounds them


def test_an_input_is_cast_once_for_the_matrices_that_take_it():
    casts = Casts(torch.float32)
    x = torch.randn(3, 4).bfloat16()
    first = casts.inputs(x)
    assert torch.equal(first, x.float())
    first.fill_(7)  # what a second cast would undo
    assert casts.inputs(x.view(3, 4)).eq(7).all()
    for changed in (x.clone(), x.t().contiguous().t(), x[:2], x.mul_(2)):
        assert torch.equal(casts.inputs(changed), changed.float())
    casts.forget()
    assert torch.equal(casts.inputs(x), x.float())


def test_a_tensor_that_came_in_the_place_of_one_that_is_gone_is_cast():
    casts = Casts(torch.float32)
    for number in range(5):
        x = torch.full((100, 100), float(number)).bfloat16()
        assert casts.inputs(x).eq(number).all()
        del x


def test_nothing_is_cast_where_nothing_has_to_be():
    casts = Casts(torch.float32)
    x = torch.randn(3, 4)
    assert casts.inputs(x) is x
    assert casts.gradient(x) is x
    assert casts.room((2, 2), "product", x) is None


def test_what_was_cast_in_inference_can_be_used_after_it():
    casts = Casts(torch.float32)
    with torch.inference_mode():
        for number in range(2):
            assert casts.inputs(torch.full((2, 2), float(number)).bfloat16()).eq(number).all()
    assert casts.inputs(torch.full((2, 2), 5.0).bfloat16()).eq(5).all()
