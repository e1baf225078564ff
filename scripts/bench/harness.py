"""What the benchmarks share: fresh processes that take turns, peaks of memory, medians, ratios, a table and JSON.

A benchmark is one program. Called by a user it runs itself again for each side, in turn (A B A B); such a run measures
one thing and prints its figures as a line of JSON. Read the ratios, not the seconds: on a shared machine both sides
slow down together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.table import Table

FIGURES = {
    "step_seconds": ("s", 1.0),
    "seconds": ("s", 1.0),
    "seconds_to_disk": ("s", 1.0),
    "peak_rss_bytes": ("MB", 1e6),
    "peak_anonymous_bytes": ("MB", 1e6),
}
Figures = dict[str, Any]
# As the user has it: importing hf_fedlarge sets variables for this process, which a peer should not inherit.
ENVIRONMENT = dict(os.environ)
DEMO_MODEL = Path("demo/SmolLM2-135M-Instruct")
_LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep generated models there for the next run")
    parser.add_argument("--side", help=argparse.SUPPRESS)


def run_side(side: str, extra: list[str] | None = None, environment: dict[str, str] | None = None) -> Figures:
    """Run this program for one side in a fresh process; its figures are the last line it prints."""
    words = [sys.executable, sys.argv[0], *sys.argv[1:], "--side", side, *(extra or [])]
    result = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT | (environment or {}))
    if result.returncode:
        sys.exit(f"The side {side!r} failed with exit code {result.returncode}:\n{result.stderr[-4000:]}")
    figures = json.loads(result.stdout.splitlines()[-1])
    shown = ", ".join(
        f"{name} {figures[name] / scale:.2f} {unit}" for name, (unit, scale) in FIGURES.items() if name in figures
    )
    print(f"{side}: {shown}", file=sys.stderr, flush=True)
    return figures


def alternate(sides: dict[str, dict[str, str]], pairs: int, extra: list[str] | None = None) -> dict[str, list[Figures]]:
    """Run every side `pairs` times, in turn; `sides` gives each its environment."""
    runs: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(pairs):
        for side, environment in sides.items():
            runs[side].append(run_side(side, extra, environment))
    return runs


def summarize(runs: dict[str, list[Figures]], settings: dict[str, Any]) -> dict[str, Any]:
    """Medians of each side, every other side's ratio (`ours` / it), the settings and what it ran on."""
    report: dict[str, Any] = {}
    for side, figures in runs.items():
        report[side] = {
            name: statistics.median(run[name] for run in figures) if name in FIGURES else figures[-1][name]
            for name in figures[-1]
        }
    for side in [side for side in runs if side != "ours"]:
        ratio = {
            name: report["ours"][name] / report[side][name]
            for name in FIGURES
            if name in report["ours"] and name in report[side]
        }
        report["ratio" if side == "peer" else f"ratio_to_{side}"] = ratio
    report["settings"] = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    report["versions"] = {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()}
    report["machine"] = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    return report


def show(report: dict[str, Any], title: str, file: Path | None) -> None:
    """Print the medians and ratios as a table; write everything to `file`."""
    others = [side for side in report if side not in ("ours", "settings", "versions", "machine", "notes")]
    others = [side for side in others if not side.startswith("ratio")]
    table = Table(title=title)
    table.add_column("")
    for side in ("ours", *others):
        table.add_column(side, justify="right")
    for side in others:
        table.add_column(f"ours / {side}", justify="right")
    for name, (unit, scale) in FIGURES.items():
        if name not in report["ours"]:
            continue
        values = [report[side].get(name) for side in ("ours", *others)]
        ratios = [report["ratio" if side == "peer" else f"ratio_to_{side}"].get(name) for side in others]
        table.add_row(
            name.removesuffix("_bytes").replace("_", " "),
            *("" if value is None else f"{value / scale:,.2f} {unit}" for value in values),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    Console().print(table)
    if file:
        write_report(file, report)


def workplace(options: argparse.Namespace) -> tempfile.TemporaryDirectory[str] | _Kept:
    """`--work` if it was given, else a directory that goes away."""
    return _Kept(options.work) if options.work else tempfile.TemporaryDirectory()


def run_on_demo_model(
    parser: argparse.ArgumentParser, options: argparse.Namespace, benchmark: Callable[[argparse.Namespace, Path], Any]
) -> None:
    """Run a benchmark, made of the options and a directory to work in, and write what its `run` returns as `--json`."""
    if not (DEMO_MODEL / "config.json").exists():
        parser.error(f"{DEMO_MODEL} is missing; run `make demo` once.")
    with workplace(options) as directory:
        report = benchmark(options, Path(directory)).run()
    if options.json:
        write_report(options.json, report)


def write_report(file: Path, report: dict[str, Any]) -> None:
    """Write what a benchmark found as JSON."""
    file.write_text(json.dumps(report, indent=2) + "\n")


class _Kept:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        return str(self._directory)

    def __exit__(self, *_: object) -> None:
        pass


# Another process looks: this one's threads would wait for Python's lock, and miss a peak.
_WATCH = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
path, page, base, peak = f"/proc/{sys.argv[1]}/statm", os.sysconf("SC_PAGE_SIZE"), None, (0, 0)
try:
    while True:
        with open(path) as file:
            _, resident, of_files, *_ = map(int, file.read().split())
        now = resident * page, (resident - of_files) * page
        if base is None:
            base = now
            print("watching", flush=True)
        peak = tuple(map(max, peak, now))
        time.sleep(0.001)
except KeyboardInterrupt:
    print(*(high - low for high, low in zip(peak, base)))
"""


class MemoryPeak:
    """The largest resident and anonymous memory above what there was at the start, looked at every 1 ms (Linux)."""

    def __enter__(self) -> Self:
        words = [sys.executable, "-S", "-c", _WATCH, str(os.getpid())]
        self._watcher = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._watcher.stdout.readline()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watcher.terminate()
        output, _ = self._watcher.communicate()
        self._peaks = [int(word) for word in output.split()]

    def figures(self) -> Figures:
        """The peaks in bytes, after the `with`."""
        return {"peak_rss_bytes": self._peaks[0], "peak_anonymous_bytes": self._peaks[1]}
