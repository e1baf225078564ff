"""Plots of what `transfer.py` found: the full model's loss and the share of the gain, against how much was kept.

    python scripts/bench/plot_transfer.py transfer.json more.json --output docs/transfer.svg

The rows of all files, with shares as `--keep`, are taken together; several seeds give their mean and a bar from the
least to the greatest. The base and the reference are drawn in the first plot. Needs matplotlib:
`pip install -e ".[bench]" -c constraints.txt`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

LABELS = {"plugged_in": "held-out loss of the full model with the adapter", "share_kept": "share of the gain kept"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what `transfer.py --json` wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the plot, as its suffix says")
    options = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in options.files]
    plot([row for report in reports for row in report["rows"]], reports[0]["base"], options.output)
    return 0


def plot(rows: list[dict[str, Any]], base: float, output: Path) -> None:
    """Draw both plots into one file."""
    matplotlib.use("Agg")
    # The same rows give the same bytes.
    matplotlib.rcParams |= {"svg.hashsalt": "transfer", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for method in dict.fromkeys(row["method"] for row in rows):
        for axis, name in zip(axes, LABELS, strict=True):
            shares, middle, least, greatest = by_share([row for row in rows if row["method"] == method], name)
            bars = [[m - low for m, low in zip(middle, least, strict=True)]]
            bars.append([high - m for m, high in zip(middle, greatest, strict=True)])
            axis.errorbar(shares, middle, yerr=bars, marker="o", markersize=4, capsize=2, label=method)
    reference = statistics.mean({row["seed"]: row["reference"] for row in rows}.values())
    for value, name in ((base, "base"), (reference, "LoRA on the full model")):
        axes[0].axhline(value, color="grey", linestyle=":", linewidth=1)
        axes[0].annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes[1].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes[1].legend(frameon=False)
    for axis, label in zip(axes, LABELS.values(), strict=True):
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axis.set(xlabel="weights of the blocks kept", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, metadata={"Date": None})


def by_share(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """The shares in rising order, and of the seeds' values at each the mean, the least and the greatest."""
    shares = sorted({float(row["keep"]) for row in rows})
    values = [[row[name] for row in rows if float(row["keep"]) == share] for share in shares]
    return shares, [statistics.mean(some) for some in values], [min(some) for some in values], [max(s) for s in values]


if __name__ == "__main__":
    sys.exit(main())
