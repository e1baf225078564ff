"""How long it takes to aggregate many updates, and the memory that needs, against stacking dense products.

    python scripts/bench/aggregate.py --json figures.json

Makes updates of a 1B model's shape (`--updates` 200 of rank 8; 25 MB each, so 5 GB on disk under `--work`, or a
temporary directory). Each side runs in a process of its own, in turn: `exact`, `fedavg` and `ffa` as a round runs them
(without validation); `read`, which reads every file and no more; and `dense`, which for `--modules` of the matrices
adds up the clients' dense products, as is common, and is scaled to all of them; it isn't even truncated there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from harness import (
    Figures,
    MemoryPeak,
    add_common_options,
    alternate,
    drop_from_page_cache,
    summarize,
    workplace,
    write_report,
)
from rich.console import Console
from rich.table import Table
from shapes import SHAPES

from hf_fedlarge.adapters import AdapterReader, AdapterWriter
from hf_fedlarge.combine import Part, combine
from hf_fedlarge.config import AggregationSettings, LoraSettings
from hf_fedlarge.tensors import Factors

SIDES = ("read", "exact", "fedavg", "ffa", "dense")
LORA = LoraSettings(rank=8, alpha=16.0)


def module_shapes(layers: int) -> dict[str, tuple[int, int]]:
    """The matrices of a 1B model, as (out, in)."""
    shape = SHAPES["1b"]
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {f"model.layers.{layer}.{path}": size for layer in range(layers) for path, size in block.items()}


def make_updates(work: Path, count: int, layers: int) -> tuple[Path, list[Path]]:
    """An adapter, and clients that changed it by a tenth: half of that in common, half each its own."""
    marker = work / f"made-{count}-{layers}"
    parent, updates = work / "parent", [work / f"client{number:03d}" for number in range(count)]
    if marker.exists():
        return parent, updates
    shapes = module_shapes(layers)
    for number, directory in enumerate([parent, *updates]):
        directory.mkdir(exist_ok=True)
        own = torch.Generator().manual_seed(number)
        common = torch.Generator().manual_seed(12345)
        with AdapterWriter(directory) as writer:
            for module in sorted(shapes):
                out_features, in_features = shapes[module]
                A_RI = torch.randn(LORA.rank, in_features, generator=common) * in_features**-0.5
                B_OR, shared = (torch.randn(out_features, LORA.rank, generator=common) for _ in range(2))
                if number:
                    B_OR += 0.05 * (shared + torch.randn(out_features, LORA.rank, generator=own))
                    A_RI += 0.05 * in_features**-0.5 * torch.randn(A_RI.shape, generator=own)
                writer.write(module, Factors(A_RI, B_OR))
    marker.touch()
    return parent, updates


def freeze(parent: Path, updates: list[Path]) -> list[Path]:
    """The same updates as readers see them that all have the parent's A: for `ffa`, one file on disk each."""
    frozen = []
    for update in updates:
        target = update.with_name(f"{update.name}-frozen")
        frozen.append(target)
        if not (target / "adapter_model.safetensors").exists():
            target.mkdir(exist_ok=True)
            base, reader = AdapterReader(parent), AdapterReader(update)
            with AdapterWriter(target) as writer:
                for module in reader.modules:
                    writer.write(module, Factors(base.read(module).A_RI, reader.read(module).B_OR))
    return frozen


def measure(options: argparse.Namespace) -> Figures:
    """One side's figures."""
    parent, updates = options.work / "parent", sorted(options.work.glob("client???"))
    if options.side == "ffa":
        updates = sorted(options.work.glob("client???-frozen"))
    one = (updates[0] / "adapter_model.safetensors").stat().st_size
    weights = [update / "adapter_model.safetensors" for update in updates]
    if options.cold:
        drop_from_page_cache(weights)
    else:
        for file in weights:  # all sides find the files in the page cache as far as it holds them
            file.read_bytes()
    torch.set_num_threads(options.threads)
    torch.linalg.svd(torch.randn(64, 64))
    with MemoryPeak() as peak, tempfile.TemporaryDirectory(dir=options.work) as output:
        started = time.perf_counter()
        scale = 1.0
        if options.side == "read":
            for update in updates:
                reader = AdapterReader(update)
                for module in reader.modules:
                    reader.read(module)
        elif options.side == "dense":
            scale = dense(updates, options.modules)
        else:
            settings = AggregationSettings(aggregator=options.side)
            parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates]
            trained = "B" if options.side == "ffa" else "both"
            combine(parts, parent, Path(output), LORA, settings, trained)
        seconds = (time.perf_counter() - started) * scale
    peaks = peak.figures()
    return {"seconds": seconds, **peaks, "peak_in_updates": peaks["peak_anonymous_bytes"] / one, "update_bytes": one}


def dense(updates: list[Path], modules: int) -> float:
    """Dense sums for some modules, spread over a block's kinds; returns how much more all would be."""
    readers = [AdapterReader(update) for update in updates]
    sizes = {module: sum(factor.numel() for factor in readers[0].read(module)) for module in readers[0].modules}
    chosen = readers[0].modules[:modules]
    for module in chosen:
        total = None
        for reader in readers:
            A_RI, B_OR = reader.read(module)
            product = LORA.scale / len(readers) * (B_OR @ A_RI)
            total = product if total is None else total.add_(product)
    return sum(sizes.values()) / sum(sizes[module] for module in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--modules", type=int, default=7, help="matrices that `dense` computes; 7 are a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cold", action="store_true", help="updates are on the disk and not in the page cache")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with workplace(options) as work:
        parent, updates = make_updates(Path(work), options.updates, options.layers)
        if "ffa" in options.sides:
            freeze(parent, updates)
        runs = alternate(
            {side: {"OMP_WAIT_POLICY": "passive"} for side in options.sides}, options.pairs, ["--work", work]
        )
    report(runs, options)


def report(runs: dict[str, list[Figures]], options: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(options).items() if name != "side"}
    first = options.sides[0]
    found = summarize({"ours" if side == first else side: figures for side, figures in runs.items()}, settings)
    found = {first if side == "ours" else side: value for side, value in found.items() if "ratio" not in side}
    table = Table(title=f"{options.updates} updates of {found[first]['update_bytes'] / 1e6:.1f} MB")
    for name in ("", "seconds", "× reading", "dense ×", "peak, in updates"):
        table.add_column(name, justify="right")
    for side in options.sides:
        entry = found[side]
        for name, other, turned in (("times_reading", "read", False), ("dense_times", "dense", True)):
            if other in found:
                ratio = entry["seconds"] / found[other]["seconds"]
                entry[name] = 1 / ratio if turned else ratio
        row = [f"{entry[name]:.2f}" if name in entry else "" for name in ("times_reading", "dense_times")]
        table.add_row(side, f"{entry['seconds']:.1f}", *row, f"{entry['peak_in_updates']:.1f}")
    Console().print(table)
    if options.json:
        write_report(options.json, found)
        print(f"written to {options.json}", file=sys.stderr)


if __name__ == "__main__":
    main()
