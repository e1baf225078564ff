"""How much of what a small model learned the full one keeps: side by side on held-out examples.

The report has the loss of the base, of the package before and after training, and of the full model with the adapter
plugged in; with a reference, an adapter trained on the full model itself, the share of its gain that was kept.
Intervals are percentile bootstraps over examples, the same resamples for every model. The cheap predictor is how far
the adapter's gradients in the small and in the full model point the same way (GradOT, arXiv 2507.04455).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_fedlarge.adapters import attach_lora, get_factors, read_factors, set_factors
from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.data import from_tokens
from hf_fedlarge.encoding import encode_example, like_length, padded
from hf_fedlarge.evaluation import example_losses, load_model
from hf_fedlarge.gradients import adapter_gradients, agreement
from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
from hf_fedlarge.positions import check_length
from hf_fedlarge.processor import computing_device
from hf_fedlarge.tensors import Factors

_RESAMPLES = 2000
_DRAWN_TOGETHER = 2**20  # examples of all resamples that are in memory
_GRADIENT_EXAMPLES = 16


def transfer_report(
    checkpoint: Path,
    package: Path,
    adapter: Path,
    data: Sequence[dict[str, Any]],
    *,
    reference: Path | None = None,
    max_length: int = 1024,
    batch_size: int | None = None,
    assistant_only: bool = False,
    verify: bool = True,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What an adapter that was trained on a package is worth on the full model.

    Args:
        checkpoint: the full model.
        package: the small one.
        adapter: in global layer numbers.
        data: held-out examples.
        reference: an adapter trained on the full model.
        max_length, batch_size, assistant_only, verify, report: see `evaluation.evaluate`.

    Returns:
        `loss` of `base`, `package`, `package_trained`, `full_model` and, with a reference, `reference`; `gain`, by how
        much the adapter lowers the full model's loss; `share_kept` of the reference's gain, None without one, or where
        it gains nothing. Each is `{"value", "low", "high"}`, the last two a 95 % interval, None of a single example, or
        where the reference gains nothing on a resample. `examples` and `tokens`.

    Raises:
        FedLargeError: as `evaluation.evaluate`.
    """
    models = {
        "base": (checkpoint, None),
        "package": (package, None),
        "package_trained": (package, adapter),
        "full_model": (checkpoint, adapter),
    }
    if reference:
        models["reference"] = (checkpoint, reference)
    tokenizer, sums = load_tokenizer(package), {}
    for name, (model, plugged) in models.items():
        loaded = load_model(model, plugged, verify=verify)
        check_length(loaded.architecture.model_type, loaded.architecture.positions, max_length)
        sums[name], tokens = example_losses(
            loaded,
            tokenizer,
            data,
            max_length=max_length,
            batch_size=batch_size,
            assistant_only=assistant_only,
            report=report,
        )
        del loaded
        gc.collect()  # models are cycles, and hold an arena each

    base, plugged_in, full = (sums[name] for name in ("base", "full_model", "reference" if reference else "base"))
    return {
        "loss": {name: _interval(lambda of, n: of / n, of, tokens) for name, of in sums.items()},
        "gain": _interval(lambda a, b, n: (a - b) / n, base, plugged_in, tokens),
        "share_kept": _interval(_share, base, plugged_in, full) if base.sum() > full.sum() else None,
        "examples": len(tokens),
        "tokens": int(tokens.sum()),
    }


def _share(base: np.ndarray, plugged_in: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of the reference's gain; NaN where there is none."""
    gain = base - reference
    return np.divide(base - plugged_in, gain, out=np.full_like(gain, np.nan), where=gain > 0)


def _interval(statistic: Callable[..., Any], *samples: np.ndarray) -> dict[str, float | None]:
    """A function of sums over examples, with the 95 % interval over resampled examples."""
    count, generator, found = len(samples[0]), np.random.default_rng(0), []
    together = max(1, _DRAWN_TOGETHER // count)
    for start in range(0, _RESAMPLES, together):  # which draws the same as all at once
        drawn = generator.integers(count, size=(min(together, _RESAMPLES - start), count))
        found.append(statistic(*(sample[drawn].sum(axis=1) for sample in samples)))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    known = count > 1 and not np.isnan(low)
    interval = {"low": float(low), "high": float(high)} if known else {"low": None, "high": None}
    return {"value": float(statistic(*(sample.sum() for sample in samples)))} | interval


def gradient_agreement(
    checkpoint: Path,
    package: Path,
    adapter: Path,
    data: Sequence[dict[str, Any]],
    *,
    max_length: int = 1024,
    batch_size: int | None = None,
    assistant_only: bool = False,
) -> dict[int, float]:
    """Kept layer → cosine of the adapter's gradients in the small and in the full model, on the first few examples.

    Neurons that the package lacks are left out of both.

    Args:
        checkpoint, package, adapter, data, max_length, assistant_only: see `transfer_report`.
        batch_size: examples in a step; None: 8.
    """
    lora, factors = read_manifest(adapter, AdapterManifest).lora, read_factors(adapter)
    tokenizer = load_tokenizer(package)
    rows = islice(data, _GRADIENT_EXAMPLES)
    examples = from_tokens(encode_example(row, tokenizer, max_length, assistant_only) for row in rows)
    batches = [padded(examples[numbers], tokenizer) for numbers in like_length(examples, batch_size or 8)]
    device = computing_device()
    small = load_package(package, device=device, verify=False)
    check_length(small.architecture.model_type, small.architecture.positions, max_length)
    kept = small.package.kept_layers
    factors = {module: pair for module, pair in factors.items() if small.architecture.layer_of(f"{module}.") in kept}
    found = []
    for model, layers in (
        (small, kept),
        (stream_checkpoint(checkpoint, device=device), list(range(len(small.package.layers)))),
    ):
        adapted = attach_lora(model, model.architecture, lora)
        set_factors(adapted, factors, model.architecture, layers)
        found.append(adapter_gradients(adapted, model.architecture, layers, batches))
        if model is small:
            present = get_factors(adapted, model.architecture, layers, torch.ones_like)
    ours, theirs = found
    theirs = {
        module: Factors(*(part * mask for part, mask in zip(theirs[module], masks, strict=True)))
        for module, masks in present.items()
    }
    return agreement(ours, theirs, small.architecture)
