"""The streamed head and its loss equal plain torch, for any transform of the logits and any cut of the vocabulary."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from hf_fedlarge import loss as loss_module
from hf_fedlarge.architectures import LogitTransform
from hf_fedlarge.loss import StreamedHead, causal_loss
from hf_fedlarge.quantize import DenseWeight, decode, encode

V, D, N = 300, 64, 50
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "cap": LogitTransform(cap=3.0),
    "scale and cap": LogitTransform(scale=2.0, cap=3.0),
}
each_transform = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
each_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
CPU = torch.device("cpu")


def some(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_of(count, vocabulary=V):
    # Both ends of the vocabulary and of every slice are among them.
    return torch.arange(count) * 37 % vocabulary


def make_head(*, transform=TRANSFORMS["plain"], with_bias=False, rows=V, dtype=torch.float32, weight=None):
    matrix = some(V, D) / 4
    head = StreamedHead(weight or DenseWeight(matrix), some(V, seed=1) if with_bias else None, transform, dtype, CPU)
    head.rows = rows
    return head, matrix


def plain_loss(hidden, matrix, bias, transform, labels):
    logits = linear(hidden, matrix, bias) * transform.scale
    if transform.cap is not None:
        logits = transform.cap * torch.tanh(logits / transform.cap)
    return cross_entropy(logits.float(), labels, reduction="sum")


def with_gradient(loss_of, hidden):
    hidden = hidden.clone().requires_grad_()
    loss = loss_of(hidden)
    loss.backward()
    return loss.detach(), hidden.grad


def distance(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


# The loss


@each_transform
@each_bias
@pytest.mark.parametrize(("rows", "positions"), [(V, 1024), (128, 1024), (64, 16), (7, 49), (1, 50)])
def test_the_loss_and_its_gradient_equal_plain_torch(monkeypatch, transform, with_bias, rows, positions):
    monkeypatch.setattr(loss_module, "_POSITIONS", positions)
    head, matrix = make_head(transform=transform, with_bias=with_bias, rows=rows)
    hidden, labels = some(N, D, seed=2), labels_of(N)
    bias = head.bias.double() if with_bias else None
    truth = with_gradient(lambda hidden: plain_loss(hidden, matrix.double(), bias, transform, labels), hidden.double())
    found = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    assert distance(found[0], truth[0]) <= 1e-5
    assert distance(found[1], truth[1]) <= 1e-5


@each_transform
def test_large_logits_neither_overflow_nor_vanish(transform):
    head, matrix = make_head(transform=transform, rows=64)
    hidden, labels = some(N, D, seed=2) * 100, labels_of(N)
    truth = with_gradient(lambda hidden: plain_loss(hidden, matrix.double(), None, transform, labels), hidden.double())
    found = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    assert distance(found[0], truth[0]) <= 1e-5
    assert distance(found[1], truth[1]) <= 1e-4


@each_transform
@pytest.mark.parametrize("confidence", [0.0, 1.0, 3.0])
def test_bf16_is_as_near_the_truth_as_plain_bf16_also_where_the_model_is_sure(transform, confidence):
    # Sure of the label, the gradient is small: softmax-weighted mean and label's row nearly cancel.
    head, matrix = make_head(transform=transform, rows=64, dtype=torch.bfloat16)
    matrix, labels = matrix.bfloat16(), labels_of(N)
    head.weight = DenseWeight(matrix)
    hidden = (some(N, D, seed=2) / 4 + confidence * matrix[labels].float()).bfloat16()
    truth = with_gradient(lambda hidden: plain_loss(hidden, matrix.double(), None, transform, labels), hidden.double())
    plain = with_gradient(lambda hidden: plain_loss(hidden, matrix, None, transform, labels), hidden)
    found = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    assert distance(found[1], truth[1]) <= 1.2 * distance(plain[1], truth[1])
    assert distance(found[0], truth[0]) <= 1.2 * distance(plain[0], truth[0]) + 1e-5


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_a_compressed_head_has_the_loss_of_its_dequantized_rows(codec):
    matrix = some(V, D) / 4
    weight = decode("head", codec, encode("head", (V, D), codec, [matrix]))
    dense = torch.empty(V, D)
    weight.read_rows(0, V, dense)
    head, _ = make_head(weight=weight, rows=128)
    hidden, labels = some(N, D, seed=2), labels_of(N)
    truth = with_gradient(lambda hidden: plain_loss(hidden, dense, None, head.transform, labels), hidden)
    found = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    assert distance(found[0], truth[0]) <= 1e-5
    assert distance(found[1], truth[1]) <= 1e-5


def test_autocast_changes_nothing_and_the_outer_gradient_scales():
    head, _ = make_head(rows=64)
    hidden, labels = some(N, D, seed=2), labels_of(N)
    loss, gradient = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    with torch.autocast("cpu", torch.bfloat16):
        same, same_gradient = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    assert torch.equal(loss, same)
    assert torch.equal(gradient, same_gradient)
    _, tripled = with_gradient(lambda hidden: 3 * head.cross_entropy(hidden, labels), hidden)
    torch.testing.assert_close(tripled, 3 * gradient)


def test_without_a_gradient_the_loss_is_the_same():
    head, _ = make_head(rows=64)
    hidden, labels = some(N, D, seed=2), labels_of(N)
    loss, _ = with_gradient(lambda hidden: head.cross_entropy(hidden, labels), hidden)
    with torch.no_grad():
        assert torch.equal(head.cross_entropy(hidden, labels), loss)


# Labels


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_only_labelled_positions_count_shifted_by_one(items):
    head, matrix = make_head(rows=64)
    hidden = some(3, 9, D, seed=2)
    labels = labels_of(27).view(3, 9)
    labels[0, :4] = labels[2] = -100
    logits = linear(hidden, matrix)[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, labels[:, 1:].flatten(), reduction="mean" if items is None else "sum")
    torch.testing.assert_close(causal_loss(head, hidden, labels, items), expected if items is None else expected / 7)


@pytest.mark.parametrize("items", [None, 7])
def test_without_a_label_the_loss_and_the_gradient_are_zero(items):
    head, _ = make_head(rows=64)
    # The first label has nothing before it.
    labels = torch.full((2, 5), -100)
    labels[:, 0] = 3
    loss, gradient = with_gradient(lambda hidden: causal_loss(head, hidden, labels, items), some(2, 5, D, seed=2))
    assert loss == 0
    assert gradient.shape == (2, 5, D)
    assert (gradient == 0).all()


# The logits


@each_bias
@pytest.mark.parametrize("rows", [V, 128, 7])
@pytest.mark.parametrize("shape", [(N,), (2, 5), (0, 5)])
def test_the_logits_and_their_gradient_equal_a_linear_layer(with_bias, rows, shape):
    head, matrix = make_head(with_bias=with_bias, rows=rows, transform=TRANSFORMS["scale and cap"])
    hidden, weights = some(*shape, D, seed=2), some(*shape, V, seed=3)
    truth = with_gradient(lambda hidden: (linear(hidden, matrix, head.bias) * weights).sum(), hidden)
    found = with_gradient(lambda hidden: (head.logits(hidden) * weights).sum(), hidden)
    torch.testing.assert_close(head.logits(hidden), linear(hidden, matrix, head.bias))
    torch.testing.assert_close(found[1], truth[1], rtol=1e-4, atol=1e-5)


# Memory


def test_neither_the_dense_head_nor_the_logits_of_the_vocabulary_exist(monkeypatch):
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", 256 * D * 4)
    vocabulary, count = 8192, 600
    matrix = some(vocabulary, D).to(torch.int8)
    weight = decode("head", "int8", {"head": matrix, "head_scale": torch.full((vocabulary,), 0.01)})
    head = StreamedHead(weight, None, TRANSFORMS["plain"], torch.float32, CPU)
    assert head.rows == 256
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple | list) else [result]
            made = [item.numel() for item in results if isinstance(item, torch.Tensor) and item.is_floating_point()]
            largest = max(largest, *made, 0)
            return result

    with Watch():
        with_gradient(lambda hidden: head.cross_entropy(hidden, labels_of(count, vocabulary)), some(count, D, seed=2))
    assert largest <= count * 256
    assert len(list(head.slices())) == vocabulary // 256
