"""How much an update counts, before the weights of a cohort are normalised."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from hf_fedlarge.artifacts import UpdateManifest
from hf_fedlarge.errors import ConfigError, UpdateRefusedError

Weigh = Callable[[UpdateManifest], float]


def weighing(weighting: str) -> Weigh:
    """The function that says how much an update counts; `config.AggregationSettings` has the names.

    Raises:
        ConfigError: `module:function` can't be imported; or, where it weighs, it fails or gives no weight.
    """
    if ":" not in weighting:
        return {"loss": _improvement, "equal": lambda _: 1.0}.get(weighting, lambda update: getattr(update, weighting))
    module, name = weighting.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The weighting {weighting} can't be imported: {error}; PYTHONPATH has to have the directory that {module} "
            "lies in (PYTHONPATH=. where that is this one)."
        ) from error

    def weigh(update: UpdateManifest) -> float:  # of what its digest covers, nothing else
        try:
            weight = function(update.model_copy(update={"measured": {}}))
        except Exception as error:
            raise ConfigError(
                f"The weighting {weighting} failed for {update.client} with {type(error).__name__}: {error}."
            ) from error
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ConfigError(f"The weighting {weighting} gave {weight!r} for {update.client}; expected 0 or more.")
        return weight

    return weigh


def _improvement(update: UpdateManifest) -> float:
    """How far the loss fell on what the client held out; nothing where it rose. It is the client's own word."""
    if update.loss_before is None or update.loss_after is None:
        raise UpdateRefusedError(
            f"{update.client} refused: it has no held-out loss, which the weighting loss needs; let it hold out some."
        )
    return max(update.loss_before - update.loss_after, 0.0)
