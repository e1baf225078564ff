"""How many neurons each feed-forward layer keeps, of a number that all keep together.

What a layer's neurons are missed by, relative to the states behind it, falls from the first layers to the last to a
tenth and less. So every layer's neurons are taken out a few at a time on the full model's own states, the least missed
first and the others making up for them, as `neurons` does when it fits; then of all layers' steps those are taken that
cost least. The checkpoint is streamed, and one layer's sums are held at a time.

Shapes: N tokens, D hidden, F neurons.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from hf_fedlarge.neurons import NeuronFit
from hf_fedlarge.package import stream_checkpoint
from hf_fedlarge.quantize import BLOCK
from hf_fedlarge.walk import Walk, check_finite, hooked, token_weights

_TOGETHER = 8  # sequences in a step
_SEQUENCES = 64  # are enough to compare layers by
_STEPS = 6  # in which a layer can lose its neurons
_PUSH = 0.1  # how large an error is tried, of what the matrix gives
Progress = Callable[[int], None]


def choose_widths(
    checkpoint: Path,
    kept: Sequence[int],
    sequences: Sequence[torch.Tensor],
    mean: int,
    progress: Progress | None = None,
) -> dict[int, int]:
    """How many neurons each of the layers `kept` keeps: `mean` in the mean, in steps of a sixth of a layer.

    More widths would bring a package no more, and a client a compiled kernel of each product for each width.

    Args:
        checkpoint: the full model's directory; its family's neurons can be told apart.
        kept: global numbers of layers.
        sequences: from `calibrate.calibration_sequences`; up to 64 of them, evenly spread, are used.
        mean: a multiple of 64.
        progress: called with the layers that are done.

    Raises:
        ArtifactError: the model's states are not finite.
    """
    walk = Walk(stream_checkpoint(checkpoint), sequences[0])
    chosen = torch.cat(list(sequences[:: math.ceil(len(sequences) / _SEQUENCES)]))
    costs = _costs(walk, kept, chosen, progress)
    neurons = walk.architecture.neuron_count
    step = min(mean, math.ceil(neurons / _STEPS / BLOCK) * BLOCK)  # every layer keeps one
    return allot(costs, neurons, mean * len(kept), step)


def _costs(walk: Walk, kept: Sequence[int], ids: torch.Tensor, progress: Progress | None) -> dict[int, list[float]]:
    """For each layer of `kept`, what it costs as its neurons go (`NeuronFit.costs`)."""
    path = walk.architecture.feed_forward.output
    states = [walk.embed(some) for some in ids.split(_TOGETHER)]
    costs = {}
    for layer in range(len(walk)):
        if layer not in kept:
            states = [walk.step(layer, hidden) for hidden in states]
            check_finite(layer, states)
        else:
            gain, sums = _gain(walk, layer, path, states[0]), NeuronFit(walk.dense(layer, path))
            for number, hidden in enumerate(states):
                a_NF, states[number] = walk.step_with_input(layer, path, hidden)
                check_finite(layer, [states[number]])
                sums.add(a_NF.flatten(0, -2), None, token_weights(states[number].flatten(0, 1).float()))
            walk.forget()
            costs[layer] = [gain * cost for cost in sums.costs()]
            del sums
        walk.forget()
        if progress:
            progress(layer + 1)
    return costs


def _gain(walk: Walk, layer: int, path: str, hidden: torch.Tensor) -> float:
    """The square of how much larger a small error is behind the block than in its output matrix' product.

    1 where the block adds that product to its states; another number where a norm stands behind it.
    """
    generator = torch.Generator().manual_seed(0)
    pushes: list[torch.Tensor] = []

    def push(module: nn.Module, args: tuple[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=generator).to(value.device)
        pushed = value + (_PUSH * value.float().square().mean().sqrt() * noise).to(value.dtype)
        pushes.append(pushed.float() - value.float())
        return pushed

    plain = walk.step(layer, hidden).float()
    with hooked(walk.block(layer), path, push):
        moved = walk.step(layer, hidden).float() - plain
    return float(moved.square().sum() / pushes[0].square().sum())


def allot(costs: Mapping[int, Sequence[float]], neurons: int, total: int, step: int) -> dict[int, int]:
    """Take the steps that cost least a neuron until `total` are left, or fewer than `step` less.

    It is the least cost of all where each layer's steps cost more and more. Every layer keeps a step.

    Args:
        costs: layer → what it costs until each multiple of 64 is left (`NeuronFit.costs`).
        neurons: of a layer that loses none.
        total: for which there are enough steps.
        step: what a layer keeps is a multiple of it, or all; a multiple of 64.
    """
    left = [neurons, *range((neurons - 1) // step * step, 0, -step)]  # after each number of steps
    taken = dict.fromkeys(costs, 0)
    ready: list[tuple[float, int]] = []

    def offer(layer: int) -> None:
        if taken[layer] + 1 == len(left):
            return
        before, after = left[taken[layer]], left[taken[layer] + 1]
        first, last = (math.ceil((neurons - count) / BLOCK) for count in (before, after))
        heapq.heappush(ready, (sum(costs[layer][first:last]) / (before - after), layer))

    for layer in costs:
        offer(layer)
    while sum(left[steps] for steps in taken.values()) > total:
        _, layer = heapq.heappop(ready)
        taken[layer] += 1
        offer(layer)
    return {layer: left[steps] for layer, steps in taken.items()}
