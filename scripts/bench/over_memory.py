"""Optimizer steps of a model larger than the memory it may have: a 7B shape in 4 bits under a memory cgroup (Linux).

    python scripts/bench/over_memory.py --work build/bench
    python scripts/bench/over_memory.py --limit 2G --steps 2 --no-peer --work build/bench --json out.json
    python scripts/bench/over_memory.py --layers 2          # a small try, two minutes

Three sides, each a fresh process in a cgroup of its own from its first instruction on, imports included: `ours` with
the limit, `uncapped`, the same without it, and `peer`, trl's SFTTrainer on the same package, loaded as a prequantized
bitsandbytes model by stock transformers, with the limit. How the peer ended is reported: it survived with figures of
its own, was killed, or was given up after `--patience` seconds. (On a CPU stock transformers leaves the packed weights
mapped as well, so it isn't their size that kills it.) The package has bf16 embeddings because those are the packages
that stock transformers loads.

Before each run the package and the installed libraries are dropped from the page cache: cached pages stay charged to
whoever read them first and would cost a limited process nothing. So loading and the first step read the package from
the disk on both sides; without a limit the later ones find it in memory, and `--steps 2` or more leaves the first out.
For the same reason the package's digests are not verified here, which would read it once in advance.

A step takes about a minute on two cores, so each side runs once; `--pairs 3` gives medians. The model takes 17 GB of
disk while it is made and 4 GB after, and some five minutes: give `--work` to keep it.

Where no cgroup can be made, that is said in one sentence and the exit code is 0. Version 1 needs root. Version 2 needs
a directory of ours or above us that we may write and that hands on the memory controller, as in
`systemd-run --user --scope -p Delegate=yes python scripts/bench/over_memory.py …`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import (
    Figures,
    MemoryPeak,
    add_common_options,
    drop_from_page_cache,
    show,
    summarize,
    workplace,
)

RANK, ALPHA = 8, 16
_SAMPLE_SECONDS = 0.05


def main() -> int:
    """Make the package, run the sides in turn and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", default="1500M", help="memory of the limited sides, as the kernel writes it")
    parser.add_argument("--layers", type=int, help="decoder blocks; else the 32 of the shape")
    parser.add_argument("--sequences", type=int, default=4, help="in an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="sequences computed at a time")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1, help="a run's; the first of several isn't counted")
    parser.add_argument("--memory-budget", help="ours: see `hf-fedlarge train --help`")
    parser.add_argument("--patience", type=float, default=900, help="seconds after which a run is given up")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave it out")
    add_common_options(parser)
    parser.set_defaults(pairs=1)
    options = parser.parse_args()
    if options.side == "package":
        write_package(options)
        return 0
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    if not re.fullmatch(r"\d+[KMG]?", options.limit):
        parser.error(f"--limit {options.limit} is not a size; expected bytes, or a number with K, M or G.")
    if options.sequences % options.micro_batch_size:
        parser.error(f"--micro-batch-size {options.micro_batch_size} does not divide {options.sequences} sequences.")
    # Ended from outside, by `timeout` say, it leaves no process and no cgroup behind either.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with memory_cgroup(options.limit):  # before the minutes that the package takes
            pass
    except OSError as error:
        print(f"skipped: a cgroup with a limit of {options.limit} can't be made here ({error}).")
        return 0
    with workplace(options) as directory:
        home = Path(directory) / ("7b-bf16-ends" + (f"-{options.layers}" if options.layers else ""))
        if not (home / "package").exists():
            # In a process of its own: this one must not hold pages of the libraries.
            subprocess.run([sys.executable, *sys.argv, "--side", "package", "--work", str(home)], check=True)
        sides = {"ours": options.limit, "uncapped": None} | ({"peer": options.limit} if options.peer else {})
        runs: dict[str, list[Figures]] = {side: [] for side in sides}
        for _ in range(options.pairs):
            for side, limit in sides.items():
                runs[side].append(run_in_cgroup(side, limit, home, options.patience))
    if options.peer:  # one that was killed even once did not survive, and has no figures
        runs["peer"] = [run for run in runs["peer"] if run["exit"] != "survived"] or runs["peer"]
    report = summarize(runs, vars(options) | {"tokens": options.sequences * options.sequence_length})
    report["ours"]["speed_kept"] = report["uncapped"]["step_seconds"] / report["ours"]["step_seconds"]
    show(report, f"7b, {options.sequences} × {options.sequence_length} tokens in {options.limit}", options.json)
    print(f"ours keeps {report['ours']['speed_kept']:.0%} of its speed" + peer_ending(report))
    return 0


def peer_ending(report: dict[str, Any]) -> str:
    """What became of the peer, for the end of a sentence."""
    return f"; the peer: {report['peer']['exit']}." if "peer" in report else "."


def write_package(options: argparse.Namespace) -> None:
    """A full-depth package of random weights in `options.work`; the checkpoint it is made from goes away."""
    from shapes import write_checkpoint

    from hf_fedlarge.shrink import plan_shrink, shrink

    checkpoint = options.work / "checkpoint"
    if checkpoint.exists():
        shutil.rmtree(checkpoint)  # of a run that was interrupted
    write_checkpoint("7b", checkpoint, options.layers)
    shrink(plan_shrink(checkpoint, keep_layers="1.0", embeddings="bf16"), options.work / "package")
    shutil.rmtree(checkpoint)


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup of version 1 or 2."""

    directory: Path
    version: int

    def anonymous_bytes(self) -> int:
        """Anonymous memory charged to it at the moment."""
        stat = dict(line.split() for line in (self.directory / "memory.stat").read_text().splitlines())
        return int(stat["total_rss" if self.version == 1 else "anon"])

    def peak_bytes(self) -> int | None:
        """The most that was charged to it, page cache included; None where the kernel (before 5.19) keeps no record."""
        file = self.directory / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        return int(file.read_text()) if file.exists() else None

    def out_of_memory_kills(self) -> int:
        """How many of its processes were killed because it was full."""
        file = self.directory / ("memory.oom_control" if self.version == 1 else "memory.events")
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])


@contextmanager
def memory_cgroup(limit: str | None) -> Iterator[Cgroup]:
    """A cgroup with `limit` for memory and swap together (None: without), removed at the end.

    Raises:
        OSError: it can't be made or limited.
    """
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    version = 1 if "memory" in own else 2
    root = Path("/sys/fs/cgroup/memory" if version == 1 else "/sys/fs/cgroup")
    here = root / own["memory" if version == 1 else ""].lstrip("/")
    # In a container our own path may be the host's, which isn't there; in version 2 a group with processes has no
    # limited children. So the nearest one above us that can have some.
    above = [group for group in (here, *here.parents) if group.is_relative_to(root) and group.is_dir()]
    if version == 2:
        above = [group for group in above if "memory" in (group / "cgroup.subtree_control").read_text().split()]
    if not above:
        raise OSError("no cgroup above this process hands on the memory controller")
    directory = above[0] / f"fedlarge-bench-{os.getpid()}"
    directory.mkdir()
    try:
        if limit:
            if version == 1:
                (directory / "memory.limit_in_bytes").write_text(limit)
                swap, allowed = directory / "memory.memsw.limit_in_bytes", limit
            else:
                (directory / "memory.max").write_text(limit)
                swap, allowed = directory / "memory.swap.max", "0"
            if swap.exists():  # a kernel without accounting of swap, or without swap, hasn't got it
                swap.write_text(allowed)
        yield Cgroup(directory, version)
    finally:
        directory.rmdir()


def run_in_cgroup(side: str, limit: str | None, home: Path, patience: float) -> Figures:
    """Run this program for one side, cold and in a cgroup of its own; returns its figures and the cgroup's.

    Just above what it needs to live, a process reads its own code from the disk over and over and is not killed: after
    `patience` seconds it is.
    """
    left = drop_what_is_read(home / "package")
    print(f"{side}: {'no limit' if limit is None else limit} …", file=sys.stderr, flush=True)
    words = [sys.executable, *sys.argv, "--side", side, "--work", str(home)]
    anonymous = 0
    with memory_cgroup(limit) as cgroup, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        # A shell enters the cgroup and becomes the program, so that all the program ever has is charged there.
        entering = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.directory / "cgroup.procs"), *words]
        process = subprocess.Popen(entering, stdout=output, stderr=errors)
        deadline = time.monotonic() + patience
        try:
            while process.poll() is None and time.monotonic() < deadline:
                anonymous = max(anonymous, cgroup.anonymous_bytes())
                time.sleep(_SAMPLE_SECONDS)
        finally:
            given_up = process.poll() is None
            process.kill()
            process.wait()
        kills, peak = cgroup.out_of_memory_kills(), cgroup.peak_bytes()
        lines, complaint = (file.seek(0) or file.read().decode(errors="replace") for file in (output, errors))
    figures = {"charged_bytes": peak, "charged_anonymous_bytes": anonymous, "cached_before_bytes": left}
    if process.returncode == 0:
        figures = json.loads(lines.splitlines()[-1]) | figures | {"exit": "survived"}
    elif process.returncode == -signal.SIGKILL and kills:
        figures["exit"] = "killed (SIGKILL), out of memory"
    elif given_up:
        figures["exit"] = f"given up after {patience:g} s"
    else:
        last = (complaint.strip().splitlines() or ["nothing on stderr"])[-1]
        figures["exit"] = f"exit code {process.returncode}: {last}"
    if process.returncode and side != "peer":
        print(complaint[-4000:], file=sys.stderr)
        sys.exit(f"The side {side!r} did not finish: {figures}.")
    print(f"{side}: {figures}", file=sys.stderr, flush=True)
    return figures


def drop_what_is_read(package: Path) -> int | None:
    """Forget the cached pages of the package and of the installed libraries.

    Returns:
        The bytes of the package that are cached nevertheless; None where util-linux's `fincore` is missing.
    """
    weights = list(package.glob("*.safetensors"))
    libraries = Path(sysconfig.get_paths()["platlib"]).rglob("*.*")
    drop_from_page_cache([*weights, *(file for file in libraries if file.is_file())])
    if not shutil.which("fincore"):
        return None
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, weights)]
    return sum(map(int, subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.split()))


def measure(options: argparse.Namespace) -> Figures:
    """Train one side in this process; returns its figures."""
    ours = options.side != "peer"
    if ours:
        # First, as a client does: it sets what torch must know before it loads.
        import hf_fedlarge.trainers.client  # noqa: F401
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class StepMeter(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.read_bytes: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started, self.blocks = time.perf_counter(), blocks_read()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)
            self.read_bytes.append((blocks_read() - self.blocks) * 512)

    package = options.work / "package"
    tokenizer = AutoTokenizer.from_pretrained(package)
    size = (options.steps * options.sequences, options.sequence_length)
    vocabulary = AutoConfig.from_pretrained(package).vocab_size
    ids = torch.randint(3, vocabulary - 1, size, generator=torch.Generator().manual_seed(0)).tolist()
    meter = StepMeter()
    common = {
        "train_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}),
        "processing_class": tokenizer,
        "callbacks": [meter],
    }
    with tempfile.TemporaryDirectory() as directory, MemoryPeak() as memory:
        arguments = {
            "output_dir": directory,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.micro_batch_size,
            "gradient_accumulation_steps": options.sequences // options.micro_batch_size,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        counters = {}
        if ours:
            from hf_fedlarge.adapters import attach_lora
            from hf_fedlarge.config import LoraSettings
            from hf_fedlarge.package import load_package
            from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer

            budget = {"memory_budget": options.memory_budget} if options.memory_budget else {}
            model = load_package(package, verify=False)
            model = attach_lora(model, model.architecture, LoraSettings(rank=RANK, alpha=ALPHA))
            trainer = StreamingLoraTrainer(model, StreamingLoraConfig(**arguments, **budget), **common)
            trainer.train()
            counters = vars(model.engine.counters)
        else:
            model = AutoModelForCausalLM.from_pretrained(package)
            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = SFTTrainer(model, SFTConfig(**arguments), peft_config=lora, **common)
            trainer.train()
    return {
        "step_seconds": statistics.median(meter.seconds[1:] or meter.seconds),
        "each_step_seconds": meter.seconds,
        "each_step_read_bytes": meter.read_bytes,
        "loss": trainer.state.log_history[-1]["train_loss"],
        "counters": counters,
    } | memory.figures()


def blocks_read() -> int:
    """Blocks of 512 bytes that this process had to have read from a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


if __name__ == "__main__":
    sys.exit(main())
