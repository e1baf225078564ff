"""The command line's words that several commands share, or that would make `cli.py` too long.

Those for `config.AggregationSettings` and `keys.py` are here because these take too long to load for a `--help`.
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
    "weighting": (
        str,
        "tokens, examples, equal, loss, or a function of yours as module:function (tokens); nothing bounds here what "
        "updates claim of tokens and examples, so give equal where you don't trust them",
    ),
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


def add_shrinking(parser: argparse.ArgumentParser) -> None:
    """What `shrink` takes."""
    parser.add_argument("checkpoint", help="a Hugging Face directory, or a Hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the package directory to make")
    parser.add_argument("--revision", help="the Hub revision")
    parser.add_argument("--base-id", help="what to call the base model, where CHECKPOINT is a local copy of it")
    parser.add_argument("--keep-layers", help="a count, a fraction, or numbers such as 0-9,12 (all)")
    neurons = "of the feed-forward layers of all that are kept (2/3, or 1 with --keep-layers)"
    parser.add_argument("--keep-neurons", type=float, metavar="SHARE", help=neurons)
    parser.add_argument(
        "--layer-choice",
        choices=("uniform", "influence", "loss", "gradient"),
        default="uniform",
        help="which layers stay: evenly spread, or by what they do on calibration text (uniform)",
    )
    parser.add_argument(
        "--width-choice",
        choices=("error", "uniform"),
        default="error",
        help="how many neurons each layer keeps: more where they are missed more on that text, or all the same (error)",
    )
    parser.add_argument(
        "--surrogate", choices=("linear", "none"), default="linear", help="what stands for dropped layers (linear)"
    )
    parser.add_argument("--surrogate-codec", choices=("nf4", "int8", "bf16"), default="nf4", help="its storage (nf4)")
    parser.add_argument("--surrogate-rank", type=int, metavar="R", help="make it two thin matrices (one of full rank)")
    parser.add_argument("--calibration", metavar="DATA", help="public text to fit on (Python's documentation)")
    parser.add_argument("--heal-steps", type=int, default=0, metavar="N", help="of distillation on that text (0)")
    parser.add_argument("--heal-rank", type=int, default=8, metavar="R", help="of the corrections it makes (8)")
    parser.add_argument(
        "--embeddings", choices=("int8", "nf4", "bf16"), default="int8", help="embedding and head (int8)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, but for what is chosen on the text, and write nothing"
    )


def add_aggregating(parser: argparse.ArgumentParser) -> None:
    """Arguments of `aggregate`."""
    parser.add_argument("updates", nargs="+", type=Path, metavar="UPDATE", help="update directories")
    parser.add_argument("--package", type=Path, required=True, help="the package they were trained on")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the adapter directory to make")
    parser.add_argument("--adapter", type=Path, metavar="PREVIOUS", help="the adapter the clients started from")
    parser.add_argument(
        "--older", nargs="+", type=Path, default=[], metavar="ADAPTER", help="what late ones started from"
    )
    parser.add_argument("--codec", default="fp32", help="their encoding: fp32, bf16, int8, nf4 or topk (fp32)")
    parser.add_argument("--topk-share", type=float, default=0.05, help="of a factor's entries, what topk sent (0.05)")
    parser.add_argument("--round", type=int, help="the round they must be for (that of the first)")
    parser.add_argument("--min-updates", type=int, default=1, help="fewer valid ones make no adapter (1)")
    parser.add_argument("--population", type=int, metavar="N", help="clients there are, for --scaffold (the updates)")
    parser.add_argument("--keys", type=Path, metavar="LIST", help="the keys that must have signed them (none)")
    add_aggregation(parser)


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


def add_running(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("federation", type=Path, help="the federation in YAML")
    parser.add_argument("--output", type=Path, help="the run directory (run, beside the file)")
    parser.add_argument("--launcher", choices=("inprocess", "accelerate"), help="how clients are started (the file's)")
    parser.add_argument("--budget", help="the most that may be sent, both ways together, such as 500MB (the file's)")
    _no_stop(parser)


def add_serving(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument("federation", type=Path, help="the federation in YAML, with eval_data")
    parser.add_argument("--output", type=Path, help="the server's run directory (run, beside the file)")
    parser.add_argument("--store", required=True, metavar="URL", help="where it meets its clients: any fsspec URL")
    parser.add_argument("--key", type=Path, metavar="PEM", help="the server's key, to sign what it says with (none)")
    _no_stop(parser)
    _poll(parser)


def add_joining(parser: argparse.ArgumentParser) -> None:
    """What `join` takes."""
    parser.add_argument("store", metavar="URL", help="where the server is met: any fsspec URL")
    parser.add_argument("--client", required=True, help="this client's name")
    parser.add_argument("--data", required=True, help="its examples: a file, or a Hub data set")
    parser.add_argument("--eval-data", help="its held-out examples (a tenth of --data at most)")
    parser.add_argument("--cache", type=Path, help="for packages and unfinished work (~/.cache/hf_fedlarge)")
    parser.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="what training may take of the GPU's memory, or without one of this machine's, such as 2GiB (little)",
    )
    parser.add_argument("--key", type=Path, metavar="PEM", help="its private key, to sign updates with (none)")
    parser.add_argument("--keys", type=Path, metavar="LIST", help="everybody's keys, for secure aggregation (none)")
    parser.add_argument(
        "--server-key", metavar="KEY", help="64 digits, or a list: the key that signs what the server says"
    )
    parser.add_argument("--result", type=Path, metavar="DIR", help="keep the last adapter here at the end (not kept)")
    parser.add_argument("--once", action="store_true", help="leave after one round")
    parser.add_argument(
        "--check", action="store_true", help="try everything but sending, two steps of training included, and leave"
    )
    parser.add_argument(
        "--package", type=Path, metavar="DIR", help="for --check: the package, where the store names none yet"
    )
    text = "for --check: print so many examples as the model sees them, which are private text (0)"
    parser.add_argument("--show", type=int, default=0, metavar="N", help=text)
    _poll(parser)


def add_flower(parser: argparse.ArgumentParser) -> None:
    """The subcommands of `flower`; the one chosen is `action`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "Make an app: its pyproject.toml, its two modules, and a federation.yaml to edit."
    one = actions.add_parser("init", help=text, description=text, allow_abbrev=False)
    one.add_argument("directory", type=Path, help="to make; its name is the app's")
    one.add_argument("--store", required=True, metavar="URL", help="where clients read packages: any fsspec URL")
    model = "meta-llama/Llama-3.2-1B"
    one.add_argument("--checkpoint", default=model, help=f"the full model: a directory, or a Hub id ({model})")

    text = 'Keep libraries and model loaded between rounds: a process beside a SuperNode with worker="DIR".'
    one = actions.add_parser("worker", help=text, description=text, allow_abbrev=False)
    one.add_argument("directory", type=Path, help="for its socket, its owner's alone; made if it isn't there")


def _no_stop(parser: argparse.ArgumentParser) -> None:
    text = "go on where the full model with the adapter stays worse than the base"
    parser.add_argument("--no-stop", action="store_true", help=text)


def _poll(parser: argparse.ArgumentParser) -> None:
    def seconds(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise ValueError
        return float(text)

    parser.add_argument("--poll", type=seconds, default=5.0, help="seconds between two looks into the store (5)")
    week = 7 * 86400.0  # `orders.PATIENCE_SECONDS`, whose import `--help` need not wait for
    parser.add_argument("--patience", type=seconds, default=week, help="seconds to wait for the other side (a week)")


def add_transfer(parser: argparse.ArgumentParser) -> None:
    """Arguments of `transfer`."""
    parser.add_argument("checkpoint", help="the full model: a directory, or a Hub id")
    parser.add_argument("package", type=Path, help="the package that the adapter was trained on")
    parser.add_argument("adapter", type=Path, help="the adapter directory")
    parser.add_argument("--data", required=True, help="held-out examples: a file, a Hub data set, or stdlib")
    parser.add_argument("--reference", type=Path, metavar="ADAPTER", help="one that was trained on the full model")
    parser.add_argument(
        "--gradients", action="store_true", help="how far both models' gradients agree, a layer at a time"
    )
    parser.add_argument("--revision", help="the Hub revision")
    add_evaluation(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """How examples are evaluated."""
    parser.add_argument("--max-length", type=int, default=1024, help="tokens an example is cut at (1024)")
    parser.add_argument("--batch-size", type=int, help="examples in a pass (as many as have 16,384 tokens)")
    parser.add_argument("--examples", type=int, help="evaluate the first so many (all)")
    parser.add_argument("--assistant-only", action="store_true", help="count only what the assistant says")


def add_exporting(parser: argparse.ArgumentParser) -> None:
    """What `export` takes."""
    parser.add_argument("adapter", type=Path, help="the adapter directory")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the directory to make")


def add_generating(parser: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    parser.epilog = (
        "Each token reads the model once: from the disk where it is larger than memory, so one can take as long as "
        "that. Give several prompts at once; --batch-size of them share what is read."
    )
    parser.add_argument("model", help="a checkpoint (directory or Hub id) or a package directory")
    parser.add_argument("--adapter", type=Path, help="an adapter to plug in; in a checkpoint its carry counts, too")
    parser.add_argument("--revision", help="the Hub revision of the checkpoint")
    asked = parser.add_mutually_exclusive_group(required=True)
    text = "what to answer: a user's message if the model has a chat template, else a text to go on with"
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help=text)
    text = "the same from a .jsonl file (or what else --data takes): prompt, as text or messages; or messages"
    asked.add_argument("--prompts", metavar="FILE", help=text)
    text = "go on with texts as they are, without the chat template: so clients train on them"
    parser.add_argument("--plain", action="store_true", help=text)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="where answers are cut (128)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts answered together (8)")
    text = "write a JSON object a prompt there: prompt, completion, the row's own completion as expected, all else"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=text)


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """What every command that makes a directory takes."""
    parser.add_argument("--overwrite", action="store_true", help="replace an output that hf-fedlarge made")


def add_push(parser: argparse.ArgumentParser) -> None:
    """What `push` takes."""
    parser.add_argument("directory", type=Path, help="a merged checkpoint, an adapter or a package")
    parser.add_argument("repo_id", help="owner/name on the Hub")
    parser.add_argument("--public", action="store_true", help="make the repository public (private)")
    parser.add_argument("--summary", type=Path, help="summary.json of the run that made it, for the card's figures")
    parser.add_argument("--message", help="the commit message")
