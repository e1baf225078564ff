"""What federated training reaches of central training, and at how many bytes: aggregators, server optimizers, codecs.

    python scripts/bench/federation.py --json federation.json
    python scripts/bench/federation.py --methods fedavg exact --seeds 1 --rounds 2 --steps 2

SmolLM2-135M-Instruct learns the docstrings of the standard library's ten largest packages, one client each (non-IID),
cohorts of five. Every row trains the same number of steps of the same batches on the same package, from the same
adapter, and its adapter is evaluated on the clients' held-out examples together, plugged into the full model:

    central     one client with everybody's examples
    local-only  every client alone with its share of the steps; the mean of their losses
    the others  `hf_fedlarge.rounds.run_federation` with the settings of `METHODS`

    share of central's gain = (loss of the base − loss of the full model with the adapter) / (the same of central)

A method whose settings this version doesn't know is reported as unknown and left out. MB are what all clients of a run
moved, the package's download left out. With `--json` and `--work` a run that was stopped goes on when begun again: rows
in the file are not measured again, a federation in `--work` goes on after its last round, and `seconds` are those of
all pieces together. More seeds or methods may be asked for then; other settings need another file and directory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import DEMO_MODEL as CHECKPOINT
from harness import Figures, Rows, run_on_demo_model
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from hf_fedlarge.trainers.client import ClientArguments, train_client  # first: sets what torch must know

CLIENTS, COHORT, MAX_LENGTH = 10, 5, 160
ROUND_EXAMPLES = 16  # held-out ones that a run looks at after each round; what counts is evaluated here, on more
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"aggregator": "fedavg"},
    "ffa": {"aggregator": "ffa"},
    "exact": {"server_optimizer": "none"},
    "fedavg-adam": {"aggregator": "fedavg", "server_optimizer": "adam"},
    "exact-step2": {"server_optimizer": "none", "server_lr": 2.0},
    "exact-momentum": {"server_optimizer": "momentum"},
    "exact-proximal": {"server_optimizer": "none", "proximal": 0.01},
    "exact-int8": {"server_optimizer": "none", "codec": "int8"},
}
REFERENCES = ("central", "local-only")


def main() -> int:
    """Run every method for every seed; print the table and whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="of a client in a round")
    parser.add_argument("--batch", type=int, default=4, help="examples of a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="everybody's, central training's too")
    parser.add_argument("--max-examples", type=int, default=160, help="of a client")
    parser.add_argument("--eval-examples", type=int, default=128, help="held out, of all clients together")
    parser.add_argument("--keep-layers", help="make the package by leaving out layers (a third of the neurons)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, and go on with those in it")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the package and the runs there")
    options = parser.parse_args()
    if options.rounds * options.steps * COHORT % CLIENTS:
        parser.error(f"--rounds times --steps times {COHORT} has to be divisible by {CLIENTS}, for local-only.")
    run_on_demo_model(parser, options, Benchmark)
    return 0


class Benchmark:
    """The package, the worker that trains every client of every run, and the rows."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        from transformers.utils import logging

        from hf_fedlarge.calibrate import make_package, plan_package
        from hf_fedlarge.data import hide_progress
        from hf_fedlarge.trainers.launch import LAUNCHERS
        from hf_fedlarge.trainers.worker import Worker

        hide_progress()
        logging.disable_progress_bar()
        self.options, self.work = options, work
        self.methods, self.unknown = self.known_methods()
        if not self.methods:
            sys.exit("None of the methods is known to this version.")
        self.seeds = range(options.first_seed, options.first_seed + options.seeds)
        common = ("rounds", "steps", "batch", "learning_rate", "max_examples", "eval_examples", "keep_layers")
        self.rows = Rows(
            options.json,
            {name: getattr(options, name) for name in common},
            [self.key(method, seed) for seed in self.seeds for method in (*self.methods, *REFERENCES)],
        )
        self.train, self.worker = LAUNCHERS["inprocess"](), Worker()
        self.package = work / "package"
        if not self.package.exists():
            settings = self.settings(0, {})
            make_package(plan_package(CHECKPOINT, settings), settings, self.package)
            self.rows.save()
        self.base: dict[int, float] = {}  # seed → loss before training

    def known_methods(self) -> tuple[list[str], dict[str, str]]:
        """Those asked for whose settings this version knows, and what is wrong with the others."""
        unknown = {}
        for name in self.options.methods:
            try:
                self.settings(0, METHODS[name])
            except ValidationError as error:
                unknown[name] = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
                print(f"{name}: settings unknown to this version: {unknown[name]}", file=sys.stderr)
        return [name for name in self.options.methods if name not in unknown], unknown

    @staticmethod
    def key(method: str, seed: int) -> dict[str, Any]:
        """What tells a row from the others."""
        chosen = METHODS.get(method, {})
        return {"method": method, "chosen": " ".join(f"{name}={value}" for name, value in chosen.items()), "seed": seed}

    def settings(self, seed: int, method: dict[str, Any]) -> Any:
        """A federation's settings; pydantic's ValidationError where a key isn't known."""
        from hf_fedlarge.config import FederationConfig

        return FederationConfig.model_validate(
            {
                "checkpoint": str(CHECKPOINT),
                "data": {
                    "source": "stdlib",
                    "split": "column",
                    "column": "package",
                    "clients": CLIENTS,
                    "max_examples": self.options.max_examples,
                },
                "keep_layers": self.options.keep_layers,
                "rounds": self.options.rounds,
                "cohort": COHORT,
                "seed": seed,
                "eval_examples": ROUND_EXAMPLES,
                "client_eval_examples": 0,
                "training": self.training(self.options.steps),
            }
            | method
        )

    def training(self, steps: int) -> dict[str, Any]:
        """A client's training arguments."""
        return {
            "max_steps": steps,
            "per_device_train_batch_size": self.options.batch,
            "learning_rate": self.options.learning_rate,
            "max_length": MAX_LENGTH,
            "disable_tqdm": True,
            "logging_strategy": "no",
        }

    def run(self) -> dict[str, Any]:
        """The rows, their means by method, which bars are met, seconds and the settings."""
        for seed in self.seeds:
            homes = {name: self.work / f"run-{seed}-{name}" for name in self.methods}
            for name, home in homes.items():
                self.row(name, seed, home, partial(self.federated, name, home, self.settings(seed, METHODS[name])))
            home = homes[self.methods[-1]]
            self.row("central", seed, home, partial(self.central, seed, home))
            self.row("local-only", seed, home, partial(self.local_only, seed, home))
        report = self.rows.report()
        means = self.means(report["rows"])
        self.show(means)
        print(f"{report['seconds'] / 60:.1f} min in all")
        return report | {"mean": means, "unknown": self.unknown, "bars": bars(means)}

    def row(self, method: str, seed: int, home: Path, measure: Callable[[], Figures]) -> None:
        """A row, with the loss before training and what was gained."""

        def with_gain() -> Figures:
            figures = measure()
            if seed not in self.base:
                self.base[seed] = self.loss(home, None)
            return {"base": self.base[seed], "gain": self.base[seed] - figures["full"]} | figures

        print(self.rows.row(self.key(method, seed), with_gain), file=sys.stderr, flush=True)

    def federated(self, name: str, home: Path, settings: Any) -> dict[str, float]:
        """One federation, in a run directory that has the clients' data."""
        from hf_fedlarge.rounds import run_federation

        if not (home / "package").exists():
            home.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.package, home / "package", copy_function=os.link)

        def told(line: str) -> None:
            print(f"{name}: {line}", flush=True)
            self.rows.save()

        summary = run_federation(settings, home, self.train, told, stop=False)
        package = summary["package_bytes"]
        fetched = {client for entry in summary["rounds"] for client in entry["bytes_by_client"]}
        return {
            "full": self.loss(home, home / "rounds" / f"{settings.rounds:04d}" / "adapter"),
            "mb_down": (summary["bytes_down"] - package * len(fetched)) / 1e6,
            "mb_up": summary["bytes_up"] / 1e6,
        }

    def central(self, seed: int, home: Path) -> dict[str, float]:
        """One client with the union of the data and all the steps."""
        union = self.work / f"union-{seed}.jsonl"
        union.write_text("".join(path.read_text() for path in self.data(home)))
        steps = self.options.rounds * self.options.steps * COHORT
        return {"full": self.alone("central", seed, home, union, steps), "mb_down": 0.0, "mb_up": 0.0}

    def local_only(self, seed: int, home: Path) -> dict[str, float]:
        """Every client by itself: the same steps in all, and nothing moves."""
        steps = self.options.rounds * self.options.steps * COHORT // CLIENTS
        losses = [self.alone(f"local-{path.parent.name}", seed, home, path, steps) for path in self.data(home)]
        return {"full": statistics.mean(losses), "mb_down": 0.0, "mb_up": 0.0}

    def data(self, home: Path) -> list[Path]:
        """Every client's examples."""
        if found := sorted(home.glob("clients/*/train.jsonl")):
            return found
        sys.exit(f"{home} is not there any more; give the --work that {self.options.json} was begun with.")

    def alone(self, name: str, seed: int, home: Path, data: Path, steps: int) -> float:
        """Train one client from the federation's first adapter; the full model's loss with it."""
        from hf_fedlarge.collect import aggregate_updates
        from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig

        start, output = home / "rounds" / "0000" / "adapter", self.work / f"alone-{seed}" / name
        arguments = ClientArguments(
            package=str(self.package),
            adapter=str(start),
            data=str(data),
            eval_data=str(home / "held_out.jsonl"),
            eval_examples=0,
            output=str(output / "update"),
            client=name,
            verify=False,
            overwrite=True,
        )
        output.mkdir(parents=True, exist_ok=True)
        config = StreamingLoraConfig(output_dir=str(output), seed=seed, **self.training(steps))
        train_client(arguments, config, self.worker)
        adapter = output / "adapter"
        aggregate_updates([output / "update"], self.package, adapter, previous=start, overwrite=True)
        return self.loss(home, adapter)

    def loss(self, home: Path, adapter: Path | None) -> float:
        """The full model's, on the clients' held-out examples."""
        from hf_fedlarge.data import load_examples
        from hf_fedlarge.evaluation import evaluate

        held_out = load_examples(str(home / "held_out.jsonl")).shuffle(seed=0)
        held_out = held_out.select(range(min(self.options.eval_examples, len(held_out))))
        return evaluate(CHECKPOINT, held_out, adapter=adapter, max_length=MAX_LENGTH, verify=False).loss

    @staticmethod
    def means(rows: list[Figures]) -> dict[str, dict[str, float]]:
        """Method → means over seeds, and the share of central's gain, from the means."""
        means: dict[str, dict[str, float]] = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            alike = [row for row in rows if row["method"] == method]
            names = [name for name in alike[0] if name not in ("method", "chosen", "seed")]
            means[method] = {name: statistics.mean(row[name] for row in alike) for name in names}
            means[method]["gain_spread"] = statistics.pstdev(row["gain"] for row in alike)
        for mean in means.values():
            mean["share_of_central"] = mean["gain"] / means["central"]["gain"]
        return means

    def show(self, means: dict[str, dict[str, float]]) -> None:
        """The table on standard output."""
        table = Table(title=f"Full model, held-out loss in nats per token; seeds: {self.options.seeds}")
        for column in ("", "loss", "gain", "of central's", "MB down", "MB up"):
            table.add_column(column, justify="right" if column else "left")
        for method, mean in means.items():
            losses = [f"{mean['full']:.3f}", f"{mean['gain']:.3f} ± {mean['gain_spread']:.3f}"]
            table.add_row(
                method, *losses, f"{mean['share_of_central']:.1%}", f"{mean['mb_down']:.1f}", f"{mean['mb_up']:.1f}"
            )
        Console().print(table)
        for bar, met in bars(means).items():
            print(f"{'met' if met else 'NOT met'}: {bar}")


def bars(means: dict[str, dict[str, float]]) -> dict[str, bool]:
    """What the project asks for → whether the means have it; what wasn't run is left out."""
    federated = [mean["share_of_central"] for method, mean in means.items() if method not in REFERENCES]
    asked = {"the best federated setting keeps at least 80 % of central's gain": max(federated) >= 0.8}
    if {"exact", "exact-int8"} <= means.keys():
        plain, int8 = means["exact"], means["exact-int8"]
        asked |= {
            "updates in int8 lose under 2 % of the gain": int8["gain"] > 0.98 * plain["gain"],
            "at four times fewer bytes than fp32": plain["mb_up"] >= 4 * int8["mb_up"],
        }
    return asked


if __name__ == "__main__":
    sys.exit(main())
