"""Where frozen matrices are dense while they are used: one buffer that is written over and over.

A fresh tensor for every dequantized matrix costs page faults worth ten times the dequantization. The arena holds a
whole block, which is dequantized once a visit, or, where memory is scarce, some rows of a matrix at a time, dequantized
whenever a product needs them. On CUDA there are two arenas of a block: while one block computes, the next is copied and
dequantized into the other on a second stream. Where products take matrices as they are stored (`hf_fedlarge.packed`) it
holds nothing.

Products may have another dtype than all else (`hf_fedlarge.processor`); the arena has theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from hf_fedlarge.linear import Casts, FrozenLinear
from hf_fedlarge.memory import fetch_pages
from hf_fedlarge.packed import work_bytes
from hf_fedlarge.processor import product_dtype

Held = Literal["nothing", "rows", "block"]

# Where no budget was set, a block in fp32 that takes no more than this is held whole.
UNASKED_BLOCK_BYTES = 2**27
# Of some rows at a time: few enough to stay in a cache, enough for a product's full rate.
PIECE_BYTES = 2**24
_ALIGNMENT = 64  # rows, so that a piece begins and ends with a block of NF4


def _buffers(device: torch.device, held: Held) -> int:
    return 2 if device.type == "cuda" and held == "block" else 1


def least_held(
    blocks: list[list[FrozenLinear]], dtype: torch.dtype, device: torch.device, room: int | None = None
) -> Held:
    """What to hold for a computation in `dtype`, with `room` for it and as much again; None: nobody asked for less."""
    products = product_dtype(dtype, device)
    linears = [linear for block in blocks for linear in block]
    # In another dtype what is multiplied is cast through buffers.
    if products == dtype and all(linear.can_stay_packed(products, device) for linear in linears):
        return "nothing"
    needed = Arena.bytes_needed(blocks, products, device, "block")
    if room is None:  # in fp32 a block takes twice as much
        return "block" if products == dtype or needed <= UNASKED_BLOCK_BYTES else "rows"
    return "block" if 2 * needed <= room else "rows"


@dataclass
class Counters:
    """What a streamed model did so far.

    Attributes:
        visits: blocks visited.
        dequantizations: matrices dequantized, in an arena or a product; of pieces of one, those that make it whole.
        bytes_read: stored bytes that were read for them.
        arena_bytes: size of the buffers.
        activation_bytes: the most that was held from a forward pass for its backward.
    """

    visits: int = 0
    dequantizations: int = 0
    bytes_read: int = 0
    arena_bytes: int = 0
    activation_bytes: int = 0


class Arena:
    """The buffers, and which matrices are in them.

    Args:
        blocks: the matrices of every block.
        dtype: of the computation, and of what layers show as their weight outside of a visit.
        device: where to compute.
        held: a block at a time, some rows of a matrix, or nothing, where all matrices can stay packed.
        counters: what to count in.
    """

    def __init__(
        self,
        blocks: list[list[FrozenLinear]],
        dtype: torch.dtype,
        device: torch.device,
        held: Held,
        counters: Counters,
    ) -> None:
        products = product_dtype(dtype, device)
        self.held, self._dtype = held, dtype
        self._blocks, self._counters, self._casts = blocks, counters, Casts(products)
        self._numbers = {linear: number for number, linears in enumerate(blocks) for linear in linears}
        count = _buffers(device, held)
        self._stream = torch.cuda.Stream(device) if count > 1 else None
        size = self.bytes_needed(blocks, products, device, held) // products.itemsize // count
        self._buffers = [torch.empty(size, dtype=products, device=device) for _ in range(count)]
        # A buffer's block, or its matrix and the first of its rows; what the second stream has to wait for, and what
        # has to wait for it.
        self._resident: list[int | tuple[FrozenLinear, int] | None] = [None] * count
        self._free: list[torch.cuda.Event | None] = [None] * count
        self._ready: list[torch.cuda.Event | None] = [None] * count
        self._visited: int | None = None
        # While a block computes, another thread waits for the disk.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch-pages")
        counters.arena_bytes = size * count * products.itemsize
        nothing = torch.full((1,), torch.nan, dtype=dtype, device=device)
        for number, linears in enumerate(blocks):
            start = 0
            for linear in linears:
                slot = self._buffers[number % count][start : start + linear.count] if held == "block" else None
                linear.place(slot, nothing, self._casts, self._pieces, stays_packed=held == "nothing")
                start += linear.count

    @staticmethod
    def bytes_needed(blocks: list[list[FrozenLinear]], products: torch.dtype, device: torch.device, held: Held) -> int:
        """Size of the buffers, for products of this dtype."""
        if held == "nothing":
            return 0
        if held == "block":
            values = max(sum(linear.count for linear in linears) for linears in blocks)
            return products.itemsize * values * _buffers(device, held)
        matrices = [linear for linears in blocks for linear in linears]
        fewest = products.itemsize * _ALIGNMENT * max(linear.weight.shape[1] for linear in matrices)
        return min(products.itemsize * max(linear.count for linear in matrices), max(fewest, PIECE_BYTES))

    @property
    def held_bytes(self) -> int:
        """What the buffers hold of the machine's memory: on a CPU nothing until they are first written."""
        touched = self._buffers[0].device.type != "cpu" or any(held is not None for held in self._resident)
        return self._counters.arena_bytes if touched else 0

    @property
    def cast_bytes(self) -> int:
        """What a token takes of the buffers of a product, or through which its factors are cast (see `Casts`)."""
        widths = [(linear.inputs, linear.outputs) for linears in self._blocks for linear in linears]
        widest_in, widest_out = (max(sizes) for sizes in zip(*widths, strict=True))
        if self.held == "nothing":
            return work_bytes(max(widest_in, widest_out))
        if self._casts.dtype == self._dtype:
            return 0
        return self._casts.dtype.itemsize * (widest_in + widest_out + max(widest_in, widest_out))

    def enter(self, number: int, following: int | None) -> None:
        """Begin a visit of a block; `following` is the block that is likely to be visited next."""
        self._visited = number
        if self.held == "block":
            self._load(number)
            place = number % len(self._buffers)
            if (ready := self._ready[place]) is not None:
                torch.cuda.current_stream(self._buffers[0].device).wait_event(ready)
            for linear in self._blocks[number]:
                linear.show()
        # After this block's own pages were read: the disk serves one at a time.
        if following is not None and following not in self._resident:
            stored = [part for linear in self._blocks[following] for part in linear.weight.stored]
            self._reader.submit(fetch_pages, stored)

    def leave(self, number: int, following: int | None) -> None:
        """End a visit; on CUDA the following block is made ready while the work just queued is being done."""
        self._visited = None
        self._casts.forget()
        if self.held != "block":
            return
        for linear in self._blocks[number]:
            linear.hide()
        if self._stream is not None:
            self._free[number % len(self._buffers)] = torch.cuda.current_stream(self._buffers[0].device).record_event()
            if following is not None:
                self._load(following)

    def _load(self, number: int) -> None:
        place = number % len(self._buffers)
        if self._resident[place] == number:
            return
        self._resident[place] = None
        if self._stream is None:
            self._dequantize(number)
        else:
            with torch.cuda.stream(self._stream):
                if (free := self._free[place]) is not None:
                    self._stream.wait_event(free)
                self._dequantize(number)
                self._ready[place] = self._stream.record_event()
        self._resident[place] = number

    def _dequantize(self, number: int) -> None:
        for linear in self._blocks[number]:
            linear.weight.read_rows(0, linear.weight.shape[0], linear.slot)
            self._count(linear)

    def _pieces(self, linear: FrozenLinear) -> Iterator[tuple[slice, torch.Tensor]]:
        """A matrix as it is stored, some rows at a time, each valid until the next is asked for."""
        assert self._visited == self._numbers[linear], "a frozen matrix was used outside a visit of its block"
        if self.held == "nothing":
            self._count(linear)
            return iter(())
        if self.held == "block":
            return iter([(slice(0, linear.weight.shape[0]), linear.slot)])
        return self._rows(linear)

    def _rows(self, linear: FrozenLinear) -> Iterator[tuple[slice, torch.Tensor]]:
        rows, columns = linear.weight.shape
        (buffer,) = self._buffers
        step = rows if linear.count <= len(buffer) else len(buffer) // columns // _ALIGNMENT * _ALIGNMENT
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            piece = buffer[: (stop - start) * columns].view(stop - start, columns)
            if self._resident[0] != (linear, start):
                self._resident[0] = None
                linear.weight.read_rows(start, stop, piece)
                self._resident[0] = linear, start
                if start == 0:
                    self._count(linear)
            yield slice(start, stop), piece

    def _count(self, linear: FrozenLinear) -> None:
        self._counters.bytes_read += sum(part.nbytes for part in linear.weight.stored)
        self._counters.dequantizations += 1
