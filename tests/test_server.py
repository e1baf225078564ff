"""A round as a state machine: who counts, what a kill leaves, and that nothing happens twice."""

import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time

import pytest
import round_driver
from federation import LORA, make_federation, make_update
from killed import stopping
from round_driver import CLIENTS, check_ins, close, config, drive, make_server

from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, read_manifest
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.errors import ArtifactError, UpdateRefusedError
from hf_fedlarge.experience import late_updates, seen
from hf_fedlarge.journal import Journal
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import package_config
from hf_fedlarge.plan import SELECTIONS, CheckIn, sample_cohort
from hf_fedlarge.server import RoundServer
from hf_fedlarge.update import Expected, validate_update


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, the adapter of round 0, and an update of each of four clients."""
    path = tmp_path_factory.mktemp("home")
    _, package = make_federation(path)
    start_adapter(package, path / "start", LORA, seed=0)
    for seed, client in enumerate(CLIENTS):
        make_update(path / "updates" / client, package, client, seed=seed, adapter=path / "start")
    return path


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A round that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole")
    drive(home, run)
    return run


def digest(run):
    return read_manifest(run / "rounds" / "0001" / "adapter", AdapterManifest).digest


def events(run, *names):
    return Journal(run / "journal.jsonl").find(*names)


def test_the_journal_tells_the_round(whole):
    names = [
        entry["event"]
        for entry in events(whole, *{entry["event"] for entry in Journal(whole / "journal.jsonl").entries})
    ]
    per_client = ["asked", "received", "validated"]
    assert names == ["selected", *per_client * 3, "closed", "aggregated", "evaluated", "committed"]
    [aggregated] = events(whole, "aggregated")
    assert aggregated["adapter"] == digest(whole)
    sizes = {entry["client"]: entry["bytes"] for entry in events(whole, "received")}
    assert len(sizes) == 3
    assert min(sizes.values()) > 1000
    assert [path.name for path in (whole / "rounds").iterdir()] == ["0001"]


def test_killed_at_every_write_a_rerun_ends_with_the_same_bytes_and_asks_nobody_twice(home, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_fedlarge.rounds", "hf_fedlarge.trainers.launch"])
    step = 0
    while True:
        step += 1
        run = tmp_path / str(step)
        process = context.Process(target=round_driver.drive_until, args=(home, run, step))
        run.mkdir()
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        counted = {entry["client"] for entry in events(run, "validated")}
        sent: list[str] = []
        drive(home, run, sent)
        assert digest(run) == digest(whole), step
        assert not counted & set(sent), "an update that counted was asked for again"
        assert len(events(run, "committed")) == 1
        assert len(events(run, "validated")) == 3
        assert not list((run / "rounds").glob(".*"))
        if process.exitcode == 0:
            break
        shutil.rmtree(run)
    assert step > 40  # 15 journal entries, 5 directories and a file, each before and after


def test_what_a_journal_of_many_rounds_says_of_a_client_is_found_at_once(tmp_path):
    path, clients = tmp_path / "journal.jsonl", [f"c{number}" for number in range(200)]
    events = ("asked", "received", "validated")
    lines = [
        {"event": event, "round": number, "client": client, "bytes": 1}
        for number in range(1, 41)
        for event in events
        for client in clients
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    journal = Journal(path)
    journal.write("asked", round=41, client="c7", bytes=2)
    assert journal.find("asked", bytes=2) == journal.entries[-1:]
    since = time.process_time()
    for client in clients:
        assert len(journal.find("asked", client=client)) == (41 if client == "c7" else 40)
        for event in events:
            assert [entry["round"] for entry in journal.find(event, round=40, client=client)] == [40]
        assert journal.find("asked", round=42, client=client) == []
        assert len(journal.find("received", "validated", round=40)) == 2 * len(clients)
    assert time.process_time() - since < 1


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_at_any_sync_is_said_and_nothing_is_lost(home, whole, tmp_path, monkeypatch, problem):
    fsync, step, failed, sentences = os.fsync, 0, 0, set()
    while True:
        step += 7  # each file of each directory is synced; some of them will do
        left, run = step, tmp_path / str(step)
        run.mkdir()

        def failing(descriptor):
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(problem, os.strerror(problem))
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing)
            try:
                drive(home, run)
            except OSError as error:
                failed += 1
                sentences.add(str(error))
        drive(home, run)
        assert digest(run) == digest(whole), step
        if left > 0:
            break
    assert failed >= 3
    word = "the disk is full" if problem == errno.ENOSPC else "read-only"
    assert all(word in sentence for sentence in sentences), sentences


def test_a_journal_line_that_was_cut_is_as_if_never_written(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    journal = Journal(path)
    assert len(journal.entries) == len(lines) - 1
    journal.write("more", number=1)
    *_, last = Journal(path).entries
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", last.pop("time"))
    assert last == {"event": "more", "number": 1}


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"a": 1}', b"\xff", b'{"event": 3}'])
def test_a_journal_that_something_else_wrote_in_is_refused(tmp_path, line):
    (tmp_path / "journal.jsonl").write_bytes(b'{"event": "a"}\n' + line + b"\n")
    with pytest.raises(ArtifactError, match="damaged in line 2"):
        Journal(tmp_path / "journal.jsonl")


def opened(home, run, **changes):
    server = make_server(home, run, **changes)
    return server, server.open(check_ins())


def test_handing_an_update_over_again_changes_nothing(home, tmp_path):
    server, order = opened(home, tmp_path)
    client = order.clients[0]
    first = server.receive(order, client, home / "updates" / client)
    before = list(server.journal.entries)
    again = make_server(home, tmp_path).receive(order, client, home / "updates" / client)
    assert first.accepted
    assert again == first
    assert Journal(tmp_path / "journal.jsonl").entries == before


def test_a_second_update_and_one_that_was_not_asked_for_are_refused(home, tmp_path):
    server, order = opened(home, tmp_path)
    client = order.clients[0]
    assert server.receive(order, client, home / "updates" / client).accepted
    other = make_update(tmp_path / "other", home / "package", client, seed=99, adapter=home / "start")
    assert other
    receipt = server.receive(order, client, tmp_path / "other")
    assert not receipt.accepted
    assert "more than one update; the first counts" in receipt.reason
    [stranger] = set(CLIENTS) - set(order.clients)
    assert "was not asked" in server.receive(order, stranger, home / "updates" / stranger).reason
    assert server.accepted.keys() == {client}


def test_what_was_accepted_is_a_copy_of_its_own(home, tmp_path):
    server, order = opened(home, tmp_path)
    client = order.clients[0]
    shutil.copytree(home / "updates" / client, tmp_path / "sent")
    assert server.receive(order, client, tmp_path / "sent").accepted
    shutil.rmtree(tmp_path / "sent")
    assert (server.work / client / "adapter_model.safetensors").stat().st_size > 1000


def test_a_round_ends_with_as_many_updates_as_wanted_of_more_that_were_asked(home, tmp_path):
    _, order = opened(home, tmp_path, cohort=2, over_select=1.0)
    assert len(order.clients) == 4
    assert order.goal == 2
    sent = []
    drive(home, tmp_path, sent, cohort=2, over_select=1.0)
    assert sent == list(order.clients[:2])


def test_after_the_deadline_nobody_is_waited_for_and_what_comes_is_late(home, tmp_path):
    server, order = opened(home, tmp_path, deadline_seconds=0.2)
    first, second, third = order.clients
    assert server.receive(order, first, home / "updates" / first).accepted
    assert server.waiting(order) == [second, third]
    time.sleep(0.25)
    assert server.waiting(order) == []
    late = server.receive(order, second, home / "updates" / second)
    assert "after round 1 was closed" in late.reason
    with pytest.raises(
        UpdateRefusedError, match="abandoned: 1 of 3 clients sent a valid update; at least 2 are needed"
    ):
        close(server, order, home)
    assert not server.committed.exists()


def test_another_attempt_at_a_round_has_its_own_deadline(home, tmp_path):
    server, order = opened(home, tmp_path, deadline_seconds=0.2)
    time.sleep(0.25)
    with pytest.raises(UpdateRefusedError, match="abandoned"):
        close(server, order, home)
    again = server.open(check_ins())
    assert again.attempt == 2
    assert len(server.waiting(again)) == 3


def test_an_attempt_goes_on_as_it_was_begun_and_the_next_by_what_a_new_server_is_given(home, tmp_path):
    _, order = opened(home, tmp_path, deadline_seconds=60, late="buffer")
    server = make_server(home, tmp_path, deadline_seconds=60, min_updates=3)
    assert server.open(check_ins()) == order
    assert not events(tmp_path, "changed")
    first, second, third = order.clients
    assert server.receive(order, first, home / "updates" / first).accepted
    server.fail(order, second, f"{second} has no power")
    server.begin_wait(-1)
    assert "kept for a later one" in server.receive(order, third, home / "updates" / third).reason
    with pytest.raises(UpdateRefusedError, match="at least 2 are needed"):
        close(server, order, home)
    again = server.open(check_ins())
    server.begin_wait(-1)
    late = next(client for client in again.clients if client != first)
    assert "after round 1 was closed" in server.receive(again, late, home / "updates" / late).reason
    with pytest.raises(UpdateRefusedError, match="at least 3 are needed"):
        close(server, again, home)


def test_an_abandoned_round_says_whose_each_reason_is(home, tmp_path):
    """Also where a client's name, such as `a`, is in every sentence."""
    server = make_server(home, tmp_path, cohort=None)
    order = server.open([CheckIn("a", 10), CheckIn("ben", 10)])
    server.fail(order, "a", "The budget is too small.")
    server.fail(order, "ben", "ben refused: it is late.")
    with pytest.raises(UpdateRefusedError, match=r"needed\. a: The budget is too small\. ben refused: it is late\."):
        close(server, order, home)


@pytest.mark.parametrize(("begun", "answers"), [(None, 2), (60.0, 2), (None, 1)])
def test_an_attempt_goes_by_the_deadline_of_the_server_that_took_it_up_last(home, tmp_path, begun, answers):
    server, order = opened(home, tmp_path, deadline_seconds=begun)
    for client in order.clients[:answers]:
        assert server.receive(order, client, home / "updates" / client).accepted
    for _ in range(2):  # killed, and started again with the same
        server = make_server(home, tmp_path, deadline_seconds=30.0)
        assert server.open(check_ins()) == order
        assert 20 < server.seconds_left <= 30
    [changed] = events(tmp_path, "changed")
    assert (changed["round"], changed["attempt"], changed["deadline_seconds"]) == (1, 1, 30.0)
    assert server.waiting(order) == [*order.clients[answers:]]
    server.begin_wait(-1)
    assert server.waiting(order) == []
    if answers == 2:
        assert close(server, order, home)["clients"] == sorted(order.clients[:2])
        return
    with pytest.raises(
        UpdateRefusedError, match="abandoned: 1 of 3 clients sent a valid update; at least 2 are needed"
    ):
        close(server, order, home)
    again = make_server(home, tmp_path, deadline_seconds=60).open(check_ins())
    assert again.attempt == 2
    assert not events(tmp_path, "changed")[1:]  # it is begun with that


def test_a_round_that_was_closed_has_no_other_deadline(home, tmp_path):
    server, order = opened(home, tmp_path)
    for client in order.clients:
        server.receive(order, client, home / "updates" / client)
    with pytest.raises(ZeroDivisionError):
        close(server, order, home, lambda _: 1 / 0)
    make_server(home, tmp_path, deadline_seconds=0.1).open(check_ins())
    assert not events(tmp_path, "changed")


def test_a_journal_that_does_not_say_what_a_round_was_begun_with_goes_on_by_what_is_given(home, tmp_path):
    opened(home, tmp_path, deadline_seconds=60)
    path = tmp_path / "journal.jsonl"
    [selected] = events(tmp_path, "selected")
    for name in ("deadline_seconds", "late", "min_updates"):
        del selected[name]
    path.write_text(json.dumps(selected) + "\n")
    server = make_server(home, tmp_path, deadline_seconds=9.0, late="buffer", min_updates=1)
    assert server.settings == server.config
    assert 8 < server.seconds_left < 9


def test_what_comes_late_may_be_kept_for_the_next_round(home, tmp_path):
    server, order = opened(home, tmp_path, cohort=2, min_updates=1, deadline_seconds=0.2, late="buffer")
    first, second = order.clients
    assert server.receive(order, first, home / "updates" / first).accepted
    time.sleep(0.25)
    receipt = server.receive(order, second, home / "updates" / second)
    assert not receipt.accepted
    assert "is kept for a later one" in receipt.reason
    assert server.receive(order, second, home / "updates" / second) == receipt
    aggregate_updates([home / "updates" / first], home / "package", tmp_path / "one", previous=home / "start")
    server.close(
        order, lambda _, late, adapter: shutil.copytree(tmp_path / "one", adapter), lambda _: {}, lambda *_: {}
    )

    package = read_manifest(home / "package", PackageManifest)
    architecture = describe(package_config(home / "package"))
    one = read_manifest(tmp_path / "one", AdapterManifest)

    def validate(number, client, update):
        return validate_update(update, Expected(package, architecture, one.lora, number, one.digest))

    journal = Journal(tmp_path / "journal.jsonl")
    changes = {"cohort": 1, "min_updates": 1, "late": "buffer"}
    server = RoundServer(tmp_path / "rounds", 2, journal, config(**changes), validate)
    order = server.open([CheckIn(first, 10)])
    make_update(tmp_path / "two", home / "package", first, seed=9, adapter=tmp_path / "one", round_number=2)
    assert server.receive(order, first, tmp_path / "two").accepted

    def aggregate(updates, late, adapter):
        assert list(late.values()) == [1]
        aggregate_updates(
            [*updates, *late], home / "package", adapter, previous=tmp_path / "one", older=[home / "start"]
        )

    server.close(order, aggregate, lambda _: {}, lambda *_: {})
    manifest = read_manifest(server.committed / "adapter", AdapterManifest)
    staleness = {entry.client: entry.staleness for entry in manifest.contributions}
    assert staleness == {first: 0, second: 1}
    assert not list((tmp_path / "rounds" / ".late").rglob("*.safetensors"))


def test_a_late_update_that_a_new_server_took_in_time_counts_once(home, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write = Journal.write

    def dying(self, event, **fields):
        if event == "validated" and not fields["accepted"]:
            raise Killed
        write(self, event, **fields)

    changes = {"cohort": 1, "min_updates": 1, "late": "buffer"}
    server, order = opened(home, tmp_path, deadline_seconds=0.01, **changes)
    [client] = order.clients
    time.sleep(0.05)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "write", dying)
        with pytest.raises(Killed):
            server.receive(order, client, home / "updates" / client)
    assert events(tmp_path, "late")
    again = make_server(home, tmp_path, **changes)
    again.begin_wait(None)
    assert again.receive(order, client, home / "updates" / client).accepted
    following = RoundServer(tmp_path / "rounds", 2, again.journal, config(**changes), lambda *_: None)
    following.open([CheckIn("someone", 1)])
    assert late_updates(following.journal, 2, {}) == []


def test_an_abandoned_round_keeps_what_was_accepted_for_the_next_attempt(home, tmp_path):
    server, order = opened(home, tmp_path)
    first = order.clients[0]
    server.receive(order, first, home / "updates" / first)
    for client in order.clients[1:]:
        server.fail(order, client, f"{client} has no power")
    assert server.waiting(order) == []
    with pytest.raises(UpdateRefusedError, match="has no power"):
        close(server, order, home)
    again = make_server(home, tmp_path)
    order = again.open(check_ins())
    assert order.attempt == 2
    assert first not in again.waiting(order)
    sent = []
    drive(home, tmp_path, sent)
    assert first not in sent
    record = json.loads((tmp_path / "rounds" / "0001" / "round.json").read_text())
    assert first in record["clients"]
    assert len(record["clients"]) >= 3


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_of_updates_that_make_a_broken_adapter_none_counts_and_the_next_attempt_draws_anew(home, tmp_path, loss):
    server, order = opened(home, tmp_path)
    for client in order.clients:
        server.receive(order, client, home / "updates" / client)
    names = ", ".join(sorted(order.clients))
    said = f"loss_small is {loss}, loss_full is 2 with the adapter made of the updates of {names}, which count no more"
    with pytest.raises(UpdateRefusedError, match=f"Round 1 is abandoned: {said}"):
        close(server, order, home, lambda _: {"loss_small": loss, "loss_full": 2.0})
    [abandoned] = events(tmp_path, "abandoned")
    assert abandoned["accepted"].keys() == set(order.clients)
    assert not server.committed.exists()
    again = make_server(home, tmp_path)
    second = again.open(check_ins())
    assert second.attempt == 2
    assert again.waiting(second) == list(second.clients)
    assert list(again.work.iterdir()) == []
    client = next(client for client in second.clients if client in order.clients)
    for _ in range(2):  # the same may come again, and counts then, once
        assert again.receive(second, client, home / "updates" / client).accepted
    assert again.accepted.keys() == {client}
    assert len(events(tmp_path, "validated")) == 4
    for other in second.clients:
        again.receive(second, other, home / "updates" / other)
    assert close(again, second, home)["clients"] == sorted(second.clients)
    assert [entry["losses"] for entry in events(tmp_path, "evaluated")] == [{"loss_small": 2.0}]


def test_killed_while_a_broken_attempt_is_given_up_a_rerun_ends_with_the_same_bytes(home, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die():
        raise Killed

    (tmp_path / "whole").mkdir()
    drive(home, tmp_path / "whole", broken=1)
    server, order = opened(home, tmp_path / "0")
    for client in order.clients:
        server.receive(order, client, home / "updates" / client)
    step = 0
    while True:
        step += 1
        counted, run = stopping(step, die), tmp_path / str(step)
        shutil.copytree(tmp_path / "0", run)
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "write", counted(Journal.write))
            patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
            with pytest.raises(Killed):
                drive(home, run, broken=1)
        is_over = len(events(run, "selected")) == 2
        drive(home, run, broken=1)
        assert digest(run) == digest(tmp_path / "whole"), step
        assert len(events(run, "abandoned")) == len(events(run, "committed")) == 1
        assert len(events(run, "selected")) == 2
        assert not list((run / "rounds").glob(".*"))
        if is_over:
            break
    assert step >= 10  # closed, aggregated, abandoned, removed, selected, each before and after


def test_what_the_journal_says_was_committed_must_be_there(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "rounds" / "0001")
    with pytest.raises(ArtifactError, match=r"accepted .*'s update, but .* is missing; restore it"):
        make_server(home, tmp_path).open(check_ins())


def test_evaluation_is_not_repeated_after_a_kill(home, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    server, order = opened(home, tmp_path)
    for client in order.clients:
        server.receive(order, client, home / "updates" / client)
    calls = []

    def evaluate(adapter):
        calls.append(adapter)
        return {"loss_small": 2.5}

    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.server.write_json", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            close(server, order, home, evaluate)
    record = close(make_server(home, tmp_path), order, home, evaluate)
    assert len(calls) == 1
    assert record["loss_small"] == 2.5


def test_who_was_asked_again_after_a_broken_attempt_answered_once(home, tmp_path):
    drive(home, tmp_path, broken=1)
    for known in seen(check_ins(), Journal(tmp_path / "journal.jsonl")):
        assert known.asked == known.answered <= 1


def test_the_server_remembers_who_answered_and_how_fast(whole):
    known = {check_in.client: check_in for check_in in seen(check_ins(), Journal(whole / "journal.jsonl"))}
    asked = {entry["client"] for entry in events(whole, "asked")}
    for client in CLIENTS:
        assert known[client].asked == known[client].answered == (client in asked)


@pytest.mark.parametrize(
    ("selection", "favoured"),
    [("uniform", None), ("data", "rich"), ("availability", "there"), ("resources", "fast")],
)
def test_a_policy_draws_those_it_favours_more_often(selection, favoured):
    clients = [
        CheckIn("plain", 10, tokens_per_second=10, asked=10, answered=5),
        CheckIn("rich", 90, tokens_per_second=10, asked=10, answered=5),
        CheckIn("there", 10, tokens_per_second=10, asked=100, answered=100),
        CheckIn("gone", 10, tokens_per_second=10, asked=100, answered=0),
        CheckIn("fast", 10, tokens_per_second=90, asked=10, answered=5),
        CheckIn("new", 10),
    ]
    drawn = [sample_cohort(clients, 1, 0, number, selection=selection)[0] for number in range(600)]
    counts = {check_in.client: drawn.count(check_in.client) for check_in in clients}
    if favoured is None:
        assert max(counts.values()) < 140
    else:
        assert max(counts, key=counts.get) == favoured
        # As often as its weight says.
        weights = SELECTIONS[selection](clients)
        share = dict(zip(counts, weights, strict=True))[favoured] / sum(weights)
        assert counts[favoured] / 600 == pytest.approx(share, abs=0.07)
    assert counts["gone"] < 140


def test_spare_clients_are_as_many_as_there_are():
    clients = [CheckIn(f"c{index}", 1) for index in range(5)]
    assert len(sample_cohort(clients, 2, 0, 1, spare=0.5)) == 3
    assert len(set(sample_cohort(clients, 4, 0, 1, spare=9.0))) == 5
    attempts = {tuple(sample_cohort(clients, 2, 0, 1, attempt=attempt)) for attempt in range(1, 9)}
    assert len(attempts) > 2
