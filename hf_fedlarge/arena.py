"""Where frozen matrices are dense while they are used: one buffer that is written over and over.

A fresh tensor for every dequantized matrix costs page faults worth ten times the dequantization. The arena holds a
whole block, which is dequantized once a visit, or, where memory is scarce, one matrix, dequantized whenever a product
needs it. On CUDA there are two arenas of a block: while one block computes, the next is copied and dequantized into the
other on a second stream.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from hf_fedlarge.linear import FrozenLinear
from hf_fedlarge.memory import fetch_pages


@dataclass
class Counters:
    """What a streamed model did so far.

    Attributes:
        visits: blocks visited.
        dequantizations: matrices dequantized.
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
        dtype: of the dense values.
        device: where to compute.
        whole_blocks: hold a block at a time; else a matrix.
        counters: what to count in.
    """

    def __init__(
        self,
        blocks: list[list[FrozenLinear]],
        dtype: torch.dtype,
        device: torch.device,
        whole_blocks: bool,
        counters: Counters,
    ) -> None:
        self.whole_blocks = whole_blocks
        self._blocks, self._counters = blocks, counters
        self._numbers = {linear: number for number, linears in enumerate(blocks) for linear in linears}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and whole_blocks else None
        size = self.bytes_needed(blocks, dtype, whole_blocks) // dtype.itemsize
        count = 1 if self._stream is None else 2
        self._buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(count)]
        # A buffer's block, or its matrix; what the second stream has to wait for, and what has to wait for it.
        self._resident: list[int | FrozenLinear | None] = [None] * count
        self._free: list[torch.cuda.Event | None] = [None] * count
        self._ready: list[torch.cuda.Event | None] = [None] * count
        self._visited: int | None = None
        # While a block computes, another thread waits for the disk.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch-pages")
        counters.arena_bytes = size * count * dtype.itemsize
        for number, linears in enumerate(blocks):
            start = 0
            for linear in linears:
                buffer = self._buffers[number % count]
                linear.place(buffer[start : start + linear.count], self._provide)
                start += linear.count if whole_blocks else 0

    @staticmethod
    def bytes_needed(blocks: list[list[FrozenLinear]], dtype: torch.dtype, whole_blocks: bool) -> int:
        """Size of one buffer."""
        whole = sum if whole_blocks else max
        return dtype.itemsize * max(whole(linear.count for linear in linears) for linears in blocks)

    @property
    def held_bytes(self) -> int:
        """What the buffers hold of the machine's memory: on a CPU nothing until they are first written."""
        touched = self._buffers[0].device.type != "cpu" or any(matrix is not None for matrix in self._resident)
        return self._counters.arena_bytes if touched else 0

    def enter(self, number: int, following: int | None) -> None:
        """Begin a visit of a block; `following` is the block that is likely to be visited next."""
        self._visited = number
        if self.whole_blocks:
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
        if not self.whole_blocks:
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
            self._dequantize(self._blocks[number])
        else:
            with torch.cuda.stream(self._stream):
                if (free := self._free[place]) is not None:
                    self._stream.wait_event(free)
                self._dequantize(self._blocks[number])
                self._ready[place] = self._stream.record_event()
        self._resident[place] = number

    def _provide(self, linear: FrozenLinear) -> torch.Tensor:
        assert self._visited == self._numbers[linear], "a frozen matrix was used outside a visit of its block"
        if not self.whole_blocks and self._resident[0] is not linear:
            self._resident[0] = None
            self._dequantize([linear])
            self._resident[0] = linear
        return linear.slot

    def _dequantize(self, linears: list[FrozenLinear]) -> None:
        for linear in linears:
            linear.weight.read_rows(0, linear.weight.shape[0], linear.slot)
            self._counters.bytes_read += sum(part.nbytes for part in linear.weight.stored)
        self._counters.dequantizations += len(linears)
