"""What clients may send back, whoever is gone by then."""

import json
import shutil
import uuid

import pytest
from federation import make_teams, make_update
from served import CLIENTS, Server, make_home

from hf_fedlarge.artifacts import MANIFEST_NAME
from hf_fedlarge.clients import SimulatedClients, write_check_ins
from hf_fedlarge.errors import FedLargeError, UpdateRefusedError
from hf_fedlarge.experience import late_updates
from hf_fedlarge.orders import inbox
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.rounds import drive
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.launch import LAUNCHERS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter to start from, and the updates of four clients."""
    path = tmp_path_factory.mktemp("jobs")
    make_home(path)
    return path


def test_an_update_counts_though_its_client_is_gone_by_the_next_attempt(tmp_path):
    config = make_teams(tmp_path, rounds=1, cohort=2, min_updates=2)
    trained, failed, left = [], [], []

    class Leaving(SimulatedClients):
        def check_in(self, jobs, server):
            if server.accepted and not server.is_open:
                left.extend(server.accepted)
                write_check_ins(jobs.run, [known for name, known in jobs.check_ins.items() if name not in left])
                jobs.read_check_ins()

    def train(job):
        if trained and not failed:
            failed.append(job.client)
            raise FedLargeError("no power")
        trained.append(job.client)
        LAUNCHERS["inprocess"]()(job)

    drive(config, tmp_path / "run", Leaving(train), print, stop=False)
    record = json.loads((tmp_path / "run" / "rounds" / "0001" / "round.json").read_text())
    assert left == trained[:1]
    assert {entry["client"] for entry in record["clients"]} == set(trained)
    assert len(trained) == 2


def test_who_was_asked_and_is_gone_is_late_or_refused_like_any_other(home, tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}")
    server = Server(home, tmp_path / "run", store, deadline_seconds=0.5, late="buffer")
    server.open()
    store.send(home / "ann", inbox(1, "ann", 1))
    server.ask()
    server.close()
    write_check_ins(server.run, [CheckIn("ann", 10)])
    server.jobs.read_check_ins()
    store.send(home / "ben", inbox(1, "ben", 1))
    store.write(f"{inbox(1, 'cleo', 1)}/{MANIFEST_NAME}", b"{}")
    server.open(2)
    server.ask()
    assert late_updates(server.journal, 2, server.round.accepted) == [[1, "ben"]]
    causes = {entry["client"]: entry["reason"] for entry in server.round.earlier(1).refused}
    assert causes["cleo"].startswith("cleo refused: ")


def test_what_updates_are_checked_by_is_kept_for_the_last_two_rounds(home, tmp_path):
    server = Server(home, tmp_path / "run", Store(f"memory://{uuid.uuid4().hex}"))
    server.open()
    for number in range(1, 6):
        if number > 1:
            shutil.copytree(home / "start", server.adapter(number - 1))
        expected = server.jobs.expected("ann", number)
        assert expected.round == number
        assert server.jobs.expected("ann", number).package is expected.package
        assert server.jobs.expected("ben", max(number - 1, 1)).package is not None
    assert {number for number, _ in server.jobs._expected} == {4, 5}


def test_what_a_client_said_when_it_was_drawn_holds_for_the_round(home, tmp_path):
    server = Server(home, tmp_path / "run", Store(f"memory://{uuid.uuid4().hex}"))

    def open_with(examples):
        write_check_ins(server.run, [CheckIn(client, examples) for client in CLIENTS])
        server.jobs.read_check_ins()
        return server.open()

    order = open_with(10)
    make_update(tmp_path / "ann", home / "package", "ann", adapter=home / "start", examples=10)
    assert server.round.receive(order, "ann", tmp_path / "ann").accepted
    assert server.jobs.asked("ann", 2).examples == 10
    open_with(5)
    assert [server.jobs.asked("ann", number).examples for number in (1, 2)] == [10, 5]


def test_training_is_what_an_attempt_was_begun_with_and_an_update_of_any_attempt_counts(home, tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}")

    def start(steps):
        server = Server(home, tmp_path / "run", store, training={"max_steps": steps})
        server.open()
        return server

    def asks_for(server):
        ordered = server.clients.publish(server.jobs, server.round, server.order, ["ann"]).training.max_steps
        assert server.jobs.job("ann", 1, tmp_path / "ann").training["max_steps"] == ordered
        return ordered, server.jobs.asked("ann", 1).tokens // (8 * 1024)

    def abandon(server):
        for client in server.round.unheard(server.order):
            server.round.fail(server.order, client, "no power")
        with pytest.raises(UpdateRefusedError, match="abandoned"):
            server.close()

    server = start(5)
    assert asks_for(server) == (5, 5)
    server = start(9)  # killed, and started again with another file
    assert asks_for(server) == (5, 5)
    abandon(server)
    server = start(9)
    assert asks_for(server) == (9, 9)
    abandon(server)
    server = start(2)
    assert asks_for(server) == (2, 9)  # what came of an earlier attempt still counts
    assert server.jobs.asked("ann", 2).tokens == 2 * 8 * 1024
