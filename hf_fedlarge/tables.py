"""A run's figures as tables on standard output."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any]) -> None:
    """A run's summary as tables on standard output."""
    console = Console()
    rounds = Table(title="Rounds (held-out loss in nats per token)", title_justify="left")
    for name in ("round", "package", "full model", "MB down a client", "MB up a client", "seconds", "refused"):
        rounds.add_column(name, justify="right")
    for entry in summary["rounds"]:
        rounds.add_row(
            str(entry["round"]),
            f"{entry['loss_small']:.3f}",
            f"{entry['loss_full']:.3f}",
            f"{entry['bytes_down_per_client'] / 1e6:.1f}",
            f"{entry['bytes_up_per_client'] / 1e6:.1f}",
            f"{entry['seconds']:.0f}",
            str(len(entry["refused"])),
        )
    console.print(rounds)
    loss = summary["loss"]
    totals = Table(show_header=False, box=None)
    totals.add_row("held-out loss, base model", f"{loss['base']:.3f}")
    totals.add_row("held-out loss, package before training", f"{loss['package']:.3f}")
    totals.add_row("held-out loss, merged model", f"{loss['merged']:.3f}  ({loss['merged'] - loss['base']:+.3f})")
    totals.add_row("MB down, MB up", f"{summary['bytes_down'] / 1e6:.1f}, {summary['bytes_up'] / 1e6:.1f}")
    totals.add_row("peak memory, largest process", f"{summary['peak_memory_bytes'] / 1e6:.0f} MB")
    totals.add_row("peak memory, largest client", f"{summary['client_peak_memory_bytes'] / 1e6:.0f} MB")
    console.print(totals)
    if "transfer" in summary:
        print_transfer(summary["transfer"])
    sample = summary["sample"]
    if sample["prompt"]:
        for title, text in (("asked", sample["prompt"]), ("before", sample["before"]), ("after", sample["after"])):
            console.print(f"\n[bold]{title}[/bold]")
            console.print(text, markup=False, highlight=False)


def print_transfer(report: dict[str, Any]) -> None:
    """A transfer report as a table on standard output."""
    table = Table(
        title=f"What the adapter is worth, in nats per token ({report['examples']} examples)", title_justify="left"
    )
    for name in ("", "held-out loss", "95 % interval over examples"):
        table.add_column(name, justify="right" if name else "left")
    names = {
        "base": "base",
        "package": "package before training",
        "package_trained": "package after",
        "full_model": "full model with the adapter",
        "reference": "full model, trained itself",
    }

    def row(title: str, entry: dict[str, float | None], form: str) -> None:
        known = entry["low"] is not None
        interval = f"{entry['low']:{form}} to {entry['high']:{form}}" if known else "unknown"
        table.add_row(title, f"{entry['value']:{form}}", interval)

    for name, entry in report["loss"].items():
        row(names[name], entry, ".3f")
    row("gain of the full model", report["gain"], "+.3f")
    if report["share_kept"]:
        row("share of the gain kept", report["share_kept"], ".1%")
    elif "reference" in report["loss"]:
        table.add_row("share of the gain kept", "none", "the reference gains nothing")
    console = Console()
    console.print(table)
    for layer, cosine in report.get("gradient_agreement", {}).items():
        console.print(f"layer {layer}: gradients agree by {cosine:.3f}")
