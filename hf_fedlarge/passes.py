"""What a training pass leaves between its forward and its backward, and what a graph would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Pass:
    """Where the states between blocks stay from a forward pass until its backward.

    Their memory is taken at once. Taken one by one it would lie between the large tensors that a block needs for a
    moment, and leave the heap in pieces.

    Args:
        hidden: like the states between two blocks.
        first: the first block's number.
        blocks: how many the model has.
    """

    def __init__(self, hidden: torch.Tensor, first: int, blocks: int) -> None:
        self.following = first
        self._places = [torch.empty_like(hidden, memory_format=torch.contiguous_format) for _ in range(first, blocks)]

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output of the next block, at its place."""
        self.following += 1
        return self._places.pop().copy_(hidden)


def graph_bytes(forward: Callable[[], None], device: torch.device) -> int:
    """Bytes that the graph of a forward pass holds, parameters left out; random states are as before afterwards."""
    held: dict[int, int] = {}

    # Nothing is kept, and nothing asked for: an operation that keeps its own output would keep itself, and with it
    # the whole model, in a circle that no garbage collector sees.
    def pack(tensor: torch.Tensor) -> None:
        if not isinstance(tensor, nn.Parameter):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing),
    ):
        forward()
    return sum(held.values())


RandomState = tuple[torch.Tensor, torch.Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """The state of torch's generators: of the CPU's, and of a CUDA device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def restored_random_state(device: torch.device, state: RandomState) -> Iterator[None]:
    """Within it, the generators draw from `state` on; afterwards they go on where they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
