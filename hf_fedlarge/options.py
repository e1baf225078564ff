"""The command line's words for `config.AggregationSettings`, which takes too long to load for a `--help`."""

from __future__ import annotations

import argparse
from typing import Any


def _bound(text: str) -> float | str:
    return text if text == "median" else float(text)


AGGREGATION: dict[str, tuple[Any, str]] = {
    "aggregator": (
        str,
        "exact (products), svd, fedavg (factors), ffa, alternate, median, trimmed_mean, krum or multi_krum (exact)",
    ),
    "weighting": (str, "tokens, examples, equal, loss, or a function of yours as module:function (tokens)"),
    "carry_rank": (int, "the largest rank of what exact carries on (four times the adapter's)"),
    "carry_energy": (float, "end the carry where this share of the energy is left (0)"),
    "clip": (_bound, "bound the norm of each client's change: a number, or median (no bound)"),
    "byzantine": (int, "how many clients may be hostile, for trimmed_mean, krum and multi_krum"),
    "server_optimizer": (str, "none, momentum, adam, yogi or adagrad (none)"),
    "server_lr": (float, "the server's learning rate (1, or 0.01 where it is adaptive)"),
    "server_beta1": (float, "decay of the average of changes (0.9)"),
    "server_beta2": (float, "decay of the average of their squares (0.99)"),
    "server_eps": (float, "what is added to its root (0.001)"),
    "scaffold": (bool, "go on with the control variates that clients corrected their steps by"),
}


def add_aggregation(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    for name, (kind, text) in AGGREGATION.items():
        how = {"type": kind, "metavar": name.rpartition("_")[2].upper()}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how)


def chosen_aggregation(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(options, name) for name in AGGREGATION}
    return {name: value for name, value in given.items() if value is not None}
