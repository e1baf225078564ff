"""Exact arithmetic on blocks of rows, with every core busy on a block of its own.

That is faster than all threads on one operation after another: what a block needs stays in a core's cache, and hashing
and writing go on beside. torch's own functions would do, too; those here give the same bits in a fraction of the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from hf_fedlarge.kernels import kernels_for
from hf_fedlarge.memory import keep_freed_memory

ROUNDED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A piece that is computed at a time: in fp64 a megabyte, half of what a core's cache holds.
_PIECE_ROWS, _PIECE_COLUMNS = 128, 1024
_CELLS = 32  # of `Buckets`, for each unit
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with; meanwhile an operation of torch stays on the thread that calls it."""
    keep_freed_memory()  # each block needs again what the one before it gave back
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(count)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], ahead: int = 6
) -> Iterator[ResultT]:
    """`function` of every item, in their order; at most `ahead` results wait, so memory stays bounded."""
    pending: deque[Future[ResultT]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def add_product(rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> tuple[torch.Tensor, bool]:
    """rows + scale · left right, every value as computed in fp64 and rounded once to the dtype of `rows`.

    For bf16 a compiled kernel does it, where there is one, in one pass over memory.

    Args:
        rows: (n, m) in float32, float16 or bfloat16.
        left: (n, r) in fp32.
        right: (r, m) in fp32.
        scale: the factor before the product.

    Returns:
        The sum, and whether all its values are finite.
    """
    if compiled := kernels_for(rows):
        return compiled.add_product(rows, left.contiguous(), right.contiguous(), scale)
    left, right, merged = left.double(), right.double(), torch.empty_like(rows)
    for piece in _slices(len(rows), _PIECE_ROWS):
        for columns in _slices(rows.shape[1], _PIECE_COLUMNS):
            total = rows[piece, columns].double().addmm_(left[piece], right[:, columns], alpha=scale)
            merged[piece, columns] = round_fp64(total, rows.dtype)
    return merged, all(extreme.isfinite() for extreme in merged.aminmax())  # much faster than asking every value


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def round_fp64(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` rounded once, to the nearest value of `dtype`, ties to even; beyond its range infinite, NaN stays NaN.

    torch goes from fp64 to fp16 and bf16 by way of fp32, and rounding twice is wrong where the first rounding makes
    a tie. So 13 bits of precision are kept first, rounded to odd: cut, and the last one set if anything was lost.
    That is two bits more than either dtype has, enough to see on which side of a tie x was (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819), and few enough that fp32 holds them even where bf16 is subnormal.

    Args:
        x: fp64, of any shape.
        dtype: float32, float16 or bfloat16.
    """
    assert x.dtype == torch.float64, x.dtype
    assert dtype in ROUNDED_DTYPES, dtype
    if dtype == torch.float32:
        return x.float()
    bits = x.view(torch.int64)
    cut = (1 << 53 - 13) - 1
    # The sum carries into the last kept bit unless all the bits that are cut are zero; "or" makes the carry stick.
    odd = bits.bitwise_and(cut).add_(cut).bitwise_or_(bits).bitwise_and_(~cut)
    return odd.view(torch.float64).to(dtype)


class Buckets:
    """`torch.bucketize` for values in [−1, 1] and few bounds, without its bisection: how many bounds lie below each.

    The range is cut into equal cells with one bound or none in each. The bounds below a value are those in the cells
    before its own, and the one in its own if that is smaller. However `_cell` rounds, it never falls where the value
    grows: the values of a cell are an interval, so the answer is exact.

    Args:
        bounds: fp32, ascending, more than 1 / _CELLS apart.
    """

    def __init__(self, bounds: torch.Tensor) -> None:
        cells = self._cell(bounds)
        assert len(cells.unique()) == len(bounds), "two bounds in a cell"
        self._below = torch.bucketize(torch.arange(2 * _CELLS + 1), cells).to(torch.uint8)
        self._bound = torch.full((2 * _CELLS + 1,), torch.inf).index_copy_(0, cells.long(), bounds)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """The counts, uint8, for a vector of fp32 values."""
        cells = self._cell(values)
        # The sign bit of bound − value, drawn out to −1; comparing into booleans takes five times as long.
        above = self._bound.index_select(0, cells).sub_(values).view(torch.int32).bitwise_right_shift_(31)
        return self._below.index_select(0, cells).sub_(above.to(torch.uint8))

    @staticmethod
    def _cell(values: torch.Tensor) -> torch.Tensor:
        return values.mul(_CELLS).add_(_CELLS).to(torch.int32)
