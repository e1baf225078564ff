"""An adapter's gradients in two models, and how far they point the same way (GradOT, arXiv 2507.04455)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hf_fedlarge.adapters import get_factors
from hf_fedlarge.architectures import Architecture
from hf_fedlarge.tensors import Factors


def adapter_gradients(
    model: nn.Module, architecture: Architecture, layers: list[int], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, Factors]:
    """The gradients of the summed loss of some batches, as `get_factors` gives factors; zero where there are none.

    Args:
        model: with an adapter (`attach_lora`); stays in the mode it is in.
        architecture, layers: see `get_factors`.
        batches: what the model is called with, `labels` included.
    """
    device = next(model.parameters()).device
    model.zero_grad()
    for batch in batches:
        batch = {key: value.to(device) for key, value in batch.items()}
        model(**batch, num_items_in_batch=1, use_cache=False).loss.backward()
    return get_factors(
        model, architecture, layers, lambda factor: torch.zeros_like(factor) if factor.grad is None else factor.grad
    )


def agreement(ours: dict[str, Factors], theirs: dict[str, Factors], architecture: Architecture) -> dict[int, float]:
    """Layer → cosine of its gradients, A's and B's together, in two models; of the layers that `ours` has.

    Args:
        ours, theirs: from `adapter_gradients`.
        architecture: of any of the two; names are in global numbers.
    """
    modules: dict[int, list[str]] = {}
    for module in ours:
        modules.setdefault(architecture.layer_of(f"{module}."), []).append(module)
    return {
        layer: float(
            torch.cosine_similarity(
                *(torch.cat([part.flatten() for name in names for part in of[name]]) for of in (ours, theirs)), dim=0
            )
        )
        for layer, names in modules.items()
    }
