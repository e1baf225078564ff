"""A shrunk model healed: corrections of its matrices, distilled from the full model on calibration text.

The fits (`fit.py`) bring each block's states near the full model's; what they leave adds up on the way to the tokens.
So corrections of a low rank, one for each matrix of the blocks (`corrections.py`), are trained together, as an adapter
is, until what the small model says of the next token comes near what the full one says (distillation, Hinton et al.,
arXiv 1503.02531): the loss is KL(full ‖ small). The full model isn't needed for it, only the states that it ended with.

An eighth of the text is kept apart, and what the corrections do there, as they are stored, is what is told of them.

Shapes: T sequences, S tokens of each, N of some, D hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_fedlarge.adapters import adapter_parameters, attach_lora, initial_factors, set_factors
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.corrections import is_correctable, store_correction
from hf_fedlarge.entries import HealedEntry
from hf_fedlarge.loss import StreamedHead
from hf_fedlarge.tensors import Factors

_TOGETHER = 8  # sequences in a step
_POSITIONS = 128  # whose distributions are in memory at a time
_APART = 8  # one sequence of so many is for looking only
_LEARNING_RATE = 5e-4
_LONGEST_STEP = 1.0  # the gradient's norm is clipped to


@dataclass(frozen=True)
class Truth:
    """What the full model gives for the calibration text.

    Attributes:
        ids: the text (T, S).
        states: the states that its head is given, (T, S, D).
        head: its head.
    """

    ids: torch.Tensor
    states: torch.Tensor
    head: StreamedHead


class Healed(NamedTuple):
    """Corrections that were of use: their tensors as a package has them, and what is said of them."""

    tensors: dict[str, torch.Tensor]
    entry: HealedEntry


def heal(
    model: PreTrainedModel,
    truth: Truth,
    rank: int,
    steps: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Healed | None:
    """Train corrections for a package.

    Args:
        model: from `load_package`; it is of no use afterwards.
        truth: of the same text for the full model; at least two sequences.
        rank: R.
        steps: of AdamW on `_TOGETHER` sequences; the learning rate falls to zero along a cosine.
        seed: of the order, and of what corrections begin with.
        progress: called with the steps that are done.

    Returns:
        None: they don't lower the divergence on the text that is kept apart.
    """
    lora = LoraSettings(rank=rank, alpha=float(rank))
    architecture, blocks = model.architecture, list(range(model.architecture.layers))  # by the package's own numbers
    adapted = attach_lora(model, architecture, lora)
    adapted.eval()  # without the model's own dropout
    set_factors(adapted, initial_factors(architecture, blocks, lora, seed), architecture, blocks)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(len(truth.ids), generator=generator)
    apart, places = places.tensor_split([max(1, len(places) // _APART)])
    before = _mean_divergence(model, truth, apart)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < min(_TOGETHER, len(places)):
            order = places[torch.randperm(len(places), generator=generator)]
        chosen, order = order[:_TOGETHER], order[_TOGETHER:]
        hidden_ND = _states(model, truth.ids[chosen])
        _, grad_ND = divergence(model.streamed_head, hidden_ND, truth.head, truth.states[chosen].flatten(0, 1), True)
        hidden_ND.backward(grad_ND)
        nn.utils.clip_grad_norm_(parameters, _LONGEST_STEP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress:
            progress(step + 1)
    if not all(parameter.isfinite().all() for parameter in parameters):
        return None
    tensors: dict[str, torch.Tensor] = {}
    for path, A, B in adapter_parameters(adapted):
        name = f"{path}.weight"
        if is_correctable(architecture, name, model.package.codecs.get(name)):
            found, values = store_correction(name, A.detach().cpu(), B.detach().cpu())
            tensors |= found
        else:
            values = Factors(torch.zeros_like(A), torch.zeros_like(B))
        A.data.copy_(values.A_RI)
        B.data.copy_(values.B_OR)
    after = _mean_divergence(model, truth, apart)
    # Nor where either is not a number.
    return Healed(tensors, HealedEntry(rank=rank, without=before, divergence=after)) if after < before else None


def divergence(
    head: StreamedHead, hidden_ND: torch.Tensor, true_head: StreamedHead, true_ND: torch.Tensor, with_gradient: bool
) -> tuple[float, torch.Tensor | None]:
    """The mean over positions of KL(full ‖ small), and its gradient with respect to the small model's states.

    Args:
        head: the small model's.
        hidden_ND: its states.
        true_head: the full model's.
        true_ND: its states.
        with_gradient: whether the gradient is wanted.
    """
    total, parts = 0.0, []
    for given_ND, wanted_ND in zip(hidden_ND.detach().split(_POSITIONS), true_ND.split(_POSITIONS), strict=True):
        given_ND.requires_grad_(with_gradient)
        with torch.no_grad():
            wanted_NV = _log_probabilities(true_head, wanted_ND).to(hidden_ND.device)
        with torch.set_grad_enabled(with_gradient):
            given_NV = _log_probabilities(head, given_ND)
            loss = nn.functional.kl_div(given_NV, wanted_NV, log_target=True, reduction="sum") / len(hidden_ND)
        if with_gradient:
            loss.backward()
            parts.append(given_ND.grad)
        total += loss.item()
    return total, torch.cat(parts) if parts else None


def _log_probabilities(head: StreamedHead, hidden_ND: torch.Tensor) -> torch.Tensor:
    z_NV = head.logits(hidden_ND.to(head.device)).float() * head.transform.scale
    if head.transform.cap is not None:
        z_NV = head.transform.cap * torch.tanh(z_NV / head.transform.cap)
    return torch.log_softmax(z_NV, dim=-1)


def _states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the head is given, (N, D)."""
    return model.base_model(ids.to(model.engine.device), use_cache=False).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def _mean_divergence(model: PreTrainedModel, truth: Truth, places: torch.Tensor) -> float:
    found = [
        len(some) * divergence(model.streamed_head, _states(model, truth.ids[some]), truth.head, states, False)[0]
        for some in places.split(_TOGETHER)
        for states in [truth.states[some].flatten(0, 1)]
    ]
    return sum(found) / len(places)
