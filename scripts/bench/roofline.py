"""What a client's step can't go below on this machine: its large matrix products and its dequantizations, timed alone.

    python scripts/bench/roofline.py --shape 7b-block --tokens 512

For every matrix of a block: the product in forward, in the recomputation (none for the block's output projection) and
for the input's gradient, in bf16, at the rate measured for just that product; and two dequantizations into a reused
buffer. Beside it what a fresh tensor for every dequantization would cost, and a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES

from hf_fedlarge.quantize import decode, encode

_SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
_SMOLLM2 |= {"num_key_value_heads": 3}


def main() -> int:
    """Time every product of a block and print their sum for a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", *SHAPES), default="7b-block")
    parser.add_argument("--tokens", type=int, default=512, help="of a step, computed together")
    options = parser.parse_args()
    shape = _SMOLLM2 if options.shape == "smollm2" else SHAPES[options.shape]
    hidden, wide, layers = (shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    matrices = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
    matrices |= {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}

    table = Table(title=f"{options.shape}, {options.tokens} tokens, milliseconds (rate in GFLOP/s)")
    for column in ("", "x Wᵀ", "g W", "dequantize", "into a fresh tensor", "copy"):
        table.add_column(column, justify="right")
    floor = fresh_cost = 0.0
    for name, (rows, columns) in matrices.items():
        values = torch.randn(rows, columns)
        weight = decode("w", "nf4", encode("w", (rows, columns), "nf4", [values]))
        dense, other = (torch.empty(rows, columns, dtype=torch.bfloat16) for _ in range(2))
        dequantize = seconds(lambda w=weight, d=dense: w.read_rows(0, w.shape[0], d))
        fresh = seconds(lambda w=weight: w.read_rows(0, w.shape[0], torch.empty(w.shape, dtype=torch.bfloat16)))
        copy = seconds(lambda o=other, d=dense: o.copy_(d))
        x = torch.randn(options.tokens, columns, dtype=torch.bfloat16)
        g = torch.randn(options.tokens, rows, dtype=torch.bfloat16)
        forward, backward = seconds(lambda x=x, d=dense: x @ d.t()), seconds(lambda g=g, d=dense: g @ d)
        flops = 2 * options.tokens * rows * columns
        table.add_row(
            f"{name} {columns}→{rows}",
            *(f"{1e3 * taken:.2f} ({flops / taken / 1e9:.0f})" for taken in (forward, backward)),
            *(f"{1e3 * taken:.2f}" for taken in (dequantize, fresh, copy)),
        )
        floor += layers * (forward * (1 if name == "down" else 2) + backward + 2 * dequantize)
        fresh_cost += layers * 3 * fresh
    Console().print(table)
    print(f"A step's products and two dequantizations a matrix: {floor:.2f} s.")
    print(
        f"Three dequantizations a matrix into fresh tensors, as a stock step has them: {fresh_cost:.2f} s of its own."
    )
    return 0


def seconds(function: Callable[[], object], runs: int = 9) -> float:
    """Median time of `function`, after one call that isn't counted."""
    function()
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


if __name__ == "__main__":
    sys.exit(main())
