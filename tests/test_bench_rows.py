"""A benchmark's rows in its JSON file: none is measured twice, and time is counted wherever it was spent."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

from harness import Rows  # noqa: E402

PLANNED = [{"method": method, "seed": seed} for seed in (0, 1) for method in ("a", "b")]
SETTINGS = {"rounds": 4, "keep_layers": None}
KILLED = """
import os, signal, sys, time
from pathlib import Path
from harness import Rows
first, second = {"method": "a", "seed": 0}, {"method": "b", "seed": 0}
rows = Rows(Path(sys.argv[1]), {"rounds": 4, "keep_layers": None}, [first, second])
rows.row(first, lambda: {"full": 1.0})
def stopped():
    time.sleep(0.3)
    rows.save()
    os.kill(os.getpid(), signal.SIGKILL)
rows.row(second, stopped)
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr("harness.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def measured(clock, seconds, loss=1.0):
    def measure():
        clock(seconds)
        return {"full": loss}

    return measure


def never():
    raise AssertionError("measured twice")


def test_a_run_in_pieces_measures_every_row_once_and_sums_seconds(tmp_path, clock, capsys):
    file = tmp_path / "found.json"
    rows = Rows(file, SETTINGS, PLANNED)
    rows.row(PLANNED[0], measured(clock, 60))
    rows.row(PLANNED[1], measured(clock, 240, loss=2.0))
    assert not json.loads(file.read_text())["complete"]
    clock(1000)  # between the pieces
    rows = Rows(file, SETTINGS, PLANNED)
    clock(5)
    assert rows.row(PLANNED[0], never) == PLANNED[0] | {"full": 1.0, "seconds": 60}
    for key in PLANNED[1:]:
        rows.row(key, never if key == PLANNED[1] else measured(clock, 30))
    found = json.loads(file.read_text())
    assert found["complete"]
    assert found["seconds"] == 60 + 240 + 5 + 30 + 30
    assert [row["seconds"] for row in found["rows"]] == [60, 240, 30, 30]
    assert list(tmp_path.iterdir()) == [file]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "row 1, a 0; 0 min so far"
    # Rows that are alike: of the seed or of the method.
    assert told[1] == "row 2, b 0; 1 min so far, some 3 min remain"
    assert told[2] == "row 3, a 1; 5 min so far, some 5 min remain"


def test_time_of_a_row_that_failed_counts_in_it(tmp_path, clock):
    file = tmp_path / "found.json"

    def fails():
        clock(7)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Rows(file, SETTINGS, PLANNED).row(PLANNED[0], fails)
    assert Rows(file, SETTINGS, PLANNED).row(PLANNED[0], measured(clock, 10))["seconds"] == 17
    assert json.loads(file.read_text())["seconds"] == 17


def test_a_killed_run_goes_on(tmp_path, clock):
    file = tmp_path / "found.json"
    environment = os.environ | {"PYTHONPATH": str(BENCH)}
    killed = subprocess.run([sys.executable, "-c", KILLED, file], env=environment, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    rows = Rows(file, SETTINGS, PLANNED)
    assert rows.row(PLANNED[0], never)["full"] == 1.0
    seconds = rows.row(PLANNED[1], measured(clock, 10))["seconds"]
    assert 10.3 <= seconds <= rows.report()["seconds"]


def test_rows_of_other_settings_are_refused(tmp_path, clock):
    file = tmp_path / "found.json"
    Rows(file, SETTINGS, PLANNED).row(PLANNED[0], measured(clock, 1))
    with pytest.raises(SystemExit, match=r"'rounds': 4.*, not of .*'rounds': 2.*; name another file"):
        Rows(file, SETTINGS | {"rounds": 2}, PLANNED)
