"""A federation on Flower: the bytes of any other, whoever is killed, and whatever is answered."""

import http.client
import io
import json
import math
import re
import shutil
import signal
import socket
import ssl
import struct
import time
import warnings
import zipfile
from contextlib import closing

import pytest
import yaml

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'hf-fedlarge[flower]'")

import httpx
import psutil
import torch
from federation import LORA, adapter_digests, events, make_update, run_teams
from flower_nodes import Prepared
from flower_processes import BIN, NGINX, Flower, make_certificates, make_node_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from grid_double import GridDouble, Node
from secured import SecureServer, make_secure_home
from served import CLIENTS, Server, make_home

from hf_fedlarge.adapters import ADAPTER_WEIGHTS, read_factors
from hf_fedlarge.artifacts import (
    MANIFEST_NAME,
    SERVER_FILES,
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    write_manifest,
)
from hf_fedlarge.cli import main
from hf_fedlarge.clients import write_check_ins
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import AggregationSettings, Codec, checked, load_federation
from hf_fedlarge.errors import StoreError
from hf_fedlarge.flower import client as client_app
from hf_fedlarge.flower.letters import put_in
from hf_fedlarge.flower.mailbox import GRACE_SECONDS, Mailbox
from hf_fedlarge.flower.server import ServerSettings, serve_over_flower
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import allow, fingerprint, new_key, read_key, revoke
from hf_fedlarge.orders import (
    CHECK_INS,
    FAILED,
    ORDER,
    VERDICTS,
    WHOLE,
    CheckInDocument,
    OrderDocument,
    Work,
    as_bytes,
    inbox,
    write_document,
)
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.report import traffic
from hf_fedlarge.store import Store, object_path
from hf_fedlarge.traffic import changed_bytes

TRACED = shutil.which("strace") is not None

# The server's and the client's side, with a grid that is none


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter to start from, and the updates of four clients."""
    path = tmp_path_factory.mktemp("flower")
    make_home(path)
    return path


class Cohort:
    """Nodes with the real ClientApp, which send updates that were made beforehand, and a server that reaches them."""

    def __init__(self, home, path, monkeypatch):
        self.home, self.path, self.trained, self.said = home, path, [], []
        self.nodes = {name: Node(number, self.answering(name)) for number, name in enumerate(CLIENTS, 11)}
        self.grid = GridDouble(*self.nodes.values())
        self.made = {name: home / name for name in CLIENTS}
        monkeypatch.setattr("hf_fedlarge.trainers.join.in_process", lambda: self.train)

    def train(self, job):
        self.trained.append(job)
        shutil.copytree(self.made[job.client], job.output)

    def answering(self, name, **settings):
        values = {"client": name, "data": str(self.home / "data.jsonl"), "cache": str(self.path / f"cache-{name}")}
        context = Context(1, 2, values | settings, RecordDict(), {})
        return lambda message: client_app.app(message, context)

    def serve(self, key=None, **changes):
        self.mailbox = Mailbox(self.path / "run" / "mailbox", self.grid, self.said.append, key)
        packages = Store(str(self.path / "packages"))
        return Server(self.home, self.path / "run", self.mailbox, self.said, packages, key=key, **changes)


@pytest.fixture
def cohort(home, tmp_path, monkeypatch):
    return Cohort(home, tmp_path, monkeypatch)


def trains(node):
    return [message for message in node.seen if message.metadata.message_type == "train"]


def accepted(server):
    return sorted(server.round.accepted)


def test_a_round_has_the_bytes_that_a_store_would_give(home, tmp_path, cohort):
    server = cohort.serve(deadline_seconds=60, training={"max_steps": 3})
    server.open()
    server.ask()
    server.close()
    store = Store(str(tmp_path / "store"))
    other = Server(home, tmp_path / "other", store)
    other.open()
    for name in CLIENTS:
        store.send(home / name, inbox(1, name, 1))
    other.ask()
    other.close()
    assert (
        read_manifest(server.adapter(1), AdapterManifest).digest
        == read_manifest(other.adapter(1), AdapterManifest).digest
    )
    assert accepted(server) == list(CLIENTS)
    assert {job.client: job.training["max_steps"] for job in cohort.trained} == dict.fromkeys(CLIENTS, 3)


def a_round(cohort):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    server.close()
    return server


def a_round_of_many_lives(cohort, monkeypatch):
    """Its server dies before and after each entry of its journal, and begins again with none of what Flower knew."""
    plain, written, deaths, step = Journal.write, [], 0, 1

    def dying(self, event, **fields):
        written.append(event)
        if len(written) == step:
            raise KeyboardInterrupt
        plain(self, event, **fields)
        if len(written) == step + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", dying)
    while True:
        written.clear()
        try:
            server = a_round(cohort)
        except KeyboardInterrupt:
            deaths, step = deaths + 1, 1 if step > 4 else step + 1
            assert deaths < 100
            continue
        monkeypatch.setattr(Journal, "write", plain)
        assert deaths > 8
        return server


def test_a_server_app_killed_at_any_entry_of_its_journal_loses_nothing_that_it_accepted(home, tmp_path, monkeypatch):
    """Before it is written as well as after; `test_flower_killed.py` has processes, killed after entries."""
    cohort = Cohort(home, tmp_path / "whole", monkeypatch)
    whole = a_round(cohort)
    cohort = Cohort(home, tmp_path / "killed", monkeypatch)
    server = a_round_of_many_lives(cohort, monkeypatch)
    digests = [read_manifest(each.adapter(1), AdapterManifest).digest for each in (whole, server)]
    assert digests[0] == digests[1]
    assert sorted(job.client for job in cohort.trained) == list(CLIENTS)
    assert sorted(entry["client"] for entry in server.journal.find("validated")) == list(CLIENTS)


def test_a_message_has_the_order_and_the_adapter_and_neither_the_package_nor_other_names(home, cohort):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    [message] = trains(cohort.nodes["ben"])
    files = {path: array.data for path, array in message.content["files"].items()}
    order = OrderDocument.model_validate_json(files.pop(ORDER))
    [work] = order.work
    assert work.clients == ["ben"]
    assert work.package_store == str(cohort.path / "packages")
    package = read_manifest(home / "package", PackageManifest)
    assert (work.package, work.package_bytes) == (package.digest, package.total_bytes)
    adapter = read_manifest(home / "start", AdapterManifest)
    needed = {entry.sha256 for name, entry in adapter.files.items() if name not in SERVER_FILES}
    assert {path.rpartition("/")[2] for path in files} == {f"{adapter.digest}.json"} | needed
    assert 0 < order.closes_at - time.time() < 60
    assert message.metadata.group_id == "1"
    assert math.isclose(message.metadata.created_at + message.metadata.ttl, order.closes_at + GRACE_SECONDS, abs_tol=1)
    assert {path.name for path in (cohort.path / "cache-ben" / "packages").glob("[0-9a-f]*")} == {package.digest}


def with_files(change):
    """A reply like the real one, of which `change` was made to the files by name."""

    def hostile(reply, message, home):
        files = {path: array.data for path, array in reply.content["files"].items()}
        [place] = {path.rpartition("/")[0] for path in files}
        changed = change({path.rpartition("/")[2]: raw for path, raw in files.items()}, home)
        return Message(
            put_in({name if "/" in name else f"{place}/{name}": raw for name, raw in changed.items()}), reply_to=message
        )

    return hostile


def with_update(**changes):
    """A reply with an update that was made with these arguments of `make_update`."""

    def change(_, home):
        output = home / "hostile"
        shutil.rmtree(output, ignore_errors=True)
        make_update(output, home / "package", "ben", **{"seed": 1, "adapter": home / "start"} | changes)
        return {path.name: path.read_bytes() for path in output.iterdir()}

    return with_files(change)


def of_nan(files, home):
    name = "adapter_model.safetensors"
    content = bytearray(files[name])
    content[-4:] = b"\xff\xff\xff\x7f"
    output = home / "hostile"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for other, raw in files.items():
        (output / other).write_bytes(bytes(content) if other == name else raw)
    manifest = read_manifest(output, UpdateManifest)
    write_manifest(output, manifest.model_copy(update={"files": describe_files(output)}))
    return {path.name: path.read_bytes() for path in output.iterdir()}


def raw_reply(content):
    return lambda reply, message, home: Message(content, reply_to=message)


def manifest_of(**changes):
    def change(files, home):
        said = json.loads(files[MANIFEST_NAME]) | changes
        return files | {MANIFEST_NAME: json.dumps(said).encode()}

    return with_files(change)


HOSTILE = {
    "NaN": (with_files(of_nan), "holds NaN or infinity"),
    "negative weight": (manifest_of(examples=-1), "is refused: .*examples"),
    "huge weight": (manifest_of(tokens=10**30), "is refused: .*tokens"),
    "more weight than it can have": (with_update(examples=10**6), "claims 1000000 examples"),
    "another round": (with_update(round_number=7), "it is for round 7; expected round 1"),
    "other shapes": (with_update(lora=LORA.model_copy(update={"rank": 3})), "its LoRA settings are"),
    "garbage": (with_files(lambda files, _: dict.fromkeys(files, b"\x00\xff" * 50)), "is not JSON"),
    "another file's bytes": (
        with_files(
            lambda files, _: files | {"adapter_model.safetensors": files["adapter_model.safetensors"][:-1] + b"x"}
        ),
        "it was discarded",
    ),
    "huge": (with_files(lambda files, _: files | {"more": bytes(10**7)}), "has 10[0-9]{6} bytes of files; expected"),
    "something else": (with_files(lambda files, _: {"junk": b"x"}), "lacks fedlarge.json, which it was asked for"),
    "many": (with_files(lambda files, _: {f"f{number}": b"x" for number in range(99)}), "something else than up to 16"),
    "somebody else's place": (
        with_files(lambda files, _: {f"inbox/0001/ann/1/{name}": raw for name, raw in files.items()}),
        "which nobody asked for",
    ),
    "a way out": (with_files(lambda files, _: {"../../../x": b"x"}), "which nobody asked for"),
    "other records": (
        raw_reply(RecordDict({"metrics": ConfigRecord({"weight": 1e30})})),
        "something else than up to 16",
    ),
    "arrays": (
        raw_reply(RecordDict({"files": ArrayRecord({"w": Array(torch.full((2,), math.nan).numpy())})})),
        "which nobody",
    ),
    "an error": (
        lambda reply, message, home: Message(
            Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "\x1b[2J no"), reply_to=message
        ),
        r"its app failed: \?\[2J no",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_hostile_is_refused_by_name_and_the_others_count(home, cohort, kind):
    hostile, sentence = HOSTILE[kind]
    honest = cohort.nodes["ben"].answer

    def answer(message):
        reply = honest(message)
        return hostile(reply, message, home) if message.metadata.message_type == "train" else reply

    cohort.nodes["ben"].answer = answer
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == ["ann", "cleo", "dan"]
    [refused] = server.round.refused
    assert refused["client"] == "ben"
    assert re.search(sentence, refused["reason"]), refused


# Secure aggregation


@pytest.fixture(scope="module")
def secure_home(tmp_path_factory):
    path = tmp_path_factory.mktemp("secure")
    make_secure_home(path)
    return path


class SecureCohort(Cohort):
    """Likewise, with what `ffa` trains."""

    def __init__(self, home, path, monkeypatch):
        super().__init__(home, path, monkeypatch)
        self.made = {name: home / "ffa" / name for name in CLIENTS}

    def serve(self, run="run", **changes):
        self.mailbox = Mailbox(self.path / run / "mailbox", self.grid, self.said.append)
        packages = Store(str(self.path / "packages"))
        changes["secure"] = {"stage_seconds": 10.0} | changes.get("secure", {})
        return SecureServer(self.home, self.path / run, self.mailbox, said=self.said, packages=packages, **changes)


@pytest.fixture
def secure_cohort(secure_home, tmp_path, monkeypatch):
    return SecureCohort(secure_home, tmp_path, monkeypatch)


def stage_of(message):
    order = json.loads(message.content["files"][ORDER].data)
    return order["secure"]["stage"]


def test_masked_updates_sum_up_over_messages_and_nobody_gets_more_than_its_own(secure_home, tmp_path, secure_cohort):
    allowed = tmp_path / "allowed.json"
    for name in CLIENTS:
        allow(allowed, new_key(tmp_path / f"{name}.pem", name))
        signing = {"key": str(tmp_path / f"{name}.pem"), "keys": str(allowed)}
        secure_cohort.nodes[name].answer = secure_cohort.answering(name, **signing)
    server = secure_cohort.serve(keys=str(allowed), secure={"threshold": 0.9})  # so that nobody is too late for a stage
    server.whole()
    settings = AggregationSettings(aggregator="ffa", weighting="equal")
    updates = [secure_home / "ffa" / name for name in CLIENTS]
    how = {"settings": settings, "previous": secure_home / "ffa" / "start"}
    aggregate_updates(updates, secure_home / "package", tmp_path / "plain", **how)
    found, expected = read_factors(server.adapter(1)), read_factors(tmp_path / "plain")
    for module, pair in expected.items():
        for one, other in zip(pair, found[module], strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-7)
    assert [job.client for job in secure_cohort.trained] == list(CLIENTS)
    for name, node in secure_cohort.nodes.items():
        messages = trains(node)
        assert [stage_of(message) for message in messages] == ["keys", "shares", "masked", "agree", "reveal"]
        for message in messages[2:]:
            agreement = ["secure/0001/1/agreement.json"] if stage_of(message) == "reveal" else []
            boxes = [path for path in message.content["files"] if path.startswith("secure/")]
            assert boxes == ["secure/0001/1/roster.json", *agreement, f"secure/0001/1/boxes/{name}.json"]


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "reveal"])
def test_a_client_lost_at_a_stage_is_left_out_and_another_node_goes_on_with_its_secrets(secure_cohort, stage):
    """Ben never answers in the stage; cleo's node dies once it has, and is started again."""
    cohort, dead = secure_cohort, []

    def away(honest):
        return lambda message: None if trained(message) and stage_of(message) == stage else honest(message)

    def dying(message):
        if trained(message) and stage_of(message) == stage and not dead:
            dead.append(message)
            honest(message)
            cohort.nodes["cleo"].since = "2"
            return None
        return honest(message)

    honest = cohort.nodes["cleo"].answer
    cohort.nodes["ben"].answer, cohort.nodes["cleo"].answer = away(cohort.nodes["ben"].answer), dying
    server = cohort.serve(deadline_seconds=5, secure={"stage_seconds": 5.0})
    server.whole()
    [found] = [entry["found"] for entry in server.journal.find("staged", stage="reveal")]
    assert found["clients"] == (4 if stage == "reveal" else 3)
    assert len(dead) == 1
    assert [job.client for job in cohort.trained].count("cleo") == 1


def test_what_became_of_masked_updates_is_heard_and_a_client_that_was_left_out_keeps_no_secrets(secure_cohort, capsys):
    ben = secure_cohort.nodes["ben"]
    honest = ben.answer

    def away(message):
        files = message.content["files"] if trained(message) else {}
        if b'"masked"' in (files[ORDER].data if ORDER in files else b""):
            return None
        return honest(message)

    ben.answer = away
    server = secure_cohort.serve(deadline_seconds=5, secure={"stage_seconds": 3.0})
    server.whole()
    secrets = list(secure_cohort.path.glob("cache-ben/clients/*/ben/0001/secure/1.json"))
    assert len(secrets) == 1
    server.clients.end(server.adapter(1))
    capsys.readouterr()
    secure_cohort.mailbox.say_goodbye(30.0, 0.02)
    assert capsys.readouterr().out.count("round 1: the update counts") == 3
    assert not list(secure_cohort.path.glob("cache-*/clients/*/*/0001/secure"))


def trained(message):
    return message.metadata.message_type == "train"


# Who is there, who comes late, who is gone


def silent(answer, seen=None):
    """A node that says who it is, and then trains for ever; its answers are put into `seen` in place of sent."""

    def answering(message):
        if message.metadata.message_type == "query":
            return answer(message)
        if seen is not None:
            seen[message.metadata.message_id] = answer(message)
        return None

    return answering


def test_who_never_answers_holds_up_no_round_and_gets_the_next_one(home, cohort):
    for name in ("ben", "cleo"):
        cohort.nodes[name].answer = silent(cohort.nodes[name].answer)
    server = cohort.serve(deadline_seconds=4, min_updates=2)
    for number in (1, 2, 3):
        server.open(number)
        before = time.monotonic()
        server.ask()
        assert time.monotonic() - before < 8
        assert accepted(server) == ["ann", "dan"]
        server.close()
        for name in CLIENTS:  # what they train in the next round
            cohort.made[name] = home / f"{name}-{number}"
            start = {"adapter": server.adapter(number), "round_number": number + 1}
            make_update(cohort.made[name], home / "package", name, **start)
    for node in cohort.nodes.values():
        assert [message.metadata.group_id for message in trains(node)] == ["1", "2", "3"]
        assert max(message.metadata.ttl for message in trains(node)) < 4.0 + GRACE_SECONDS


def test_a_client_stops_training_when_its_round_is_closed(home, cohort):
    """A node does one thing at a time: who trains on would not get the next round's order in time."""
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    [message] = trains(cohort.nodes["cleo"])
    order = OrderDocument.model_validate_json(message.content["files"][ORDER].data)
    soon = order.model_copy(update={"closes_at": time.time() + 0.5, "attempt": 2, "round": 3})
    message.content["files"][ORDER] = put_in({ORDER: as_bytes(soon)})["files"][ORDER]

    def stubborn(_):
        try:
            time.sleep(30)
        except Exception:
            time.sleep(30)

    cohort.train = stubborn
    before = time.monotonic()
    reply = cohort.nodes["cleo"].answer(message)
    assert time.monotonic() - before < 5
    [(path, failed)] = reply.content["files"].items()
    assert path == "inbox/0003/cleo/2/failed.json"
    assert b"The round was closed before the update was ready." in failed.data


def test_a_client_whose_round_is_closed_begins_nothing(home, cohort):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    [message] = trains(cohort.nodes["ann"])
    order = OrderDocument.model_validate_json(message.content["files"][ORDER].data)
    closed = order.model_copy(update={"closes_at": time.time() - 1})
    message.content["files"][ORDER] = put_in({ORDER: as_bytes(closed)})["files"][ORDER]
    trained = len(cohort.trained)
    assert not cohort.nodes["ann"].answer(message).content
    assert len(cohort.trained) == trained


def test_the_alarm_of_whoever_called_is_left_as_it_was():
    before, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    late = pytest.raises(client_app.TooLate, match="was closed before the update was ready")
    with late, client_app._until(time.time() + 0.05):
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (timer[0] > 0)


@pytest.mark.parametrize("again", ["the same node", "another node"])
def test_a_client_that_was_killed_gets_the_order_again_and_sends_what_it_finished(cohort, again):
    ben, calls = cohort.nodes["ben"], []
    honest = ben.answer

    def dies(message):
        if message.metadata.message_type == "train":
            calls.append(message)
            honest(message)  # trained, and killed before it was sent
            if again == "the same node":
                ben.since = "2"
                ben.answer = honest
            else:
                ben.online = False
                cohort.grid.nodes.append(Node(99, honest))
            return None
        return honest(message)

    ben.answer = dies
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert [job.client for job in cohort.trained].count("ben") == 1
    assert len(calls) == 1


def test_a_name_belongs_to_the_node_that_has_it(cohort):
    cohort.grid.nodes.append(Node(99, cohort.answering("ann")))
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert not trains(cohort.grid.nodes[-1])
    assert any("it says that it is ann, as another node did" in line for line in cohort.said)
    assert len(cohort.grid.nodes[-1].seen) == 1  # and is not asked again


def test_a_node_that_was_killed_is_its_client_again_once_its_former_life_is_over(cohort):
    """A SuperNode that nobody registered has another number when it is started again; for a minute both are listed."""
    cohort.serve(clients=dict.fromkeys(CLIENTS, 12))
    again = Node(99, cohort.answering("ann"))
    cohort.grid.nodes.append(again)
    for _ in range(3):
        assert len(cohort.mailbox.names("check_ins")) == len(CLIENTS)
    assert len(again.seen) == 1
    cohort.nodes["ann"].online = False
    assert "ann.json" not in cohort.mailbox.names("check_ins")
    assert "ann.json" in cohort.mailbox.names("check_ins")
    assert len(again.seen) == 2
    assert sum("can't take part" in line for line in cohort.said) == 1


def test_a_node_is_who_it_was_registered_as(cohort):
    cohort.nodes["ann"].name = "ann"
    cohort.nodes["ben"].name = "lab-9"
    server = cohort.serve(deadline_seconds=4)
    server.open()
    server.ask()
    assert accepted(server) == ["ann", "cleo", "dan"]
    assert "node 12 can't take part: it says that it is ben; it is registered as 'lab-9'." in cohort.said


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (lambda message: Message(put_in({"order.json": b"{}"}), reply_to=message), "which nobody asked for"),
        (lambda message: Message(put_in({"check_ins/eve.json": bytes(10**5)}), reply_to=message), "has 100000 bytes"),
        (lambda message: Message(RecordDict(), reply_to=message), "0 check-ins; expected one"),
    ],
)
def test_a_node_that_does_not_say_who_it_is_takes_no_part(cohort, reply, sentence):
    cohort.grid.nodes.append(Node(99, reply))
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert re.search(f"node 99 can't take part: .*{sentence}", "\n".join(cohort.said))


def test_who_is_offline_is_not_checked_in(cohort):
    server = cohort.serve(clients=dict.fromkeys(CLIENTS, 12))  # which has asked who is there
    assert len(cohort.mailbox.names("check_ins")) == len(CLIENTS)
    cohort.nodes["dan"].online = False
    assert cohort.mailbox.names("check_ins") == ["ann.json", "ben.json", "cleo.json"]
    assert [known.client for known in server.clients._admission.look(None)] == ["ann", "ben", "cleo"]


def test_answers_to_other_messages_and_replies_that_cannot_be_read_spoil_nothing(cohort, monkeypatch):
    pull, spoiled = cohort.grid._pull, []

    def foreign(id):
        reply = pull(id)
        node, message = cohort.grid._pushed[id]
        if reply is not None and message.metadata.message_type == "train":
            if node.id == 11:  # ann's answer comes as one to another message
                reply.metadata.__dict__["_reply_to_message_id"] = "0" * 64
            if node.id == 12:
                spoiled.append(id)
                raise ValueError("Mismatch in children")
        return reply

    monkeypatch.setattr(cohort.grid, "_pull", foreign)
    server = cohort.serve(deadline_seconds=4, min_updates=2)
    server.open()
    server.ask()
    assert accepted(server) == ["cleo", "dan"]
    [refused] = server.round.refused
    assert refused["client"] == "ben"
    assert "its message can't be read (ValueError: Mismatch in children)" in refused["reason"]
    assert len(spoiled) == 1


def test_a_superlink_that_cannot_be_reached_is_waited_for(cohort):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    cohort.grid.unreachable = [httpx.ConnectError("refused")] * 3
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert "The SuperLink can't be reached (refused)." in cohort.said


def failing(status):
    return httpx.HTTPStatusError("", request=httpx.Request("POST", "http://link"), response=httpx.Response(status))


def test_a_superlink_that_answers_with_an_error_is_waited_for_and_nobody_blamed(cohort):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    cohort.grid.unreachable = [failing(500)] * 12  # of looks for nodes and for answers
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert server.round.refused == []
    assert "The SuperLink failed (HTTP status 500)." in cohort.said


def test_an_answer_that_the_superlink_always_fails_on_holds_up_no_other(cohort, monkeypatch):
    pull, failures = cohort.grid._pull, []
    monkeypatch.setattr("hf_fedlarge.flower.mailbox._MOST_FAILURES", 3)

    def poisoned(id):
        node, message = cohort.grid._pushed[id]
        if node.id == 11 and message.metadata.message_type == "train" and len(failures) < 3:
            failures.append(id)
            raise failing(422)
        return pull(id)

    monkeypatch.setattr(cohort.grid, "_pull", poisoned)
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == list(CLIENTS)
    assert len(set(failures)) == 1
    assert len(trains(cohort.nodes["ann"])) == 1  # of the letter that was sent again
    assert "  no answer from ann: The SuperLink failed (HTTP status 422)." in cohort.said


def test_a_late_update_is_kept_where_the_policy_says_so(cohort):
    answers = {}
    cohort.nodes["cleo"].answer = silent(cohort.nodes["cleo"].answer, answers)
    server = cohort.serve(deadline_seconds=4, late="buffer", min_updates=2)
    server.open()
    server.ask()
    server.close()
    [message] = trains(cohort.nodes["cleo"])
    assert message.metadata.ttl > 86400
    cohort.grid.late = answers
    server.open(2)
    server.ask()
    assert any("is kept for a later one" in line for line in cohort.said)
    assert [entry["client"] for entry in server.journal.find("late")] == ["cleo"]


def test_a_client_is_told_with_the_next_order_what_became_of_its_update(home, cohort, capsys):
    cohort.made["ben"] = cohort.path / "of another round"
    make_update(cohort.made["ben"], home / "package", "ben", adapter=home / "start", round_number=7)
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    server.close()
    for name in CLIENTS:
        cohort.made[name] = cohort.path / f"{name}-2"
        make_update(cohort.made[name], home / "package", name, adapter=server.adapter(1), round_number=2)
    capsys.readouterr()
    server.open(2)
    server.ask()
    said = capsys.readouterr().out
    assert "round 1: the server says: ben refused: it is for round 7" in said
    assert said.count("round 1: the update counts") == 3
    for name, node in cohort.nodes.items():
        verdicts = [path for path in trains(node)[1].content["files"] if path.startswith("verdicts/")]
        assert verdicts == [f"verdicts/0001/{name}/1.json"]


def second_round(home, cohort, spoil=lambda: None):
    """In which B alone is another than before, and `spoil` was done in between; what messages brought to ben."""
    codec = Codec(name="int8")
    server = cohort.serve(deadline_seconds=60, aggregator="fedavg", codec="int8")
    for number in (1, 2):
        for name in CLIENTS:
            cohort.made[name] = cohort.path / f"{name}-{number}"
            how = {"codec": codec, "frozen": "A", "adapter": server.adapter(number - 1), "round_number": number}
            make_update(cohort.made[name], home / "package", name, seed=number, **how)
        server.open(number)
        server.ask()
        if number == 1:
            server.close(aggregator="fedavg", codec=codec)
            spoil()
    assert accepted(server) == list(CLIENTS)
    messages = [message.content["files"] for message in trains(ben(cohort)) if message.metadata.group_id == "2"]
    return server, [{path: array.data for path, array in files.items()} for files in messages]


def ben(cohort):
    return cohort.nodes["ben"]


def weights_of(adapter):
    return object_path(read_manifest(adapter, AdapterManifest).files[ADAPTER_WEIGHTS].sha256)


def test_who_was_in_the_round_before_is_sent_what_changed_and_the_journal_counts_that(home, cohort):
    server, [files] = second_round(home, cohort)
    before, now = server.adapter(0), server.adapter(1)
    assert weights_of(now) not in files
    [work] = OrderDocument.model_validate_json(files[ORDER]).work
    assert work.change.clients == ["ben"]
    brought = sum(len(raw) for path, raw in files.items() if path.startswith(("objects/", "artifacts/")))
    counted = traffic(server.journal, 2)["bytes_by_client"]["ben"]["down"]
    assert counted == changed_bytes(now, before) < 0.7 * changed_bytes(now, None)
    config = read_manifest(now, AdapterManifest).files["adapter_config.json"].size  # goes along, though it is the same
    assert brought == counted + config
    assert {weights_of(job.adapter) for job in cohort.trained if job.round == 2} == {weights_of(now)}


@pytest.mark.parametrize("lost", [["clients"], ["clients", "packages"]])
def test_who_cannot_use_what_changed_is_sent_the_whole_adapter_once_and_it_is_counted(home, cohort, capsys, lost):
    """And the package that it fetches again with it."""

    def lose():
        for name in lost:
            shutil.rmtree(cohort.path / "cache-ben" / name)

    server, [partial, whole] = second_round(home, cohort, lose)
    now = server.adapter(1)
    assert weights_of(now) in whole.keys() - partial.keys()
    assert capsys.readouterr().out.count("round 2: fetching the whole adapter: ") == 1
    down = traffic(server.journal, 2)["bytes_by_client"]
    again = server.jobs.tiers[0].manifest.total_bytes if "packages" in lost else 0
    assert down["ben"]["down"] == changed_bytes(now, None) + again
    assert down["ann"]["down"] == changed_bytes(now, server.adapter(0))
    assert sorted(job.client for job in cohort.trained if job.round == 2) == list(CLIENTS)


def test_who_asks_for_the_whole_adapter_without_end_is_refused(home, cohort):
    def insist():
        node, honest = ben(cohort), ben(cohort).answer

        def answer(message):
            reply = honest(message)
            if message.metadata.message_type != "train":
                return reply
            return Message(put_in({f"{inbox(2, 'ben', 1)}/{WHOLE}": b'{"reason": "gone"}'}), reply_to=message)

        node.answer = answer

    with pytest.raises(AssertionError, match="ben"):
        second_round(home, cohort, insist)
    [failed] = list(Journal(cohort.path / "run" / "journal.jsonl").find("failed"))
    assert "its message lacks fedlarge.json, which it was asked for" in failed["reason"]
    assert len(trains(ben(cohort))) == 3


def test_signatures_are_asked_for_as_anywhere(home, cohort):
    """Ann signs; ben doesn't, and eve's node says that it is cleo, with a key of its own."""
    listed = cohort.path / "allowed.json"
    for name in CLIENTS:
        allow(listed, new_key(cohort.path / f"{name}.pem", name))
    new_key(cohort.path / "eve.pem", "cleo")
    for name, key in (("ann", "ann"), ("cleo", "eve")):
        cohort.made[name] = cohort.path / f"signed-{name}"
        private = cohort.path / f"{key}.pem"
        make_update(cohort.made[name], home / "package", name, adapter=home / "start", key=private)
    server = cohort.serve(deadline_seconds=60, keys=str(listed))
    server.open()
    server.ask()
    assert accepted(server) == ["ann"]
    reasons = {entry["client"]: entry["reason"] for entry in server.round.refused}
    assert "has no signature.json" in reasons["ben"]
    assert "which is not one of cleo's" in reasons["cleo"]


@pytest.mark.parametrize("key", ["server", "eve", None])
def test_a_client_that_knows_the_server_s_key_does_what_that_signed(home, cohort, key):
    public = {name: new_key(cohort.path / f"{name}.pem", name).split()[2] for name in ("server", "eve")}
    for name in CLIENTS[:3]:
        cohort.nodes[name].answer = cohort.answering(name, **{"server-key": public["server"]})
    server = cohort.serve(key and read_key(cohort.path / f"{key}.pem"), deadline_seconds=60)
    server.open()
    server.ask()
    assert accepted(server) == (list(CLIENTS) if key == "server" else ["dan"])
    sentence = "is not signed; expected" if key is None else "is signed with the key"
    assert all(sentence in entry["reason"] for entry in server.round.refused)
    assert len(cohort.trained) == len(accepted(server))


def test_an_old_message_of_the_server_s_is_not_answered_again(home, cohort):
    public = new_key(cohort.path / "server.pem", "server").split()[2]
    cohort.nodes["ann"].answer = cohort.answering("ann", **{"server-key": public})
    server = cohort.serve(read_key(cohort.path / "server.pem"), deadline_seconds=60, clients={"ann": 10})
    write_check_ins(server.run, [CheckIn("ann", 10)])
    for number in (1, 2):
        server.open(number)
        server.ask()
        server.close()
        cohort.made["ann"] = cohort.path / f"ann-{number}"
        make_update(cohort.made["ann"], home / "package", "ann", adapter=server.adapter(1), round_number=2)
    first, _ = trains(cohort.nodes["ann"])
    [(path, failed)] = cohort.nodes["ann"].answer(first).content["files"].items()
    assert (path, len(cohort.trained)) == ("inbox/0001/ann/1/failed.json", 2)
    assert b"is an old one, for round 1, attempt 1; expected none before round 2" in failed.data


def test_at_the_end_clients_hear_what_became_of_their_last_updates(home, cohort, capsys):
    """Cleo is still at work on something and is not waited for."""
    public = new_key(cohort.path / "server.pem", "server").split()[2]
    for name in CLIENTS:
        cohort.nodes[name].answer = cohort.answering(name, **{"server-key": public})
    cohort.nodes["cleo"].answer = silent(cohort.nodes["cleo"].answer)
    server = cohort.serve(read_key(cohort.path / "server.pem"), deadline_seconds=4)
    server.open()
    server.ask()
    server.close()
    server.clients.end(server.adapter(1))
    capsys.readouterr()
    before = time.monotonic()
    cohort.mailbox.say_goodbye(30.0, 0.02)
    assert time.monotonic() - before < 10
    said = capsys.readouterr().out
    assert said.count("round 1: the update counts") == 3
    assert said.count("the federation is over after round 1") == 3
    assert not [line for line in cohort.said if "is over" in line]  # of clocks that don't agree
    assert not list(cohort.path.glob("cache-*/clients/*/*/0001/sent.json"))


def test_a_server_that_was_started_again_tells_everybody_of_the_end(home, cohort, capsys):
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    server.close()
    server.clients.end(server.adapter(1))
    cohort.nodes["dan"].answer = lambda message: None  # at work on something since before
    capsys.readouterr()
    before = time.monotonic()
    Mailbox(cohort.path / "run" / "mailbox", cohort.grid, cohort.said.append).say_goodbye(1.0, 0.02)
    assert time.monotonic() - before < 10
    said = capsys.readouterr().out
    assert said.count("round 1: the update counts") == 3
    assert said.count("the federation is over after round 1") == 3


def test_who_may_not_take_part_is_told_of_the_end_as_everybody(home, cohort, capsys):
    """Why it may not lies beside verdicts on updates, and is none of them."""
    server = cohort.serve(deadline_seconds=60)
    server.open()
    server.ask()
    server.close()
    write_document(cohort.mailbox, f"{CHECK_INS}/ben.json", CheckInDocument(client="ben", examples=11))
    server.clients._admission.look({"ben": 10})
    assert cohort.mailbox.names(f"{VERDICTS}/{CHECK_INS}/ben") == ["refused.json"]
    server.clients.end(server.adapter(1))
    capsys.readouterr()
    cohort.mailbox.say_goodbye(30.0, 0.02)
    said = capsys.readouterr().out
    assert said.count("round 1: the update counts") == 4
    assert said.count("the federation is over after round 1") == 4


def test_an_end_that_the_server_did_not_sign_ends_nothing(home, cohort, capsys):
    public = new_key(cohort.path / "server.pem", "server").split()[2]
    order = OrderDocument(run="0" * 32, state="over", round=1, attempt=0)
    reply = cohort.answering("ann", **{"server-key": public})(
        Message(put_in({ORDER: as_bytes(order)}), 11, "train", ttl=60)
    )
    assert not reply.content
    said = capsys.readouterr().out
    assert "is not signed; expected" in said
    assert "the federation is over" not in said


def test_a_place_that_the_server_did_not_name_is_not_looked_at(cohort):
    public = new_key(cohort.path / "server.pem", "server").split()[2]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        none = {"package": "0" * 64, "adapter": "0" * 64, "package_bytes": 1, "adapter_bytes": 1, "update_bytes": 10**5}
        work = Work(clients=["ann"], package_store=f"ftp://127.0.0.1:{listener.getsockname()[1]}/x", **none)
        order = OrderDocument(run="0" * 32, state="open", round=1, attempt=1, work=[work])
        reply = cohort.answering("ann", **{"server-key": public})(
            Message(put_in({ORDER: as_bytes(order)}), 11, "train", ttl=60)
        )
        with pytest.raises(TimeoutError):
            listener.accept()
    [(path, failure)] = reply.content["files"].items()
    assert path == f"{inbox(1, 'ann', 1)}/{FAILED}"
    assert b"is not signed; expected" in failure.data


def test_a_node_s_own_settings_count_its_memory_and_where_it_reads_packages(home, cohort):
    mirror = Store(str(cohort.path / "mirror"))
    mirror.put(home / "package")
    cohort.nodes["ann"].answer = cohort.answering("ann", **{"store": mirror.url, "memory-budget": "600MB"})
    server = cohort.serve(deadline_seconds=60, clients={"ann": 10})
    write_check_ins(server.run, [CheckIn("ann", 10)])
    server.open()
    cohort.nodes = {"ann": cohort.nodes["ann"]}
    shutil.rmtree(cohort.path / "packages", ignore_errors=True)
    put_already = read_manifest(home / "package", PackageManifest).digest
    server.clients._offers._packages[home / "package"] = put_already
    server.ask()
    assert accepted(server) == ["ann"]
    assert cohort.trained[0].training["memory_budget"] == "600MB"


# The app that users begin with


def test_init_makes_an_app_that_flower_takes_and_that_holds_nothing_of_the_server_s(tmp_path, capsys, monkeypatch):
    app = tmp_path / "my-app"
    assert main(["flower", "init", str(app), "--store", "s3://bucket/packages", "--checkpoint", "me/model"]) == 0
    (app / "run").mkdir()
    (app / "run" / "secret.json").write_text("{}")
    (app / "mine.jsonl").write_text("{}")
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # of how flwr calls pathspec
        bundle = build_fab_from_disk(app)
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert sorted(name for name in names if name != ".info/CONTENT") == [
        "fedlarge_app/__init__.py",
        "fedlarge_app/client.py",
        "fedlarge_app/server.py",
        "pyproject.toml",
    ]
    assert load_federation(app / "federation.yaml").checkpoint == "me/model"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    assert main(["flower", "init", "other", "--store", "x", "--checkpoint", "models/llama"]) == 0
    assert load_federation(tmp_path / "other" / "federation.yaml").checkpoint == str(tmp_path / "models" / "llama")
    assert main(["flower", "init", str(app), "--store", "x"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["flower", "init", str(tmp_path / "My App"), "--store", "x"]) == 2
    assert "can't be an app's name" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{}, {"patience": 60}])
def test_a_server_app_has_the_patience_that_its_settings_say(cohort, monkeypatch, given):
    def drive(config, run, clients, *rest, **how):
        raise StoreError(f"waited for {clients.patience.seconds:g} s")

    monkeypatch.setattr("hf_fedlarge.flower.server.drive", drive)
    settings = checked(ServerSettings, {"federation": "x", "output": "y", "store": "z"} | given)
    with pytest.raises(StoreError, match=f"waited for {given.get('patience', 7 * 86400)} s"):
        serve_over_flower(None, cohort.path, "memory://x", cohort.grid, print, patience=settings.patience)


# Flower's own processes


@pytest.fixture
def flower(tmp_path):
    """Starts programs, and ends them."""
    started = []

    def start(**options):
        started.append(Flower(tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.end()


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def make_app(path, tmp_path, federation, key):
    assert main(["flower", "init", str(path), "--store", str(tmp_path / "packages")]) == 0
    (path / "federation.yaml").write_text(yaml.safe_dump(federation))
    with (path / "pyproject.toml").open("a") as file:  # its last table is the ServerApp's settings
        file.write(f'stop = false\npoll = 0.2\nkey = "{key}"\n')


def make_hostile(home, run, lora):
    """What three clients send in two rounds, and what is said to it."""

    def made(name, number, **changes):
        path, how = home / name / str(number), {"lora": lora, "examples": 1, "tokens": 1, "round_number": number}
        make_update(path, run / "package", name, **how | changes)
        return path

    def spoil(path, last=b"", **changes):
        weights = path / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) - len(last)] + last)
        manifest = read_manifest(path, UpdateManifest)
        write_manifest(path, manifest.model_copy(update={"files": describe_files(path)} | changes))

    start = run / "rounds" / "0000" / "adapter"
    spoil(made("eve", 1), struct.pack("<f", math.nan))
    made("eve", 2, round_number=1, adapter=start)  # what would have been good the round before
    spoil(made("trudy", 1, lora=lora.model_copy(update={"rank": 3})), lora=lora)
    made("trudy", 2, adapter=start)
    heavy = made("ivan", 1) / MANIFEST_NAME
    heavy.write_text(json.dumps(json.loads(heavy.read_text()) | {"tokens": 1e30}))
    spoil(made("ivan", 2), struct.pack("<f", 1e30))
    return {
        (1, "eve"): "holds NaN or infinity",
        (2, "eve"): "it is for round 1; expected round 2",
        (1, "trudy"): r"is torch.float32 .*3.*; expected torch.float32 .*2",
        (2, "trudy"): "it started from the adapter .*; expected .* the state before this round",
        (1, "ivan"): "tokens: Input should be a valid integer",
        (2, "ivan"): r"has the norm 1e\+30; expected at most",
    }


def test_flower_ends_with_the_bytes_of_one_process_whoever_is_killed_and_whatever_one_sends(tmp_path, flower):
    """Killed are a node while it trains, then the ServerApp, and the SuperLink when the round was taken up again.

    Two of the nodes have resident workers, and lists of the server's keys. Then these take part in another federation,
    whose server has another key, and in which three others send what is well addressed and no update.
    """
    whole, app, cache, hostile = tmp_path / "whole", tmp_path / "teams", tmp_path / "cache", tmp_path / "hostile"
    whole.mkdir()
    run_teams(whole, rounds=1)
    federation = yaml.safe_load((whole / "federation.yaml").read_text())
    federation["clients"]["mallory"] = 6
    (hostile / "mallory" / "1").mkdir(parents=True)
    (hostile / "mallory" / "1" / MANIFEST_NAME).write_text("{}")
    (hostile / "mallory" / "1" / "more").write_bytes(bytes(12_000_000))
    old, new = (new_key(tmp_path / f"{name}.pem", "server") for name in ("old", "new"))
    known = {team: tmp_path / f"{team}-knows.json" for team in ("blue", "red")}
    make_app(app, tmp_path, federation, tmp_path / "old.pem")
    run, processes = app / "run", flower(trace=TRACED)
    large = Prepared(processes, hostile, ["mallory"])

    def joins(team, **settings):
        own = whole / "run" / "clients" / team
        data = {"data": own / "train.jsonl", "eval-data": own / "held_out.jsonl", "cache": cache}
        processes.supernode(team, **data | settings)

    workers = {team: processes.worker(team) for team in known}
    processes.superlink()
    processes.superexec()
    for team, listed in known.items():
        allow(listed, old)
        joins(team, worker=workers[team], **{"server-key": listed})
    joins("green", **{"server-key": old.split()[2]})
    large.start()
    try:
        processes.until(lambda: all(map(processes.is_ready, workers)))
        processes.run(app)
        processes.until(lambda: list(cache.glob("clients/*/green/0001/adapter")))
        words = processes.command_lines("green")
        started = processes.kill("green")
        assert "flwr-clientapp" in words
        processes.until(lambda: all(map(gone, started)), 30)
        processes.until(lambda: events(run, "validated"))
        processes.server_app().kill()
        processes.until(lambda: processes.server_app() is None)
        assert not events(run, "committed")
        joins("green", **{"server-key": old.split()[2]})
        processes.run(app)
        processes.until(lambda: (tmp_path / "green.log").read_text().count("begun") == 2)
        processes.kill("superlink")
        processes.superlink()
        processes.until((run / "summary.json").exists)
    finally:
        large.end()
    assert adapter_digests(run) == adapter_digests(whole / "run")
    assert len(adapter_digests(run)) == 2
    assert not [entry for entry in events(run, "validated") if not entry["accepted"]]
    [failed] = events(run, "failed", "abandoned")
    assert failed["client"] == "mallory"
    assert re.search("its message has 120000[0-9]{2} bytes of files; expected", failed["reason"])
    assert len(list((cache / "packages").glob("[0-9a-f]*"))) == 1
    over = "the federation is over after round 1"
    processes.until(lambda: all(over in (tmp_path / f"{team}.log").read_text() for team in workers))
    assert "round 1: the update counts" in (tmp_path / "blue.log").read_text()
    assert "no worker" not in (tmp_path / "blue.log").read_text()

    refusals = make_hostile(hostile, whole / "run", load_federation(whole / "federation.yaml").lora)
    senders = sorted({name for _, name in refusals})
    others = federation | {
        "clients": dict.fromkeys(("blue", "red", *senders), 6),
        "rounds": 2,
        "min_updates": 1,
        "codec": "fp32",
    }
    make_app(tmp_path / "others", tmp_path, others, tmp_path / "new.pem")
    run, sending = tmp_path / "others" / "run", Prepared(processes, hostile, senders)
    allow(known["blue"], new)
    sending.start()
    try:
        processes.run(tmp_path / "others")
        processes.until(lambda: "red" in {entry["client"] for entry in events(run, "failed")})
        # The nodes go on, and read their lists anew for the next round's order.
        allow(known["red"], new)
        revoke(known["blue"], "server", fingerprint(old.split()[2]))
        processes.until((run / "summary.json").exists)
    finally:
        sending.end()
    accepted = {(entry["round"], entry["client"]) for entry in events(run, "validated") if entry["accepted"]}
    assert accepted == {(1, "blue"), (2, "blue"), (2, "red")}
    assert not events(run, "abandoned")
    refused = {(entry["round"], entry["client"]): entry["reason"] for entry in events(run, "validated", "failed")}
    for who, sentence in (refusals | {(1, "red"): f"is signed with the key {fingerprint(new.split()[2])}"}).items():
        assert re.search(sentence, refused.get(who) or "nothing"), (who, refused, processes.logs())
    if TRACED:
        processes.end()
        traces = "".join(path.read_text() for path in tmp_path.glob("*.trace"))
        connected = re.findall(r"sa_family=AF_INET6?, [^}]*", traces)
        assert connected
        assert [line for line in connected if "127.0.0.1" not in line and '"::1"' not in line] == []


NO_CADDY = pytest.mark.skipif(not (BIN / "caddy").exists(), reason="needs caddyserver of requirements-flower.txt")
NO_NGINX = pytest.mark.skipif(not NGINX, reason="needs nginx, such as Debian's nginx-light")


@pytest.mark.parametrize("proxy", [pytest.param("caddy", marks=NO_CADDY), pytest.param("nginx", marks=NO_NGINX)])
def test_a_proxy_keeps_the_control_interface_from_clients_and_passes_nodes(tmp_path, flower, proxy):
    processes = flower(authenticated=True)
    processes.superlink()
    processes.gate(proxy)
    ca = ("--root-certificates", processes.tls / "ca.pem")
    key = make_node_key(tmp_path / "key")
    app = tmp_path / "app"
    assert main(["flower", "init", str(app), "--store", str(tmp_path / "packages")]) == 0
    for words in (
        ("run", app, "gated"),
        ("supernode", "register", key.with_suffix(".pub"), "gated", "--name", "eve"),
        ("list", "gated"),
    ):
        refused = processes.attempt(*words)
        assert refused.returncode != 0, words
        assert "403" in refused.stdout + refused.stderr, words
    known = ssl.create_default_context(cafile=processes.tls / "ca.pem")

    def status(port, path):
        """To a request of this path as it is: httpx would make another of one with dots."""
        with closing(http.client.HTTPSConnection("127.0.0.1", port, context=known)) as connection:
            connection.request("POST", path, headers={"Content-Type": "application/protobuf"})
            return connection.getresponse().status

    assert status(processes.port, "/v1/control/list-runs") == 200
    assert status(processes.gate_port, "/v1/fleet/pull-messages") == 401  # by the SuperLink, which wants a node's key
    for path in (
        "/",
        "/v1/runtime/x",
        "/v1/control/list-runs",
        "/v1/control/list-runs?/v1/fleet/",
        "/v1//control/list-runs",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
    ):
        assert status(processes.gate_port, path) == 403, path
    for path in (  # passed as they are, and nothing is there
        "/v1/control/list-runs/../../fleet/x",
        "/v1/control/list-runs%3f/../../fleet/x",
        "/v1/fleet/%252e%252e/control/list-runs",
    ):
        assert status(processes.gate_port, path) == 404, path
    assert json.loads(processes.command("list", "test", "--format", "json"))["runs"] == []
    processes.command("supernode", "register", key.with_suffix(".pub"), "test", "--name", "known")
    processes.supernode("known", *ca, "--auth-supernode-private-key", key, port=processes.gate_port)
    processes.until(lambda: "SuperNode ID" in (tmp_path / "known.log").read_text())


def test_no_node_is_let_in_without_its_key_nor_connects_without_the_superlink_s(tmp_path, flower):
    processes = flower(authenticated=True)
    processes.superlink()
    (tmp_path / "others").mkdir()
    other = make_certificates(tmp_path / "others" / "tls")
    ca = ("--root-certificates", processes.tls / "ca.pem")
    known, unknown = make_node_key(tmp_path / "known"), make_node_key(tmp_path / "unknown")
    refused = {
        "wrong-ca": ("--root-certificates", other / "ca.pem", "--auth-supernode-private-key", known),
        "no-key": ca,
        "other-key": (*ca, "--auth-supernode-private-key", unknown),
        "plaintext": ("--insecure",),
    }
    for name, words in refused.items():
        processes.supernode(name, *words, "--max-retries", 1)
    processes.command("supernode", "register", known.with_suffix(".pub"), "test", "--name", "known")
    processes.supernode("known", *ca, "--auth-supernode-private-key", known)
    said = {name: (tmp_path / f"{name}.log").read_text for name in ("known", *refused)}
    processes.until(lambda: "SuperNode ID" in said["known"]())
    for name in refused:
        process = processes.processes[name]
        processes.until(lambda process=process: process.poll() is not None)
        assert process.returncode != 0, said[name]()
        assert "SuperNode ID" not in said[name]()
    assert "CERTIFICATE_VERIFY_FAILED" in said["wrong-ca"]()
