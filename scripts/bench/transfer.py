"""How much of full-model LoRA's gain an adapter keeps that was trained on a package and plugged into the full model.

    python scripts/bench/transfer.py --keep 0.75 --seeds 3 --json transfer.json
    python scripts/bench/transfer.py --keep 0.75 0.67 0.5 --methods none linear --seeds 1

Everything is trained alike: SmolLM2-135M-Instruct writes the docstrings of Python's standard library, labels on the
docstring only, examples cut at 160 tokens, `--steps` steps of 8, AdamW with a constant 5e-4, LoRA of rank 16 on every
matrix of every (kept) layer, the same initial factors, the same examples in the same order; another seed has other
factors and another order. 64 examples are held out, the same for all; 192 others are calibration text of the domain.
The reference is LoRA on the full model in bf16. Packages are in NF4 with int8 embeddings (`--embeddings`).

    share kept = (loss of the base − loss of the full model with the adapter) / (the same of the reference)

Methods: `none` (layers dropped evenly, nothing in their place), `linear` (surrogates there), `low-rank` (of rank 64),
`influence`, `loss` and `gradient` (as `linear`, the layers chosen by score), `neurons` (all layers, with as many of
their neurons as make no more bytes than `linear`), `even-neurons` (as many in every layer). They are fitted on Python's
documentation, text of another domain, and with `-in-domain` behind the name on docstrings that nobody trains on,
filled up with that documentation.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import DEMO_MODEL as CHECKPOINT
from harness import run_on_demo_model, write_report
from rich.console import Console
from rich.table import Table

from hf_fedlarge.trainers.client import ClientArguments  # noqa: F401  (sets what torch must know before it loads)

HELD_OUT, CALIBRATION, MAX_LENGTH, BATCH = 64, 192, 160, 8
IN_DOMAIN = "-in-domain"
SETTINGS = {
    "none": {"surrogate": "none"},
    "linear": {},
    "influence": {"layer_choice": "influence"},
    "loss": {"layer_choice": "loss"},
    "gradient": {"layer_choice": "gradient"},
    "low-rank": {"surrogate_rank": 64},
    "neurons": {},
    "even-neurons": {"width_choice": "uniform"},
}
METHODS = [*SETTINGS, *(method + IN_DOMAIN for method in SETTINGS if method != "none")]


def main() -> int:
    """Train, plug in and evaluate every method; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", nargs="+", default=["0.75"], help="shares or counts of the layers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["none", "linear", "neurons", METHODS[-1]])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--surrogate-codec", choices=("nf4", "int8", "bf16"), default="nf4")
    parser.add_argument("--embeddings", choices=("int8", "nf4", "bf16"), default="int8", help="how packages store them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the packages there")
    options = parser.parse_args()
    run_on_demo_model(parser, options, Benchmark)
    return 0


class Benchmark:
    """One run: the data, the packages that were made so far, and the rows."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        from hf_fedlarge.data import from_rows, training_columns, write_jsonl
        from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
        from hf_fedlarge.stdlib_corpus import standard_library_pairs

        self.options, self.work = options, work
        self.load_package, self.stream_checkpoint = load_package, stream_checkpoint
        self.tokenizer = load_tokenizer(CHECKPOINT)
        pairs = standard_library_pairs()
        order = np.random.default_rng(0).permutation(len(pairs))
        rows = [pairs[place] for place in order]
        self.held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
        self.calibration = work / "calibration.jsonl"
        self.calibration.unlink(missing_ok=True)
        write_jsonl(training_columns(from_rows(rows[:CALIBRATION])), self.calibration)
        self.training = training_columns(from_rows(rows[CALIBRATION:]))
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """The base's loss, the rows, their means by share and method, and the settings."""
        options, full = self.options, self.stream_checkpoint(CHECKPOINT)
        layers = list(range(full.architecture.layers))
        base = self.loss(full)
        print(f"base: {base:.4f}", file=sys.stderr)
        packages = {(keep, method): self.package(keep, method) for keep in options.keep for method in options.methods}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            factors, reference = self.train(self.stream_checkpoint(CHECKPOINT), layers, seed)
            reference |= {"loss": self.plugged_in(factors)}
            print(f"seed {seed}, reference: {reference}", file=sys.stderr)
            for (keep, method), made in packages.items():
                package = self.load_package(made["directory"])
                kept = package.package.kept_layers
                row = {"keep": keep, "method": method, "seed": seed, "reference": reference["loss"]}
                row["before"] = self.loss(package)
                factors, figures = self.train(package, kept, seed)
                row |= figures | {name: made[name] for name in ("kept", "bytes_share", "make_seconds")}
                row["plugged_in"] = self.plugged_in(factors)
                row["share_kept"] = (base - row["plugged_in"]) / (base - reference["loss"])
                row["step_ratio"] = row["step_seconds"] / reference["step_seconds"]
                self.rows.append(row)
                print(row, file=sys.stderr, flush=True)
                if options.json:  # what there is so far, for whoever can't wait
                    write_report(options.json, self.report(base))
        self.show()
        return self.report(base)

    def report(self, base: float) -> dict[str, Any]:
        """What `--json` gets."""
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.options).items()}
        return {"base": base, "rows": self.rows, "mean": self.means(), "settings": settings}

    def package(self, keep: str, method: str) -> dict[str, Any]:
        """Make a package; where it is, what it costs and which layers it has."""
        from hf_fedlarge.calibrate import make_package, plan_package
        from hf_fedlarge.config import PackageSettings
        from hf_fedlarge.layers import format_ranges

        directory = self.work / f"package-{keep}-{method}"
        shutil.rmtree(directory, ignore_errors=True)
        kind = method.removesuffix(IN_DOMAIN)
        kept = {"keep_neurons": self.neurons(keep)} if kind.endswith("neurons") else {"keep_layers": keep}
        settings = PackageSettings(
            surrogate_codec=self.options.surrogate_codec,
            embeddings=self.options.embeddings,
            calibration=str(self.calibration) if method.endswith(IN_DOMAIN) else None,
            **kept,
            **SETTINGS[kind],
        )
        started = time.perf_counter()
        plan = plan_package(CHECKPOINT, settings)
        manifest = make_package(plan, settings, directory)
        weights = sum(entry.size for name, entry in manifest.files.items() if name.endswith(".safetensors"))
        return {
            "directory": directory,
            "kept": format_ranges(plan.kept),
            "make_seconds": time.perf_counter() - started,
            "bytes_share": weights / plan.full_bytes,
        }

    def neurons(self, keep: str) -> float:
        """The share of neurons with which all layers have as many weights as that share of layers with surrogates."""
        from hf_fedlarge.architectures import describe, load_config
        from hf_fedlarge.layers import parse_layers

        architecture = describe(load_config(CHECKPOINT))
        sizes = {
            path: math.prod(architecture.parameters[f"{architecture.blocks}.0.{path}.weight"])
            for path in architecture.linears
        }
        forward = architecture.feed_forward
        neurons = sum(sizes[path] for path in (*forward.inputs, forward.output))
        surrogate = (sizes[forward.output] // architecture.neuron_count) ** 2
        share = parse_layers(keep, architecture.layers) / architecture.layers
        left = share * sum(sizes.values()) + (1 - share) * surrogate - (sum(sizes.values()) - neurons)
        return math.floor(left / neurons * architecture.neuron_count / 64) * 64 / architecture.neuron_count

    def train(self, model: Any, layers: list[int], seed: int) -> tuple[dict[str, Any], dict[str, float]]:
        """Train adapters on a model whose blocks are these layers; returns the factors and the figures."""
        from step_timer import StepTimer

        from hf_fedlarge.adapters import attach_lora, get_factors, initial_factors, set_factors
        from hf_fedlarge.config import LoraSettings
        from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer

        timer = StepTimer()
        lora, architecture = LoraSettings(), model.architecture
        full = self.stream_checkpoint(CHECKPOINT).architecture
        everywhere = initial_factors(full, list(range(full.layers)), lora, seed)
        factors = {module: pair for module, pair in everywhere.items() if full.layer_of(f"{module}.") in layers}
        adapted = attach_lora(model, architecture, lora)
        set_factors(adapted, factors, architecture, layers)
        config = StreamingLoraConfig(
            output_dir=str(self.work / "trainer"),
            max_steps=self.options.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=5e-4,
            max_length=MAX_LENGTH,
            seed=seed,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = StreamingLoraTrainer(
            adapted, config, train_dataset=self.training, processing_class=self.tokenizer, callbacks=[timer]
        )
        trainer.train()
        figures = {"after": self.loss(adapted), "step_seconds": statistics.median(timer.seconds[1:])}
        return get_factors(adapted, architecture, layers), figures

    def plugged_in(self, factors: dict[str, Any]) -> float:
        """The full model's held-out loss with these factors, in global layer numbers."""
        from hf_fedlarge.adapters import attach_lora, set_factors
        from hf_fedlarge.config import LoraSettings

        model = self.stream_checkpoint(CHECKPOINT)
        layers = list(range(model.architecture.layers))
        adapted = attach_lora(model, model.architecture, LoraSettings())
        set_factors(adapted, factors, model.architecture, layers)
        return self.loss(adapted)

    def loss(self, model: Any) -> float:
        """Held-out loss."""
        from hf_fedlarge.evaluation import evaluate_model

        return evaluate_model(model, self.tokenizer, self.held_out, max_length=MAX_LENGTH).loss

    def means(self) -> list[dict[str, Any]]:
        """Means over seeds, for each share and method."""
        means = []
        for keep, method in dict.fromkeys((row["keep"], row["method"]) for row in self.rows):
            rows = [row for row in self.rows if (row["keep"], row["method"]) == (keep, method)]
            names = [name for name, value in rows[0].items() if isinstance(value, float)]
            mean = {name: statistics.mean(row[name] for row in rows) for name in names}
            means.append({"keep": keep, "method": method, "seeds": len(rows)} | mean)
        return means

    def show(self) -> None:
        """Print the means as a table."""
        table = Table(title="Share of the full model's gain that the plugged-in adapter keeps")
        columns = ("keep", "method", "share kept", "small before", "after", "plugged in", "bytes", "step", "made in")
        for column in columns:
            table.add_column(column, justify="right")
        for mean in self.means():
            losses = [f"{mean[name]:.3f}" for name in ("before", "after", "plugged_in")]
            costs = [f"{mean['bytes_share']:.3f}", f"{mean['step_ratio']:.2f}", f"{mean['make_seconds']:.0f} s"]
            table.add_row(mean["keep"], mean["method"], f"{mean['share_kept']:.1%}", *losses, *costs)
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
