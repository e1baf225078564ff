"""Rounding with errors that make up for one another, against the textbook's steps in fp64."""

import pytest
import torch

from hf_fedlarge.gptq import add_inputs, compensated
from hf_fedlarge.quantize import BLOCK, NF4_CODE
from hf_fedlarge.rounding import dense, round_trip

OUT, IN, N = 24, 3 * BLOCK, 2000


def matrix(inputs=IN, seed=0):
    return torch.randn(OUT, inputs, generator=torch.Generator().manual_seed(seed))


def moments(inputs=IN, seed=1):
    """Of inputs that go together, and are of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x *= torch.logspace(-1, 1, inputs)
    gram = torch.zeros(inputs, inputs)
    add_inputs(gram, x, torch.full((N, 1), 1 / N))
    torch.testing.assert_close(gram, x.T @ x / N, rtol=1e-3, atol=1e-3)
    return gram


def lost(V, W, gram):
    error = (V - W).double()
    return float((error @ gram.double() * error).sum())


def rounded(W):
    return dense(round_trip("w", "nf4", W)[1], torch.float32)


def by_the_book(W, gram, damping):
    """One column after the other, the inverse of what is left computed anew each time."""
    H = gram.double() + torch.diag(gram.diagonal().double() * damping)
    blocks = W.double().view(OUT, -1, BLOCK)
    scales = blocks.abs().amax(dim=2).repeat_interleave(BLOCK, dim=1)
    fixed = torch.zeros_like(blocks, dtype=torch.bool)
    fixed = fixed.scatter_(2, blocks.abs().argmax(dim=2, keepdim=True), True).view(OUT, -1)
    V, wanted = torch.empty_like(scales), W.double().clone()
    left = gram.diagonal().argsort(descending=True)
    while len(left):
        j, inverse = left[0], torch.linalg.inv(H[left][:, left])
        nearest = NF4_CODE.double()[(wanted[:, j, None] / scales[:, j, None] - NF4_CODE).abs().argmin(dim=1)]
        V[:, j] = torch.where(fixed[:, j], W[:, j].double(), nearest * scales[:, j])
        wanted[:, left] -= (wanted[:, j] - V[:, j])[:, None] / inverse[0, 0] * inverse[0]
        left = left[1:]
    return V


def test_it_takes_the_steps_of_the_optimal_brain_surgeon():
    W, gram = matrix(), moments()
    V = compensated(W, gram.clone(), damping=0.1)
    expected = by_the_book(W, gram, 0.1)
    # Where a value lies between two codes fp32 may choose the other, and all after it follow.
    same = (V - expected).abs() < 1e-4
    assert same.double().mean() > 0.98
    assert lost(V, W, gram) == pytest.approx(lost(expected, W, gram), rel=0.02)


def test_it_loses_much_less_than_rounding_each_value_by_itself_also_as_a_package_reads_it():
    W, gram = matrix(), moments()
    V = compensated(W, gram.clone()).to(torch.bfloat16)
    assert lost(rounded(V), W, gram) < 0.4 * lost(rounded(W), W, gram)


def test_rounded_once_more_it_has_the_same_codes_and_the_scales_of_plain_rounding():
    W = matrix()
    V = compensated(W, moments())
    again, plain = (round_trip("w", "nf4", values.to(torch.bfloat16))[0] for values in (V, W))
    codes = (V.view(-1, BLOCK) / W.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)).view(-1, 2)
    expected = (codes[..., None] - NF4_CODE).abs().argmin(dim=-1)
    torch.testing.assert_close(again["w"].flatten().long(), expected[:, 0] * 16 + expected[:, 1])
    for part in ("w.absmax", "w.nested_absmax"):
        torch.testing.assert_close(again[part], plain[part])


def test_where_inputs_have_nothing_in_common_it_is_plain_rounding():
    W = matrix()
    V = compensated(W, torch.diag(torch.rand(IN) + 0.1))
    torch.testing.assert_close(rounded(V), rounded(W))


def test_inputs_that_are_always_zero_and_a_matrix_of_zeros_are_no_trouble():
    gram = moments()
    gram[5], gram[:, 5] = 0, 0
    W = matrix()
    W[:, 0:BLOCK] = 0
    V = compensated(W, gram)
    assert V.isfinite().all()
    assert not V[:, 0:BLOCK].any()
    assert not compensated(torch.zeros(OUT, IN), torch.zeros(IN, IN)).any()


def test_rows_that_are_no_whole_blocks_stay_as_they_are():
    W = matrix(inputs=IN + 8)
    assert compensated(W, moments(IN + 8)).equal(W)
