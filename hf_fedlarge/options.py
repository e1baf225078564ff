"""The command line's words that several commands share, or that would make `cli.py` too long.

Those for `config.AggregationSettings` are here because that takes too long to load for a `--help`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
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
}


def add_aggregation(parser: argparse.ArgumentParser) -> None:
    """An option for each setting."""
    for name, (kind, text) in AGGREGATION.items():
        metavar = name.rpartition("_")[2].upper()
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)


def chosen_aggregation(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(options, name) for name in AGGREGATION}
    return {name: value for name, value in given.items() if value is not None}


def add_serving(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument("federation", type=Path, help="the federation in YAML, with eval_data")
    parser.add_argument("--output", type=Path, help="the server's run directory (run, beside the file)")
    parser.add_argument("--store", required=True, metavar="URL", help="where it meets its clients: any fsspec URL")
    parser.add_argument(
        "--no-stop", action="store_true", help="go on where the full model with the adapter stays worse than the base"
    )
    _poll(parser)


def add_joining(parser: argparse.ArgumentParser) -> None:
    """What `join` takes."""
    parser.add_argument("store", metavar="URL", help="where the server is met: any fsspec URL")
    parser.add_argument("--client", required=True, help="this client's name")
    parser.add_argument("--data", required=True, help="its examples: a file, or a Hub data set")
    parser.add_argument("--eval-data", help="its held-out examples (a tenth of --data)")
    parser.add_argument("--cache", type=Path, help="for packages and unfinished work (~/.cache/hf_fedlarge)")
    parser.add_argument("--once", action="store_true", help="leave after one round")
    _poll(parser)


def _poll(parser: argparse.ArgumentParser) -> None:
    def seconds(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text)

    parser.add_argument("--poll", type=seconds, default=5.0, help="seconds between two looks into the store (5)")
