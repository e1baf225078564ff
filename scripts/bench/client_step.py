"""A client's optimizer step against what would be used instead: trl's SFTTrainer on a bitsandbytes NF4 model.

    make bench
    python scripts/bench/client_step.py --micro-batches 4 --micro-batch-size 1 --sequence-length 128 --json out.json

Both sides train LoRA of rank 16 on every matrix of the same full-depth model (nothing is dropped), on the same random
tokens, in fresh processes that take turns. The peer has the settings its documentation gives: NF4 with double
quantization, bf16 autocast, activation checkpointing. Quoted are medians over the runs of each run's median step, the
first step left out, and the largest memory above what the process had after its imports.

Read the ratios, not the seconds: threads that wait for each other make both sides many times slower on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

SIDES = ("peer", "ours")
FIGURES = ("step_seconds", "peak_rss_bytes", "peak_anonymous_bytes")


def main() -> int:
    """Run both sides in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/SmolLM2-135M-Instruct"), help="from `make demo`")
    parser.add_argument("--micro-batches", type=int, default=1, help="accumulated for an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    if not (options.checkpoint / "config.json").exists():
        parser.error(f"{options.checkpoint} is no checkpoint; run `make demo` once, or give --checkpoint.")

    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "package"
        shrink(options.checkpoint, package)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(options.pairs):
            for side in SIDES:
                words = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--package", str(package)]
                result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
                runs[side].append(json.loads(result.stdout.splitlines()[-1]))
    report: dict[str, Any] = {
        side: {figure: statistics.median(run[figure] for run in runs[side]) for figure in FIGURES} for side in SIDES
    }
    report["ratio"] = {figure: report["ours"][figure] / report["peer"][figure] for figure in FIGURES}
    report["settings"] = {name: str(value) for name, value in vars(options).items() if name not in ("side", "package")}
    report["versions"] = {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    print(f"{'':22}{'ours':>12}{'peer':>12}{'ratio':>8}")
    for figure, unit, scale in zip(FIGURES, ("s", "MB", "MB"), (1, 1e6, 1e6), strict=True):
        ours, peer = report["ours"][figure] / scale, report["peer"][figure] / scale
        print(f"{figure:22}{ours:>10.2f} {unit}{peer:>10.2f} {unit}{report['ratio'][figure]:>7.2f}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def shrink(checkpoint: Path, package: Path) -> None:
    from hf_fedlarge.shrink import plan_shrink
    from hf_fedlarge.shrink import shrink as write

    write(plan_shrink(checkpoint, keep_layers="1.0"), package)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train one side in this process; returns its figures."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from hf_fedlarge.adapters import attach_lora
    from hf_fedlarge.config import LoraSettings
    from hf_fedlarge.package import load_package
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer

    class StepTimer(TrainerCallback):
        seconds: ClassVar[list[float]] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    peak = MemoryPeak()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    count = options.steps * options.micro_batches * options.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, len(tokenizer) - 1, (count, options.sequence_length), generator=generator).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    with tempfile.TemporaryDirectory() as directory:
        arguments = {
            "output_dir": directory,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.micro_batch_size,
            "gradient_accumulation_steps": options.micro_batches,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        common = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [StepTimer()]}
        if options.side == "ours":
            model = load_package(options.package, device="cuda" if torch.cuda.is_available() else "cpu")
            model = attach_lora(model, model.architecture, LoraSettings())
            trainer = StreamingLoraTrainer(model, StreamingLoraConfig(**arguments), **common)
        else:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
            model = AutoModelForCausalLM.from_pretrained(options.checkpoint, quantization_config=quantization)
            lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            trainer = SFTTrainer(model, SFTConfig(**arguments), peft_config=lora, **common)
        trainer.train()
    rss, anonymous = peak.stop()
    return {
        "step_seconds": statistics.median(StepTimer.seconds[1:]),
        "peak_rss_bytes": rss,
        "peak_anonymous_bytes": anonymous,
    }


class MemoryPeak:
    """The largest resident and anonymous memory above what there was at the start, sampled every 5 ms (Linux)."""

    def __init__(self) -> None:
        self._base, self._peak = self._read(), (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[int, int]:
        self._stop.set()
        self._thread.join()
        return self._peak[0] - self._base[0], self._peak[1] - self._base[1]

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = tuple(map(max, self._peak, self._read()))

    @staticmethod
    def _read() -> tuple[int, int]:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))


if __name__ == "__main__":
    sys.exit(main())
