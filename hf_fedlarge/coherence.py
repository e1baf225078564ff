"""Settings of a federation that are right each by itself and can't work together, and what to do about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.errors import ConfigError

if TYPE_CHECKING:
    from hf_fedlarge.config import FederationConfig

ON_FACTORS = ("fedavg", "ffa", "alternate")
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum")
# What the trainer takes for an argument of `training` that isn't given, as far as the server counts on it: with a wrong
# value here it would refuse honest updates for the tokens that they claim.
TRAINING_DEFAULTS: dict[str, Any] = {
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_length": 1024,
    "packing": False,
    "packing_strategy": "bfd",
    "assistant_only_loss": False,
}


def refuse(what: str, causes: Sequence[tuple[bool, str]]) -> None:
    """Refuse `what` for the first of the causes, (whether it was found, what to say), that was.

    Raises:
        ValueError: one was.
    """
    for found, cause in causes:
        if found:
            raise ValueError(f"{what} {cause}")


def check_federation(config: FederationConfig) -> None:
    """Refuse a federation that could not be run to its end.

    Raises:
        ValueError: in a sentence without its end.
    """
    if config.package is not None and config.making:
        raise ValueError(
            f"package is made already, and {', '.join(config.making)} would say how to make one; leave out either"
        )
    if config.cohort is not None and config.min_updates > config.cohort:
        raise ValueError(f"min_updates is {config.min_updates}, but a cohort has only {config.cohort} clients")
    if config.late == "buffer" and (config.tiers or config.aggregator == "alternate"):
        what = "tiers" if config.tiers else "alternate"
        raise ValueError(f"late updates can't be kept with {what}: they started from another kind of adapter")
    if config.scaffold and (config.codec != "fp32" or config.late == "buffer"):
        what = "late updates" if config.late == "buffer" else f"the codec {config.codec}"
        raise ValueError(f"scaffold can't be used with {what}: what it sums up has to arrive whole and in its round")
    if config.tiers and config.aggregator in ON_FACTORS:
        raise ValueError(f"tiers have adapters of their own shapes, which {config.aggregator} can't compare; use exact")
    if config.tiers and config.aggregator in ROBUST:
        raise ValueError(
            f"tiers leave what only the largest packages have to few clients, among whom {config.aggregator} can't "
            "outvote hostile ones; use exact, or leave out tiers"
        )
    if config.cohort is not None and config.fewest_updates > config.cohort:
        raise ValueError(
            f"{config.aggregator} needs {config.fewest_updates} updates to stand {config.byzantine} hostile clients, "
            f"but a cohort has only {config.cohort}"
        )
    if config.privacy:
        refuse(
            "privacy",
            [
                (config.selection != "uniform", "counts on cohorts drawn evenly; it needs selection: uniform"),
                (config.over_select > 0, "counts on all of a cohort of known size; leave out over_select"),
                (
                    config.late == "buffer",
                    "can't take late updates, which are of another round's cohort; use late: refuse",
                ),
                (bool(config.tiers), "can't be used with tiers, whose adapters have shapes of their own"),
                (
                    config.min_updates > 1,
                    "takes a round of however few answers, for a second draw would keep the first one's updates; leave "
                    "min_updates at 1",
                ),
            ],
        )
    if config.secure:
        alone = min(config.cohort or 2, len(config.clients or "ab")) < 2
        refuse(
            "secure",
            [
                (
                    config.aggregator not in ("ffa", "fedavg"),
                    f"gives the server a sum of factors, but {config.aggregator} needs each client's own; use ffa or "
                    "fedavg",
                ),
                (
                    config.weighting not in ("equal", "tokens", "examples"),
                    f"shows the server nothing that weighting {config.weighting} could be computed of; use equal, "
                    "tokens or examples",
                ),
                (config.clip is not None, "shows the server no update whose norm it could clip; leave out clip"),
                (
                    config.codec != "fp32",
                    "sends whole numbers of its own, which can't be encoded again; leave codec at fp32",
                ),
                (config.scaffold, "can't be used with scaffold, whose control variates aren't masked"),
                (config.late == "buffer", "masks an update for one round's clients; use late: refuse"),
                (bool(config.tiers), "can't be used with tiers, whose updates have shapes of their own"),
                (
                    config.selection == "resources",
                    "shows the server no tokens, and so no speeds; use another selection",
                ),
                (alone, "needs two clients in a round, for the sum of one is its update"),
            ],
        )
    _check_clients(config)
    _check_packing(config)
    if config.weighting == "loss" and config.client_eval_examples == 0:
        raise ValueError("weighting loss needs held-out losses, but client_eval_examples is 0; raise it")
    sizes = {"budget": config.budget} | {f"tiers.{name}.memory": tier.memory for name, tier in config.tiers.items()}
    sizes |= {f"data.memory.{number}": size for number, size in enumerate((config.data and config.data.memory) or ())}
    for key, size in sizes.items():
        try:
            parse_bytes(0 if size is None else size)
        except ConfigError as error:
            raise ValueError(f"{key} is {size!r}; expected a size such as 2GiB or 1500MB") from error


def _check_clients(config: FederationConfig) -> None:
    """Where clients are named, nobody else may check in, and a round would wait for more for ever."""
    if config.clients is None:
        return
    robust = f"{config.aggregator} needs {config.fewest_updates} updates to stand {config.byzantine} hostile clients"
    wanted = {
        f"cohort is {config.cohort}": config.cohort or 0,
        f"min_updates is {config.min_updates}": config.min_updates,
        robust: config.fewest_updates,
    }
    for what, count in wanted.items():
        if count > len(config.clients):
            raise ValueError(f"{what}, but only {len(config.clients)} clients are named; name more or lower it")


def _check_packing(config: FederationConfig) -> None:
    """An update may claim as many tokens as its client's examples can have (`jobs.Jobs.asked`)."""
    training = TRAINING_DEFAULTS | config.training
    strategy, steps = training["packing_strategy"], training["max_steps"]
    if training["packing"] and strategy != "bfd" and not (isinstance(steps, int) and steps > 0):
        raise ValueError(
            f"packing_strategy {strategy} makes any number of sequences of a long text, so nobody could tell how many "
            "tokens a client can have trained on; set max_steps, or use packing_strategy: bfd"
        )
