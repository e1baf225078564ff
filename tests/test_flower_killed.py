"""Flower's ServerApp and SuperLink killed at every step of the journal: the bytes of an undisturbed run.

The processes are real ones; the clients are threads (`flower_nodes.py`) that send updates which were made beforehand.
"""

import json
import shutil
from collections import Counter

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'hf-fedlarge[flower]'")

from federation import TEAMS, adapter_digests, events, make_update, run_teams
from flower_nodes import Prepared
from flower_processes import Flower

from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.cli import main

STEPS = ("selected", "asked", "received", "validated", "closed", "aggregated", "evaluated", "committed")
# The app's module for the server: where STOPS has a file for a round's step, it waits there until that is removed.
SERVER = """
import time
from pathlib import Path

from hf_fedlarge.flower.server import app
from hf_fedlarge.journal import Journal

__all__ = ["app"]
write = Journal.write


def write_and_wait(self, event, **fields):
    write(self, event, **fields)
    stop = Path({stops!r}) / f"{{fields['round']}}-{{event}}"
    if stop.exists():
        reached = stop.rename(stop.with_suffix(".reached"))
        while reached.exists():
            time.sleep(0.02)


Journal.write = write_and_wait
"""


def run_undisturbed(home):
    """Two rounds in this process, with updates that nobody trained and that lie in home/updates/CLIENT/ROUND then."""

    def make(job):
        number, lora = TEAMS.index(job.client), read_manifest(job.adapter, AdapterManifest).lora
        how = {"adapter": job.adapter, "round_number": job.round, "codec": job.codec, "lora": lora}
        make_update(job.output, job.package, job.client, seed=10 * job.round + number, examples=1 + number, **how)
        shutil.copytree(job.output, home / "updates" / job.client / str(job.round))

    run_teams(home, 2, make)


def make_app(path, home, stops):
    assert main(["flower", "init", str(path), "--store", str(home / "packages")]) == 0
    shutil.copy(home / "federation.yaml", path)
    (path / "fedlarge_app" / "server.py").write_text(SERVER.format(stops=str(stops)))
    with (path / "pyproject.toml").open("a") as file:
        file.write("stop = false\npoll = 0.1\n")
    stops.mkdir()
    for step in STEPS:
        for number in (1, 2):
            (stops / f"{number}-{step}").touch()


class Kills:
    """Kills processes where the ServerApp waits at a step, and keeps what the journal held and who had been asked."""

    def __init__(self, processes, nodes, app, stops):
        self.processes, self.nodes, self.app, self.stops = processes, nodes, app, stops
        self.journal, self.seen = app / "run" / "journal.jsonl", []

    def at(self, number, step, *killed):
        """Kill what is named at a round's step, and start it again; what isn't killed goes on meanwhile."""
        reached = self.stops / f"{number}-{step}.reached"
        self.processes.until(reached.exists)
        *_, last = self.journal.read_text().splitlines()
        last = json.loads(last)
        assert (last["round"], last["event"]) == (number, step)
        self.seen.append((self.journal.read_bytes(), len(self.nodes.orders)))
        server_app = self.processes.server_app()
        if "server app" in killed:
            server_app.kill()
            self.processes.until(lambda: self.processes.server_app() is None)
        if "superlink" in killed:
            self.processes.kill("superlink")
        reached.unlink()
        if "superlink" in killed:
            self.processes.superlink()
        if "server app" in killed:
            self.processes.run(self.app)


def test_killed_at_each_step_a_run_goes_on_from_its_journal_to_the_bytes_of_an_undisturbed_one(tmp_path):
    """The ServerApp and the SuperLink in turn, at each step the other one in the next round; once both."""
    run_undisturbed(tmp_path)
    app, run, stops = tmp_path / "app", tmp_path / "app" / "run", tmp_path / "stops"
    make_app(app, tmp_path, stops)
    processes = Flower(tmp_path)
    nodes = Prepared(processes, tmp_path / "updates", TEAMS)
    try:
        processes.superlink()
        processes.superexec()
        nodes.start()
        processes.run(app)
        kills = Kills(processes, nodes, app, stops)
        for number in (1, 2):
            for place, step in enumerate(STEPS):
                both = ("server app", "superlink")
                kills.at(number, step, *(both if (number, step) == (1, "validated") else [both[(number + place) % 2]]))
        processes.until((run / "summary.json").exists)
    finally:
        nodes.end()
        processes.end()
    assert len(kills.seen) == 16
    journal = kills.journal.read_bytes()
    for before, asked in kills.seen:
        assert journal.startswith(before)
        entries = map(json.loads, before.splitlines())
        accepted = {(entry["round"], entry["client"]) for entry in entries if entry.get("accepted")}
        assert not accepted & set(nodes.orders[asked:])
    written = [Counter((entry["round"], entry["event"]) for entry in events(path)) for path in (run, tmp_path / "run")]
    assert written[0] == written[1]
    assert {step for _, step in written[0]} == set(STEPS)
    assert all(entry["accepted"] for entry in events(run, "validated"))
    assert adapter_digests(run) == adapter_digests(tmp_path / "run")
    assert len(adapter_digests(run)) == 3
