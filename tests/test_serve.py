"""A federation over a store: the bytes of a federation in one process, whoever is killed and whatever is sent."""

import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from federation import LORA, TEAMS, adapter_digests, events, make_update, run_teams
from served import CLIENTS, Server, make_home
from test_store import objects

from hf_fedlarge.admission import RefusalDocument, refusal
from hf_fedlarge.artifacts import (
    CARRY_WEIGHTS,
    MANIFEST_NAME,
    SERVER_FILES,
    UNPUBLISHED_FILES,
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from hf_fedlarge.cli import main
from hf_fedlarge.clients import HELD_OUT, write_check_ins
from hf_fedlarge.config import LoraSettings, load_federation
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError, OutputError, StoreError, UpdateRefusedError
from hf_fedlarge.experience import late_updates
from hf_fedlarge.keys import allow, new_key, read_key, revoke
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.memory import used_bytes
from hf_fedlarge.orders import (
    CHECK_INS,
    FAILED,
    INBOX,
    ORDER,
    VERDICTS,
    CheckInDocument,
    FailureDocument,
    OrderDocument,
    TrainingOrder,
    VerdictDocument,
    Work,
    describe_client,
    inbox,
    read_document,
    verdict,
    write_document,
)
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.retention import clear, discard
from hf_fedlarge.rounds import run_federation
from hf_fedlarge.serve import StoreClients, serve_federation
from hf_fedlarge.server import RoundServer
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.join import join
from hf_fedlarge.trainers.launch import LAUNCHERS
from hf_fedlarge.voice import signed

# A whole federation, in processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A federation's file, and its run with simulated clients."""
    home = tmp_path_factory.mktemp("whole")
    run_teams(home)
    return home


def command(words, log):
    """In a process of its own: one command, with its output in a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    sys.exit(main([str(word) for word in words]))


class Processes:
    """Commands in processes that don't import everything anew, ended with the test."""

    def __init__(self, home):
        self.home, self.started = home, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hf_fedlarge.serve", "hf_fedlarge.trainers.join"])

    def start(self, name, *words):
        return self.of(command, words, self.home / f"{name}.log")

    def of(self, target, *arguments):
        process = self.context.Process(target=target, args=arguments)
        process.start()
        self.started.append(process)
        return process

    def end(self):
        for process in self.started:
            if process.is_alive():
                process.kill()
            process.join()

    def logs(self):
        return "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(self.home.glob("*.log")))


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.end()


def until(true, processes, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, processes.logs()
        time.sleep(0.05)


def test_processes_that_share_a_directory_end_with_the_bytes_of_one_process_whoever_is_killed(
    whole, tmp_path, processes
):
    """The clients sign, which changes no bytes of an adapter."""
    run, store, cache, allowed = (tmp_path / name for name in ("run", "store", "cache", "allowed.json"))
    for team in TEAMS:
        allow(allowed, new_key(tmp_path / f"{team}.pem", team))
    federation = yaml.safe_load((whole / "federation.yaml").read_text()) | {"keys": str(allowed)}
    (tmp_path / "signed.yaml").write_text(yaml.safe_dump(federation))

    def serve():
        words = ["serve", tmp_path / "signed.yaml", "--output", run, "--store", store, "--poll", 0.1, "--no-stop"]
        return processes.start("server", *words)

    def joins(team):
        own = whole / "run" / "clients" / team
        words = ["--data", own / "train.jsonl", "--eval-data", own / "held_out.jsonl", "--cache", cache, "--poll", 0.1]
        return processes.start(team, "join", store, "--client", team, "--key", tmp_path / f"{team}.pem", *words)

    server, blue, green = serve(), joins("blue"), joins("green")
    until((store / ORDER).exists, processes)  # before which a server forgets who checked in
    # Someone who is only there, so that the round can't end before the server is killed.
    write_document(Store(str(store)), f"{CHECK_INS}/red.json", CheckInDocument(client="red", examples=6))
    until(lambda: list(cache.glob("clients/*/green/0001/adapter")), processes)
    green.kill()
    green.join()
    until(lambda: events(run, "validated"), processes)
    server.kill()
    server.join()
    assert not events(run, "committed")
    green, red, server = joins("green"), joins("red"), serve()
    for process in (server, blue, green, red):
        process.join(240)
        assert process.exitcode == 0, processes.logs()
    assert adapter_digests(run) == adapter_digests(whole / "run")
    assert len(adapter_digests(run)) == 3
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, whole / "run")]
    said = [tuple(summary[key] for key in ("simulated", "data", "eval_data")) for summary in summaries]
    assert said == [(False, None, "public.jsonl"), (True, "data.jsonl", "public.jsonl")]
    assert not [entry for entry in events(run, "validated") if not entry["accepted"]]
    assert len(list((cache / "packages").glob("[0-9a-f]*"))) == 1
    assert {path.name for path in store.iterdir()} == {
        *("artifacts", "check_ins", "inbox", "objects", "order.json", "verdicts")
    }
    assert not list((store / "inbox").iterdir())
    for team in TEAMS:
        log = (tmp_path / f"{team}.log").read_text()
        assert [log.count(f"round {number}: the update counts") for number in (1, 2)] == [1, 1], log
    over = read_document(Store(str(store)), ORDER, OrderDocument)
    assert (over.state, over.adapter) == ("over", adapter_digests(run)[-1])


def test_serving_needs_public_examples_and_a_store_of_its_own(whole, tmp_path, capsys):
    raw = yaml.safe_load((whole / "federation.yaml").read_text())

    def serve(**changes):
        (tmp_path / "federation.yaml").write_text(yaml.safe_dump(raw | changes))
        store = ["--store", tmp_path / "store"]
        assert main([str(word) for word in ("serve", tmp_path / "federation.yaml", *store)]) == 2
        return capsys.readouterr().err

    assert "has no eval_data" in serve(eval_data=None)
    assert "can't be ordered of clients: hub_token" in serve(training={"hub_token": "x"})
    assert "can't be ordered of clients: max_steps" in serve(training={"max_steps": 10**7})
    bare = shutil.copytree(raw["checkpoint"], tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    chats = {"checkpoint": str(bare), "eval_data": str(tmp_path / "chats.jsonl")}
    assert "the model's tokenizer has no chat template; take" in serve(**chats)
    write_document(Store(str(tmp_path / "store")), ORDER, OrderDocument(run="0" * 32, state="open", round=3, attempt=1))
    assert "serves another federation, whose order.json is for its round 3" in serve()
    with pytest.raises(ConfigError, match="was begun with simulated clients"):
        serve_federation(load_federation(whole / "federation.yaml"), whole / "run", str(tmp_path / "other"))
    assert not (tmp_path / "run" / "federation.json").exists()


# The server's side, with updates that were made beforehand


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter to start from, and the updates of four clients."""
    path = tmp_path_factory.mktemp("serve")
    make_home(path)
    return path


def reseal(package):
    manifest = read_manifest(package, PackageManifest)
    write_manifest(package, manifest.model_copy(update={"files": describe_files(package)}))


@pytest.fixture
def store():
    return Store(f"memory://{uuid.uuid4().hex}")


def send(home, store, client, attempt=1):
    store.send(home / client, inbox(1, client, attempt))


def test_an_order_names_what_is_asked_and_is_closed_afterwards(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, training={"max_steps": 3}, codec="int8", deadline_seconds=60)
    order = server.open()
    seen = []

    def asked(client):
        seen.append(client)

    answers = server.clients.answers(server.jobs, server.round, order, asked)
    send(home, store, "ann")
    next(answers)
    assert seen == list(CLIENTS)
    document = read_document(store, ORDER, OrderDocument)
    work = document.work_of("ben")
    assert document.is_open
    assert document.training == TrainingOrder(max_steps=3)
    assert 50 < document.closes_at - time.time() < 60
    assert work.adapter == read_manifest(home / "start", AdapterManifest).digest
    store.get(work.package, tmp_path / "package", PackageManifest, most_bytes=work.package_bytes)
    store.get(work.adapter, tmp_path / "adapter", AdapterManifest, most_bytes=work.adapter_bytes)
    assert document.work_of("eve") is None


def test_who_never_answers_is_waited_for_until_the_deadline(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, deadline_seconds=1.0, min_updates=2)
    server.open()
    for client in ("ann", "cleo"):
        send(home, store, client)
    server.ask()
    assert read_document(store, ORDER, OrderDocument).state == "closed"
    record = server.close()
    assert record["refused"] == []
    contributions = read_manifest(server.adapter(1), AdapterManifest).contributions
    assert [entry.client for entry in contributions] == ["ann", "cleo"]


def test_without_a_deadline_who_never_answers_is_waited_for_until_a_server_is_started_with_one(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, min_updates=2)
    server.open()
    for client in ("ann", "cleo"):
        send(home, store, client)
    server.clients.patience.seconds = 0.05
    for _ in range(2):
        with pytest.raises(StoreError, match=r"for ben, dan, and there is no deadline_seconds \(give one, or take who"):
            server.ask()
    server = Server(home, tmp_path / "run", store, min_updates=2, deadline_seconds=1.0)
    server.open()
    server.ask()
    assert server.close()["refused"] == []
    contributions = read_manifest(server.adapter(1), AdapterManifest).contributions
    assert [entry.client for entry in contributions] == ["ann", "cleo"]


@pytest.mark.parametrize("least", [2, 3])
def test_who_is_taken_out_of_the_file_is_no_longer_waited_for(home, store, tmp_path, least):
    server = Server(home, tmp_path / "run", store, min_updates=least)
    order = server.open()
    server.clients.patience.seconds = 0.05
    with pytest.raises(StoreError, match="Waited"):
        server.ask()
    for client in ("ann", "cleo"):
        send(home, store, client)
    left = {"ann": 10, "ben": 10, "cleo": 10}
    for _ in range(2):  # killed, and started again with the same
        server = Server(home, tmp_path / "run", store, clients=left, min_updates=least)
        assert server.open() == order
        server.clients.patience.seconds = 0.05
        with pytest.raises(StoreError, match="for ben, and there is no"):
            server.ask()
        assert read_document(store, ORDER, OrderDocument).work_of("dan") is None
    send(home, store, "dan")
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "cleo": 10, "dan": 10}, min_updates=least)
    server.open()
    server.ask()
    gone = [f"{client} is no longer among the federation's clients" for client in ("dan", "ben")]
    assert [entry["reason"] for entry in server.journal.find("failed")] == gone
    assert read_document(store, verdict(1, "ben", 1), VerdictDocument).cause == gone[1]
    assert set(server.round.accepted) == {"ann", "cleo"}
    if least == 2:
        assert [entry["reason"] for entry in server.close()["refused"]] == gone
        return
    with pytest.raises(UpdateRefusedError, match=r"at least 3 are needed\. dan is no longer among"):
        server.close()
    write_check_ins(server.run, [CheckIn(client, 10) for client in ("ann", "cleo", "dan")])
    server.jobs.read_check_ins()
    again = server.open()
    assert (again.attempt, server.round.waiting(again)) == (2, ["dan"])


def test_a_client_without_the_memory_to_train_says_so_and_nobody_waits_for_it(home, store, member, tmp_path):
    """It is taken, for a package may be trained on with less memory than it has bytes."""
    server = Server(home, tmp_path / "run", store, clients={"ann": 12})
    client = threading.Thread(target=member, args=(LAUNCHERS["inprocess"](),), kwargs={"memory_budget": "1MB"})
    client.start()
    round_server = RoundServer(server.run / "rounds", 1, server.journal, server.config, server.validate)
    server.clients.check_in(server.jobs, round_server)
    assert server.jobs.check_ins == {"ann": CheckIn("ann", 12, 10**6)}
    server.open()
    server.ask()
    client.join(60)
    assert not client.is_alive()
    [refused] = server.round.refused
    assert re.match(r"The memory budget of 1 MB is too small: .* give at least \d+ MB", refused["reason"])


def test_a_round_ends_with_as_many_as_it_wants(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, cohort=2, over_select=1.0)
    server.open()
    for client in CLIENTS[:3]:
        send(home, store, client)
    server.ask()
    assert len(server.round.accepted) == 2


def test_what_is_malformed_is_refused_by_name_and_the_others_count(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, deadline_seconds=30)
    server.open()
    place = {client: inbox(1, client, 1) for client in CLIENTS}
    send(home, store, "ann")
    # A file that is not what the manifest says, one too large, an update that is somebody else's, and a failure.
    weights = "adapter_model.safetensors"
    content = bytearray((home / "ben" / weights).read_bytes())
    content[-1] ^= 1
    for name in ("adapter_config.json", MANIFEST_NAME):
        store.write(f"{place['ben']}/{name}", (home / "ben" / name).read_bytes())
    store.write(f"{place['ben']}/{weights}", bytes(content))
    manifest = json.loads((home / "cleo" / MANIFEST_NAME).read_text())
    manifest["files"][weights]["size"] = 10**9
    store.write(f"{place['cleo']}/{MANIFEST_NAME}", json.dumps(manifest).encode())
    write_document(store, f"{place['dan']}/{FAILED}", FailureDocument(reason="the battery is empty"))
    server.ask()
    reasons = {refused["client"]: refused["reason"] for refused in server.round.refused}
    assert set(server.round.accepted) == {"ann"}
    assert "has the SHA-256" in reasons["ben"]
    assert "lists 10000" in reasons["cleo"]
    assert reasons["dan"] == "the battery is empty"
    assert {path.name for path in server.round.work.iterdir() if not path.name.startswith(".")} == {"ann"}
    verdicts = {client: read_document(store, verdict(1, client, 1), VerdictDocument) for client in CLIENTS}
    assert verdicts["ann"].sentence == "round 1: the update counts"
    assert re.match("round 1: the server says: ben refused: .* has the SHA-256", verdicts["ben"].sentence)
    for client in CLIENTS:
        content = store.read(verdict(1, client, 1), 10**4).decode()
        assert not [other for other in CLIENTS if other != client and re.search(rf"\b{other}\b", content)]
        assert str(tmp_path) not in content
        assert store.url not in content


def test_an_update_signed_by_another_does_not_count(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10}, deadline_seconds=30)
    write_check_ins(server.run, [CheckIn("ann", 10), CheckIn("ben", 10)])
    server.open()
    send(home, store, "ann")
    store.send(home / "ann", inbox(1, "ben", 1))
    server.ask()
    assert "in the name of ann; expected ben" in server.round.refused[0]["reason"]


def cheat(home, tmp_path, adapter):
    """Client → what it sends in round 2, and what the server says of that; only ann's first round was sound."""
    package = home / "package"
    second = {"adapter": adapter, "round_number": 2}
    keys = {client: tmp_path / f"{client}.pem" for client in CHEATS}

    def make(client, **how):
        make_update(tmp_path / "sent" / client, package, client, **second | {"key": keys[client]} | how)

    make("unsigned", key=None)
    make("others_key", key=keys["unsigned"])
    make("revoked")
    make("stale", round_number=1, adapter=home / "start")
    make("wrong_base", adapter=home / "start")
    make("replayed")
    shutil.rmtree(tmp_path / "sent" / "replayed")
    shutil.copytree(tmp_path / "first", tmp_path / "sent" / "replayed")
    make("anothers")
    shutil.rmtree(tmp_path / "sent" / "anothers")
    make("unsigned_too")
    shutil.copytree(tmp_path / "sent" / "unsigned_too", tmp_path / "sent" / "anothers")
    edit_manifest(tmp_path / "sent" / "unsigned_too", tokens=99)
    make("greedy", examples=10**9)
    make("honest")


CHEATS = {
    "unsigned": "it has no signature.json",
    "others_key": "which is not one of others_key's",
    "revoked": "which is revoked since",
    "stale": "it is for round 1; expected round 2",
    "wrong_base": "it started from the adapter",
    "replayed": "it is for round 1; expected round 2",
    "anothers": "its update is in the name of unsigned_too; expected anothers",
    "unsigned_too": "is not of this manifest",
    "greedy": "it claims 1000000000 examples",
    "honest": None,
}


def edit_manifest(update, **changes):
    path = update / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_in_a_served_round_who_cheats_learns_why_it_does_not_count_and_the_others_do(home, store, tmp_path):
    allowed = tmp_path / "allowed.json"
    for client in CHEATS:
        allow(allowed, new_key(tmp_path / f"{client}.pem", client))
    changes = {"clients": dict.fromkeys(CHEATS, 10), "keys": str(allowed), "deadline_seconds": 60, "cohort": None}
    server = Server(home, tmp_path / "run", store, **changes)
    write_check_ins(server.run, [CheckIn("replayed", 10)])
    server.open()
    key = tmp_path / "replayed.pem"
    make_update(tmp_path / "first", home / "package", "replayed", adapter=home / "start", key=key)
    store.send(tmp_path / "first", inbox(1, "replayed", 1))
    server.ask()
    server.close()
    revoke(allowed, "revoked")
    write_check_ins(server.run, [CheckIn(client, 10) for client in CHEATS])
    server.jobs.read_check_ins()
    server.open(2)
    cheat(home, tmp_path, server.adapter(1))
    for client in CHEATS:
        store.send(tmp_path / "sent" / client, inbox(2, client, 1))
    server.ask()
    for client, cause in CHEATS.items():
        said = read_document(store, verdict(2, client, 1), VerdictDocument)
        assert re.search(f"{client} refused: .*{cause}", said.cause) if cause else said.cause is None, said
    server.close()
    contributions = read_manifest(server.adapter(2), AdapterManifest).contributions
    assert [(entry.client, entry.weight) for entry in contributions] == [("honest", 1.0)]


def test_of_eight_that_send_at_once_under_one_name_at_most_one_counts(home, tmp_path):
    """One place takes all eight: what comes of them is one of them, or a mixture that its manifest doesn't fit."""
    store = Store(str(tmp_path / "store"))
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10}, deadline_seconds=60)
    write_check_ins(server.run, [CheckIn("ann", 10), CheckIn("ben", 10)])
    server.open()
    for seed in range(8):
        make_update(tmp_path / f"{seed}", home / "package", "ann", seed=seed, adapter=home / "start")
    sound = {read_manifest(tmp_path / f"{seed}", UpdateManifest).digest for seed in range(8)}
    began = threading.Barrier(9)

    def send_one(seed):
        began.wait(30)
        with suppress(StoreError):  # another one's file was renamed meanwhile
            Store(store.url).send(tmp_path / f"{seed}", inbox(1, "ann", 1))

    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(send_one, seed) for seed in range(8)]
        began.wait(30)
        send(home, store, "ben")
        server.ask()
        for each in sent:
            each.result()
    entries = server.journal.find("validated", client="ann") + server.journal.find("failed", client="ann")
    assert len(entries) == 1
    cause = read_document(store, verdict(1, "ann", 1), VerdictDocument).cause
    if entries[0].get("accepted"):
        assert cause is None
        assert server.round.accepted["ann"] in sound
    else:
        assert re.search("ann refused: .*(bytes; its manifest says|has the SHA-256|is not JSON)", cause)
    assert "ben" in server.round.accepted


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see a process's own memory")
def test_the_memory_that_updates_take_does_not_grow_with_their_number(home, tmp_path):
    """`scripts/bench/serve_load.py` does the same with 64 clients and 20 MB each."""
    wide, peaks = LoraSettings(rank=460, alpha=8.0), {}
    names = [f"c{number}" for number in range(16)]
    of_wide = tmp_path / "home"
    of_wide.mkdir()
    (of_wide / "package").symlink_to(home / "package")
    shutil.copyfile(home / "data.jsonl", of_wide / "data.jsonl")
    start_adapter(home / "package", of_wide / "start", wide, seed=0)
    for seed, name in enumerate(names):
        make_update(tmp_path / name, home / "package", name, lora=wide, adapter=of_wide / "start", seed=seed)
    size = read_manifest(tmp_path / "c0", UpdateManifest).total_bytes
    assert size > 4.5e6
    for count in (2, 16):
        store = Store(str(tmp_path / f"store{count}"))
        clients = dict.fromkeys(names[:count], 10)
        server = Server(of_wide, tmp_path / f"run{count}", store, clients=clients)
        write_check_ins(server.run, [CheckIn(name, 10) for name in clients])
        server.open()
        before, over = used_bytes(torch.device("cpu")), threading.Event()
        peaks[count] = 0

        def look(count=count, before=before, over=over):
            while not over.wait(0.005):
                peaks[count] = max(peaks[count], used_bytes(torch.device("cpu")) - before)

        looking = threading.Thread(target=look)
        looking.start()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda name, to=store: to.send(tmp_path / name, inbox(1, name, 1)), clients))
            server.ask()
        over.set()
        looking.join()
        assert set(server.round.accepted) == set(clients)
    assert peaks[16] < max(peaks[2], size) + 4 * size, peaks  # of the 16 · size that they have together


def test_a_store_that_fails_for_a_while_is_tried_again(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10}, deadline_seconds=30)
    write_check_ins(server.run, [CheckIn("ann", 10)])
    server.open()
    send(home, store, "ann")
    names, fetch, failures = Store.names, Store.fetch, []

    def failing(plain):
        def wrapper(self, *arguments, **options):
            if failures.count(plain) < 2:
                failures.append(plain)
                raise StoreError("the line is dead")
            return plain(self, *arguments, **options)

        return wrapper

    monkeypatch.setattr(Store, "names", failing(names))
    monkeypatch.setattr(Store, "fetch", failing(fetch))
    server.ask()
    assert set(server.round.accepted) == {"ann"}
    assert len(failures) == 4
    assert server.said.count("the line is dead") == 1


def test_what_the_server_writes_is_tried_again_and_the_deadline_counts_from_when_it_is_there(
    home, store, tmp_path, monkeypatch
):
    """The package, the order, its closing, the verdict, the last adapter and the end: each fails for a while."""
    # Less than the store is away for.
    server = Server(home, tmp_path / "run", store, clients={"ann": 10}, deadline_seconds=0.2)
    write_check_ins(server.run, [CheckIn("ann", 10)])
    server.open()
    failures, plain = {}, {name: getattr(Store, name) for name in ("write", "put")}

    def failing(name):
        def wrapper(self, *arguments, **options):
            state = json.loads(arguments[1]).get("state", "verdict") if name == "write" else name
            failures[state] = failures.get(state, 0) + 1
            if failures[state] <= 15:
                raise StoreError(f"the line is dead for {state}.")
            if state == "open":
                send(home, store, "ann")
            return plain[name](self, *arguments, **options)

        return wrapper

    for name in plain:
        monkeypatch.setattr(Store, name, failing(name))
    server.ask()
    assert set(server.round.accepted) == {"ann"}
    server.clients.end(server.adapter(0))
    assert read_document(store, ORDER, OrderDocument).state == "over"
    assert failures.keys() == {"put", "open", "verdict", "closed", "over"}
    for state in failures.keys() - {"verdict"}:
        assert server.said.count(f"the line is dead for {state}. Trying again.") == 1


def test_the_deadline_does_not_run_while_the_package_is_on_its_way(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10}, deadline_seconds=0.2)
    write_check_ins(server.run, [CheckIn("ann", 10)])
    server.open()
    put, write, left = Store.put, Store.write, []

    def slow(self, *arguments, **options):
        time.sleep(0.15)  # for the package, and again for the adapter
        return put(self, *arguments, **options)

    def writing(self, path, content):
        write(self, path, content)
        if json.loads(content).get("state") == "open":
            left.append(json.loads(content)["closes_at"] - time.time())
            send(home, store, "ann")

    monkeypatch.setattr(Store, "put", slow)
    monkeypatch.setattr(Store, "write", writing)
    server.ask()
    assert 0 < left[0] <= 0.2
    assert set(server.round.accepted) == {"ann"}


def test_what_came_in_the_last_moment_before_the_deadline_counts(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store, deadline_seconds=30)
    server.open()

    def wait(*_):
        send(home, store, "ann")
        server.round.begin_wait(-1)

    monkeypatch.setattr(server.clients.patience, "wait", wait)
    server.ask()
    assert set(server.round.accepted) == {"ann"}


def test_what_is_fetched_when_the_deadline_passes_and_what_waits_for_that_count(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store, deadline_seconds=30)
    server.open()
    for client in CLIENTS[:3]:
        send(home, store, client)
    fetch = Store.fetch

    def slow(*arguments, **options):
        server.round.begin_wait(-1)
        return fetch(*arguments, **options)

    monkeypatch.setattr(Store, "fetch", slow)
    server.ask()
    assert set(server.round.accepted) == set(CLIENTS[:3])
    assert server.round.refused == []


def test_a_store_that_cannot_be_written_is_given_up_when_patience_ends(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store)
    server.open()
    server.clients.patience.seconds = 0.1
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(StoreError("the line is dead.")))
    with pytest.raises(StoreError, match="the line is dead"):
        server.ask()
    assert "the line is dead. Trying again." in server.said


def test_a_late_update_is_kept_for_the_next_round_where_the_policy_says_so(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, deadline_seconds=0.5, late="buffer")
    server.open()
    send(home, store, "ann")
    server.ask()
    server.close()
    send(home, store, "ben")
    server.open(2)
    server.ask()
    assert any("ben came after round 1 was closed" in line for line in server.said)
    make_update(tmp_path / "two", home / "package", "ann", seed=9, adapter=server.adapter(1), round_number=2)
    assert late_updates(server.journal, 2, server.round.accepted) == [[1, "ben"]]
    # In the next round the inbox of the first is cleared.
    clear(store, INBOX, 2)
    assert store.names("inbox") == []


def test_a_late_update_is_kept_as_its_round_was_begun_though_the_next_one_refuses_them(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, deadline_seconds=0.3, late="buffer")
    server.open()
    send(home, store, "ann")
    server.ask()
    server.close()
    send(home, store, "ben")
    server = Server(home, tmp_path / "run", store, deadline_seconds=0.2)
    server.open(2)
    server.ask()
    assert late_updates(server.journal, 2, server.round.accepted) == [[1, "ben"]]
    assert server.round.earlier(3).keeping is None


def test_the_store_keeps_what_the_last_two_rounds_start_from_and_a_restarted_server_needs_nothing_else(
    home, store, tmp_path
):
    shutil.copytree(home / "package", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"another": True}))
    reseal(tmp_path / "other")
    elsewhere = store.put(tmp_path / "other")  # of a federation that was here before
    server = Server(home, tmp_path / "run", store, clients={"ann": 10}, aggregator="fedavg")
    write_check_ins(server.run, [CheckIn("ann", 10)])
    for number in range(1, 5):
        server.open(number)
        previous = server.adapter(number - 1)
        update = tmp_path / f"{number}"
        make_update(update, home / "package", "ann", seed=number, adapter=previous, round_number=number)
        store.send(update, inbox(number, "ann", 1))
        if number == 3:  # killed, and started again with an open round and a store that lost what it needs
            store.remove("artifacts")
            store.remove("objects")
            store.put(tmp_path / "other")
            store.put(server.adapter(0))  # as if the server had been killed before it removed it
            server = Server(home, tmp_path / "run", store, clients={"ann": 10}, aggregator="fedavg")
            server.open(number)
        server.ask()
        server.close()
        expected = [server.adapter(past) for past in range(max(0, number - 2), number)]
        digests = {read_manifest(path, AdapterManifest).digest for path in expected}
        if number == 3:
            digests.remove(read_manifest(server.adapter(1), AdapterManifest).digest)  # which the store had lost
        package = read_manifest(home / "package", PackageManifest).digest
        assert set(store.names("artifacts")) == {f"{digest}.json" for digest in digests | {package, elsewhere}}
        for digest in digests:
            store.get(digest, tmp_path / "got" / digest, AdapterManifest, leave_out=SERVER_FILES)
        for digest in (package, elsewhere):
            store.get(digest, tmp_path / f"got{number}" / digest, PackageManifest)
        assert store.names(VERDICTS) == [f"{past:04d}" for past in range(max(1, number - 1), number + 1)]
    wanted = {sha256 for digest in digests | {package, elsewhere} for sha256 in files_of(store, digest)}
    there = {path.rpartition("/")[2] for path in store.fs.find(f"{store._root}/objects")}
    assert there == wanted


def test_a_store_whose_manifests_can_not_be_read_keeps_its_files_and_ends_nothing(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store)
    old = store.put(server.adapter(0), leave_out=SERVER_FILES)
    store.write("artifacts/other.json", b"{")
    server.clients._forget(3)
    assert re.search("stays in the store: .*other.json is not JSON", server.said[0])
    assert f"{old}.json" in store.names("artifacts")


def files_of(store, digest):
    return [entry["sha256"] for entry in json.loads(store.read(f"artifacts/{digest}.json", 10**6))["files"].values()]


def test_a_client_whose_adapter_is_gone_says_so_and_takes_the_next_order(home, store, published, member, tmp_path):
    start_adapter(home / "package", tmp_path / "old", LORA, seed=5)
    old = store.put(tmp_path / "old", leave_out=SERVER_FILES)
    published(adapter=old)
    fetched = Store._download

    def removed_meanwhile(self, path, entry, target):
        if read_manifest(tmp_path / "old", AdapterManifest).files["adapter_model.safetensors"] == entry:
            discard(Store(store.url), read_manifest(tmp_path / "old", AdapterManifest))
            published(round=4)
        return fetched(self, path, entry, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Store, "_download", removed_meanwhile)
        member()
    assert [job.round for job in member.jobs] == [4]
    [line] = [line for line in member.said if "it was removed with an old round" in line]
    assert line.endswith("Trying again.")


def test_who_may_check_in(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10, "cleo": 10}, deadline_seconds=0.3)
    for client, examples in {"ann": 7, "ben": 11, "eve": 1}.items():
        write_document(store, f"{CHECK_INS}/{client}.json", CheckInDocument(client=client, examples=examples))
    write_document(store, f"{CHECK_INS}/cleo.json", CheckInDocument(client="ann", examples=1))
    store.write(f"{CHECK_INS}/.json", b"{")
    round_server = RoundServer(server.run / "rounds", 1, server.journal, server.config, server.validate)
    server.clients.check_in(server.jobs, round_server)
    assert server.jobs.check_ins == {"ann": CheckIn("ann", 7)}
    said = "\n".join(server.said)
    assert "'ben' can't take part: it says 11 examples; expected 10 at most" in said
    assert "'eve' can't take part: it is not among the federation's clients" in said
    assert "'cleo' can't take part: it says that it is ann" in said
    assert server.said.count(server.said[0]) == 1
    assert store.names(f"{VERDICTS}/{CHECK_INS}") == ["ben", "cleo", "eve"]
    note = read_document(store, refusal("ben"), RefusalDocument)
    assert note.sentence == "the server says: ben can't take part: it says 11 examples; expected 10 at most"
    assert note.is_about(server.clients._id, CheckInDocument(client="ben", examples=11))
    assert not note.is_about(server.clients._id, CheckInDocument(client="ben", examples=10))
    assert not note.is_about("0" * 32, CheckInDocument(client="ben", examples=11))
    # Who mends it is taken, and no longer told otherwise.
    write_document(store, f"{CHECK_INS}/ben.json", CheckInDocument(client="ben", examples=10, memory_bytes=5))
    assert CheckIn("ben", 10, 5) in server.clients._admission.look(server.config.clients)
    assert store.names(f"{VERDICTS}/{CHECK_INS}/ben") == []
    # Neither is who is in the file when the server is started again.
    server.clients.prepare(server.config, server.run, lambda *examples: None)
    assert store.names(f"{VERDICTS}/{CHECK_INS}") == []
    server.clients._admission.look(server.config.clients, least_bytes=6)
    note = read_document(store, refusal("ben"), RefusalDocument)
    assert note.sentence.endswith("it says 5 bytes of memory; expected 6 at least")


def test_a_note_that_cannot_be_written_keeps_nobody_else_out(home, store, tmp_path, monkeypatch):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10})
    for client, examples in {"ann": 11, "ben": 10}.items():
        write_document(store, f"{CHECK_INS}/{client}.json", CheckInDocument(client=client, examples=examples))
    monkeypatch.setattr(Store, "write", lambda *_: (_ for _ in ()).throw(StoreError("the line is dead")))
    assert server.clients._admission.look(server.config.clients) == [CheckIn("ben", 10)]
    assert server.said[-1] == "'ann' can't be told that it can't take part: the line is dead"


def test_a_run_whose_orders_are_signed_does_not_go_on_without_a_key(home, store, tmp_path):
    new_key(tmp_path / "server.pem", "server")
    Server(home, tmp_path / "run", store, key=read_key(tmp_path / "server.pem"))
    order = store.read(ORDER, 2**20)
    with pytest.raises(ConfigError, match=r"order.json is signed, and clients that know the key .*; give --key"):
        Server(home, tmp_path / "run", store)
    assert store.read(ORDER, 2**20) == order
    Server(home, tmp_path / "run", store, key=read_key(tmp_path / "server.pem"))


@pytest.mark.parametrize("signs", [True, False])
def test_a_client_that_is_not_taken_learns_why_and_waits(home, store, member, tmp_path, signs):
    """Here the file says a row less than it has; the rows that it would hold out count, too."""
    public = new_key(tmp_path / "server.pem", "server").split()[2]
    key, known = read_key(tmp_path / "server.pem"), {"server_key": public} if signs else {}
    server = Server(home, tmp_path / "run", store, clients={"ann": 11, "ben": 10}, key=key if signs else None)
    client = threading.Thread(target=member, kwargs={"once": False, **known}, daemon=True)
    client.start()
    wait_for(lambda: store.names(CHECK_INS))
    for _ in range(2):
        server.clients._admission.look(server.config.clients)
        wait_for(lambda: any("can't take part" in line for line in member.said))
    over = OrderDocument(run=server.clients._id, state="over", round=1, attempt=0)
    write_document(store, ORDER, signed(over, key if signs else None))
    client.join(60)
    assert not client.is_alive()
    sentence = (
        "the server says: ann can't take part: it says 12 examples; expected 11 at most; waiting, as that may change"
    )
    assert [line for line in member.said if "can't" in line] == [sentence]


def test_what_others_say_of_who_may_take_part_is_not_believed(home, store, published, member, tmp_path):
    public, _ = (new_key(tmp_path / f"{name}.pem", name).split()[2] for name in ("server", "eve"))
    key, other = (read_key(tmp_path / f"{name}.pem") for name in ("server", "eve"))
    order = published(clients=["ben"])
    write_document(store, ORDER, signed(order, key))
    note = RefusalDocument(run=order.run, client="ann", cause="go home")
    write_document(store, refusal("ann"), signed(note, other))
    with pytest.raises(StoreError, match="had no new order"):
        member(server_key=public, patience=0.5)
    [line] = [line for line in member.said if "can't" in line]
    assert line.startswith("why the server can't take this client can't be read: ")
    assert "is signed with the key" in line


def test_a_federation_that_begins_takes_nothing_of_the_one_before_and_one_that_goes_on_keeps_all(home, tmp_path):
    path = tmp_path / "store"
    store = Store(str(path))
    places = [f"{CHECK_INS}/ann.json", f"{INBOX}/0001/ann/1/{FAILED}", f"{VERDICTS}/0001/ann/1.json"]

    def leave():
        for place in places:
            write_document(store, place, CheckInDocument(client="ann", examples=1))

    leave()
    for name in (CHECK_INS, INBOX):  # made by an operator, for clients that may not make them
        (path / name).chmod(0o770)
    write_document(store, ORDER, OrderDocument(run="0" * 32, state="over", round=1, attempt=0))
    Server(home, tmp_path / "run", store)
    assert [store.names(place) for place in (CHECK_INS, INBOX, VERDICTS)] == [[], [], []]
    assert [oct((path / name).stat().st_mode & 0o777) for name in (CHECK_INS, INBOX)] == ["0o770", "0o770"]
    leave()
    Server(home, tmp_path / "run", store)
    assert store.names(CHECK_INS) == ["ann.json"]


def test_a_server_that_was_killed_while_it_began_goes_on(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store)
    (server.run / HELD_OUT).unlink()  # the last that is written
    again = Server(home, tmp_path / "run", store)
    assert (server.run / HELD_OUT).read_text() == (home / "data.jsonl").read_text()
    assert again.clients._id == server.clients._id


def test_a_served_run_does_not_go_on_with_simulated_clients(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store)
    with pytest.raises(ConfigError, match="run was begun with clients that aren't simulated; go on as it was begun"):
        run_federation(server.config, server.run, None)
    assert not events(server.run)


def test_a_round_s_folder_is_open_to_whom_the_inbox_is(home, tmp_path):
    store, modes = Store(str(tmp_path / "store")), []
    server = Server(home, tmp_path / "run", store, deadline_seconds=0.1)
    (tmp_path / "store" / INBOX).mkdir(parents=True)
    (tmp_path / "store" / INBOX).chmod(0o2770)
    order, mask = server.open(), os.umask(0o027)
    try:
        for _ in server.clients.answers(server.jobs, server.round, order, modes.append):
            pass
    finally:
        os.umask(mask)
    assert modes == list(CLIENTS)
    assert oct((tmp_path / "store" / inbox(1)).stat().st_mode & 0o7777) == "0o2770"


def test_what_cannot_be_removed_is_named_and_keeps_nothing_else(home, store, monkeypatch):
    for number in (1, 2, 3):
        for client in ("ann", "ben"):
            store.write(f"{inbox(number, client, 1)}/x", b"1")
    remove = store.fs.rm

    def refusing(path, recursive):
        if path.endswith(("/0001", "/0001/ann")):
            raise PermissionError(13, "Permission denied", "ann")
        remove(path, recursive=recursive)

    monkeypatch.setattr(store.fs, "rm", refusing)
    with pytest.raises(StoreError, match=r"keeps inbox/0001/ann, of rounds that are over .*denied.* with umask 007"):
        clear(store, INBOX, 3)
    assert [store.names(inbox(number)) for number in (1, 2, 3)] == [["ann"], [], ["ann", "ben"]]


def test_a_check_in_that_cannot_be_read_keeps_nobody_else_out(home, store, tmp_path, monkeypatch):
    """Such as one whose owner alone may read it, in a shared directory."""
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10}, deadline_seconds=0.3)
    for client in ("ann", "ben"):
        write_document(store, f"{CHECK_INS}/{client}.json", CheckInDocument(client=client, examples=7))
    read = store.fs.cat_file

    def reading(path, *arguments, **options):
        if path.endswith("/ann.json"):
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(store.fs, "cat_file", reading)
    round_server = RoundServer(server.run / "rounds", 1, server.journal, server.config, server.validate)
    server.clients.patience.seconds = 5
    server.clients.check_in(server.jobs, round_server)
    assert server.jobs.check_ins == {"ben": CheckIn("ben", 7)}
    [line] = [line for line in server.said if "'ann'" in line]
    assert "can't take part: its check-in can't be read: " in line
    assert "Permission denied" in line


def test_a_crowd_of_names_is_looked_at_up_to_a_number_and_the_federation_s_own_come_first(
    home, store, tmp_path, monkeypatch
):
    monkeypatch.setattr("hf_fedlarge.admission._MAX_CHECK_INS", 3)
    server = Server(home, tmp_path / "run", store, clients={"zoe": 10})
    for client in (*CLIENTS, "zoe"):
        write_document(store, f"{CHECK_INS}/{client}.json", CheckInDocument(client=client, examples=1))
    assert server.clients._admission.look(server.config.clients) == [CheckIn("zoe", 1)]
    assert server.said[0] == "5 names checked in; 3 are looked at, the federation's own first"
    assert len(server.said) == 3


def test_a_server_waits_for_clients_as_long_as_its_patience(home, store, tmp_path):
    server = Server(home, tmp_path / "run", store, clients={"ann": 10, "ben": 10})
    server.clients = StoreClients(store, server.said.append, poll=0.02, patience=0.2)
    server.clients.check(server.config, server.run)
    server.clients.prepare(server.config, server.run, lambda *examples: None)
    write_document(store, f"{CHECK_INS}/ann.json", CheckInDocument(client="ann", examples=1))
    round_server = RoundServer(server.run / "rounds", 1, server.journal, server.config, server.validate)
    waited = r"Waited 0\.2 s \(patience\) for "
    with pytest.raises(StoreError, match=waited + "2 clients to check in, of whom 1 have; the same command goes on"):
        server.clients.check_in(server.jobs, round_server)
    write_check_ins(server.run, [CheckIn("ann", 10), CheckIn("ben", 10)])
    server.open()
    send(home, store, "ann")
    with pytest.raises(StoreError, match=waited + "ben, and there is no deadline_seconds"):
        server.ask()
    assert set(server.round.accepted) == {"ann"}
    [first, *_, last] = [line for line in server.said if "; missing: " in line]
    assert first == f"waiting at {store.url}: 1 of 2 clients checked in; missing: ben"
    assert last == "round 1: 1 of 2 clients answered; missing: ben"
    assert server.said.count(first) == server.said.count(last) == 1


# The client's side, with orders that a test writes


@pytest.fixture
def published(home, store):
    """Publishes an order for round 1, with changes."""
    package, start = (read_manifest(home / name, kind) for name, kind in PARTS)
    store.put(home / "package")
    store.put(home / "start", leave_out=SERVER_FILES)

    def publish(**changes):
        work = {
            "clients": ["ann"],
            "package": package.digest,
            "package_bytes": package.total_bytes,
            "adapter": start.digest,
            "adapter_bytes": start.total_bytes,
            "update_bytes": 10**6,
        }
        work = Work(**work | {name: changes.pop(name) for name in list(changes) if name in work})
        order = {"run": "f" * 32, "state": "open", "round": 1, "attempt": 1, "work": [work]} | changes
        document = OrderDocument(**order)
        write_document(store, ORDER, document)
        return document

    return publish


PARTS = (("package", PackageManifest), ("start", AdapterManifest))


@pytest.fixture
def member(home, store, tmp_path):
    """Joins as ann, training by a function that notes its job."""
    jobs, said = [], []

    def train(job):
        jobs.append(job)
        make_update(job.output, job.package, job.client, adapter=job.adapter)

    def take_part(train=train, once=True, **options):
        options = {"eval_data": None, "cache": tmp_path / "cache", "poll": 0.02} | options
        join(store.url, "ann", str(home / "data.jsonl"), once=once, report=said.append, train=train, **options)

    take_part.jobs, take_part.said = jobs, said
    return take_part


def test_a_client_does_what_an_order_says_and_sends_its_update(home, store, published, member, tmp_path):
    published(training=TrainingOrder(max_steps=3, learning_rate=1e-3), proximal=0.1, seed=5)
    member()
    [job] = member.jobs
    assert (job.client, job.round, job.proximal) == ("ann", 1, 0.1)
    assert set(job.training) == {"seed", "max_steps", "learning_rate"}
    check_in = read_document(store, f"{CHECK_INS}/ann.json", CheckInDocument)
    assert check_in.examples == 12
    found = store.fetch(inbox(1, "ann", 1), tmp_path / "got", UpdateManifest, most_bytes=10**6, manifest_bytes=10**5)
    assert found.client == "ann"
    # Started again it has nothing to do.
    threading.Timer(0.3, lambda: published(state="over", round=1, work=[])).start()
    member(once=False)
    assert len(member.jobs) == 1
    assert "the federation is over" in member.said[-1]


def test_a_client_s_memory_is_its_own_to_say(home, store, published, member):
    published(training=TrainingOrder(max_steps=3))
    with pytest.raises(ConfigError, match="The budget 'much' can't be read"):
        member(memory_budget="much")
    member(memory_budget="600MB")
    [job] = member.jobs
    assert job.training["memory_budget"] == "600MB"
    check_in = read_document(store, f"{CHECK_INS}/ann.json", CheckInDocument)
    assert check_in.memory_bytes == 600_000_000


def test_the_memory_that_a_client_says_is_its_gpu_s_where_that_is_less(home, monkeypatch):
    data = str(home / "data.jsonl")
    whole = describe_client("ann", data).memory_bytes
    assert whole == psutil.virtual_memory().total
    monkeypatch.setattr("hf_fedlarge.orders._GPU_DRIVERS", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    card = SimpleNamespace(total_memory=10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    assert describe_client("ann", data).memory_bytes == 10**9
    assert describe_client("ann", data, "600MB").memory_bytes == 600_000_000
    card.total_memory = 2 * whole
    assert describe_client("ann", data).memory_bytes == whole


def test_a_client_whose_update_was_refused_learns_why(home, store, member, tmp_path):
    def train(job):
        make_update(job.output, job.package, "ann", adapter=job.adapter, examples=1000)

    server = Server(home, tmp_path / "run", store, clients={"ann": 12}, deadline_seconds=60)
    write_check_ins(server.run, [CheckIn("ann", 12)])
    server.open()
    client = threading.Thread(target=member, args=(train,), kwargs={"once": False})
    client.start()
    server.ask()
    write_document(store, ORDER, OrderDocument(run=server.clients._id, state="over", round=1, attempt=0))
    client.join(60)
    assert not client.is_alive()
    [cause] = [line for line in member.said if "the server says" in line]
    assert cause == (
        "round 1: the server says: ann refused: it claims 1000 examples and 100 tokens; expected 1 to 12 and 1 to "
        "36864."
    )
    assert str(tmp_path) not in cause


def test_what_the_server_said_is_heard_once_also_by_the_next_process(store, published, member):
    order = published()
    member()
    said = VerdictDocument(run=order.run, client="ann", round=1, attempt=1, cause="too little, too late")
    for other in ({"run": "0" * 32}, {"client": "ben"}, {"attempt": 2}):
        write_document(store, verdict(1, "ann", 1), said.model_copy(update=other))
        member()
    write_document(store, verdict(1, "ann", 1), said)
    for _ in range(2):
        member()
    assert [line for line in member.said if "the server says" in line] == [
        "round 1: the server says: too little, too late"
    ]


def test_a_verdict_that_is_too_long_or_no_verdict_stops_nobody(store, published, member):
    published()
    member()
    store.write(verdict(1, "ann", 1), b" " * 10**6)
    published(round=2)
    member()
    assert len(member.jobs) == 2
    assert [line for line in member.said if re.search("can't be read: .* expected at most 32768", line)]


def test_a_client_waits_for_an_order_as_long_as_its_patience(published, member):
    published(clients=["ben"])
    threading.Timer(0.3, lambda: published(clients=["ben"], round=2)).start()
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"had no new order for 0\.6 s \(--patience\); ask its server"):
        member(once=False, patience=0.6)
    assert time.monotonic() - began > 0.8  # an order for others is a sign of life


def test_a_client_of_a_former_federation_waits_for_the_next_one_and_checks_in_again(store, published, member):
    """The order of the former one lies in the store until the server begins, and then its check-ins are gone."""
    published()
    member()
    published(state="over", work=[])
    member(once=False)
    assert member.said[-1] == "the federation is over after round 1"
    client = threading.Thread(target=member, kwargs={"once": False, "patience": 30}, daemon=True)
    client.start()
    wait_for(lambda: "waiting for the next one" in member.said[-1])
    for place in (CHECK_INS, INBOX):
        store.remove(place)
    published(run="e" * 32, state="closed", round=0, attempt=0, work=[])
    wait_for(lambda: store.names(CHECK_INS))
    published(run="e" * 32)
    wait_for(lambda: len(member.jobs) == 2)
    published(run="e" * 32, state="over", work=[])
    client.join(30)
    assert not client.is_alive()
    assert member.said[-1] == "the federation is over after round 1"
    assert [line.startswith("the federation that was here is over") for line in member.said].count(True) == 1


def finished(home, store, run):
    """A server at the end of a federation of one round."""
    server = Server(home, run, store, clients={"ann": 12, "ben": 10}, deadline_seconds=60)
    write_check_ins(server.run, [CheckIn("ann", 12), CheckIn("ben", 10)])
    server.open()
    for client in ("ann", "ben"):
        send(home, store, client)
    server.ask()
    server.close(settings=server.config)
    server.clients.end(server.adapter(1))
    return server


def test_a_client_keeps_what_came_of_the_federation(home, store, member, tmp_path, monkeypatch):
    """As it is published, with what didn't fit into its rank; a store that fails on the way is tried again."""
    server, result, download, failed = finished(home, store, tmp_path / "run"), tmp_path / "mine", Store._download, []

    def failing(self, path, entry, target):
        if not failed:
            failed.append(path)
            raise StoreError("the line is dead.")
        return download(self, path, entry, target)

    monkeypatch.setattr(Store, "_download", failing)
    with pytest.raises(StoreError, match="had no new order"):  # of a federation that isn't this client's
        member(once=False, result=result, patience=0.2)
    assert not result.exists()
    home_of_ann = tmp_path / "cache" / "clients" / server.clients._id / "ann" / "0001"
    home_of_ann.mkdir(parents=True)  # it trained for that
    member(once=False, result=result)
    assert failed
    manifest = read_manifest(result, AdapterManifest)
    assert manifest == read_manifest(server.adapter(1), AdapterManifest)
    assert {path.name for path in result.iterdir()} == {MANIFEST_NAME, *manifest.files} - UNPUBLISHED_FILES
    assert CARRY_WEIGHTS in manifest.files
    verify_files(result, manifest, unneeded=UNPUBLISHED_FILES)
    assert member.said[-2:] == [
        f"{result} is the federation's adapter, digest {manifest.digest[:12]}",
        "the federation is over after round 1",
    ]
    # Once more, with what is there already, or in place of an older one.
    shutil.rmtree(result)
    shutil.copytree(home / "start", result)
    for _ in range(2):
        member(once=True, result=result)
        assert read_manifest(result, AdapterManifest) == manifest


def test_a_result_that_was_changed_in_the_store_is_not_kept(home, store, member, tmp_path):
    finished(home, store, tmp_path / "run")
    weights = read_manifest(tmp_path / "run" / "rounds" / "0001" / "adapter", AdapterManifest).files[CARRY_WEIGHTS]
    path = f"{store._root}/objects/{weights.sha256[:2]}/{weights.sha256}"
    store.fs.pipe_file(path, flipped(store.fs.cat_file(path)))
    with pytest.raises(ArtifactError, match="has the SHA-256"):
        member(result=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_what_is_no_adapter_is_not_replaced_by_a_result(home, store, member, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for result in (tmp_path / "mine", home / "package", home / "data.jsonl"):
        with pytest.raises(OutputError, match=r"\(--result\) is there and is no adapter of hf-fedlarge"):
            member(result=result)
    assert not store.names(CHECK_INS)


def test_who_comes_when_a_federation_is_over_and_has_no_part_in_it_waits_but_not_with_once(published, member):
    published(state="over", work=[])
    with pytest.raises(StoreError, match=r"had no new order for 0\.3 s"):
        member(once=False, patience=0.3)
    assert "ann has nothing to do with it any more; waiting for the next one" in member.said[-1]
    member(once=True)
    assert member.said[-1] == "the federation is over after round 1"


def wait_for(true):
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_is_not_asked_waits(published, member):
    published(clients=["ben"])
    threading.Timer(0.3, lambda: published(state="over", work=[])).start()
    member(once=False)
    assert not member.jobs


def test_a_client_killed_after_training_sends_what_it_has(home, store, published, member, monkeypatch):
    published()
    with monkeypatch.context() as patched:
        patched.setattr(Store, "send", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            member()
    member()
    assert len(member.jobs) == 1
    assert store.names(inbox(1, "ann", 1)) == ["adapter_config.json", "adapter_model.safetensors", MANIFEST_NAME]


def test_an_update_for_another_start_of_the_round_is_not_sent(home, published, member, tmp_path):
    stale = tmp_path / "cache" / "clients" / ("f" * 32) / "ann" / "0001" / "update"
    start_adapter(home / "package", tmp_path / "other", LORA, seed=3)
    make_update(stale, home / "package", "ann", adapter=tmp_path / "other")
    published()
    member()
    assert len(member.jobs) == 1


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [
        (50, 6730, "training, 50 steps; the round closes in 1 h 52 min"),
        (1, 700, "training, 1 step; the round closes in 12 min"),
        (None, 60, "training; the round closes in 60 s"),
        (50, None, "training, 50 steps"),
    ],
)
def test_a_client_says_what_it_is_asked_for_and_until_when(published, member, steps, seconds, said):
    closes_at = None if seconds is None else time.time() + seconds
    published(training=TrainingOrder(max_steps=steps), closes_at=closes_at)
    member()
    assert f"round 1: {said}" in member.said


def test_a_client_whose_clock_is_ahead_says_so_once(published, member):
    published(closes_at=time.time() - 60)
    with pytest.raises(StoreError, match="had no new order"):
        member(once=False, patience=0.2)
    assert not member.jobs
    [line] = [line for line in member.said if "clock" in line]
    assert re.match(r"round 1 was over for \d+ s by this machine's clock when its order was first seen; unless", line)
    published(clients=["ben"], closes_at=time.time() - 60)
    with pytest.raises(StoreError, match="had no new order"):
        member(once=False, patience=0.2)
    assert len([line for line in member.said if "clock" in line]) == 1


@pytest.mark.parametrize("late", ["refuse", "buffer"])
def test_after_the_deadline_a_client_sends_only_what_will_be_kept(home, store, published, member, late):
    def train(job):
        make_update(job.output, job.package, job.client, adapter=job.adapter)
        time.sleep(0.6)

    published(closes_at=time.time() + 0.5, late=late)
    member(train)
    assert bool(store.names(inbox(1, "ann", 1))) == (late == "buffer")


def test_what_was_too_late_is_sent_when_the_server_comes_back_with_a_new_deadline(store, published, member):
    def train(job):
        trained.append(job.round)
        make_update(job.output, job.package, job.client, adapter=job.adapter)
        wait_for(lambda: time.time() > closes_at)

    trained, closes_at = [], time.time() + 0.5
    published(closes_at=closes_at)
    thread = threading.Thread(target=member, args=(train,), kwargs={"once": False})
    thread.start()
    wait_for(lambda: any("was closed before" in line for line in member.said))
    published(closes_at=time.time() + 60)
    wait_for(lambda: MANIFEST_NAME in store.names(inbox(1, "ann", 1)))
    published(closes_at=time.time() + 90)  # once more: it has answered
    published(state="over", work=[])
    thread.join(10)
    assert (trained, sum("update sent" in line for line in member.said)) == ([1], 1)


def test_after_the_round_was_closed_a_client_does_not_send(store, published, member):
    def train(job):
        make_update(job.output, job.package, job.client, adapter=job.adapter)
        published(state="closed", work=[])

    published()
    member(train)
    assert store.names(inbox(1, "ann", 1)) == []
    assert "was closed before the update was ready" in member.said[-1]


def test_an_update_is_trained_anew_under_other_terms_and_not_under_the_same(published, member):
    """Or a server could have all clients but one train to nothing, and then ask for the sum under honest terms."""
    for attempt, rate, trained in ((1, 0.0, 1), (2, 0.0, 1), (3, 1e-3, 2), (4, 1e-3, 2)):
        published(attempt=attempt, training=TrainingOrder(learning_rate=rate))
        member()
        assert len(member.jobs) == trained


def test_what_others_put_into_a_client_s_inbox_does_not_end_it(store, published, member):
    """Whoever may write there can stop an answer, as by removing it, but not the client."""
    trained = []

    def train(job):
        trained.append(job.round)
        published(state="over", round=2, work=[])
        raise DataError("that was all")

    store.write(f"{inbox(1, 'ann', 1)}/{FAILED}", b" " * 100_000)
    published()
    threading.Timer(1.0, published, kwargs={"round": 2}).start()
    member(train, once=False)
    assert trained == [2]


def test_a_client_that_cannot_train_says_why(store, published, member):
    def train(job):
        raise DataError("nothing to\nlearn")

    published()
    member(train)
    assert read_document(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument).reason == "nothing to learn"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"package_bytes": 10}, "lists .* bytes of files; expected 10 at most"),
        ({"adapter_bytes": 10}, "lists .* bytes of files; expected 10 at most"),
        ({"update_bytes": 10}, "the order takes 10 at most"),
    ],
)
def test_a_client_keeps_to_what_was_announced(store, published, member, changes, sentence):
    published(**changes)
    member()
    failure = read_document(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument)
    assert re.search(sentence, failure.reason)
    assert store.names(inbox(1, "ann", 1)) == [FAILED]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", "/etc"),
        ("push_to_hub", True),
        ("hub_token", "x"),
        ("trust_remote_code", True),
        ("report_to", "wandb"),
        ("deepspeed", "x.json"),
        ("resume_from_checkpoint", "/tmp"),
        ("max_steps", 10**9),
        ("max_steps", "3"),
        ("max_length", -1),
        ("learning_rate", float("nan")),
        ("optim", "galore_adamw"),
        ("per_device_train_batch_size", 10**9),
    ],
)
def test_an_order_with_anything_but_bounded_training_arguments_is_refused(store, published, member, key, value):
    document = published().model_dump(mode="json", exclude_none=True)
    document["training"] = {key: value}
    store.write(ORDER, json.dumps(document).encode())
    with pytest.raises(ArtifactError, match=f"training.{key}"):
        member()
    assert not member.jobs


def test_a_client_s_name_is_no_path_and_is_taken_once(home, store, published, member, tmp_path):
    with pytest.raises(ConfigError, match="--client or --data is wrong: client"):
        join(store.url, "../ann", str(home / "data.jsonl"), cache=tmp_path)

    def train(job):
        with pytest.raises(OutputError, match="ann takes part in another process already"):
            member()
        make_update(job.output, job.package, job.client, adapter=job.adapter)

    published()
    member(train)


def test_a_store_that_cannot_be_reached_is_tried_again(published, member, monkeypatch):
    write, left = Store.write, 2

    def failing(self, path, content):
        nonlocal left
        left -= 1
        if left >= 0:
            raise StoreError("the line is dead.")
        write(self, path, content)

    published()
    monkeypatch.setattr(Store, "write", failing)
    member()
    assert left < 0
    assert member.said.count("the line is dead. Trying again.") == 1
    assert len(member.jobs) == 1


def test_old_rounds_leave_the_cache(home, published, member, tmp_path):
    old = tmp_path / "cache" / "clients" / ("f" * 32) / "ann" / "0000" / "adapter"
    old.mkdir(parents=True)
    published()
    member()
    assert {path.name for path in old.parent.parent.iterdir()} == {"0001"}


# What was damaged in the store


def flipped(content):
    return bytes([content[0] ^ 1]) + content[1:]


FAULTS = {
    "cut short": (lambda store, model, _: store.fs.pipe_file(model, store.fs.cat_file(model)[:-1]), "bytes; its manif"),
    "longer": (lambda store, model, _: store.fs.pipe_file(model, store.fs.cat_file(model) + b"\0"), "bytes; its manif"),
    "flipped": (lambda store, model, _: store.fs.pipe_file(model, flipped(store.fs.cat_file(model))), "the SHA-256"),
    "another": (
        lambda store, _, order: store.write(
            f"artifacts/{order.work[0].package}.json", store.read(f"artifacts/{order.work[0].adapter}.json", 10**6)
        ),
        "describes|is of kind 'adapter'; expected a package",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_refuses_a_package_before_anything_opens_it(store, published, member, tmp_path, name):
    spoil, cause = FAULTS[name]
    order = published()
    model = objects(store)[0]
    artifact = f"artifacts/{order.work[0].package}.json"
    sound = store.fs.cat_file(model), store.read(artifact, 10**6)
    spoil(store, model, order)
    member()
    assert not member.jobs
    failure = read_document(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument)
    assert re.search(cause, failure.reason), failure.reason
    packages = tmp_path / "cache" / "packages"
    assert not [path for path in packages.glob("*") if not path.name.startswith(".")]
    bad = [path for path in packages.rglob("*") if path.is_file() and path.read_bytes() == store.fs.cat_file(model)]
    assert not bad or name == "another"
    store.fs.pipe_file(model, sound[0])
    store.write(artifact, sound[1])
    published(attempt=2)
    member()
    assert len(member.jobs) == 1


def test_an_order_that_announces_less_than_the_package_has_fetches_nothing(store, published, member, tmp_path):
    published(package_bytes=1000)
    member()
    assert not member.jobs
    files = [path for path in (tmp_path / "cache" / "packages").rglob("*") if path.is_file()]
    assert [path for path in files if path.stat().st_size] == []


def test_a_package_that_was_damaged_in_the_cache_is_not_loaded(store, published, member, tmp_path):
    published()
    member()
    [package] = (tmp_path / "cache" / "packages").glob("[0-9a-f]*")
    weights = max(package.iterdir(), key=lambda path: path.stat().st_size)
    weights.write_bytes(flipped(weights.read_bytes()))
    manifest = json.loads((package / MANIFEST_NAME).read_text())

    def train(job):
        assert job.package == package
        assert json.loads((job.package / MANIFEST_NAME).read_text()) == manifest
        assert weights.read_bytes() == sound
        make_update(job.output, job.package, job.client, adapter=job.adapter, round_number=2)

    sound = flipped(weights.read_bytes())
    published(round=2)
    member(train)
    assert store.names(inbox(2, "ann", 1))
