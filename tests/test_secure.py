"""Secure aggregation over a store: the adapter of a round without it, whoever drops out or is killed when."""

import json
import re
import threading
import time
import uuid
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from families import make_checkpoint
from federation import LORA
from round_driver import CLIENTS
from secured import LIMIT, TOKENS, SecureServer, make_secure_home, train
from test_serve import Processes

from hf_fedlarge import combine, secagg, secure_serve
from hf_fedlarge.adapters import read_factors
from hf_fedlarge.agreement import agreed
from hf_fedlarge.artifacts import MANIFEST_NAME, AdapterManifest, UpdateManifest, read_manifest
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import AggregationSettings, PrivacySettings, SecureSettings
from hf_fedlarge.data import from_rows, write_jsonl
from hf_fedlarge.errors import ArtifactError, ConfigError, StoreError, UpdateRefusedError
from hf_fedlarge.fixed_point import levels
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import SIGNATURE_NAME, allow, new_key, read_key
from hf_fedlarge.ledger import Draw
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.orders import (
    AGREED,
    AGREEMENT,
    CLIENT_BYTES,
    FAILED,
    KEYS,
    MAX_NOTE_BYTES,
    ORDER,
    REVEALED,
    SHARES,
    FailureDocument,
    SecureOrder,
    TrainingOrder,
    inbox,
    read_document,
)
from hf_fedlarge.report import traffic
from hf_fedlarge.secure_sum import mask_update
from hf_fedlarge.store import Store
from hf_fedlarge.tensors import Factors
from hf_fedlarge.trainers.join import join
from hf_fedlarge.trainers.secure import SecureMember
from hf_fedlarge.update import MASKED_WORDS

STAGES = ("keys", "shares", "masked", "reveal")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, an adapter to start from for each aggregator, and every client's update of each."""
    path = tmp_path_factory.mktemp("secure")
    make_secure_home(path)
    return path


class Members:
    """Clients in threads; `away` says which (client, stage) don't answer, `killed` who dies once before answering.

    `told` gives, of a client and the order of a stage, the one that this client is shown in its place.
    """

    def __init__(self, home, store, cache, monkeypatch, aggregator="ffa", clients=CLIENTS, **options):
        self.trained, self.said, self.away, self.killed, self.failed = [], [], set(), set(), []
        self.threads, self.told = [], lambda client, order: order
        plain, this = SecureMember.answer, self

        def answer(self, order, work, update):
            order = this.told(self._client, order)
            about = (self._client, order.secure.stage)
            if about in this.away:
                raise StoreError(f"{about} is away.")
            if about in this.killed:
                this.killed.remove(about)
                # Half of them before, half of them when all is done but its being known.
                if len(about[0]) == 3:
                    plain(self, order, work, update)
                raise KeyboardInterrupt
            plain(self, order, work, update)

        def own_training(job):
            self.trained.append((job.client, job.round))
            number = CLIENTS.index(job.client) + 10 * (job.round - 1)
            train(job.output, home / "package", job.adapter, job.client, number)

        def take_part(client):
            while True:
                try:
                    keys = {name: value(client) if callable(value) else value for name, value in options.items()}
                    data = str(home / "data.jsonl")
                    how = {"poll": 0.02, "report": self.said.append, "train": own_training}
                    join(store.url, client, data, cache=cache / client, **how, **keys)
                    return
                except KeyboardInterrupt:
                    continue
                except Exception as error:
                    self.failed.append(error)
                    raise

        monkeypatch.setattr(SecureMember, "answer", answer)
        for client in clients:
            self.threads.append(threading.Thread(target=take_part, args=(client,), daemon=True))


@contextmanager
def together(server, members, last=0):
    """Clients run while the test does, and are told that it is over, with the adapter of a round."""
    for thread in members.threads:
        thread.start()
    try:
        yield
    finally:
        server.clients.end(server.adapter(last))
        for thread in members.threads:
            thread.join(20)
        assert not members.failed, members.said
        assert not any(thread.is_alive() for thread in members.threads), members.said


@pytest.fixture
def store():
    return Store(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def federation(home, store, tmp_path, monkeypatch):
    """Server and clients."""

    def make(aggregator="ffa", run="run", options=None, clients=CLIENTS, **changes):
        server = SecureServer(home, tmp_path / run, store, aggregator, **changes)
        members = Members(home, store, tmp_path / "cache", monkeypatch, aggregator, clients, **(options or {}))
        return server, members

    return make


@pytest.fixture
def known(tmp_path):
    """What clients are started with who sign, and know each other's keys."""
    for client in CLIENTS:
        allow(tmp_path / "allowed.json", new_key(tmp_path / f"{client}.pem", client))
    return {"key": lambda client: tmp_path / f"{client}.pem", "keys": tmp_path / "allowed.json"}


def plain(home, output, aggregator, clients, weighting="equal", previous=None, updates=None, **options):
    """The adapter of the same updates without secure aggregation."""
    own = home / aggregator
    settings = AggregationSettings(aggregator=aggregator, weighting=weighting)
    previous = previous or own / "start"
    updates = updates or [own / client for client in clients]
    aggregate_updates(updates, home / "package", output, settings=settings, previous=previous, **options)
    return read_factors(output)


def difference(one, two):
    """The largest, over all numbers of two adapters."""
    assert one.keys() == two.keys()
    return max((a - b).abs().max().item() for module in one for a, b in zip(one[module], two[module], strict=True))


# fp32 adds as much to a number as its own last place, of numbers below 1.
ROUNDING = 2.0**-24


# The sum


@pytest.mark.parametrize(
    ("aggregator", "weighting"), [("ffa", "equal"), ("ffa", "tokens"), ("fedavg", "tokens"), ("fedavg", "examples")]
)
def test_the_adapter_is_that_of_a_round_without_secure_aggregation(home, federation, tmp_path, aggregator, weighting):
    server, members = federation(aggregator, weighting=weighting)
    with together(server, members):
        server.whole()
    found = read_factors(server.adapter(1))
    expected = plain(home, tmp_path / "plain", aggregator, CLIENTS, weighting)
    # Each client loses less than a step of LIMIT / level, which the weights take into the mean: n LIMIT / Σ level.
    # A token of the most that is asked for is a share of the levels, and its rounding half of one of them.
    least = 10 if weighting != "equal" else 1
    most = {"tokens": server.jobs.asked("ann", 1).tokens, "examples": 10, "equal": 1}[weighting]
    together_levels = levels(4) * sum(TOKENS.values() if weighting == "tokens" else [least] * 4) / most
    step = 4 * LIMIT / together_levels
    rounding_of_weights = 2 * LIMIT * 4 / together_levels
    assert difference(found, expected) <= step + rounding_of_weights + ROUNDING
    assert difference(found, read_factors(home / aggregator / "start")) > 0.001
    if aggregator == "ffa":  # A comes back bit for bit
        start = read_factors(home / "ffa" / "start")
        assert all(torch.equal(found[module].A_RI, start[module].A_RI) for module in start)
    manifest = read_manifest(server.adapter(1), AdapterManifest)
    assert (manifest.contributions, manifest.aggregator, manifest.weighting) == ([], aggregator, weighting)
    assert [entry["found"]["lost"] for entry in server.journal.find("staged", stage="reveal")] == [[]]
    received = server.journal.find("received")
    assert len(received) == 4
    assert not any({"loss_before", "loss_after"} & entry.keys() for entry in received)


def test_two_rounds_go_on_from_each_other(home, federation, tmp_path):
    server, members = federation(secure={"limit": 1.0}, server_optimizer="momentum")
    with together(server, members):
        for number in (1, 2):
            server.whole(number)
    assert [round_number for _, round_number in sorted(members.trained, key=lambda one: one[1])] == [1] * 4 + [2] * 4
    assert read_manifest(server.adapter(2), AdapterManifest).server_optimizer == "momentum"
    settings = AggregationSettings(aggregator="ffa", weighting="equal", server_optimizer="momentum")
    previous = home / "ffa" / "start"
    for number in (1, 2):
        updates = [tmp_path / f"{client}-{number}" for client in CLIENTS]
        for place, update in enumerate(updates):
            train(update, home / "package", previous, CLIENTS[place], place + 10 * (number - 1))
        after = tmp_path / f"plain-{number}"
        aggregate_updates(updates, home / "package", after, settings=settings, previous=previous)
        previous = after
    assert difference(read_factors(previous), read_factors(server.adapter(2))) < 1e-8 + ROUNDING


@pytest.mark.parametrize("stage", STAGES)
def test_who_is_lost_at_a_stage_is_left_out_and_the_others_sum_up(home, federation, tmp_path, stage):
    server, members = federation(secure={"stage_seconds": 6.0}, deadline_seconds=6.0)
    members.away = {("ben", stage)}
    with together(server, members):
        server.whole()
    # Who only didn't reveal had sent its vector.
    counted = CLIENTS if stage == "reveal" else [client for client in CLIENTS if client != "ben"]
    [found] = [entry["found"] for entry in server.journal.find("staged", stage="reveal")]
    assert found["clients"] == len(counted)
    assert found["lost"] == (["ben"] if stage in ("shares", "masked") else [])
    expected = plain(home, tmp_path / "plain", "ffa", counted)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING
    assert not list((tmp_path / "cache").rglob("secure/*.json"))  # nor are ben's secrets kept when all is over


@pytest.mark.parametrize("last", ["in the last moment", "when it is being fetched"])
def test_masked_updates_that_were_there_at_the_deadline_count(federation, store, monkeypatch, last):
    server, members = federation()
    fetch, wait = Store.fetch, server.clients.patience.wait

    def pass_the_deadline():
        until(lambda: all(MANIFEST_NAME in store.names(inbox(1, client, 1)) for client in CLIENTS))
        server.round.begin_wait(-1)

    def fetching(*arguments, **options):
        if not server.round.is_late:
            pass_the_deadline()
        return fetch(*arguments, **options)

    def waiting(*arguments):
        if server.round.stage(server.order, "shares") and not server.round.stage(server.order, "masked"):
            pass_the_deadline()
        else:
            wait(*arguments)

    if last == "in the last moment":
        monkeypatch.setattr(server.clients.patience, "wait", waiting)
    else:
        monkeypatch.setattr(Store, "fetch", fetching)
    with together(server, members):
        server.whole()
    assert server.journal.find("staged", stage="masked")[0]["found"]["survivors"] == sorted(CLIENTS)
    assert server.round.refused == []


def test_who_is_taken_out_of_the_file_is_no_longer_waited_for(home, federation, store, tmp_path):
    stay = [client for client in CLIENTS if client != "ben"]
    begun, members = federation(clients=stay, deadline_seconds=None)
    begun.open()
    server = SecureServer(home, tmp_path / "run", store, deadline_seconds=None, clients=dict.fromkeys(stay, 10))
    with together(server, members):
        server.whole()
    [found] = [entry["found"] for entry in server.journal.find("staged", stage="reveal")]
    assert (found["clients"], found["lost"]) == (3, [])
    assert [entry["client"] for entry in server.round.refused] == ["ben"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_with_too_few_a_round_is_abandoned_and_the_next_attempt_has_new_keys(home, federation, store, tmp_path, stage):
    server, members = federation(secure={"stage_seconds": 3.0})
    members.away = {("ben", stage), ("dan", stage)}
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match=r"Round 1 is abandoned: [0-2] clients .* at least 3 are needed"):
            server.ask()
        revealed = [client for client in CLIENTS if store.read(f"{inbox(1, client, 1)}/{REVEALED}", 10**6) is not None]
        assert len(revealed) == (2 if stage == "reveal" else 0)  # fewer than the threshold
        assert not (server.round.work / ".secure" / "sum").exists()
        members.away = set()
        server.whole()
    assert sorted(members.trained) == [(client, 1) for client in CLIENTS]  # once, though asked for twice
    first, second = (entry["found"]["roster"] for entry in server.journal.find("staged", stage="keys"))
    assert first != second
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING


def test_an_attempt_of_which_all_clients_failed_is_abandoned_by_a_server_that_was_killed(federation):
    server, _ = federation()
    order = server.open()
    for client in CLIENTS:
        server.round.fail(order, client, "nothing to learn")
    with pytest.raises(UpdateRefusedError, match="0 clients have trained and advertised keys"):
        server.ask()


@pytest.mark.parametrize("stage", STAGES)
def test_clients_that_were_killed_go_on(home, federation, tmp_path, stage):
    server, members = federation()
    members.killed = {("ben", stage), ("cleo", stage)}
    with together(server, members):
        server.whole()
    assert not members.killed
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING
    assert sorted(members.trained) == [(client, 1) for client in CLIENTS]


def test_once_is_one_round_with_all_of_its_stages(federation):
    server, members = federation(options={"once": True}, secure={"stage_seconds": 3.0})
    members.away = {("dan", "shares")}
    with together(server, members):
        server.whole()
        for thread in members.threads:
            thread.join(20)
            assert not thread.is_alive()


def test_a_server_killed_at_any_entry_of_its_journal_goes_on_with_what_it_asked_before(
    home, federation, store, tmp_path, monkeypatch, known
):
    server, members = federation(keys=str(known["keys"]), options=known)
    write, written = Journal.write, []
    step = 1

    def dying(self, event, **fields):
        written.append(event)
        if len(written) == step:
            raise KeyboardInterrupt
        write(self, event, **fields)
        if len(written) == step + 1:
            raise KeyboardInterrupt

    with together(server, members):
        monkeypatch.setattr(Journal, "write", dying)
        for _ in range(200):
            written.clear()
            try:
                server.whole()
                break
            except KeyboardInterrupt:
                step = 1 if step > 6 else step + 1
                monkeypatch.setattr(Journal, "write", write)
                server = SecureServer(home, tmp_path / "run", store, keys=str(known["keys"]))
                monkeypatch.setattr(Journal, "write", dying)
        monkeypatch.setattr(Journal, "write", write)
    assert server.round.committed.exists()
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING
    for stage in (*STAGES, "agree"):
        assert len(server.journal.find("staged", stage=stage)) == 1
    assert len(server.journal.find("validated")) == 4
    told = [(entry["client"], entry["way"], entry["what"]) for entry in server.journal.find("told")]
    assert len(told) == len(set(told)) >= 4 * 6


# The commands


@pytest.fixture
def processes(tmp_path):
    made = Processes(tmp_path)
    yield made
    made.end()


def test_commands_that_share_a_directory_end_with_the_sum_of_what_was_trained(tmp_path, processes):
    """Real training, by two clients in processes of their own, whose plain updates are still in their cache."""
    make_checkpoint(tmp_path / "checkpoint", layers=2, tokenizer=True)
    for team in ("blue", "green", "public"):
        write_jsonl(from_rows([{"text": f"{team} {index}"} for index in range(6)]), tmp_path / f"{team}.jsonl")
    federation = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "eval_data": str(tmp_path / "public.jsonl"),
        "clients": {"blue": 6, "green": 6},
        "keep_layers": 1.0,
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "rounds": 1,
        "aggregator": "ffa",
        "weighting": "equal",
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True},
        "client_eval_examples": 0,
        "secure": {},
    }
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(federation))
    run, store, cache = tmp_path / "run", tmp_path / "store", tmp_path / "cache"
    words = ["serve", tmp_path / "federation.yaml", "--output", run, "--store", store, "--poll", 0.05]
    started = [processes.start("server", *words)]
    for team in ("blue", "green"):
        words = ["--data", tmp_path / f"{team}.jsonl", "--cache", cache, "--poll", 0.05]
        started.append(processes.start(team, "join", store, "--client", team, *words))
    for process in started:
        process.join(240)
        assert process.exitcode == 0, processes.logs()
    settings = AggregationSettings(aggregator="ffa", weighting="equal")
    start, updates = run / "rounds" / "0000" / "adapter", sorted(cache.glob("clients/*/*/0001/update"))
    aggregate_updates(updates, run / "package", tmp_path / "plain", settings=settings, previous=start, min_updates=2)
    found = read_factors(run / "rounds" / "0001" / "adapter")
    assert difference(found, read_factors(tmp_path / "plain")) < 2 / levels(2) + ROUNDING
    assert difference(found, read_factors(start)) > 1e-3
    record = json.loads((run / "rounds" / "0001" / "round.json").read_text())
    assert record["secure"] == {"clients": 2, "of": 2, "lost": [], "clipped": 0}
    assert record["clients"] == []
    assert not list(cache.glob("clients/*/*/0001/secure/*.json"))
    assert not list((store / "secure").iterdir())


# What is sent


def test_bytes_are_those_of_the_journal_and_within_what_was_announced(federation, store, known):
    server, members = federation(
        options=known, secure={"threshold": 0.9}
    )  # or the last one to reveal would not be waited for
    sizes = {}
    with together(server, members):
        server.open()
        server.ask()
        for client in CLIENTS:
            place = inbox(1, client, 1)
            names = store.names(place)
            assert set(names) == {KEYS, SHARES, AGREED, REVEALED, MANIFEST_NAME, SIGNATURE_NAME, MASKED_WORDS}
            sizes[client] = {name: len(store.read(f"{place}/{name}", 10**7)) for name in names}
        server.close()
    words = server.jobs.expected("ann", 1).words
    start = read_factors(server.adapter(0))
    assert words == sum(pair.B_OR.numel() for pair in start.values()) + 2
    assert all(size[MASKED_WORDS] == 4 * words for size in sizes.values())
    by_client = traffic(server.journal, 1)["bytes_by_client"]
    told = sum(entry["bytes"] for entry in server.journal.find("told"))
    assert 0 < told <= len(CLIENTS) * (MAX_NOTE_BYTES + CLIENT_BYTES * len(CLIENTS))  # what a budget counts with
    for client, size in sizes.items():
        assert by_client[client]["up"] == sum(size.values())
        assert sum(size[name] for name in (MANIFEST_NAME, SIGNATURE_NAME, MASKED_WORDS)) <= server.jobs.upload_bytes(
            client, 1
        )


def test_masked_updates_look_like_noise_and_are_no_updates_for_others(home, federation, tmp_path):
    server, members = federation()
    with together(server, members):
        server.open()
        server.ask()
        words = {client: np.fromfile(server.round.work / client / MASKED_WORDS, "<u4") for client in CLIENTS}
        for masked in words.values():
            counts = np.bincount(masked.view(np.uint8), minlength=256)
            assert abs((counts - counts.mean()) / counts.std()).max() < 6
            assert counts.std() < 2 * counts.mean() ** 0.5
        manifest = read_manifest(server.round.work / "ann", UpdateManifest)
        assert (manifest.examples, manifest.tokens, manifest.loss_before) == (0, 0, None)
        assert (manifest.roster, manifest.client) == (server.round.stage(server.order, "keys")["roster"], "ann")
        with pytest.raises(UpdateRefusedError, match="its update is masked; this round takes others"):
            plain(home, tmp_path / "no", "ffa", (), updates=[server.round.work / "ann"])
        server.close()


def test_an_update_that_is_not_masked_is_refused(home, federation, store):
    server, members = federation(clients=("ben", "cleo", "dan"), secure={"stage_seconds": 1.5}, deadline_seconds=3)
    with together(server, members):
        server.open()
        store.send(home / "ffa" / "ann", inbox(1, "ann", 1))
        secrets = secagg.new_secrets()
        keys = secagg.advertised("ann", secrets, "signed by nobody")
        store.write(f"{inbox(1, 'ann', 1)}/{KEYS}", keys.model_dump_json(exclude_none=True).encode())

        def share():
            roster = wait_for(store, "secure/0001/1/roster.json", secagg.Roster)
            shares = secagg.shared(secrets, roster, "ann")
            store.write(f"{inbox(1, 'ann', 1)}/{SHARES}", shares.model_dump_json().encode())

        sharing = threading.Thread(target=share, daemon=True)
        sharing.start()
        server.ask()
        sharing.join(10)
        server.close()
    [reason] = [entry["reason"] for entry in server.round.refused]
    assert "ann refused" in reason
    assert "masked for others than this attempt's clients" in reason or "is not masked" in reason


def wait_for(store, path, kind, seconds=15):
    until(lambda: read_document(store, path, kind, 10**6) is not None, seconds)
    return read_document(store, path, kind, 10**6)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (KEYS, b"{", "is not JSON"),
        (KEYS, b"{" + b" " * 100_000 + b"}", "has 100002 bytes; expected at most"),
        (KEYS, b'{"client": "ann", "client": "ann"}', "holds a key twice"),
        (KEYS, {"client": "ben"}, "they are in the name of ben"),
        (KEYS, {"mask": "00"}, "mask: String should match"),
        (KEYS, {"more": 1}, "more is not known"),
        (KEYS, {"mask": "00" * 32}, "is none that anybody can agree with"),
        (SHARES, b'{"boxes": {}}', "it has boxes for 0 clients"),
        (SHARES, b'{"boxes": {"ben": "00"}}', "boxes.ben: String should match"),
        (FAILED, b'{"reason": "no\\nlines"}', "reason: String should match"),
    ],
)
def test_a_message_that_is_malformed_is_refused_with_the_cause_and_the_others_go_on(
    home, federation, store, tmp_path, monkeypatch, name, content, sentence
):
    server, members = federation(secure={"stage_seconds": 2.0})
    write = Store.write

    def writing(self, path, raw):
        """What ann writes is something else."""
        if path == f"{inbox(1, 'ann', 1)}/{name if name != FAILED else KEYS}":
            if isinstance(content, dict):
                raw = json.dumps(json.loads(raw) | content).encode()
            else:
                path, raw = path.rpartition("/")[0] + f"/{name}", content
        write(self, path, raw)

    monkeypatch.setattr(Store, "write", writing)
    with together(server, members):
        server.whole()
    assert any(entry["client"] == "ann" and sentence in entry["reason"] for entry in server.round.refused)
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS[1:])
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING


@pytest.mark.parametrize("given", ["both", "none"])
def test_shares_of_others_than_were_asked_for_are_refused(federation, monkeypatch, given):
    """Of a client that gives away both secrets of another, or none."""
    server, members = federation(secure={"threshold": 0.9})  # everybody is needed
    write = Store.write

    def writing(self, path, raw):
        if path == f"{inbox(1, 'ann', 1)}/{REVEALED}":
            seeds = json.loads(raw)["seeds"] if given == "both" else {}
            raw = json.dumps({"seeds": seeds, "masks": seeds}).encode()
        write(self, path, raw)

    monkeypatch.setattr(Store, "write", writing)
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match=r"ann refused: it has other shares than were asked for"):
            server.ask()


def test_a_masked_update_of_another_size_or_attempt_is_refused(home, federation, store, tmp_path, monkeypatch):
    import hf_fedlarge.trainers.secure as secure

    server, members = federation(secure={"stage_seconds": 2.0})
    masked = secure.mask_update

    def wrong(update, adapter, output, order, clients, roster, add_masks, key=None):
        manifest = read_manifest(update, UpdateManifest)
        if manifest.client == "ann":
            roster = "0" * 64
        if manifest.client == "ben":
            add = add_masks
            add_masks = lambda words: add(words) or words.resize(len(words) - 1, refcheck=False)  # noqa: E731
        masked(update, adapter, output, order, clients, roster, add_masks, key)

    monkeypatch.setattr(secure, "mask_update", wrong)
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match="2 clients have sent their masked updates; at least 3 are needed"):
            server.ask()
    reasons = {entry["client"]: entry["reason"] for entry in server.round.refused}
    assert "masked for others than this attempt's clients" in reasons["ann"]
    assert "expected masked.bin of" in reasons["ben"]


def test_nonsense_under_masks_gives_no_adapter(federation, monkeypatch):
    import hf_fedlarge.trainers.secure as secure

    server, members = federation()
    masked = secure.mask_update

    def wrong(update, adapter, output, order, clients, roster, add_masks, key=None):
        def add(words):
            if read_manifest(update, UpdateManifest).client == "ann":
                words[:-2] = np.random.default_rng(0).integers(0, 2**32, len(words) - 2, dtype=np.uint32)
            add_masks(words)

        masked(update, adapter, output, order, clients, roster, add, key)

    monkeypatch.setattr(secure, "mask_update", wrong)
    with together(server, members):
        server.open()
        with pytest.raises(
            UpdateRefusedError, match=r"The sum has a value of .* sent something else than was asked for"
        ):
            server.ask()


@pytest.mark.parametrize("limit", [30_000.0, 0.0001])
def test_a_limit_that_leaves_the_heaviest_client_s_change_alone_is_refused_by_the_others(home, tmp_path, limit):
    """Of 1,000 tokens something would be left in words, of 7 nothing; too low a limit makes signs of all numbers."""
    order = SecureOrder(stage="masked", limit=limit, weighting="tokens", most=1000)
    args = (home / "ffa" / "start", tmp_path / "masked", order)
    with pytest.raises(ArtifactError, match="the numbers that dan changed, and so show what others changed"):
        mask_update(home / "ffa" / "dan", *args, 4, "0" * 64, lambda words: None)
    assert not (tmp_path / "masked").exists()
    fine = order.model_copy(update={"limit": 1.0})
    mask_update(home / "ffa" / "dan", *args[:2], fine, 4, "0" * 64, lambda words: None)


def test_who_refuses_a_limit_is_left_out_and_the_server_told(federation):
    server, members = federation(secure={"limit": 1e-4})
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match="0 clients have sent their masked updates"):
            server.ask()
    failed = server.journal.find("failed")
    assert sorted(entry["client"] for entry in failed) == sorted(CLIENTS)
    assert all("would cut to 0 or clip more than a quarter" in entry["reason"] for entry in failed)


# Keys


def test_clients_that_sign_and_know_each_other(home, federation, tmp_path):
    lines = {client: new_key(tmp_path / f"{client}.pem", client) for client in CLIENTS}
    for client in CLIENTS:
        allow(tmp_path / "allowed.json", lines[client])
    new_key(tmp_path / "other.pem", "dan")
    file_of = lambda client: tmp_path / ("other.pem" if client == "dan" else f"{client}.pem")  # noqa: E731
    server, members = federation(
        keys=str(tmp_path / "allowed.json"), options={"key": file_of, "keys": tmp_path / "allowed.json"}
    )
    with together(server, members):
        server.whole()
    [reason] = [entry["reason"] for entry in server.round.refused]
    assert "dan refused: dan's keys are refused: it is signed with the key" in reason
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS[:3])
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING


def test_a_server_that_swaps_a_key_learns_nothing_of_clients_that_know_each_other(federation, store, tmp_path):
    """It has no list itself, so that it takes its own invention; the clients have one."""
    for client in CLIENTS:
        allow(tmp_path / "allowed.json", new_key(tmp_path / f"{client}.pem", client))
    options = {"key": lambda client: tmp_path / f"{client}.pem", "keys": tmp_path / "allowed.json"}
    server, members = federation(clients=CLIENTS[:3], options=options, secure={"stage_seconds": 2.0})
    with together(server, members):
        server.open()
        keys = secagg.advertised("dan", secagg.new_secrets(), "signed by nobody")
        store.write(f"{inbox(1, 'dan', 1)}/{KEYS}", keys.model_dump_json(exclude_none=True).encode())
        with pytest.raises(UpdateRefusedError, match="0 clients have shared their secrets"):
            server.ask()
        for client in CLIENTS[:3]:
            failure = read_document(store, f"{inbox(1, client, 1)}/{FAILED}", FailureDocument)
            assert "dan's keys are refused: they are not signed" in failure.reason


# That all were told the same survivors


def revealing(store):
    return [client for client in CLIENTS if store.read(f"{inbox(1, client, 1)}/{REVEALED}", 10**6) is not None]


def reason_of(store, client):
    return wait_for(store, f"{inbox(1, client, 1)}/{FAILED}", FailureDocument).reason


def test_what_the_server_leaves_in_a_stage_is_written_again_where_the_store_fails(
    home, federation, tmp_path, known, monkeypatch
):
    server, members = federation(keys=str(known["keys"]), options=known)
    write, failures = Store.write, {}

    def failing(self, path, content):
        if path.startswith("secure/"):
            failures[path] = failures.get(path, 0) + 1
            if failures[path] <= 2:
                raise StoreError("the line is dead.")
        write(self, path, content)

    monkeypatch.setattr(Store, "write", failing)
    with together(server, members):
        server.whole()
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING
    assert len(failures) == 2 + len(CLIENTS)  # the roster, each one's boxes, the agreement
    assert set(failures.values()) == {3}


@pytest.mark.parametrize("stage", ["masked", "agree", "reveal"])
def test_clients_that_agree_sum_up_whoever_of_them_is_lost_when(home, federation, store, tmp_path, known, stage):
    seconds = {"stage_seconds": 4.0} if stage == "masked" else {}  # in the others nobody waits for one of four
    server, members = federation(keys=str(known["keys"]), options=known, secure=seconds)
    members.away = {("ben", stage)}
    with together(server, members):
        server.open()
        server.ask()
        server.close()
    counted = ("ann", "cleo", "dan") if stage == "masked" else CLIENTS
    expected = plain(home, tmp_path / "plain", "ffa", counted)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING
    [found] = [entry["found"] for entry in server.journal.find("staged", stage="agree")]
    assert len(found["signers"]) >= 3
    told = [entry["client"] for entry in server.journal.find("told", what=AGREEMENT)]
    assert sorted(told) == sorted(counted)


def test_one_below_a_quorum_reveals_nothing(federation, store, known):
    server, members = federation(keys=str(known["keys"]), options=known, secure={"stage_seconds": 2.0})
    members.away = {("ben", "agree"), ("dan", "agree")}
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match="2 clients have signed who the survivors are; at least 3 are"):
            server.ask()
        assert revealing(store) == []
        assert not (server.round.work / ".secure" / "sum").exists()


def test_killed_clients_sign_once_more_what_they_signed(home, federation, tmp_path, known):
    server, members = federation(options=known)
    members.killed = {("ben", "agree"), ("cleo", "agree"), ("ben", "reveal")}
    with together(server, members):
        server.whole()
    expected = plain(home, tmp_path / "plain", "ffa", CLIENTS)
    assert difference(read_factors(server.adapter(1)), expected) < 1e-8 + ROUNDING


@pytest.mark.parametrize("knowing", [True, False])
def test_a_server_that_tells_two_clients_different_survivors_gets_no_share_of_either(federation, store, known, knowing):
    """Dan's vector came. Ann and ben are told that it didn't, which has them give away his mask's key."""
    server, members = federation(options=known if knowing else {}, secure={"stage_seconds": 4.0})

    def told(client, order):
        if not order.secure.survivors:
            return order
        if client in ("ann", "ben"):
            survivors = ["ann", "ben", "cleo"]
            return order.model_copy(update={"secure": order.secure.model_copy(update={"survivors": survivors})})
        if order.secure.stage == "reveal":  # so that the attempt isn't over before they had their chance
            until(lambda: all(heard & set(store.names(inbox(1, name, 1))) for name in ("ann", "ben")))
        return order

    heard, members.told = {REVEALED, FAILED}, told
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match=r"[02] clients have revealed their shares"):
            server.ask()
        assert revealing(store) == ([] if knowing else list(CLIENTS))
        for client in CLIENTS if knowing else ():
            assert re.search("[0-2] clients signed the survivors that this one was told", reason_of(store, client))
        for client in () if knowing else CLIENTS:
            shares = read_document(store, f"{inbox(1, client, 1)}/{REVEALED}", secagg.Revealed, 10**6)
            assert ("dan" in shares.masks) == (client in ("ann", "ben")) != ("dan" in shares.seeds)


@pytest.mark.parametrize("how", ["forged", "earlier", "repeated", "left out"])
def test_a_server_that_has_too_few_signatures_gets_no_share(federation, store, tmp_path, monkeypatch, known, how):
    """Ann and ben signed. What the server passes on beside their signatures doesn't count."""
    waited_for = how in ("left out", "earlier")  # a stage to its end
    server, members = federation(options=known, secure={"stage_seconds": 4.0 if waited_for else 30.0})
    new_key(tmp_path / "eve.pem", "cleo")
    write, attempts = Store.write, []

    def writing(self, path, raw):
        if path.endswith(f"/{AGREEMENT}"):
            good = json.loads(raw)["signatures"]
            attempts.append(good)
            made = {name: good[name] for name in ("ann", "ben")}
            if how == "forged":
                roster = read_document(store, "secure/0001/1/roster.json", secagg.Roster, 10**6)
                names = list(CLIENTS)
                forged = agreed("cleo", read_key(tmp_path / "eve.pem"), roster, names, names).signature
                made["cleo"] = forged.model_dump(mode="json")
            if how == "earlier" and len(attempts) == 2:
                made["cleo"] = attempts[0]["cleo"]
            if how == "repeated":
                made |= {"cleo": good["ann"], "dan": good["ben"]}
            if how != "earlier" or len(attempts) == 2:
                raw = json.dumps({"signatures": made}).encode()
        write(self, path, raw)

    monkeypatch.setattr(Store, "write", writing)
    monkeypatch.setattr(secure_serve, "quorum", lambda roster: 4)  # so that all four sign
    if how == "left out":
        monkeypatch.setattr(secure_serve, "is_signed", lambda roster: False)
    members.away = {(client, "reveal") for client in CLIENTS} if how == "earlier" else set()
    with together(server, members):
        for attempt in (1, 2) if how == "earlier" else (1,):
            server.open()
            with pytest.raises(UpdateRefusedError, match="0 clients have revealed their shares"):
                server.ask()
            members.away = set()
            places = [inbox(1, client, attempt) for client in CLIENTS]
            assert not any(REVEALED in store.names(place) for place in places)
        if how != "left out":  # where they wait for what isn't there
            reasons = [read_document(store, f"{place}/{FAILED}", FailureDocument).reason for place in places]
            assert all("2 clients signed the survivors that this one was told" in reason for reason in reasons)


def test_a_client_signs_no_second_list_of_survivors_and_reveals_nothing_for_one(federation, store, known):
    server, members = federation(options=known, secure={"stage_seconds": 4.0})

    def told(client, order):
        if client == "ann" and order.secure.stage == "reveal":
            changed = order.secure.model_copy(update={"survivors": ["ann", "ben", "cleo"]})
            return order.model_copy(update={"secure": changed})
        if order.secure.stage == "reveal":
            until(lambda: FAILED in store.names(inbox(1, "ann", 1)))
        return order

    members.told = told
    with together(server, members):
        server.whole()
        assert reason_of(store, "ann") == "ann was asked before with another survivors in this attempt."
        assert "ann" not in revealing(store)


def test_who_has_no_key_signs_nothing(federation, store, monkeypatch):
    server, members = federation(secure={"stage_seconds": 2.0})
    monkeypatch.setattr(secure_serve, "is_signed", lambda roster: True)
    with together(server, members):
        server.open()
        with pytest.raises(UpdateRefusedError, match="0 clients have signed who the survivors are"):
            server.ask()
        assert "ann is asked to sign the survivors, and has no key: join with --key" in reason_of(store, "ann")


# What a client answers once


@pytest.mark.parametrize("what", ["survivors", "sharers", "limit", "training", "roster", "shown", "update"])
def test_a_client_that_is_asked_again_with_something_else_reveals_nothing(
    home, federation, store, tmp_path, monkeypatch, what
):
    """The server changes its mind between the stages; orders are what clients see, so they are changed there."""
    server, members = federation(secure={"stage_seconds": 2.0})
    publish, write, refusing = server.clients.publish, Store.write, what == "survivors"

    def publishing(jobs, round_server, order, waiting, secure):
        [home_of_ann] = (tmp_path / "cache").glob("ann/clients/*/ann/0001") if secure.stage != "keys" else [None]
        if what == "survivors" and secure.stage == "reveal":
            publish(jobs, round_server, order, waiting, secure)
            until(lambda: '"ann"' in (home_of_ann / "secure" / "1.json").read_text().partition("survivors")[2])
            secure = secure.model_copy(update={"survivors": ["ann", "ben", "cleo"]})
        if what == "sharers" and secure.stage == "reveal":
            changed = ["ann", "ben", "cleo"]
            boxes = read_document(store, "secure/0001/1/boxes/ann.json", secagg.Shares, 10**6).boxes
            fewer = secagg.Shares(boxes={name: boxes[name] for name in changed})
            write(store, "secure/0001/1/boxes/ann.json", fewer.model_dump_json().encode())
            secure = secure.model_copy(update={"sharers": changed})
        if what == "limit" and secure.stage == "masked":
            secure = secure.model_copy(update={"limit": 0.1})
        if what == "training" and secure.stage == "shares":
            monkeypatch.setattr("hf_fedlarge.serve.training_order", lambda _: TrainingOrder(max_steps=2))
        if what in ("roster", "shown") and secure.stage == "masked":
            roster = read_document(store, "secure/0001/1/roster.json", secagg.Roster, 10**6)
            forged = [*roster.clients[:3], secagg.advertised("dan", secagg.new_secrets(), roster.context)]
            forged = roster.model_copy(update={"clients": forged})
            write(store, "secure/0001/1/roster.json", forged.model_dump_json(exclude_none=True).encode())
            if what == "roster":  # else somebody else than the server changed it
                secure = secure.model_copy(update={"roster": forged.digest})
        if what == "update" and secure.stage == "masked":
            train(tmp_path / "other", home / "package", home / "ffa" / "start", "ann", 99)
            for name in ("adapter_model.safetensors", MANIFEST_NAME):
                (home_of_ann / "update" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        document = publish(jobs, round_server, order, waiting, secure)
        if what == "survivors" and secure.stage == "reveal":  # or the others would be enough, and end the round
            wait_for(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument)
        return document

    def writing(self, path, raw):
        """Nothing that ann reveals gets through at first."""
        if refusing and path == f"{inbox(1, 'ann', 1)}/{REVEALED}":
            raise StoreError("the line is dead.")
        write(self, path, raw)

    monkeypatch.setattr(server.clients, "publish", publishing)
    monkeypatch.setattr(Store, "write", writing)
    with together(server, members):
        server.open()
        if what in ("sharers", "roster", "shown", "limit", "training"):
            with pytest.raises(UpdateRefusedError, match=r"0 clients have (revealed|sent|shared)"):
                server.ask()
        else:
            server.ask()
        failure = read_document(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument)
        assert store.read(f"{inbox(1, 'ann', 1)}/{REVEALED}", 10**6) is None
    assert {
        "survivors": "ann has revealed its shares in this attempt, for other survivors",
        "sharers": "ann was asked before with another sharers",
        "limit": "ann advertised keys for ",
        "training": "ann advertised keys for ",
        "roster": "ann was asked before with another roster",
        "shown": "ann is shown another list of keys than the order is about",
        "update": "ann's update is another one than when it advertised its keys",
    }[what] in failure.reason


def test_shares_that_were_too_late_are_revealed_when_the_server_gives_the_stage_more_time(
    federation, store, monkeypatch
):
    """As one does that was down at the deadline."""
    server, members = federation()
    publish = server.clients.publish

    def publishing(jobs, round_server, order, waiting, secure):
        if secure.stage == "reveal":
            round_server.begin_wait(0.3)
            publish(jobs, round_server, order, waiting, secure)
            until(lambda: any("before the shares were ready" in line for line in members.said))
            round_server.begin_wait(15)
        document = publish(jobs, round_server, order, waiting, secure)
        if secure.stage == "reveal":
            until(lambda: "ann" in revealing(store))
        return document

    def told(client, order):
        if (client, order.secure.stage) == ("ann", "reveal") and not late:
            late.append(client)
            until(lambda: time.time() > order.closes_at)
        return order

    late, members.told = [], told
    monkeypatch.setattr(server.clients, "publish", publishing)
    with together(server, members):
        server.whole()


def test_an_order_that_the_server_did_not_sign_has_nobody_reveal_shares_after_an_attempt_was_given_up(
    federation, store, tmp_path, monkeypatch
):
    """Ann has her shares ready and looks whether they are still asked for; somebody else answers that."""
    public = new_key(tmp_path / "server.pem", "server").split()[2]
    options = {"server_key": public}
    server, members = federation(options=options, key=read_key(tmp_path / "server.pem"))
    revealed, read, forging = secagg.revealed, Store.read, threading.local()

    def revealing(opened, roster, client, survivors):
        forging.now = client == "ann"
        return revealed(opened, roster, client, survivors)

    def reading(self, path, most_bytes):
        raw = read(self, path, most_bytes)
        if path == ORDER and getattr(forging, "now", False):
            forging.now = False
            order = json.loads(raw)
            del order["signature"]
            raw = json.dumps(order | {"closes_at": order["closes_at"] + 1000}).encode()
        return raw

    monkeypatch.setattr(secagg, "revealed", revealing)
    monkeypatch.setattr(Store, "read", reading)
    with together(server, members, last=1):
        server.whole()
        failure = wait_for(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument)
        assert store.read(f"{inbox(1, 'ann', 1)}/{REVEALED}", 10**6) is None
    assert "is not signed; expected a signature by the server's key" in failure.reason


def until(true, seconds=15):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# With differential privacy


def test_with_privacy_the_sum_gets_the_noise_and_is_divided_by_the_cohort(home, tmp_path, store, monkeypatch):
    pytest.importorskip("dp_accounting")
    privacy = PrivacySettings(clip=0.2, noise_multiplier=1.0, delta=1e-6)
    own = tmp_path / "ffa"
    start_adapter(home / "package", own / "start", LORA, seed=0, aggregator="ffa", privacy=privacy)
    made = []

    def noise(before, trained, deviation):
        made.append(deviation)
        return Factors(*(factor.double() for factor in before))

    monkeypatch.setattr(combine, "with_noise", noise)
    server = SecureServer(
        home,
        tmp_path / "run",
        store,
        weighting="equal",
        privacy=privacy.model_dump(),
        secure={"stage_seconds": 2.0},
        deadline_seconds=3,
        start=own / "start",
    )
    members = Members(home, store, tmp_path / "cache", monkeypatch)
    members.away = {("dan", "masked")}
    with together(server, members):
        server.whole()
    updates = [own / client for client in CLIENTS[:3]]
    for number, update in enumerate(updates):
        train(update, home / "package", own / "start", update.name, number)
    settings = AggregationSettings(aggregator="ffa", weighting="equal", privacy=privacy)
    output, draw = tmp_path / "plain", Draw(cohort=4, of=4)
    aggregate_updates(
        updates, home / "package", output, settings=settings, previous=own / "start", draw=draw, min_updates=1
    )
    found, expected = read_factors(server.adapter(1)), read_factors(output)
    assert difference(found, expected) < 1e-8 + ROUNDING
    assert set(made) == {1.0 * 0.2 / 4}
    one, two = (read_manifest(path, AdapterManifest).privacy for path in (server.adapter(1), output))
    assert one == two
    before = read_factors(own / "start")
    moved = sum((found[module].B_OR - before[module].B_OR).double().square().sum() for module in found) ** 0.5
    assert moved <= 3 * 0.2 / 4


# What it can't go with


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"aggregator": "exact"}, "gives the server a sum of factors, but exact needs each client's own"),
        ({"aggregator": "median"}, "but median needs"),
        ({"aggregator": "alternate"}, "but alternate needs"),
        ({"weighting": "loss"}, "nothing that weighting loss could be computed of"),
        ({"weighting": "mine:weigh"}, "nothing that weighting mine:weigh"),
        ({"clip": 1.0}, "no update whose norm it could clip"),
        ({"codec": "int8"}, "can't be encoded again"),
        ({"codec": "topk"}, "can't be encoded again"),
        ({"scaffold": True}, "can't be used with scaffold"),
        ({"late": "buffer"}, "use late: refuse"),
        ({"tiers": {"phone": {"memory": "1GB"}}}, "tiers"),
        ({"selection": "resources"}, "no tokens, and so no speeds"),
        ({"cohort": 1, "min_updates": 1}, "needs two clients in a round"),
        ({"clients": {"ann": 10}}, "needs two clients in a round"),
        ({"secure": {"threshold": 0.4}}, "threshold"),
        ({"secure": {"limit": 0}}, "limit"),
    ],
)
def test_what_it_excludes_is_refused_with_the_reason(changes, sentence):
    from round_driver import config

    good = {"aggregator": "ffa", "weighting": "equal", "secure": {}}
    assert config(**good).secure == SecureSettings()
    with pytest.raises(ValueError, match=sentence):
        config(**good | changes)


def test_simulated_clients_have_nothing_to_hide(home, tmp_path):
    from round_driver import config

    from hf_fedlarge.clients import SimulatedClients

    made = config(aggregator="ffa", weighting="equal", secure={})
    with pytest.raises(ConfigError, match="secure hides clients' updates from a server, but simulated clients are on"):
        SimulatedClients(lambda job: None).check(made, tmp_path)
