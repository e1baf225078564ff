"""Shrinking and merging a checkpoint against what the stock libraries do, and against a plain copy of the files.

    python scripts/bench/stream_io.py --json stream_io.json
    python scripts/bench/stream_io.py --shape 1b --layers 2 --stage merge --pairs 1

The checkpoint is generated: SmolLM2-1.7B's shape in bf16 (3.4 GB in shards of 1 GiB), random weights. Two stages:

- shrink. Ours: `plan_shrink` and `shrink`, every layer kept (`keep_layers="1.0"`), so that both sides quantize the same
  matrices to the same bits. Peer: `AutoModelForCausalLM.from_pretrained` with `BitsAndBytesConfig(load_in_4bit, nf4,
  double quantization, compute dtype bf16)` and `save_pretrained`. Embeddings are stored in bf16 (`--embeddings bf16`),
  as the peer stores them; with `int8`, our default, our side does more and writes less.
- merge, of a LoRA adapter of rank 16 on every linear, random factors in fp32; all sides read the same files. Ours:
  `merge`. Peer: `AutoModelForCausalLM.from_pretrained(dtype=bf16)`, `PeftModel.from_pretrained`, `merge_and_unload()`
  and `save_pretrained`. Copy: every file of the checkpoint read and written through one buffer of 256 KB.

Ours also hashes what it writes, flushes it to the disk and checks the checkpoint's digest; neither the peer nor the
copy does. A server that merges has shrunk the same checkpoint before, so that its digest is remembered and what is
compiled is there; with `--first-time` merging reads the checkpoint once more, as where another machine shrank it.
`seconds` is until the call returns, `seconds_to_disk` until the operating system has written everything out as well.

Each run is a process of its own; the sides take turns. Before the clock starts a run has imported what its side needs,
written back the dirty pages of the runs before it, and read the checkpoint and the adapter once: the input is in the
page cache for every side, the output is new. Quoted are medians of the seconds and of the largest resident and
anonymous memory above what the process had at that moment (mapped pages of the checkpoint count as resident).

The sides suffer differently from a busy machine, so the ratio does, too: `cores_of_others` under `notes` is what other
processes, and other machines on the host, took during each run. Where it is not near zero, measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import harness
import psutil
import shapes

STAGES = {"shrink": ("ours", "peer"), "merge": ("ours", "peer", "copy")}
RANK = 16
_READ_BUFFER, _COPY_BUFFER = 2**24, 2**18  # larger ones make the copy slower


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="1.7b")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder blocks (default: the shape's)")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--embeddings", choices=["bf16", "int8", "nf4"], default="bf16", help="how shrink stores them")
    harness.add_common_options(parser)
    parser.add_argument("--first-time", action="store_true", help="the checkpoint's digest isn't known yet")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return 0
    with harness.workplace(options) as directory:
        inputs = Path(directory) / f"{options.shape}-{options.layers or 'all'}"
        make_inputs(options, inputs)
        reports = {}
        for stage in STAGES if options.stage == "all" else [options.stage]:
            extra = ["--stage", stage, "--inputs", str(inputs)] + ["--first-time"] * options.first_time
            runs = harness.alternate({side: {} for side in STAGES[stage]}, options.pairs, extra)
            others = {side: [run.pop("cores_of_others") for run in figures] for side, figures in runs.items()}
            settings = {
                "stage": stage,
                "shape": shapes.SHAPES[options.shape],
                "layers": options.layers,
                "pairs": options.pairs,
                "checkpoint_bytes": sum(path.stat().st_size for path in (inputs / "checkpoint").iterdir()),
            } | (
                {"embeddings": options.embeddings}
                if stage == "shrink"
                else {"rank": RANK, "first_time": options.first_time}
            )
            reports[stage] = harness.summarize(runs, settings)
            reports[stage]["notes"] = {"cores_of_others": others}
            harness.show(reports[stage], f"{stage}, {options.shape}", None)
            print("cores of others:", *(f"{side} {max(values):.2f}" for side, values in others.items()))
    if options.json:
        harness.write_report(options.json, reports)
    return 0


def make_inputs(options: argparse.Namespace, inputs: Path) -> None:
    """The checkpoint and an adapter of random factors on all its linears, unless they are there from another run."""
    if inputs.exists():
        return
    import torch

    from hf_fedlarge.adapters import initial_factors, write_adapter
    from hf_fedlarge.architectures import describe, load_config
    from hf_fedlarge.artifacts import AdapterManifest, BaseModelEntry, describe_files, write_manifest
    from hf_fedlarge.config import LoraSettings
    from hf_fedlarge.tensors import Factors, checkpoint_digest

    staging = inputs.with_name(f".{inputs.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    checkpoint, adapter = staging / "checkpoint", staging / "adapter"
    shapes.write_checkpoint(options.shape, checkpoint, options.layers)
    architecture, lora = describe(load_config(checkpoint)), LoraSettings(rank=RANK, alpha=2.0 * RANK)
    layers, generator = list(range(architecture.layers)), torch.Generator().manual_seed(1)
    factors = {
        module: Factors(A_RI, torch.empty_like(B_OR).normal_(std=0.01, generator=generator))
        for module, (A_RI, B_OR) in initial_factors(architecture, layers, lora, seed=0).items()
    }
    adapter.mkdir()
    base = BaseModelEntry(id="bench/base", digest=checkpoint_digest(checkpoint))
    write_adapter(adapter, factors, lora, architecture, base)
    manifest = AdapterManifest(
        files=describe_files(adapter),
        base=base,
        package="0" * 64,
        parent=None,
        round=1,
        layers=layers,
        lora=lora,
        aggregator="exact",
    )
    write_manifest(adapter, manifest)
    staging.replace(inputs)


def measure(options: argparse.Namespace) -> harness.Figures:
    """Run one side of one stage in this process; its figures."""
    checkpoint, adapter = options.inputs / "checkpoint", options.inputs / "adapter"
    output = options.inputs / f"output-{options.side}"
    shutil.rmtree(output, ignore_errors=True)
    prepare = {"ours": _ours, "peer": _peer, "copy": _copy}[options.side]
    run = prepare(options, checkpoint, adapter, output)
    os.sync()
    for path in (*checkpoint.iterdir(), *adapter.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_BUFFER):
                pass
    with harness.MemoryPeak() as peak:
        started, others = time.perf_counter(), _core_seconds_of_others()
        run()
        seconds = time.perf_counter() - started
        cores_of_others = (_core_seconds_of_others() - others) / seconds
    os.sync()
    times = {"seconds": seconds, "seconds_to_disk": time.perf_counter() - started, "cores_of_others": cores_of_others}
    shutil.rmtree(output)
    return times if options.side == "copy" else times | peak.figures()


def _core_seconds_of_others() -> float:
    """What other processes, and other machines on the same host, have taken of this one's processors so far."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - own.user - own.system


# Each imports what its side needs, also what the libraries would import later, and gives back what is to be timed.


def _ours(options: argparse.Namespace, checkpoint: Path, adapter: Path, output: Path) -> Callable[[], object]:
    from transformers import LlamaForCausalLM  # noqa: F401

    from hf_fedlarge.kernels import kernels
    from hf_fedlarge.merge import merge
    from hf_fedlarge.shrink import plan_shrink, shrink
    from hf_fedlarge.tensors import checkpoint_digest

    if options.stage == "merge":
        kernels()
        if options.first_time:
            for path in checkpoint.iterdir():
                path.touch()
        else:
            checkpoint_digest(checkpoint)
        return lambda: merge(checkpoint, adapter, output)
    return lambda: shrink(plan_shrink(checkpoint, keep_layers="1.0", embeddings=options.embeddings), output)


def _peer(options: argparse.Namespace, checkpoint: Path, adapter: Path, output: Path) -> Callable[[], object]:
    import bitsandbytes  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import torch
    import transformers.integrations.bitsandbytes
    import transformers.quantizers.quantizer_bnb_4bit  # noqa: F401
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa: F401

    def shrink() -> None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.bfloat16)
        model.save_pretrained(output)

    def merge() -> None:
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(output)

    return {"shrink": shrink, "merge": merge}[options.stage]


def _copy(options: argparse.Namespace, checkpoint: Path, adapter: Path, output: Path) -> Callable[[], object]:
    def copy() -> None:
        output.mkdir()
        for path in checkpoint.iterdir():
            with path.open("rb") as source, (output / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, _COPY_BUFFER)

    return copy


if __name__ == "__main__":
    sys.exit(main())
