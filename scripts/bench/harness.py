"""What the benchmarks share: fresh processes that take turns, peaks of memory, medians, ratios, a table and JSON.

One that takes hours keeps its rows in its JSON file (`Rows`), and goes on where it was stopped.

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
import time
from collections.abc import Callable, Iterable, Sequence
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
    return report | surroundings()


def surroundings() -> dict[str, Any]:
    """The libraries' versions, and the machine."""
    return {
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    }


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
    """Write what a benchmark found as JSON; whoever dies at it leaves the file as it was."""
    waiting = file.with_name(f".{file.name}.waiting")
    waiting.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(waiting, file)


def drop_from_page_cache(files: Iterable[Path]) -> None:
    """Forget the cached pages of these files, but those that other processes map: they are read from the disk next."""
    os.sync()  # a page that has yet to be written stays
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Rows:
    """The rows of a benchmark that takes hours: each is in its JSON file once it is measured, and not measured again.

    Begun again with the same file and settings, a benchmark goes on where it was stopped. Its seconds are those of all
    pieces together, whatever they were spent on; of a piece that was killed, those up to its last `save`.

    Args:
        file: `--json`; None: nothing is kept.
        settings: what all rows have in common, as JSON has it.
        planned: what tells each row from the others, in their order; at least one.

    Raises:
        SystemExit: the file has rows of other settings.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any], planned: Sequence[dict[str, Any]]) -> None:
        self._file, self._settings, self._planned = file, settings, planned
        known: dict[str, Any] = {"settings": settings, "rows": [], "seconds": 0.0, "under_way": {}}
        if file is not None and file.exists():
            known = json.loads(file.read_text())
        if known.get("settings") != settings:
            sys.exit(f"{file} has rows of the settings {known.get('settings')}, not of {settings}; name another file.")
        self._rows: list[Figures] = known["rows"]
        self._under_way: dict[str, Any] = known["under_way"]  # its key, and the seconds that it has taken
        self._earlier, self._started = known["seconds"], time.monotonic()

    def row(self, key: dict[str, Any], measure: Callable[[], Figures]) -> Figures:
        """The row of `key`: the one that was measured before, or `key` with the figures of `measure` and `seconds`.

        The seconds have those of earlier pieces that were stopped at this row.
        """
        if found := self._measured(key):
            return found
        if self._under_way.get("key") != key:
            self._under_way = {"key": key, "seconds": 0.0}
        name = " ".join(str(value) for value in key.values())
        print(f"row {len(self._rows) + 1}, {name}; {self._outlook()}", file=sys.stderr, flush=True)
        self._since = time.monotonic()
        try:
            figures = measure()
            self._count()
            self._rows.append(key | figures | {"seconds": self._under_way["seconds"]})
            self._under_way = {}
        finally:
            self.save()
        return self._rows[-1]

    def save(self) -> None:
        """Write what there is. Called now and then within a row, no more time than since then is missed."""
        if self._under_way:
            self._count()
        if self._file is not None:
            write_report(self._file, self.report())

    def report(self) -> dict[str, Any]:
        """All rows of these settings, whether the planned ones are there, seconds, settings and what it ran on."""
        return {
            "rows": self._rows,
            "complete": all(self._measured(key) for key in self._planned),
            "seconds": self._spent(),
            "under_way": self._under_way,
            "settings": self._settings,
        } | surroundings()

    def _count(self) -> None:
        now = time.monotonic()
        self._under_way["seconds"] += now - self._since
        self._since = now

    def _spent(self) -> float:
        return self._earlier + time.monotonic() - self._started

    def _measured(self, key: dict[str, Any]) -> Figures | None:
        return next((row for row in self._rows if _alike(row, key) == len(key)), None)

    def _outlook(self) -> str:
        """Time so far, and what remains if rows take as long as the ones most like them did."""
        so_far = f"{self._spent() / 60:.0f} min so far"
        if not self._rows:
            return so_far
        left = -self._under_way["seconds"]
        for key in self._planned:
            if not self._measured(key):
                most = max(_alike(row, key) for row in self._rows)
                left += statistics.mean(row["seconds"] for row in self._rows if _alike(row, key) == most)
        return f"{so_far}, some {max(left, 0.0) / 60:.0f} min remain"


def _alike(row: Figures, key: dict[str, Any]) -> int:
    return sum(row[name] == value for name, value in key.items())


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
