"""What a rerun must have in common with the run that it goes on with."""

from __future__ import annotations

import json
from pathlib import Path

from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.config import ATTEMPT_SETTINGS, FederationConfig
from hf_fedlarge.errors import ConfigError

SETTINGS = "federation.json"
# More rounds, another budget, other clients or another way to start them don't change what was committed; what an
# attempt at a round was begun with is in the journal.
_MAY_CHANGE = {"rounds", "launcher", "budget", "clients"} | ATTEMPT_SETTINGS
# But of `training` what says which tokens count, or losses of rounds would not compare; and with `tiers` the size of a
# step, which their packages and ranks were planned for.
_TOKENS = {"max_length", "assistant_only_loss"}
_STEP = {"per_device_train_batch_size", "gradient_accumulation_steps"}


def begun_with(run: Path, config: FederationConfig) -> str | None:
    """The revision of the base that a run began with; of one that begins now, the one that is asked for.

    Raises:
        ConfigError: the run has other settings.
    """
    path = run / SETTINGS
    if not path.exists():
        return config.revision
    found, settings = json.loads(path.read_text()), config.model_dump(mode="json")
    # What a run from before a setting was there did is what the setting does by default.
    before = {name: field.default for name, field in type(config).model_fields.items()} | found["settings"]
    keys = (settings.keys() | found["settings"].keys()) - _MAY_CHANGE
    changed = sorted(key for key in keys if settings.get(key) != before.get(key))
    now, then = (TRAINING_DEFAULTS | of["training"] for of in (settings, before))
    fixed = _TOKENS | _STEP if config.tiers else _TOKENS
    changed += sorted(f"training.{name}" for name in fixed if now[name] != then[name])
    if changed:
        raise ConfigError(f"{run} was run with other settings for {', '.join(changed)}; choose another --output.")
    return found["revision"]
