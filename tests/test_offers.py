"""Over a store, too, only what changed goes down, and whoever can't use that gets the whole adapter."""

import json
import shutil
import uuid
from types import SimpleNamespace

import pytest
from federation import LORA, make_examples, make_federation, make_update
from safetensors.torch import load_file, save_file
from served import Server

from hf_fedlarge.adapters import ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, read_manifest, verify_files
from hf_fedlarge.clients import write_check_ins
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import Codec
from hf_fedlarge.errors import ArtifactError, BudgetError, StoreError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.orders import KEYS, ORDER, WHOLE, FailureDocument, OrderDocument, inbox, read_document, write_document
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.report import traffic
from hf_fedlarge.rounds import _Federation
from hf_fedlarge.secagg import Keys
from hf_fedlarge.secure_serve import SecureRound
from hf_fedlarge.server import RoundServer
from hf_fedlarge.store import Store, artifact_path, object_path
from hf_fedlarge.traffic import apply_change, changed_bytes, write_changes
from hf_fedlarge.trainers.join import join

CODEC = Codec(name="int8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`package`, the adapter `start`, examples."""
    path = tmp_path_factory.mktemp("offers")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=3, aggregator="fedavg")
    make_examples(path / "data.jsonl")
    return path


class Rounds:
    """Served rounds of clients that change B alone, as `server.jobs` counts them."""

    def __init__(self, home, path, monkeypatch, clients=("ann",)):
        self.home, self.path, self.names = home, path, clients
        self.store = Store(f"memory://{uuid.uuid4().hex}")
        self.said, self.jobs, self.read = [], [], []
        self.serve()
        call = Store._call

        def noted(store, operation, path, *arguments, **options):
            result = call(store, operation, path, *arguments, **options)
            if operation == "cat_file" and "packages" not in path and not self.putting:
                self.read.append((path.removeprefix(f"{self.store._root}/"), len(result)))
            return result

        def putting(*arguments, **options):
            """The server looks whether a manifest is whole, which goes down to nobody."""
            self.putting = True
            try:
                return put(*arguments, **options)
            finally:
                self.putting = False

        monkeypatch.setattr(Store, "_call", noted)
        put, self.putting = Store.put, False
        monkeypatch.setattr(Store, "put", putting)

    def serve(self):
        """Start the server, or start it again."""
        changes = {"clients": dict.fromkeys(self.names, 12), "aggregator": "fedavg", "codec": "int8"}
        self.server = Server(self.home, self.path / "run", self.store, **changes)
        write_check_ins(self.server.run, [CheckIn(name, 12) for name in self.names])

    def join(self, client):
        def train(job):
            self.jobs.append(job)
            verify_files(job.adapter, read_manifest(job.adapter, AdapterManifest), unneeded=SERVER_FILES)
            how = {"adapter": job.adapter, "codec": CODEC, "frozen": "A", "round_number": job.round}
            make_update(job.output, job.package, client, seed=job.round, **how)

        options = {"cache": self.path / client, "poll": 0.02, "once": True, "report": self.said.append}
        join(self.store.url, client, str(self.home / "data.jsonl"), train=train, **options)

    def run(self, number, clients):
        """One round that these clients answer and the others say they can't; returns what went down to each."""
        server = self.server
        server.open(number)
        server.clients.publish(server.jobs, server.round, server.order, list(self.names))
        for client in clients:  # one after the other, for libraries that aren't meant for threads
            self.join(client)
        for client in set(self.names) - set(clients):
            write_document(self.store, f"{inbox(number, client, 1)}/failed.json", FailureDocument(reason="away"))

        def asked(client):
            server.round.asked(client, server.jobs.missing_bytes(server.journal, client, number, down="offered"))

        for client, problem in server.clients.answers(server.jobs, server.round, server.order, asked):
            if problem is None:
                server.round.receive(server.order, client, server.round.work / client)
            else:
                server.round.fail(server.order, client, problem)
        previous = server.adapter(number - 1)
        how = {"previous": previous, "codec": CODEC, "aggregator": "fedavg", "round_number": number}
        close = lambda updates, late, adapter: aggregate_updates(  # noqa: E731
            updates, self.home / "package", adapter, **how
        )
        server.round.close(server.order, close, lambda _: {}, lambda *_: {})
        server.round.finish()
        return {client: entry["down"] for client, entry in traffic(server.journal, number)["bytes_by_client"].items()}

    def fetched(self):
        """What was read of adapters since the last call, and how many bytes that were."""
        read = [(path, size) for path, size in self.read if path.startswith(("objects/", "artifacts/"))]
        self.read.clear()
        return [path for path, _ in read], sum(size for _, size in read)


@pytest.fixture
def rounds(home, tmp_path, monkeypatch):
    return Rounds(home, tmp_path, monkeypatch)


def of_adapter(directory):
    manifest = read_manifest(directory, AdapterManifest)
    return manifest.digest, manifest.files[ADAPTER_WEIGHTS].sha256


def test_who_has_the_round_before_fetches_what_changed_and_the_journal_counts_that(rounds):
    first = rounds.run(1, ["ann"])
    rounds.fetched()
    second = rounds.run(2, ["ann"])
    before, now = rounds.server.adapter(0), rounds.server.adapter(1)
    digest, weights = of_adapter(now)
    assert [job.round for job in rounds.jobs] == [1, 2]
    paths, size = rounds.fetched()
    assert object_path(weights) not in paths
    assert artifact_path(digest) in paths
    assert size == second["ann"] == changed_bytes(now, before) < 0.7 * changed_bytes(now, None) < first["ann"]
    assert of_adapter(rounds.jobs[1].adapter) == (digest, weights)
    assert not [line for line in rounds.said if "whole" in line]


def damage(path, content=None):
    (path / ADAPTER_WEIGHTS).write_bytes(content or (path / ADAPTER_WEIGHTS).read_bytes()[:-1] + b"x")


@pytest.mark.parametrize("what", ["gone", "damaged", "tampered", "removed", "broken off", "of other tensors"])
def test_who_cannot_use_what_changed_takes_the_whole_and_it_is_counted(rounds, what, monkeypatch, tmp_path):
    rounds.run(1, ["ann"])
    [had] = rounds.path.glob("ann/clients/*/ann/0001/adapter")
    if what == "gone":
        shutil.rmtree(had)
    elif what == "damaged":
        damage(had)
    elif what != "broken off":
        put = Store.put_file

        def spoiled(store, path, entry):
            put(store, path, entry)
            if "changes" in path.parts:
                if what == "removed":
                    store.remove(object_path(entry.sha256))
                elif what == "tampered":
                    raw = store.read(object_path(entry.sha256), 10**7)
                    store.write(object_path(entry.sha256), raw[:-1] + bytes([raw[-1] ^ 1]))

        monkeypatch.setattr(Store, "put_file", spoiled)
    if what == "broken off":

        def half(store, entry, target):
            target.write_bytes(b"half")
            raise StoreError("The store is away.")

        monkeypatch.setattr(Store, "get_file", half)
    if what == "of other tensors":
        plain = apply_change
        monkeypatch.setattr(
            "hf_fedlarge.trainers.fetch.apply_change",
            lambda previous, change, output: plain(previous, other_tensors(change, tmp_path), output),
        )
    rounds.fetched()
    down = rounds.run(2, ["ann"])
    now = rounds.server.adapter(1)
    digest, weights = of_adapter(now)
    assert of_adapter(rounds.jobs[1].adapter) == (digest, weights)
    paths, _ = rounds.fetched()
    assert object_path(weights) in paths
    assert [line for line in rounds.said if line.startswith("round 2: fetching the whole adapter: ")]
    assert down["ann"] == changed_bytes(now, None)
    assert read_document(rounds.store, f"{inbox(2, 'ann', 1)}/{WHOLE}", FailureDocument).reason
    assert rounds.server.round.accepted.keys() == {"ann"}


def other_tensors(change, directory):
    other = directory / "other"
    save_file({f"{name}.more": tensor for name, tensor in load_file(change).items()}, other)
    return other


def test_who_missed_a_round_takes_the_whole_and_who_did_not_takes_what_changed(home, tmp_path, monkeypatch):
    rounds = Rounds(home, tmp_path, monkeypatch, clients=("ann", "ben"))
    rounds.run(1, ["ann", "ben"])
    rounds.run(2, ["ann"])
    down = rounds.run(3, ["ann", "ben"])
    now, before = rounds.server.adapter(2), rounds.server.adapter(1)
    assert down == {"ann": changed_bytes(now, before), "ben": changed_bytes(now, None)}
    assert {of_adapter(job.adapter) for job in rounds.jobs[-2:]} == {of_adapter(now)}
    assert not [line for line in rounds.said if "whole" in line]


def test_a_server_that_was_killed_offers_the_same_again(rounds, monkeypatch):
    rounds.run(1, ["ann"])
    offered = []
    for _ in range(2):
        rounds.serve()
        rounds.server.open(2)
        clients = rounds.server.clients
        document = clients.publish(rounds.server.jobs, rounds.server.round, rounds.server.order, ["ann"])
        offered.append(json.dumps([work.model_dump(mode="json") for work in document.work]))
        [entry] = document.work[0].change.files.values()
        assert document.work[0].change.clients == ["ann"]
        assert rounds.store.fs.size(rounds.store._at(object_path(entry.sha256))) == entry.size
    assert offered[0] == offered[1]
    assert rounds.run(2, ["ann"])["ann"] == changed_bytes(rounds.server.adapter(1), rounds.server.adapter(0))


def test_a_change_leaves_the_store_with_the_adapter_that_it_leads_to(rounds):
    objects = []
    for number in range(1, 5):
        rounds.run(number, ["ann"])
        if number > 1:
            order = rounds.server.jobs.changes(rounds.server.jobs.tiers[0], number)
            objects.append(object_path(order[1][ADAPTER_WEIGHTS].sha256))
    assert [rounds.store._size(path) is not None for path in objects] == [False, True, True]


def test_a_budget_has_room_for_whole_adapters(rounds):
    rounds.run(1, ["ann"])
    server = rounds.server
    server.open(2)
    spent = sum(entry["bytes"] for entry in server.journal.find("asked", "received", "told"))
    needed = changed_bytes(server.adapter(1), None) + server.jobs.upload_bytes("ann", 2)
    for budget, fits in ((spent + needed, True), (spent + needed - 1, False)):
        server.jobs.config = server.config.model_copy(update={"budget": f"{budget}B"})
        if fits:
            server.jobs.check_budget(server.journal, ["ann"], 2, down="offered")
        else:
            with pytest.raises(BudgetError):
                server.jobs.check_budget(server.journal, ["ann"], 2, down="offered")


def test_a_whole_adapter_that_was_counted_is_not_reserved_again(rounds):
    rounds.run(1, ["ann"])
    server = rounds.server
    server.open(2)
    server.round.asked("ann", server.jobs.missing_bytes(server.journal, "ann", 2, down="offered"))
    server.round.told(server.order, "ann", "down", "adapter", server.jobs.whole_bytes("ann", 2))
    needed = sum(entry["bytes"] for entry in server.journal.find("asked", "received", "told"))
    needed += server.jobs.upload_bytes("ann", 2)
    server.jobs.config = server.config.model_copy(update={"budget": f"{needed}B"})
    server.jobs.check_budget(server.journal, ["ann"], 2, down="offered")
    server.jobs.config = server.config.model_copy(update={"budget": f"{needed - 1}B"})
    with pytest.raises(BudgetError):
        server.jobs.check_budget(server.journal, ["ann"], 2, down="offered")


def test_a_package_that_is_fetched_again_is_counted_once(rounds):
    first = rounds.run(1, ["ann"])
    assert not rounds.server.journal.find("told")
    rounds.run(2, ["ann"])
    shutil.rmtree(rounds.path / "ann" / "packages")
    down = rounds.run(3, ["ann"])
    [told] = rounds.server.journal.find("told", what="package")
    package = rounds.server.jobs.tiers[0].manifest.total_bytes
    assert told["bytes"] == package < first["ann"]
    assert down["ann"] == package + changed_bytes(rounds.server.adapter(2), rounds.server.adapter(1))


def test_a_package_is_not_counted_twice_for_who_is_asked_for_the_first_time(home, tmp_path, monkeypatch):
    rounds = Rounds(home, tmp_path, monkeypatch, clients=("ben",))
    rounds.run(1, ["ben"])
    rounds.names = ("ann", "ben")
    rounds.serve()
    down = rounds.run(2, ["ann", "ben"])
    assert not rounds.server.journal.find("told", what="package")
    package = rounds.server.jobs.tiers[0].manifest.total_bytes
    assert down["ann"] == package + changed_bytes(rounds.server.adapter(1), None)


def test_a_budget_has_room_for_what_may_still_come_of_the_round_before(rounds, monkeypatch):
    rounds.run(1, ["ann"])
    server = rounds.server
    server.open(2)
    monkeypatch.setattr(RoundServer, "unheard", lambda self, order: ["ann"])
    monkeypatch.setattr(server.clients, "answers", lambda *_: [])
    federation = SimpleNamespace(clients=server.clients, jobs=server.jobs, journal=server.journal)
    needed = sum(entry["bytes"] for entry in server.journal.find("asked", "received", "told"))
    needed += changed_bytes(server.adapter(1), None) + server.jobs.upload_bytes("ann", 2)
    for late, more in (("refuse", 0), ("buffer", server.jobs.upload_bytes("ann", 1))):
        server.journal.find("selected", round=1)[-1]["late"] = late
        server.jobs.config = server.config.model_copy(update={"budget": f"{needed + more}B"})
        _Federation._ask(federation, server.round, server.order)
        server.jobs.config = server.config.model_copy(update={"budget": f"{needed + more - 1}B"})
        with pytest.raises(BudgetError):
            _Federation._ask(federation, server.round, server.order)


def test_where_every_tensor_changed_nothing_is_offered_and_the_whole_is_counted(rounds, monkeypatch):
    rounds.run(1, ["ann"])
    monkeypatch.setattr("hf_fedlarge.jobs.write_changes", lambda adapter, previous, output: {})
    rounds.serve()
    rounds.fetched()
    down = rounds.run(2, ["ann"])
    assert down["ann"] == rounds.fetched()[1] == changed_bytes(rounds.server.adapter(1), None)
    assert not [line for line in rounds.said if "whole" in line]


def test_that_the_whole_is_fetched_is_said_before_it_is(rounds, monkeypatch):
    rounds.run(1, ["ann"])
    [had] = rounds.path.glob("ann/clients/*/ann/0001/adapter")
    shutil.rmtree(had)
    download, said = Store._download, []

    def noted(store, *arguments):
        if rounds.server.order.round == 2:
            said.append(read_document(rounds.store, f"{inbox(2, 'ann', 1)}/{WHOLE}", FailureDocument))
        return download(store, *arguments)

    monkeypatch.setattr(Store, "_download", noted)
    rounds.run(2, ["ann"])
    assert said
    assert None not in said


def test_the_whole_adapter_of_a_late_client_is_counted_in_the_round_it_was_for(rounds, tmp_path):
    rounds.run(1, ["ann"])
    server = rounds.server
    server.open(2)
    write_document(rounds.store, f"{inbox(2, 'ann', 1)}/{WHOLE}", FailureDocument(reason="gone"))
    server.clients._take_late(server.jobs, server.round.earlier(2), tmp_path / "late")
    [told] = server.journal.find("told", what="adapter")
    assert (told["round"], told["client"], told["bytes"]) == (2, "ann", server.jobs.whole_bytes("ann", 2))


def test_the_whole_adapter_of_a_client_that_gives_only_keys_is_counted(rounds):
    rounds.run(1, ["ann"])
    server = rounds.server
    server.open(2)
    write_document(rounds.store, f"{inbox(2, 'ann', 1)}/{WHOLE}", FailureDocument(reason="gone"))
    secure = SecureRound(server.clients, server.config, server.jobs, server.round, server.order)
    assert secure._message("ann", KEYS, Keys, lambda *_: None) is None
    [told] = server.journal.find("told", what="adapter")
    assert told["bytes"] == server.jobs.whole_bytes("ann", 2)


def test_where_every_tensor_changed_there_is_no_file_of_changes(home, tmp_path):
    make_update(tmp_path / "ann", home / "package", "ann", adapter=home / "start")
    aggregate_updates([tmp_path / "ann"], home / "package", tmp_path / "next", previous=home / "start")
    assert write_changes(tmp_path / "next", home / "start", tmp_path / "changes") == {}
    assert not (tmp_path / "changes").exists()


def test_a_change_of_what_is_not_there_is_refused(home, tmp_path):
    weights = home / "start" / ADAPTER_WEIGHTS
    shutil.copyfile(weights, tmp_path / "change")
    other = other_tensors(tmp_path / "change", tmp_path)
    with pytest.raises(ArtifactError, match="expected its changes"):
        apply_change(weights, other, tmp_path / "made")


def test_an_order_without_changes_is_read_as_before(rounds):
    rounds.server.open(1)
    rounds.server.clients.publish(rounds.server.jobs, rounds.server.round, rounds.server.order, ["ann"])
    assert "change" not in json.loads(rounds.store.read(ORDER, 10**6))["work"][0]
    assert read_document(rounds.store, ORDER, OrderDocument).work[0].change is None
