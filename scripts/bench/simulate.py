"""Hundreds of clients in one process: what each costs besides its training steps, and whether memory stays flat.

    python scripts/bench/simulate.py --clients 200 --json simulate.json
    python scripts/bench/simulate.py --clients 20 --smollm2

A client is trained as `hf-fedlarge run` trains it with `launcher: inprocess`: `--examples` docstrings of the standard
library, of their natural lengths up to `--max-length` tokens, `--steps` steps of `--batch`. Overhead is a client's time
less its steps and its held-out evaluation (`--evaluate`; the runner's clients evaluate): reading and tokenizing data,
making a Trainer, an optimizer, the update on disk. It is one thread's work, so its processor seconds, which company on
the same cores changes less, are what its seconds would be alone. Resident memory is looked at after each client.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from harness import workplace, write_report

import hf_fedlarge.trainers.client  # noqa: F401  (sets what torch must know before it loads)

SMOLLM2 = Path("demo/SmolLM2-135M-Instruct")


def main() -> int:
    """Train the clients one after another; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--smollm2", action="store_true", help="three quarters of SmolLM2's layers (a toy)")
    parser.add_argument("--examples", type=int, default=24, help="of each client")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--evaluate", action="store_true", help="with held-out losses before and after")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the package and the data there")
    options = parser.parse_args()
    if options.smollm2 and not (SMOLLM2 / "config.json").exists():
        parser.error(f"{SMOLLM2} is missing; run `make demo` once.")
    if options.clients < 2:
        parser.error("--clients is the number of clients, 2 or more.")
    with workplace(options) as directory:
        report = simulate(options, Path(directory))
    print(json.dumps({name: value for name, value in report.items() if name != "clients"}, indent=2))
    if options.json:
        write_report(options.json, report)
    return 0


def simulate(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Medians over the clients but the first, which loads the package, and every client's own figures."""
    import psutil
    from transformers.utils import logging

    from hf_fedlarge.artifacts import UpdateManifest, read_manifest
    from hf_fedlarge.data import from_rows, hide_progress, training_columns, write_jsonl
    from hf_fedlarge.jobs import ClientJob
    from hf_fedlarge.stdlib_corpus import standard_library_pairs
    from hf_fedlarge.trainers import worker
    from hf_fedlarge.trainers.launch import LAUNCHERS

    class Steps(worker.Steps):
        """Knows also what processor time the main thread spent in steps."""

        processor = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            Steps.processor -= time.thread_time()
            super().on_step_begin(*args, **kwargs)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_step_end(*args, **kwargs)
            Steps.processor += time.thread_time()

    worker.Steps = Steps
    hide_progress()
    logging.disable_progress_bar()
    package, adapter = prepare(options, work)
    pairs = standard_library_pairs()
    if not options.smollm2:
        # The toy's tokenizer knows no chats.
        pairs = [{"text": pair["completion"][0]["content"]} for pair in pairs]
    shutil.rmtree(work / "updates", ignore_errors=True)
    train, process, clients = LAUNCHERS["inprocess"](), psutil.Process(), []
    for number in range(options.clients):
        rows = [pairs[(number * options.examples + place) % len(pairs)] for place in range(options.examples)]
        write_jsonl(training_columns(from_rows(rows)), work / "data.jsonl")
        job = ClientJob(
            client=f"client-{number:03d}",
            round=1,
            package=package,
            adapter=adapter,
            data=work / "data.jsonl",
            eval_data=work / "data.jsonl",
            output=work / "updates" / f"{number:03d}",
            training={
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch,
                "max_length": options.max_length,
                "seed": number,
                "disable_tqdm": True,
                "logging_strategy": "no",
            },
            eval_examples=8 if options.evaluate else 0,
        )
        began, processor = time.perf_counter(), time.thread_time() - Steps.processor
        train(job)
        processor = time.thread_time() - Steps.processor - processor
        seconds = time.perf_counter() - began
        measured = read_manifest(job.output, UpdateManifest).measured
        figures = {name: measured[f"{name}_seconds"] for name in ("train", "evaluation")}
        # From outside: the writing of the update is in it.
        figures |= {"overhead": seconds - sum(figures.values())}
        figures |= {"overhead_processor": processor, "rss": process.memory_info().rss}
        clients.append(figures)
        print(f"{job.client}: {figures}", file=sys.stderr, flush=True)
    rest = clients[1:]
    early = min(20, len(clients)) - 1
    return {
        "overhead_seconds_median": statistics.median(figures["overhead"] for figures in rest),
        # With --evaluate the evaluation's are in it.
        "overhead_processor_seconds_median": statistics.median(figures["overhead_processor"] for figures in rest),
        "overhead_seconds_first": clients[0]["overhead"],
        "train_seconds_median": statistics.median(figures["train"] for figures in rest),
        "evaluation_seconds_median": statistics.median(figures["evaluation"] for figures in rest),
        "rss_mb_at_client_20": clients[early]["rss"] / 1e6,
        "rss_mb_at_the_end": clients[-1]["rss"] / 1e6,
        "load_average": os.getloadavg()[0],
        "clients": clients,
        "settings": {name: str(value) for name, value in vars(options).items()},
    }


def prepare(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """The package and the adapter that all start from, made unless they are there."""
    from shapes import write_checkpoint

    from hf_fedlarge.config import LoraSettings
    from hf_fedlarge.lineage import start_adapter
    from hf_fedlarge.shrink import plan_shrink, shrink

    home = work / ("smollm2" if options.smollm2 else "tiny")
    package, adapter = home / "package", home / "adapter"
    if not package.exists():
        if not options.smollm2:
            write_checkpoint("tiny", home / "checkpoint")
        shrink(plan_shrink(SMOLLM2 if options.smollm2 else home / "checkpoint", keep_layers="0.75"), package)
    if not adapter.exists():
        start_adapter(package, adapter, LoraSettings(), seed=0)
    return package, adapter


if __name__ == "__main__":
    sys.exit(main())
