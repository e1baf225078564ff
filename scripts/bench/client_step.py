"""A client's optimizer step against what would be used instead: trl's SFTTrainer on a bitsandbytes NF4 model.

    make bench
    python scripts/bench/client_step.py --shape 7b-block --micro-batches 4 --micro-batch-size 1 --sequence-length 128
    python scripts/bench/client_step.py --shape smollm2 --peer tuned --labelled-fraction 0.3 --json out.json

Both sides train LoRA of rank 16 on every matrix of the same full-depth model (nothing is dropped), on the same random
tokens in the same order, through their Trainer. The first step is left out; quoted are medians over the runs of each
run's median step, and the largest memory above what the process had after its imports. Neither side evaluates:
an evaluation spoils a bitsandbytes model's later training on some processors.

The peers (trl, bitsandbytes and peft as installed):

- `default` has what their documentation gives: NF4 with double quantization and bf16 compute dtype, everything else of
  SFTConfig as it is, which means bf16 autocast, activation checkpointing and the model in the checkpoint's dtype.
- `tuned` is what an expert would make of it: all of the model and the computation without autocast in the dtype whose
  products the processor computes fastest (bf16 with matrix instructions for it, else fp32), as few and as large batches
  as hold the same sequences, and glibc told to keep the memory it has, which spares it page faults (MALLOC_TOP_PAD_,
  MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ of 1 GiB, 1 GiB and 32 MiB, the most it allows). `--tuned-dtype` sets
  the other.
- `ourselves` is our own engine with all tokens of the step as one sequence: what dividing them costs.
- `uncompiled` is our own engine without the operations that GCC compiles: what they spare.

Ours has its defaults; `--memory-budget` and `--optim` are passed on to it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Figures, MemoryPeak, add_common_options, alternate, show, summarize, workplace

SMOLLM2 = Path("demo/SmolLM2-135M-Instruct")
KEEP_MEMORY = {
    "MALLOC_TOP_PAD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}
RANK, ALPHA = 16, 32
# Peers that are our own engine, and their environment.
OURS = {"ourselves": {}, "uncompiled": {"HF_FEDLARGE_KERNELS": "off"}}


def main() -> int:
    """Run both sides in turn and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", "1b", "7b-block"), default="smollm2")
    parser.add_argument("--layers", type=int, help="decoder blocks of a generated shape; else as many as it has")
    parser.add_argument("--peer", choices=("default", "tuned", *OURS), default="default")
    parser.add_argument("--tuned-dtype", choices=("bfloat16", "float32"), help="of the tuned peer; else the faster one")
    parser.add_argument("--micro-batches", type=int, default=1, help="accumulated for an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--labelled-fraction", type=float, default=1.0, help="the last share of every sequence")
    parser.add_argument("--ragged", action="store_true", help="lengths spread evenly, others in every step")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a run; the first is not counted")
    parser.add_argument("--memory-budget", help="ours: see `hf-fedlarge train --help`")
    parser.add_argument("--optim", help="ours: the optimizer, as SFTConfig names it")
    add_common_options(parser)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    if options.peer == "tuned":
        options.tuned_dtype = options.tuned_dtype or fastest_dtype()
    if options.shape == "smollm2" and not (SMOLLM2 / "config.json").exists():
        parser.error(f"{SMOLLM2} is missing; run `make demo` once.")
    with workplace(options) as directory:
        models = prepare(Path(directory), options)
        words = ["--work", str(models), *(["--tuned-dtype", options.tuned_dtype] if options.tuned_dtype else [])]
        peer = KEEP_MEMORY if options.peer == "tuned" else OURS.get(options.peer, {})
        sides = {"ours": {}, "peer": peer}
        report = summarize(alternate(sides, options.pairs, words), vars(options))
    tokens = options.micro_batches * options.micro_batch_size * options.sequence_length
    title = f"{options.shape}, {options.micro_batches} × {options.micro_batch_size} × {options.sequence_length}"
    report["settings"]["tokens"] = tokens
    show(report, f"{title}, {options.peer} peer", options.json)
    return 0


def fastest_dtype() -> str:
    """The name of the dtype in which this machine computes products of 512 tokens with a 2048 × 2048 matrix fastest."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(512, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        taken = []
        for _ in range(9):
            started = time.perf_counter()
            x @ w
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    return min(("bfloat16", "float32"), key=lambda name: seconds(getattr(torch, name)))


def prepare(directory: Path, options: argparse.Namespace) -> Path:
    """Make checkpoint and package, where they are not there yet; returns the directory of both."""
    from shapes import write_checkpoint

    from hf_fedlarge.shrink import plan_shrink, shrink

    home = directory / (options.shape + (f"-{options.layers}" if options.layers else ""))
    checkpoint = home / "checkpoint"
    if not checkpoint.exists():
        if options.shape == "smollm2":
            home.mkdir(parents=True, exist_ok=True)
            checkpoint.symlink_to(SMOLLM2.resolve())
        else:
            write_checkpoint(options.shape, checkpoint, options.layers)
    if not (home / "package").exists():
        shrink(plan_shrink(checkpoint, keep_layers="1.0"), home / "package")
    return home


def examples(options: argparse.Namespace, vocabulary: int) -> dict[str, list[list[int]]]:
    """Random token ids and their labels.

    Ragged ones of a step have one length in each of as many equal parts of the range up to the longest, so that steps
    have different lengths, as a client's do, and nearly as many tokens: half of what padding would make of them.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    count = options.micro_batches * options.micro_batch_size
    longest = options.sequence_length
    lengths = [longest] * count * options.steps
    if options.ragged:
        parts = torch.stack([torch.randperm(count, generator=generator) for _ in range(options.steps)]).flatten()
        within = torch.rand(len(parts), generator=generator)
        lengths = ((parts + within) * longest / count).ceil().int().clamp(min=2).tolist()
    data: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for length in lengths:
        ids = torch.randint(3, vocabulary - 1, (length,), generator=generator).tolist()
        unlabelled = round(length * (1 - options.labelled_fraction))
        data["input_ids"].append(ids)
        data["labels"].append([-100] * unlabelled + ids[unlabelled:])
    return data


def trainer_arguments(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """What both sides' Trainers are told."""
    import torch

    return {
        "output_dir": directory,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.micro_batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def import_ours() -> None:
    """Load what our side needs, before its memory is looked at; the client first, as it sets up torch."""
    for name in ("trainers.client", "trainers.streaming_trainer", "adapters", "package"):
        importlib.import_module(f"hf_fedlarge.{name}")


def streaming_trainer(
    options: argparse.Namespace, package: Path, arguments: dict[str, Any], common: dict[str, Any]
) -> Any:
    """Our Trainer with an adapter on a package."""
    import torch

    from hf_fedlarge.adapters import attach_lora
    from hf_fedlarge.config import LoraSettings
    from hf_fedlarge.package import load_package
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer

    extra = {"memory_budget": options.memory_budget, "optim": options.optim}
    config = StreamingLoraConfig(**arguments, **{name: value for name, value in extra.items() if value})
    model = load_package(package, device="cuda" if torch.cuda.is_available() else "cpu")
    model = attach_lora(model, model.architecture, LoraSettings(rank=RANK, alpha=ALPHA))
    return StreamingLoraTrainer(model, config, **common)


def measure(options: argparse.Namespace) -> Figures:
    """Train one side in this process; returns its figures."""
    ours = options.side == "ours" or options.peer in OURS
    if options.side == "peer" and options.peer == "ourselves":
        options.sequence_length *= options.micro_batches * options.micro_batch_size
        options.micro_batches = options.micro_batch_size = 1
    if ours:
        import_ours()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from step_timer import StepTimer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    checkpoint, package = options.work / "checkpoint", options.work / "package"
    timer = StepTimer()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    data = Dataset.from_dict(examples(options, AutoConfig.from_pretrained(checkpoint).vocab_size))
    merge_batches = not ours and options.peer == "tuned"
    with tempfile.TemporaryDirectory() as directory, MemoryPeak() as memory:
        arguments = trainer_arguments(options, directory)
        if merge_batches:
            arguments["per_device_train_batch_size"] *= arguments.pop("gradient_accumulation_steps")
        common = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [timer]}
        counters = {}
        if ours:
            trainer = streaming_trainer(options, package, arguments, common)
            trainer.train()
            counters = vars(trainer.model.get_base_model().engine.counters)
        else:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=getattr(torch, options.tuned_dtype if options.peer == "tuned" else "bfloat16"),
            )
            tuned = {"dtype": getattr(torch, options.tuned_dtype)} if options.peer == "tuned" else {}
            model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, **tuned)
            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
            config = SFTConfig(**arguments, **({"bf16": False} if tuned else {}))
            trainer = SFTTrainer(model, config, peft_config=lora, **common)
            trainer.train()
    return {
        "step_seconds": statistics.median(timer.seconds[1:]),
        "loss": trainer.state.log_history[-1]["train_loss"],
        "counters": counters,
    } | memory.figures()


if __name__ == "__main__":
    sys.exit(main())
