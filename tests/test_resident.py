"""A process that keeps the model loaded beside Flower's, and outlives neither its use nor its welcome."""

import json
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Client, Listener
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'hf-fedlarge[flower]'")

import psutil
from federation import TRAINING
from flwr.app import Context, Message, RecordDict
from grid_double import GridDouble
from served import make_home
from test_serve import Processes

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, UpdateManifest, read_manifest
from hf_fedlarge.errors import ConfigError, OutputError
from hf_fedlarge.flower import client as client_app
from hf_fedlarge.flower import resident
from hf_fedlarge.flower.letters import put_in
from hf_fedlarge.flower.work import NodeSettings
from hf_fedlarge.keys import allow, new_key, read_key
from hf_fedlarge.orders import ORDER, OrderDocument, TrainingOrder, Work, as_bytes
from hf_fedlarge.store import Store, artifact_path, object_path
from hf_fedlarge.trainers import worker as worker_module
from hf_fedlarge.trainers.launch import in_process
from hf_fedlarge.voice import signed

HOW = {name: value for name, value in TRAINING.items() if name != "seed"}
LONG = HOW | {"max_steps": 100_000}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("resident")
    make_home(path)
    Store(str(path / "packages")).put(path / "package")
    Store(str(path / "adapters")).put(path / "start", leave_out=SERVER_FILES)
    return path


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.end()


@pytest.fixture
def directory(tmp_path, processes):
    """Of a worker that is ready."""
    path = tmp_path / "worker"
    processes.worker = processes.start("worker", "flower", "worker", path)
    until(lambda: is_ready(tmp_path / "worker.log"))
    return path


def is_ready(log):
    return log.exists() and "ready in" in log.read_text()


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def order_of(home, training=None, **changes):
    """A message's content, for ann to train on."""
    package, start = read_manifest(home / "package", PackageManifest), read_manifest(home / "start", AdapterManifest)
    work = Work(
        clients=["ann"],
        package=package.digest,
        package_bytes=package.total_bytes,
        package_store=str(home / "packages"),
        adapter=start.digest,
        adapter_bytes=start.total_bytes,
        update_bytes=10**7,
    )
    order = {"run": "f" * 32, "state": "open", "round": 1, "attempt": 1, "work": [work]} | changes
    files = {ORDER: as_bytes(OrderDocument(**order, training=TrainingOrder(**(training or HOW))))}
    adapters = Store(str(home / "adapters"))
    for path in (artifact_path(start.digest), *(object_path(entry.sha256) for entry in start.files.values())):
        files[path] = adapters.read(path, 10**7)
    return files


def answer(home, cache, files, **settings):
    """What the ClientApp answers, as files by their names."""
    GridDouble()  # which says whose messages these are
    values = {"client": "ann", "data": str(home / "data.jsonl"), "cache": str(cache)} | settings
    message = Message(put_in(files), 11, "train", ttl=60)
    reply = client_app.app(message, Context(1, 2, values, RecordDict(), {}))
    return {path.rpartition("/")[2]: array.data for path, array in reply.content["files"].items()}


def weights(files):
    return UpdateManifest.model_validate_json(files["fedlarge.json"]).files


def test_a_round_after_the_first_loads_nothing_and_gives_the_bytes_of_a_process_of_its_own(
    home, tmp_path, directory, capsys
):
    plain = answer(home, tmp_path / "cache", order_of(home))
    capsys.readouterr()
    for number in (1, 2):
        found = answer(home, tmp_path / f"cache-{number}", order_of(home), worker=str(directory))
        assert weights(found) == weights(plain)
    said = capsys.readouterr().out
    assert said.count("round 1: update sent") == 2
    assert "no worker" not in said


def test_the_package_is_loaded_once(home, tmp_path, monkeypatch):
    loaded, train = [], in_process()
    load = worker_module.load_package
    monkeypatch.setattr(worker_module, "load_package", lambda *a, **k: loaded.append(a) or load(*a, **k))
    for number in (1, 2, 3):
        said = what_a_worker_says(home, tmp_path, train, number)
        assert said[-1] == {"done": True}
        assert {"line": f"round {number}: update sent"} in said
    assert len(loaded) == 1


def what_a_worker_says(home, tmp_path, train, number):
    """In this process, to a round's order."""
    settings = NodeSettings(client="ann", data=str(home / "data.jsonl"), cache=str(tmp_path / "cache"))
    mailbox = resident.mailbox_in(tmp_path / "worker", "ann")
    mailbox.remove("")
    for path, raw in order_of(home, round=number).items():
        mailbox.write(path, raw)
    work = OrderDocument.model_validate_json(mailbox.read(ORDER, 10**6)).work[0]
    here, there = multiprocessing.Pipe()
    with here, there:
        request = {"settings": settings.model_dump(mode="json"), "work": work.model_dump(mode="json")}
        here.send_bytes(json.dumps(request).encode())
        resident._answer(there, tmp_path / "worker", train)
        said = []
        while here.poll():
            said.append(json.loads(here.recv_bytes()))
    return said


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), OSError("no such device"), EOFError("cut")])
def test_training_that_fails_is_said_and_logged_and_the_worker_goes_on(home, tmp_path, caplog, error):
    train = in_process()

    def fails(job):
        raise error

    said = what_a_worker_says(home, tmp_path, fails, 1)
    assert said[-1] == {"failed": f"the worker failed ({type(error).__name__}: {error}); its log has more."}
    [record] = [record for record in caplog.records if record.name == resident.__name__]
    assert record.exc_info[1] is error
    assert what_a_worker_says(home, tmp_path, train, 1)[-1] == {"done": True}


def test_files_are_named_to_the_worker_as_they_are_from_here(home, tmp_path, directory, monkeypatch, capsys):
    """Whose working directory is another one."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.jsonl").write_bytes((home / "data.jsonl").read_bytes())
    (here / "held-out.jsonl").write_bytes((home / "data.jsonl").read_bytes())
    (here / "packages").symlink_to(home / "packages")
    new_key(here / "ann.pem", "ann")
    allow(here / "server.json", new_key(here / "server.pem", "server"))
    monkeypatch.chdir(here)
    named = {"data": "mine.jsonl", "eval_data": "held-out.jsonl", "key": "ann.pem", "store": "packages"}
    order = order_of(home)
    said = signed(OrderDocument.model_validate_json(order[ORDER]), read_key(here / "server.pem"))
    order |= {ORDER: as_bytes(said)}
    found = answer(home, "cache", order, worker=str(directory), **named, server_key="server.json")
    assert {"fedlarge.json", "signature.json"} <= found.keys()
    assert list((here / "cache").glob("clients/*/ann/0001/update"))
    assert "no worker" not in capsys.readouterr().out


def test_what_names_no_file_stays_as_it_is():
    work = Work(
        **dict.fromkeys(("package_bytes", "adapter_bytes", "update_bytes"), 1),
        package="0" * 64,
        adapter="0" * 64,
        clients=["ann"],
        package_store="s3://bucket/packages",
    )
    settings = NodeSettings(client="ann", data="owner/name")
    assert resident._from_the_root(settings, work) == {}
    known = settings.model_copy(update={"server_key": "0" * 64})
    assert resident._from_the_root(known, work) == {}
    mine = settings.model_copy(update={"cache": "~/cache", "keys": "/srv/keys.json"})
    assert resident._from_the_root(mine, work) == {"cache": str(Path.home() / "cache"), "keys": "/srv/keys.json"}


def test_why_there_is_no_update_comes_back_and_the_worker_goes_on(home, tmp_path, directory):
    files = order_of(home) | {ORDER: as_bytes(OrderDocument(**order_with(home, update_bytes=50_000)))}
    found = answer(home, tmp_path / "cache", files, worker=str(directory))
    assert b"the order takes 50000 at most" in found["failed.json"]
    assert "fedlarge.json" in answer(home, tmp_path / "other", order_of(home), worker=str(directory))


def order_with(home, **changes):
    order = OrderDocument.model_validate_json(order_of(home)[ORDER])
    return order.model_dump() | {"work": [order.work[0].model_copy(update=changes)], "training": order.training}


@pytest.mark.parametrize("training", ["in the worker", "of its own"])
def test_a_deadline_holds(home, tmp_path, directory, training):
    began = time.monotonic()
    worker = {"worker": str(directory)} if training == "in the worker" else {}
    found = answer(home, tmp_path / "cache", order_of(home, LONG, closes_at=time.time() + 2.0), **worker)
    assert time.monotonic() - began < 8
    assert b"The round was closed before the update was ready." in found["failed.json"]
    began = time.monotonic()
    found = answer(home, tmp_path / "cache", order_of(home, round=2), **worker)
    assert "fedlarge.json" in found
    assert time.monotonic() - began < 20


def cpu_within_a_second(process):
    before = process.cpu_times().user
    time.sleep(1.0)
    return process.cpu_times().user - before


def asking(home, cache, directory):
    with suppress(SystemExit):
        answer(home, cache, order_of(home, LONG), worker=str(directory))


def test_who_is_killed_while_the_worker_trains_leaves_no_training_behind(home, tmp_path, directory, processes):
    """As Flower ends a ClientApp when its SuperNode was killed."""
    asks = processes.of(asking, home, tmp_path / "cache", directory)
    worker = psutil.Process(processes.worker.pid)
    until(lambda: list((tmp_path / "cache").glob("clients/*/ann/0001/trained.json")))
    before = worker.cpu_times().user
    until(lambda: worker.cpu_times().user - before > 0.5)
    asks.kill()
    asks.join()
    until(lambda: cpu_within_a_second(worker) < 0.1)  # of a process that may get little of one when it is at work
    assert not list((tmp_path / "cache").glob("clients/*/ann/0001/update"))
    assert "fedlarge.json" in answer(home, tmp_path / "cache", order_of(home, round=2), worker=str(directory))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [True, False])
def test_a_signal_ends_it_and_its_socket_and_whoever_asks_trains_himself(
    home, tmp_path, directory, processes, capsys, number, busy
):
    if busy:
        asks = processes.of(asking, home, tmp_path / "other", directory)
        until(lambda: list((tmp_path / "other").glob("clients/*/ann/0001/trained.json")))
    os.kill(processes.worker.pid, number)
    processes.worker.join(15)
    assert processes.worker.exitcode == 0
    assert sorted(path.name for path in directory.iterdir() if path.name != "mailbox") in ([], [".lock"])
    if busy:
        asks.kill()  # which has begun to train itself
        asks.join()
    assert "fedlarge.json" in answer(home, tmp_path / "cache", order_of(home), worker=str(directory))
    assert "no worker in" in capsys.readouterr().out


def started_by_another(directory, pid_file):
    """A process that starts a worker in another one, and waits."""
    pid = os.fork()
    if pid == 0:
        pid_file.write_text(str(os.getpid()))
        with suppress(BaseException):
            resident.serve(directory, print)
        os._exit(0)
    time.sleep(3600)


def test_it_ends_with_the_process_that_started_it(tmp_path, processes):
    parent = processes.of(started_by_another, tmp_path / "worker", tmp_path / "pid")
    until((tmp_path / "worker" / "socket").exists)
    worker = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.join()
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, 10)
    assert not (tmp_path / "worker" / "socket").exists()


def test_it_ends_where_the_process_that_started_it_was_gone_before_it_was_loaded(tmp_path, processes):
    worker = processes.of(started_by_one_that_is_gone, tmp_path / "worker")
    worker.join(30)
    assert worker.exitcode == 0
    assert not (tmp_path / "worker" / "socket").exists()


def started_by_one_that_is_gone(directory):
    resident.serve(directory, print, os.getpid())  # which is not its parent


def test_what_a_killed_worker_left_is_no_worker_and_a_new_one_takes_its_place(home, tmp_path, directory, processes):
    processes.worker.kill()
    processes.worker.join()
    assert (directory / "socket").exists()
    assert "fedlarge.json" in answer(home, tmp_path / "cache", order_of(home), worker=str(directory))
    again = processes.start("again", "flower", "worker", directory)
    until(lambda: is_ready(tmp_path / "again.log"))
    found = answer(home, tmp_path / "other", order_of(home), worker=str(directory))
    assert "fedlarge.json" in found
    assert again.is_alive()


def test_there_is_one_worker_in_a_directory_and_only_its_owner_s(tmp_path, directory):
    with pytest.raises(OutputError, match="Another worker is at work in"):
        resident.serve(directory, print)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "open").mkdir(mode=0o755)
    for use in (
        lambda: resident.serve(tmp_path / "open", print),
        lambda: resident.mailbox_in(tmp_path / "open", "ann"),
    ):
        with pytest.raises(ConfigError, match=r"is open to others \(mode 755\); expected 700"):
            use()
    with pytest.raises(ConfigError, match="can't have a socket"):
        resident.serve(tmp_path / ("x" * 120), print)


def test_who_does_not_know_the_key_is_not_answered_and_the_worker_goes_on(home, tmp_path, directory, capsys):
    with pytest.raises(multiprocessing.AuthenticationError):
        Client(str(directory / "socket"), "AF_UNIX", authkey=b"x" * 32)
    key = (directory / "key").read_bytes()
    with Client(str(directory / "socket"), "AF_UNIX", authkey=key) as connection:
        with suppress(BrokenPipeError):  # it may hang up at the size, before all of that is sent
            connection.send_bytes(b"x" * (resident.MAX_MESSAGE_BYTES + 1))  # more than it reads
        with pytest.raises((EOFError, OSError)):
            connection.recv_bytes()
    with Client(str(directory / "socket"), "AF_UNIX", authkey=key) as connection:
        connection.send_bytes(b'{"settings": 1}')
        assert "failed" in json.loads(connection.recv_bytes())
    assert "fedlarge.json" in answer(home, tmp_path / "cache", order_of(home), worker=str(directory))
    assert "no worker" not in capsys.readouterr().out


def test_somebody_else_at_the_socket_is_not_believed(home, tmp_path, capsys):
    directory = tmp_path / "worker"
    resident.mailbox_in(directory, "ann")
    (directory / "key").write_bytes(b"k" * 32)

    def accept():
        with pytest.raises(multiprocessing.AuthenticationError):
            other.accept()

    with Listener(str(directory / "socket"), "AF_UNIX", authkey=b"x" * 32) as other:
        accepting = threading.Thread(target=accept)
        accepting.start()
        assert "fedlarge.json" in answer(home, tmp_path / "cache", order_of(home), worker=str(directory))
        accepting.join()
    assert "(AuthenticationError); training here" in capsys.readouterr().out
