"""Which layers a model can best do without, by what it does on calibration text.

- `influence`: those that change their states least: block influence, 1 − cos of the states before and after a layer,
  mean over tokens (ShortGPT, arXiv 2403.03853). One pass over the text.
- `loss`: those without which the calibration loss rises least while a surrogate stands in their place; they go one by
  one, each next one judged with the earlier ones gone. One pass, an evaluation a layer, and for every layer that goes
  but the first, evaluations of the few that looked best so far.
- `gradient`: those whose surrogate leaves the gradients of an adapter on the other layers as they were, which is what
  clients send: 1 − the mean cosine over those layers. One pass, and a backward pass a layer and one more.

A surrogate is here one layer's own, fitted on the full model's states and not rounded. The checkpoint is streamed, so
it may be larger than memory; the surrogates of all layers (D, D) and, for `loss`, 4,096 tokens' states for every layer
are held.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from hf_fedlarge.adapters import attach_lora, initial_factors, set_factors
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.gradients import adapter_gradients, agreement
from hf_fedlarge.package import stream_checkpoint
from hf_fedlarge.surrogate import Regression
from hf_fedlarge.walk import Walk, check_finite

_TOGETHER = 16  # sequences in a step
_EVALUATED = 32  # sequences a loss is measured on
_DIFFERENTIATED = 16  # and a gradient,
_BACKWARD = 4  # so many at a time, as a backward pass holds much more than a step
# Layers judged anew before one goes. It is mostly the neighbours of those gone whose place changes, and with so many a
# choice of a quarter of the layers costs about as much again as judging each of them alone.
_TRIED = 4
Progress = Callable[[int], None]
Surrogate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Choice:
    """Which layers stay, and why.

    Attributes:
        kept: their numbers, sorted.
        scores: of every layer, the higher the more it is missed; infinite for the first, behind which surrogates begin.
            By `loss`, what was found when the layer went, or last of those that stay.
        cost: what it took, in words.
    """

    kept: list[int]
    scores: list[float]
    cost: str


def choose(
    checkpoint: Path,
    sequences: Sequence[torch.Tensor],
    how: Literal["influence", "loss", "gradient"],
    count: int,
    progress: Progress | None = None,
) -> Choice:
    """Choose `count` layers to keep, the first among them.

    Args:
        checkpoint: the full model's directory.
        sequences: from `calibrate.calibration_sequences`.
        how: see above.
        count: how many stay.
        progress: called with the layers that the pass over the text has behind it.

    Raises:
        ArtifactError: the model's states are not finite.
    """
    walk = Walk(model := stream_checkpoint(checkpoint), sequences[0])
    scores, surrogates = _pass(walk, sequences, how, progress)
    evaluated, differentiated = sequences[:_EVALUATED], sequences[:_DIFFERENTIATED]
    cost = f"by {how}: one pass over {_tokens(sequences)}"
    if how == "loss":
        measure = partial(losses, walk, evaluated, surrogates)
        dropped, scores, evaluations = _by_loss(measure, len(walk), count)
        cost += f", {evaluations} evaluations of {_tokens(evaluated)}"
    else:
        if how == "gradient":
            scores = _by_gradient(model, walk, torch.cat(list(differentiated)), surrogates)
            cost += f", {len(walk)} backward passes over {_tokens(differentiated)}"
        scores = [float("inf"), *scores[1:]]
        dropped = sorted(range(len(walk)), key=scores.__getitem__)[: len(walk) - count]
    return Choice([layer for layer in range(len(walk)) if layer not in dropped], scores, cost)


def _tokens(sequences: Sequence[torch.Tensor]) -> str:
    return f"{sum(ids.numel() for ids in sequences):,} tokens"


def _pass(
    walk: Walk, sequences: Sequence[torch.Tensor], how: str, progress: Progress | None
) -> tuple[list[float], dict[int, Surrogate]]:
    """The influence of every layer or, for the other choices, a surrogate for each but the first."""
    states = [walk.embed(ids) for ids in torch.cat(list(sequences)).split(_TOGETHER)]
    scores, surrogates = [], {}
    for layer in range(len(walk)):
        after = [walk.step(layer, hidden) for hidden in states]
        check_finite(layer, after)
        if how == "influence":
            alike = [torch.cosine_similarity(x.float(), y.float(), dim=-1) for x, y in zip(states, after, strict=True)]
            scores.append(1 - float(torch.cat(alike).mean()))
        elif layer:
            regression = Regression.between(states, after)
            T = regression.solve()
            W, b = T.T.to(states[0].dtype), regression.bias(T).to(states[0].dtype)
            surrogates[layer] = partial(_stand_in, W, b)
        states = after
        walk.forget()
        if progress:
            progress(layer + 1)
    return scores, surrogates


def _stand_in(W_DD: torch.Tensor, b_D: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + nn.functional.linear(hidden, W_DD, b_D)


def losses(
    walk: Walk,
    sequences: Sequence[torch.Tensor],
    surrogates: Mapping[int, Surrogate],
    without: Sequence[Collection[int]],
) -> list[float]:
    """The mean loss for every set of layers in whose place their surrogates stand, in one walk over the blocks.

    Args:
        walk: the full model's.
        sequences: tokens, each (1, S).
        surrogates: by layer.
        without: the sets; what two of them have in common up to a layer is computed once up to there.
    """
    batches = [walk.embed(ids) for ids in torch.cat(list(sequences)).split(_TOGETHER)]
    states = {frozenset[int](): batches}
    for layer in range(len(walk)):
        after: dict[frozenset[int], list[torch.Tensor]] = {}
        for gone in {frozenset(number for number in one if number <= layer) for one in without}:
            step = surrogates[layer] if layer in gone else partial(walk.step, layer)
            after[gone] = [step(hidden) for hidden in states[gone - {layer}]]
        states = after
        walk.forget()
    found = []
    for one in without:
        hidden = torch.cat(states[frozenset(one)]).split(1)
        found.append(sum(map(walk.loss, hidden, sequences)) / len(sequences))
    return found


def _by_loss(
    measure: Callable[[Sequence[Collection[int]]], list[float]], total: int, count: int
) -> tuple[set[int], list[float], int]:
    """Greedily: the layers that go, the scores, and how many losses were measured."""
    loss, *alone = measure([set(), *({layer} for layer in range(1, total))])
    scores, evaluations = [float("inf"), *(one - loss for one in alone)], total
    gone: set[int] = set()
    while len(gone) < total - count:
        best = sorted(set(range(total)) - gone, key=scores.__getitem__)[: min(_TRIED, total - 1 - len(gone))]
        if gone:
            found = measure([gone | {layer} for layer in best])
            evaluations += len(best)
            for layer, one in zip(best, found, strict=True):
                scores[layer] = one - loss
        least = min(best, key=scores.__getitem__)
        gone, loss = gone | {least}, loss + scores[least]
    return gone, scores, evaluations


def _by_gradient(
    model: nn.Module, walk: Walk, ids_BS: torch.Tensor, surrogates: Mapping[int, Surrogate]
) -> list[float]:
    """1 − how far the others' gradients agree without each layer. A fresh adapter's: B is zero, so they are B's."""
    architecture, lora, layers = model.architecture, LoraSettings(), list(range(len(walk)))
    adapted = attach_lora(model, architecture, lora)
    set_factors(adapted, initial_factors(architecture, layers, lora, seed=0), architecture, layers)
    batches = [{"input_ids": ids, "labels": ids} for ids in ids_BS.split(_BACKWARD)]
    whole = adapter_gradients(adapted, architecture, layers, batches)
    scores = [0.0]
    for layer, surrogate in surrogates.items():
        with walk.replaced(layer, surrogate):
            cosines = agreement(adapter_gradients(adapted, architecture, layers, batches), whole, architecture)
        scores.append(1 - sum(cosine for other, cosine in cosines.items() if other != layer) / (len(walk) - 1))
        walk.forget()
    return scores
