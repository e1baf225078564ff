"""What a server says is signed, and a client that knows its key believes nothing else and nothing old."""

import threading
import uuid
from pathlib import Path

import pytest
from federation import make_update
from served import Server, make_home

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.clients import write_check_ins
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.keys import allow, fingerprint, new_key, read_key, revoke
from hf_fedlarge.orders import (
    FAILED,
    INBOX,
    ORDER,
    FailureDocument,
    OrderDocument,
    SecureOrder,
    VerdictDocument,
    Work,
    as_bytes,
    inbox,
    read_document,
    verdict,
    write_document,
)
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.serve import serve_federation
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.join import join
from hf_fedlarge.voice import Ear, signed

RUN, OTHER = "a" * 32, "b" * 32


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, an adapter, and two servers' keys with what clients are told of them."""
    path = tmp_path_factory.mktemp("voice")
    make_home(path)
    for name in ("server", "eve"):
        (path / f"{name}.pub").write_text(new_key(path / f"{name}.pem", name).split()[2])
    return path


@pytest.fixture
def store(home):
    made = Store(f"memory://{uuid.uuid4().hex}")
    made.put(home / "package")
    made.put(home / "start", leave_out=SERVER_FILES)
    return made


@pytest.fixture
def say(home, store):
    """Publishes an order as the server would, or somebody else."""

    def publish(key="server", spoil=None, **changes):
        package, start = (
            read_manifest(home / "package", PackageManifest),
            read_manifest(home / "start", AdapterManifest),
        )
        work = Work(
            clients=["ann"],
            package=package.digest,
            package_bytes=package.total_bytes,
            adapter=start.digest,
            adapter_bytes=start.total_bytes,
            update_bytes=10**6,
        )
        order = {"run": RUN, "state": "open", "round": 1, "attempt": 1, "work": [work]} | changes
        said = signed(OrderDocument(**order), key and read_key(home / f"{key}.pem"))
        write_document(store, ORDER, spoil(said) if spoil else said)
        return said

    return publish


@pytest.fixture
def member(home, store, tmp_path):
    """Joins as ann, who knows the server's key."""
    jobs, said = [], []

    def train(job):
        jobs.append(job)
        make_update(job.output, job.package, job.client, adapter=job.adapter, round_number=job.round)

    def take_part(**options):
        options = {"once": True, "server_key": (home / "server.pub").read_text(), "poll": 0.02} | options
        join(
            store.url,
            "ann",
            str(home / "data.jsonl"),
            cache=tmp_path / "cache",
            report=said.append,
            train=train,
            **options,
        )

    take_part.jobs, take_part.said = jobs, said
    return take_part


def one_sentence(error):
    return str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_a_round_whose_server_signs_is_that_of_any_other(home, store, member, tmp_path):
    key = read_key(home / "server.pem")
    server = Server(home, tmp_path / "run", store, clients={"ann": 12}, deadline_seconds=60, key=key)
    write_check_ins(server.run, [CheckIn("ann", 12)])
    server.open()
    client = threading.Thread(target=member, kwargs={"once": False})
    client.start()
    server.ask()
    server.close()
    server.clients.end(server.adapter(1))
    client.join(60)
    assert not client.is_alive()
    assert "round 1: the update counts" in member.said
    assert member.said[-1] == "the federation is over after round 1"


def changed(**changes):
    return lambda said: said.model_copy(update=changes)


def renamed(home):
    """A signature that says it was made with another key than it was."""
    return lambda said: said.model_copy(
        update={"signature": said.signature.model_copy(update={"key": fingerprint_of(home, "server")})}
    )


def fingerprint_of(home, name):
    said = OrderDocument(run=RUN, state="closed", round=1, attempt=1)
    return signed(said, read_key(home / f"{name}.pem")).signature.key


FORGED = {
    "unsigned": ({"key": None}, "is not signed; expected a signature by the server's key "),
    "signed by another": ({"key": "eve"}, "is signed with the key [0-9a-f]{16}; expected the server's key "),
    "under the server's name": (
        {"key": "eve", "spoil": renamed},
        "was changed after it was signed, or signed by another",
    ),
    "another round": ({"spoil": changed(round=2)}, "was changed after it was signed"),
    "another attempt": ({"spoil": changed(attempt=2)}, "was changed after it was signed"),
    "another run": ({"spoil": changed(run=OTHER)}, "was changed after it was signed"),
    "longer": ({"spoil": changed(closes_at=4e9)}, "was changed after it was signed"),
    "other training": ({"spoil": changed(seed=5)}, "was changed after it was signed"),
    "over": ({"spoil": changed(state="over")}, "was changed after it was signed"),
    "over, unsigned": ({"key": None, "state": "over"}, "is not signed"),
    "closed, unsigned": ({"key": None, "state": "closed"}, "is not signed"),
}


@pytest.mark.parametrize("name", FORGED)
def test_an_order_that_the_server_did_not_sign_is_refused_in_a_sentence(home, store, say, member, name):
    how, sentence = FORGED[name]
    if how.get("spoil") is renamed:
        how = how | {"spoil": renamed(home)}
    say(**how)
    with pytest.raises(ArtifactError, match=sentence) as error:
        member()
    assert one_sentence(error)
    assert not member.jobs
    assert store.names(INBOX) == []


def test_what_is_said_of_an_update_does_not_pass_for_an_order(home, store, say, member):
    """Both begin with prefixes of their own, whatever the same key signed."""
    said = VerdictDocument(run=RUN, client="ann", round=1, attempt=1)
    other = signed(said, read_key(home / "server.pem")).signature
    say(spoil=changed(signature=other))
    with pytest.raises(ArtifactError, match="was changed after it was signed"):
        member()


def secure(stage):
    return SecureOrder(stage=stage, limit=1.0, weighting="equal", most=1)


OLD = {
    "another round": ([{"round": 1}], {"round": 2}, {"round": 1}),
    "another attempt": ([{"attempt": 1}], {"attempt": 2}, {"attempt": 1}),
    "another stage": ([{"secure": secure("keys")}], {"secure": secure("masked")}, {"secure": secure("shares")}),
    "another run": ([{"round": 3}, {"round": 3, "state": "over", "work": []}], {"run": OTHER}, {"round": 3}),
    "the end of fewer rounds": (
        [{"round": 3, "state": "over", "work": []}],
        {"round": 5},
        {"round": 3, "state": "over", "work": []},
    ),
}


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("by", ["the same process", "the next process"])
def test_an_order_that_was_signed_once_does_not_count_again(home, store, say, tmp_path, name, by):
    """In the order of the server: what came first, what is asked for now, and then a former one is put back."""

    def ear():
        return Ear(store, "ann", tmp_path / "cache", (home / "server.pub").read_text(), print)

    before, now, old = OLD[name]
    here = ear()
    for changes in [*before, now, now]:
        say(**changes)
        assert here.hear().time == say(**changes).time
    say(**old)
    with pytest.raises(ArtifactError, match=r"is an old one, for round \d, attempt \d; expected none before") as error:
        (here if by == "the same process" else ear()).hear()
    assert one_sentence(error)
    say(**now)
    assert here.hear() is not None
    say(state="closed", round=0, attempt=0, work=[])  # as a server says that begins again, which asks for nothing
    assert here.hear().state == "closed"


@pytest.mark.parametrize("other", [{}, {"state": "over", "round": 5, "work": []}])
@pytest.mark.parametrize("by", ["the same process", "the next process"])
def test_another_federation_s_order_does_not_count_while_this_one_is_not_over(home, store, say, tmp_path, other, by):
    """Signed with the same key, and taken from another place; its updates wouldn't even be masked."""

    def ear(at=store, key="server"):
        return Ear(at, "ann", tmp_path / "cache", (home / f"{key}.pub").read_text(), print)

    here = ear()
    say(secure=secure("keys"))
    here.hear()
    say(run=OTHER, **other)
    with pytest.raises(
        ArtifactError, match=f"is of the federation {OTHER}; expected one of {RUN}, .* remove "
    ) as error:
        (here if by == "the same process" else ear()).hear()
    assert one_sentence(error)
    say(key="eve", run=OTHER)  # whose federation may be met in the same place
    assert ear(key="eve").hear().run == OTHER
    elsewhere = Store(f"memory://{uuid.uuid4().hex}")
    elsewhere.write(ORDER, as_bytes(say(run=OTHER)))
    assert ear(elsewhere).hear().run == OTHER
    # What the sentence says to remove is what has to be.
    Path(str(error.value).rpartition(" remove ")[2].rstrip(".")).unlink()
    assert ear().hear().run == OTHER


def test_the_next_federation_counts_when_the_one_before_is_over(home, store, say, tmp_path):
    ear = Ear(store, "ann", tmp_path / "cache", (home / "server.pub").read_text(), print)
    for run in (RUN, OTHER, "c" * 32):
        say(run=run)
        assert ear.hear().run == run
        say(run=run, state="over", work=[])
        assert ear.hear().state == "over"


@pytest.mark.parametrize("key", ["server", None])
def test_with_the_list_of_clients_keys_nothing_is_sent_unmasked(home, store, say, member, tmp_path, key):
    allow(tmp_path / "allowed.json", new_key(tmp_path / "ann.pem", "ann"))
    say(key=key)
    known = {"server_key": None} if key is None else {}
    member(keys=tmp_path / "allowed.json", **known)
    assert not member.jobs
    assert store.names(inbox(1, "ann", 1)) == [FAILED]
    reason = read_document(store, f"{inbox(1, 'ann', 1)}/{FAILED}", FailureDocument).reason
    assert "the order would have the update sent unmasked; expected one of secure aggregation" in reason


def test_an_old_order_is_not_trained_for(say, member):
    say(round=2)
    member()
    say(round=1)
    with pytest.raises(ArtifactError, match="is an old one, for round 1"):
        member()
    assert [job.round for job in member.jobs] == [2]


def test_what_became_of_an_update_is_believed_of_the_server_alone(home, store, say, member):
    say()
    member()
    true = VerdictDocument(run=RUN, client="ann", round=1, attempt=1, cause="too late")
    key, eve = read_key(home / "server.pem"), read_key(home / "eve.pem")
    # Of another attempt, run or client, though signed: not about this update, of which more may come.
    for other in ({"attempt": 2}, {"run": OTHER}, {"client": "ben"}, {"round": 2}):
        write_document(store, verdict(1, "ann", 1), signed(true.model_copy(update=other), key))
        member()
    assert not [line for line in member.said if "the server says" in line]
    # Nor is anything that the server didn't sign, and what it does say later is heard.
    for said, cause in (
        (true, "is not signed"),
        (signed(true, eve), "is signed with the key"),
        (signed(true, key).model_copy(update={"cause": None}), "was changed after it was signed"),
    ):
        write_document(store, verdict(1, "ann", 1), said)
        member.said.clear()
        member()
        assert cause in member.said[0]
        assert "what the server says of the update can't be read" in member.said[0]
    write_document(store, verdict(1, "ann", 1), signed(true, key))
    for _ in range(2):
        member()
    assert [line for line in member.said if "the server says:" in line] == ["round 1: the server says: too late"]


def test_what_is_not_believed_is_reported_once(home, store, say, member, tmp_path):
    say()
    member()
    said = []
    ear = Ear(store, "ann", tmp_path / "cache", (home / "server.pub").read_text(), said.append)
    true = VerdictDocument(run=RUN, client="ann", round=1, attempt=1)
    for verdict_of in (true, signed(true, read_key(home / "eve.pem"))):
        write_document(store, verdict(1, "ann", 1), verdict_of)
        for _ in range(3):
            ear.hear()
    assert len(said) == 2
    assert "is not signed" in said[0]
    assert "is signed with the key" in said[1]


CLOSED = [
    ({"round": 2, "attempt": 2}, False),  # older than what there are secrets of
    ({"round": 1, "attempt": 9}, False),
    ({"round": 3, "attempt": 1}, False),
    ({"round": 0, "attempt": 0}, False),
    ({"round": 3, "attempt": 2}, True),
    ({"round": 4, "attempt": 1}, True),
]


@pytest.mark.parametrize(("closed", "gone"), CLOSED)
def test_an_old_order_that_closes_takes_no_secrets_of_a_newer_attempt(home, store, say, tmp_path, closed, gone):
    ear = Ear(store, "ann", tmp_path / "cache", (home / "server.pub").read_text(), print)
    order = say(round=3, attempt=2, secure=secure("keys"))
    secrets = ear.home(order) / "0003" / "secure" / "2.json"
    secrets.parent.mkdir(parents=True)
    secrets.write_text("{}")
    ear.hear()
    say(state="closed", work=[], **closed)
    ear.hear()
    assert secrets.exists() != gone
    say(round=4)  # what is open leaves no other round's
    ear.hear()
    assert not secrets.exists()


def test_without_the_server_s_key_everything_is_believed_as_before(say, member):
    for key in (None, "eve"):
        say(key=key, round=1 if key is None else 2)
        member(server_key=None)
    assert [job.round for job in member.jobs] == [1, 2]


# A server's key is replaced


@pytest.fixture
def rotating(home, tmp_path):
    """A list with the server's key, and one that comes after it: its file and its line."""
    path = tmp_path / "server.json"
    allow(path, f"ed25519 server {(home / 'server.pub').read_text()}")
    return path, tmp_path / "next.pem", new_key(tmp_path / "next.pem", "server")


def test_a_client_that_goes_on_takes_a_key_that_its_list_allows_and_none_that_it_revokes(
    home, store, say, member, rotating, tmp_path
):
    """One client's process, before whose eyes the list changes between orders."""
    path, following, line = rotating
    ear = Ear(store, "ann", tmp_path / "cache", str(path), print)

    def says(key, number):
        said = OrderDocument(run=RUN, state="open", round=number, attempt=1)
        write_document(store, ORDER, signed(said, read_key(key)))
        return ear.hear().round

    assert says(home / "server.pem", 1) == 1
    with pytest.raises(ArtifactError, match=r"is signed with the key .*; expected the server's key"):
        says(following, 2)
    new = allow(path, line)
    assert says(following, 2) == 2
    assert says(home / "server.pem", 3) == 3  # while both are allowed
    [old] = revoke(path, "server", fingerprint((home / "server.pub").read_text()))
    with pytest.raises(ArtifactError, match=f"{old.fingerprint}, which is revoked since .* key {new.fingerprint} "):
        says(home / "server.pem", 4)
    assert says(following, 4) == 4
    # What was heard holds for the new key as for the old: nothing older, and no other federation.
    with pytest.raises(ArtifactError, match="is an old one, for round 3"):
        says(following, 3)
    write_document(
        store, ORDER, signed(OrderDocument(run=OTHER, state="open", round=9, attempt=1), read_key(following))
    )
    with pytest.raises(ArtifactError, match=f"is of the federation {OTHER}; expected one of {RUN}"):
        ear.hear()


def test_a_round_goes_on_with_another_key_of_the_server_s(home, store, member, rotating, tmp_path):
    """The server is stopped in the middle of a federation, and started with its new key; the client isn't."""
    path, following, line = rotating
    options = {"clients": {"ann": 12}, "deadline_seconds": 20}
    server = Server(home, tmp_path / "run", store, key=read_key(home / "server.pem"), **options)
    write_check_ins(server.run, [CheckIn("ann", 12)])
    server.open()
    client = threading.Thread(target=member, kwargs={"once": False, "server_key": str(path)})
    client.start()
    server.ask()
    server.close()
    allow(path, line)
    server = Server(home, tmp_path / "run", store, key=read_key(following), **options)
    server.open(2)
    server.ask()
    server.close()
    revoke(path, "server", fingerprint((home / "server.pub").read_text()))
    server.clients.end(server.adapter(2))
    client.join(60)
    assert not client.is_alive()
    assert [job.round for job in member.jobs] == [1, 2]
    assert "round 2: the update counts" in member.said


def test_a_list_without_a_key_of_the_server_s_is_refused_before_anything_is_done(home, store, member, tmp_path):
    path = tmp_path / "list.json"
    allow(path, new_key(tmp_path / "ann.pem", "ann"))
    with pytest.raises(ConfigError, match="has no allowed key of server; expected one"):
        member(server_key=str(path))
    allow(path, f"ed25519 server {(home / 'server.pub').read_text()}")
    revoke(path, "server")
    with pytest.raises(ConfigError, match="has no allowed key of server; expected one"):
        member(server_key=str(path))
    assert store.names("check_ins") == []


@pytest.mark.parametrize("key", ["", "ed25519 server 00", "zz" * 32, "00" * 31])
def test_a_server_key_that_is_none_is_said_before_anything_is_done(store, member, key):
    with pytest.raises(ConfigError, match=r"--server-key is .*; expected the 64 hexadecimal digits"):
        member(server_key=key)
    assert store.names("check_ins") == []


def test_a_server_whose_key_is_missing_begins_nothing(home, tmp_path, capsys):
    with pytest.raises(ConfigError, match="is not a file; expected a key made by"):
        serve_federation(None, tmp_path / "run", "memory://x", key=tmp_path / "none.pem")
    words = ["join", str(tmp_path / "store"), "--client", "ann", "--data", str(home / "data.jsonl")]
    assert main([*words, "--cache", str(tmp_path), "--server-key", "nonsense"]) == 2
    assert "--server-key is 'nonsense'" in capsys.readouterr().err


def test_the_bytes_of_an_unsigned_order_are_what_they_were():
    """A client of before reads what a server without a key says."""
    said = OrderDocument(run=RUN, state="closed", round=1, attempt=1)
    assert b"signature" not in as_bytes(said)
