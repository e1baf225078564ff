"""The command line's words for what takes too long to load for a `--help`: `config.AggregationSettings`, `keys.py`."""

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


def add_keys(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `keys`; the one chosen is `action`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=text, description=text, allow_abbrev=False)

    one = action("new", "Make a client's key and print the line that the server's operator adds.")
    one.add_argument("name", help="the client's name")
    one.add_argument("-o", "--output", type=Path, required=True, help="the directory for NAME.pem, which stays secret")
    one = action("allow", "Add a key to a server's list, which is made if it isn't there.")
    one.add_argument("list", type=Path, metavar="LIST", help="the list of keys")
    one.add_argument("line", nargs="+", metavar="KEYLINE", help="what `keys new` printed")
    one = action("revoke", "Refuse updates signed with a client's keys from now on.")
    one.add_argument("list", type=Path, metavar="LIST", help="the list of keys")
    one.add_argument("name", help="the client's name")
    one.add_argument("--key", metavar="FINGERPRINT", help="only this one (all of the client's)")
    one = action("list", "Print a list of keys.")
    one.add_argument("list", type=Path, metavar="LIST", help="the list of keys")
