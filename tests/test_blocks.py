"""Rounding against exact arithmetic, buckets against torch's own, and threads that neither mix nor pile up results."""

import itertools
import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedlarge import blocks
from hf_fedlarge.blocks import Buckets, add_product, in_order, round_fp64, workers
from hf_fedlarge.kernels import kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Bits of precision and exponent of the smallest normal number.
FORMATS = {torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}


def nearest(x, dtype):
    """The value of `dtype` nearest to the float `x`, ties to even, in exact arithmetic."""
    if x == 0 or not math.isfinite(x):
        return x
    precision, smallest = FORMATS[dtype]
    quantum = Fraction(2) ** (max(math.frexp(x)[1] - 1, smallest) - precision + 1)
    rounded = round(Fraction(abs(x)) / quantum) * quantum
    return math.copysign(math.inf if rounded > torch.finfo(dtype).max else float(rounded), x)


@st.composite
def near_ties(draw, dtype):
    """A float at, or by as little as possible beside, the middle between two neighbours of `dtype`."""
    bits = draw(st.integers(0, {2: 2**15, 4: 2**31}[dtype.itemsize] - 2))
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low, high = torch.tensor([bits, bits + 1], dtype=integer).view(dtype).double().tolist()
    if not math.isfinite(low):
        return low
    if not math.isfinite(high):
        high = low + (low - nearest(low * (1 - 2.0 ** -FORMATS[dtype][0]), dtype))
    middle = (low + high) / 2
    step = draw(st.sampled_from([0, 1, -1, 2**20, -(2**20), 2**30]))
    return draw(st.sampled_from([1, -1])) * (middle + step * math.ulp(middle))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_rounding_is_exact(dtype, data):
    values = data.draw(st.lists(near_ties(dtype) | st.floats(allow_nan=False), min_size=1, max_size=20))
    found = round_fp64(torch.tensor(values, dtype=torch.float64), dtype)
    assert found.dtype == dtype
    for x, rounded in zip(values, found.double().tolist(), strict=True):
        if math.isnan(x):
            assert math.isnan(rounded)
        else:
            assert (rounded, math.copysign(1, rounded)) == (nearest(x, dtype), math.copysign(1, x)), x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_every_tie(dtype):
    """All middles of a 16-bit dtype, and the fp64 numbers on both sides; torch's own conversion gets these wrong."""
    bits = torch.arange(2**15 - 1, dtype=torch.int16)
    values = bits.view(dtype).double()
    low, high = values[:-1], values[1:]
    finite = torch.isfinite(high)
    low, high, even = low[finite], high[finite], bits[:-1][finite] % 2 == 0
    middle = (low + high) / 2
    below, above = middle.nextafter(torch.zeros_like(middle)), middle.nextafter(torch.full_like(middle, torch.inf))
    for sign in (1, -1):
        assert torch.equal(round_fp64(sign * below, dtype).double(), sign * low)
        assert torch.equal(round_fp64(sign * above, dtype).double(), sign * high)
        assert torch.equal(round_fp64(sign * middle, dtype).double(), sign * torch.where(even, low, high))
    assert not torch.equal(below.to(dtype).double(), low)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_keeps_what_is_not_a_number(dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324, -5e-324, 0.0, -0.0], dtype=torch.float64)
    found = round_fp64(x, dtype)
    assert math.isnan(found[0])
    assert found[1:5].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert found[5:].tolist() == [0.0] * 4
    assert torch.signbit(found[5:]).tolist() == [False, True, False, True]


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    """Both ways of adding a product to bf16."""
    if request.param == "torch":
        monkeypatch.setattr(blocks, "kernels_for", lambda rows: None)
    elif kernels() is None:
        pytest.skip("nothing is compiled: there is no GCC, or HF_FEDLARGE_KERNELS=off")


@pytest.mark.parametrize("shape", [(3, 5), (300, 1000), (2, 2**18), (21, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_added_and_rounded_once(way, dtype, shape):
    """Values at ties and beside them by less than fp32 shows, which torch alone rounds wrong, and plain ones."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator).to(dtype)
    half = torch.finfo(dtype).eps / 2  # of the distance between two neighbours in [1, 2)
    rows.view(-1)[::7] = 1.0
    left = torch.randn(shape[0], 2, generator=generator).mul_(1e-12)
    left[:, 1] = half
    right = torch.randn(2, shape[1], generator=generator)
    right[1] = 1.0
    found, finite = add_product(rows, left, right, 1.0)
    exact = torch.addmm(rows.double(), left.double(), right.double())
    assert found.dtype == dtype
    assert finite
    assert torch.equal(found, round_fp64(exact, dtype))
    if dtype != torch.float32:
        assert not torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("rank", [0, 1, 3, 16, 70])
def test_a_product_of_any_rank(way, rank):
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randn(19, 75, generator=generator).bfloat16()
    left = torch.randn(rank, 19, generator=generator).T  # as a transposed matrix's factor comes
    right = torch.randn(rank, 75, generator=generator)
    found, finite = add_product(rows, left, right, 0.3)
    assert finite
    assert torch.equal(found, round_fp64(rows.double() + 0.3 * (left.double() @ right.double()), torch.bfloat16))


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        *itertools.product([1e-38, 1e-30, 1e-19, 1.0, 1e4, 1e8], [0.3, -1e-9, 1e9]),
        (1e30, 1e-60),
        (1e-30, 1e60),
        (1e25, 0.0),
    ],
)
def test_a_product_whose_terms_cancel_and_one_beyond_fp32(way, size, scale):
    """What fp32 makes of such sums is far off: terms of size² that leave a thousandth of one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(19, 75, generator=generator).bfloat16()
    left = torch.randn(19, 4, generator=generator).mul_(size)
    right = torch.randn(4, 75, generator=generator).mul_(size)
    left[:, 2], right[2] = left[:, 1], -right[1]
    left[:, 0] *= 1e-3
    left[:, 3] = 0
    found, finite = add_product(rows, left, right, scale)
    exact = rows.double() + scale * (left[:, :1].double() @ right[:1].double())
    assert finite
    assert torch.equal(found, round_fp64(exact, torch.bfloat16))


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_factors_that_are_not_finite_spoil_their_own_rows_alone(way, factor):
    rows, left = torch.ones(9, 40, dtype=torch.bfloat16), torch.full((9, 2), 0.5)
    left[3, 1] = factor
    found, finite = add_product(rows, left, torch.ones(2, 40), 1.0)
    assert not finite
    assert not found[3].isfinite().any()
    assert (found[torch.arange(9) != 3] == 2).all()


@pytest.mark.parametrize("row", [0, 4, 8], ids="row {}".format)
@pytest.mark.parametrize("column", [0, 31, 32, 39], ids="column {}".format)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3.4e38])
def test_a_sum_beyond_the_dtype_is_noticed_wherever_it_is(way, value, row, column):
    rows = torch.zeros(9, 40, dtype=torch.bfloat16)
    rows[row, column] = value  # 3.4e38 is nearer to infinity than to bf16's largest number
    one = torch.zeros(9, 1)
    found, finite = add_product(rows, one, torch.zeros(1, 40), 1.0)
    assert not finite
    assert not found[row, column].isfinite()
    found[row, column] = 0
    assert not found.any()


# Buckets


def test_buckets_are_torch_s_own_at_and_beside_every_bound_and_cell():
    bounds = torch.tensor([-0.9, -0.4, -1 / 32, 0.0, 1e-3 + 1 / 32, 0.5, 0.7071])
    values = torch.cat([bounds, torch.linspace(-1, 1, 4 * 64 + 1), torch.tensor([-0.0, 1e-45, 1e-39]), torch.rand(999)])
    up, down = torch.full_like(values, torch.inf), torch.full_like(values, -torch.inf)
    near = torch.cat([values, values.nextafter(up), values.nextafter(down)])
    for x in (near, -near, near.clamp(-1, 1)):
        assert torch.equal(Buckets(bounds)(x).int(), torch.bucketize(x, bounds, out_int32=True))


def test_bounds_that_share_a_cell_are_our_own_bug():
    with pytest.raises(AssertionError, match="two bounds in a cell"):
        Buckets(torch.tensor([0.5, 0.501]))


# Several threads


def test_results_come_in_order_and_only_a_few_wait():
    started, taken = [], []

    def work(item):
        started.append(item)
        time.sleep(0.01 * (item % 3))
        return -item

    threads = torch.get_num_threads()
    with workers() as pool:
        assert {pool.submit(torch.get_num_threads).result(), torch.get_num_threads()} == {1}
        for result in in_order(pool, work, range(20), ahead=4):
            taken.append(result)
            assert len(started) <= len(taken) + 4
    assert taken == [-item for item in range(20)]
    assert torch.get_num_threads() == threads


def test_an_error_in_a_thread_arrives_and_ends_the_work():
    started = []

    def work(item):
        started.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"), workers() as pool:
        list(in_order(pool, work, range(1000), ahead=4))
    assert len(started) <= 5
