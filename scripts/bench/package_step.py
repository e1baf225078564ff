"""What a package costs whoever trains on it: a client's optimizer step and memory, package by package.

    hf-fedlarge shrink demo/SmolLM2-135M-Instruct -o full --keep-layers 1.0 --keep-neurons 1
    hf-fedlarge shrink demo/SmolLM2-135M-Instruct -o layers --keep-layers 0.75
    hf-fedlarge shrink demo/SmolLM2-135M-Instruct -o neurons --keep-neurons 0.67
    python scripts/bench/package_step.py full layers neurons

The packages take turns, each run in a fresh process: our Trainer, LoRA of rank 16 on every matrix, random tokens.
Sequences have other lengths in every step, as a client's have, and products of every new size are compiled and kept.
The first step is left out; quoted are medians over the runs of each run's median step, the largest memory above what
the process had after its imports, and what share of the first package's time that step is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from client_step import examples, import_ours, streaming_trainer, trainer_arguments
from harness import Figures, MemoryPeak, alternate, surroundings, write_report
from rich.console import Console
from rich.table import Table


def main() -> int:
    """Train on every package in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path, help="the others are compared with the first")
    parser.add_argument("--micro-batches", type=int, default=1, help="accumulated for an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=160, help="the longest")
    parser.add_argument("--labelled-fraction", type=float, default=0.5, help="the last share of every sequence")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps a run; the first is not counted")
    parser.add_argument("--memory-budget", help="see `hf-fedlarge train --help`")
    parser.add_argument("--optim", help="the optimizer, as SFTConfig names it")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each package, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ragged = True
    if options.side:
        print(json.dumps(measure(options, options.side)))
        return 0
    for package in options.packages:
        if not (package / "fedlarge.json").exists():
            parser.error(f"{package} is no package; make it with `hf-fedlarge shrink`.")
    runs = alternate({str(package): {} for package in options.packages}, options.rounds)
    rows = [
        {"package": package} | {name: statistics.median(run[name] for run in figures) for name in figures[0]}
        for package, figures in runs.items()
    ]
    for row in rows:
        row["step_ratio"] = row["step_seconds"] / rows[0]["step_seconds"]
    show(rows)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name not in ("packages", "json", "side")}
        write_report(options.json, {"rows": rows, "settings": settings} | surroundings())
    return 0


def measure(options: argparse.Namespace, package: Path) -> Figures:
    """Train on one package in this process; returns the figures."""
    import_ours()
    from datasets import Dataset
    from step_timer import StepTimer

    from hf_fedlarge.package import load_tokenizer

    timer = StepTimer()
    vocabulary = json.loads((package / "config.json").read_text())["vocab_size"]
    common = {
        "train_dataset": Dataset.from_dict(examples(options, vocabulary)),
        "processing_class": load_tokenizer(package),
        "callbacks": [timer],
    }
    with tempfile.TemporaryDirectory() as directory, MemoryPeak() as memory:
        streaming_trainer(options, package, trainer_arguments(options, directory), common).train()
    weights = sum(file.stat().st_size for file in package.glob("*.safetensors"))
    return {"weight_bytes": weights, "step_seconds": statistics.median(timer.seconds[1:])} | memory.figures()


def show(rows: list[Figures]) -> None:
    """Print them as a table."""
    table = Table(title="A client's step by package")
    for column in ("package", "weights", "step", "of the first", "peak memory", "anonymous"):
        table.add_column(column, justify="left" if column == "package" else "right")
    for row in rows:
        sizes = [f"{row[name] / 1e6:,.0f} MB" for name in ("weight_bytes", "peak_rss_bytes", "peak_anonymous_bytes")]
        table.add_row(
            row["package"], sizes[0], f"{row['step_seconds']:.2f} s", f"{row['step_ratio']:.2f}", sizes[1], sizes[2]
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
