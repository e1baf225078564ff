"""Signed updates: whose key signed what, and what a server that knows its clients' keys refuses."""

import json
import re
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from federation import LORA, make_federation, make_update
from round_driver import check_ins, config

from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import MANIFEST_NAME, AdapterManifest, PackageManifest, UpdateManifest, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ConfigError, OutputError, UpdateRefusedError
from hf_fedlarge.journal import Journal
from hf_fedlarge.keys import (
    MAX_SIGNATURE_BYTES,
    PREFIX,
    SIGNATURE_NAME,
    allow,
    make_allowed,
    new_key,
    read_allowed,
    read_key,
    revoke,
)
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import package_config
from hf_fedlarge.relay import relay_update
from hf_fedlarge.server import RoundServer
from hf_fedlarge.update import Asked, Expected, validate_update
from hf_fedlarge.voice import server_keys


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, a list that allows ann and bob, their keys, eve's that nobody allowed, and signed updates of both."""
    path = tmp_path_factory.mktemp("keys")
    _, package = make_federation(path)
    start_adapter(package, path / "start", LORA, seed=0)
    for client in ("ann", "bob", "eve"):
        line = new_key(path / f"{client}.pem", client)
        if client != "eve":
            allow(path / "allowed.json", line)
    for seed, client in enumerate(("ann", "bob")):
        make_update(
            path / client, package, client, seed=seed, adapter=path / "start", key=path / f"{client}.pem", tokens=100
        )
    return path


@pytest.fixture
def expected(home):
    """What a server that wants signatures expects in round 1."""
    package = read_manifest(home / "package", PackageManifest)
    start = read_manifest(home / "start", AdapterManifest)
    return Expected(
        package,
        describe(package_config(home / "package")),
        LORA,
        1,
        start.digest,
        keys=read_allowed(home / "allowed.json"),
    )


def refusal(update, expected):
    with pytest.raises(UpdateRefusedError) as refused:
        validate_update(update, expected)
    return str(refused.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_signed_update_is_the_unsigned_one_and_a_file_beside_it(home, expected, tmp_path):
    make_update(tmp_path / "plain", home / "package", "ann", seed=0, adapter=home / "start", tokens=100)
    signed, plain = (read_manifest(path, UpdateManifest) for path in (home / "ann", tmp_path / "plain"))
    assert signed == plain
    assert {path.name for path in (home / "ann").iterdir()} - {
        path.name for path in (tmp_path / "plain").iterdir()
    } == {SIGNATURE_NAME}
    assert validate_update(home / "ann", expected) == plain
    # A server that asks for no signature takes both.
    assert validate_update(home / "ann", replace(expected, keys=None)) == plain
    assert refusal(tmp_path / "plain", expected) == (
        "ann refused: it has no signature.json; expected a signature by a key that is allowed for ann: "
        "train with --key."
    )


def other_key(update, home):
    key = read_key(home / "eve.pem")
    manifest = read_manifest(update, UpdateManifest)
    edit(update / SIGNATURE_NAME, signature=key.sign(PREFIX + manifest.canonical).hex())


def other_prefix(update, home):
    key = read_key(home / "ann.pem")
    manifest = read_manifest(update, UpdateManifest)
    edit(update / SIGNATURE_NAME, signature=key.sign(b"hf-fedlarge update v2\n" + manifest.canonical).hex())


def of_bob(update, home):
    shutil.copyfile(home / "bob" / SIGNATURE_NAME, update / SIGNATURE_NAME)


def in_bobs_name(update, home):
    edit(update / MANIFEST_NAME, client="bob")


def other_file(update, home):
    files = json.loads((update / MANIFEST_NAME).read_text())["files"]
    files["adapter_model.safetensors"]["sha256"] = "0" * 64
    edit(update / MANIFEST_NAME, files=files)


def link(update, home):
    (update / SIGNATURE_NAME).unlink()
    (update / SIGNATURE_NAME).symlink_to(home / "ann" / SIGNATURE_NAME)


NOT_OF_IT = r"its signature by the key [0-9a-f]{16} is not of this manifest; expected one of the digest [0-9a-f]{12}…"


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (other_key, NOT_OF_IT),
        (other_prefix, NOT_OF_IT),
        (other_file, NOT_OF_IT),
        (lambda update, home: edit(update / MANIFEST_NAME, round=2), NOT_OF_IT),
        (lambda update, home: edit(update / MANIFEST_NAME, tokens=10**9), NOT_OF_IT),
        (lambda update, home: edit(update / MANIFEST_NAME, adapter=None), NOT_OF_IT),
        (lambda update, home: edit(update / MANIFEST_NAME, package="0" * 64), NOT_OF_IT),
        (of_bob, r"signed with the key [0-9a-f]{16}, which is not one of ann's; expected [0-9a-f]{16}: sign with that"),
        (in_bobs_name, r"bob refused: it is signed with the key [0-9a-f]{16}, which is not one of bob's"),
        (lambda update, home: edit(update / MANIFEST_NAME, client="eve"), "not one of eve's; expected none yet"),
        (lambda update, home: edit(update / SIGNATURE_NAME, key="0" * 16), "the key 0000000000000000, which is not"),
        (lambda update, home: edit(update / SIGNATURE_NAME, signature="0" * 128), NOT_OF_IT),
        (lambda update, home: edit(update / SIGNATURE_NAME, signature="zz"), "not a signature: signature: String"),
        (lambda update, home: edit(update / SIGNATURE_NAME, more=1), "more is not known"),
        (lambda update, home: (update / SIGNATURE_NAME).write_text("{"), r"signature.json is not JSON"),
        (lambda update, home: (update / SIGNATURE_NAME).write_text("[]"), "not a signature"),
        (lambda update, home: (update / SIGNATURE_NAME).write_text('{"key": 1, "key": 2}'), "holds a key twice"),
        (
            lambda update, home: (update / SIGNATURE_NAME).write_bytes(b" " * (MAX_SIGNATURE_BYTES + 1)),
            "has 4097 bytes; expected at most 4096",
        ),
        (link, "signature.json is not a regular file"),
        (lambda update, home: (update / "signature.bin").write_bytes(b""), "holds signature.bin, which its manifest"),
    ],
)
def test_what_was_not_signed_as_it_is_is_refused_by_name(home, expected, tmp_path, spoil, cause):
    shutil.copytree(home / "ann", tmp_path / "ann")
    spoil(tmp_path / "ann", home)
    sentence = refusal(tmp_path / "ann", expected)
    assert re.search(cause, sentence), sentence
    assert re.match("(ann|bob|eve) refused: ", sentence)


@pytest.mark.parametrize("content", [b"{", b" " * (MAX_SIGNATURE_BYTES + 1)])
def test_a_server_without_keys_takes_no_rubbish_for_a_signature(home, expected, tmp_path, content):
    shutil.copytree(home / "ann", tmp_path / "ann")
    (tmp_path / "ann" / SIGNATURE_NAME).write_bytes(content)
    assert "signature.json" in refusal(tmp_path / "ann", replace(expected, keys=None))


def test_what_was_measured_is_not_signed(home, expected, tmp_path):
    shutil.copytree(home / "ann", tmp_path / "ann")
    edit(tmp_path / "ann" / MANIFEST_NAME, measured={"seconds": 0.25})
    validate_update(tmp_path / "ann", expected)


def seconds(update):
    """A weighting that would like to see more than was signed."""
    return update.measured.get("seconds", 1.0)


def test_and_weighs_nothing(home, tmp_path):
    for client, took in (("ann", 1.0), ("bob", 9.0)):
        shutil.copytree(home / client, tmp_path / client)
        edit(tmp_path / client / MANIFEST_NAME, measured={"seconds": took})
    collected = aggregate_updates(
        [tmp_path / "ann", tmp_path / "bob"],
        home / "package",
        tmp_path / "adapter",
        previous=home / "start",
        weighting="test_keys:seconds",
        keys=home / "allowed.json",
    )
    assert [entry.weight for entry in collected.manifest.contributions] == [0.5, 0.5]


def test_a_revoked_key_is_refused_and_a_new_one_may_follow(home, expected, tmp_path):
    shutil.copyfile(home / "allowed.json", tmp_path / "allowed.json")
    [old] = revoke(tmp_path / "allowed.json", "ann")
    revoked = replace(expected, keys=read_allowed(tmp_path / "allowed.json"))
    sentence = refusal(home / "ann", revoked)
    assert f"ann's key {old.fingerprint}, which is revoked since {old.since}; sign with a new key" in sentence
    validate_update(home / "bob", revoked)
    with pytest.raises(ConfigError, match=r"has the key .* already, revoked for ann since"):
        allow(tmp_path / "allowed.json", f"ed25519 ann {old.public}")
    with pytest.raises(ConfigError, match=r"has the key .* already, revoked for ann since"):
        allow(tmp_path / "allowed.json", f"ed25519 zoe {old.public}")
    allow(tmp_path / "allowed.json", new_key(tmp_path / "new.pem", "ann"))
    make_update(tmp_path / "ann", home / "package", "ann", adapter=home / "start", tokens=100, key=tmp_path / "new.pem")
    rotated = replace(expected, keys=read_allowed(tmp_path / "allowed.json"))
    validate_update(tmp_path / "ann", rotated)
    assert "is revoked since" in refusal(home / "ann", rotated)


def test_the_commands_make_allow_list_and_revoke(tmp_path, capsys):
    def run(*words):
        code = main(["keys", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    def new(folder):
        code, line = run("new", "lab-3", "--output", tmp_path / folder)
        assert code == 0
        assert line.startswith("ed25519 lab-3 ")
        return line.strip()

    line, keys = new("keys"), tmp_path / "allowed.json"
    secret = tmp_path / "keys" / "lab-3.pem"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    before = secret.read_bytes()
    code, said = run("new", "lab-3", "--output", tmp_path / "keys")
    assert code == 2
    assert "exists already, and a key is never replaced" in said
    assert secret.read_bytes() == before
    assert run("allow", keys, line)[0] == 0
    assert run("allow", keys, *new("keys-2").split())[0] == 0
    first, second = (entry.fingerprint for entry in read_allowed(keys).clients["lab-3"])
    assert run("revoke", keys, "lab-3", "--key", first) == (0, f"{keys}: the key {first} of lab-3 is revoked\n")
    code, said = run("list", keys)
    assert code == 0
    assert re.fullmatch(rf"lab-3 {first} revoked since \S+\nlab-3 {second} allowed since \S+\n", said)
    for words, cause in (
        (("revoke", keys, "lab-3", "--key", first), f"no allowed key {first} of 'lab-3'"),
        (("revoke", keys, "lab-4"), "no allowed key of 'lab-4'"),
        (("allow", keys, line), "has the key"),
        (("allow", keys, "ssh-rsa lab-3 AAAA"), "is not a key; expected the line that"),
        (("allow", keys, "ed25519 lab-3 abc"), "public: String should match pattern"),
        (("allow", keys, "ed25519 ../x " + "0" * 64), "can't be a client's name"),
        (("new", "../x", "--output", tmp_path), "can't be a client's name"),
        (("list", tmp_path / "none.json"), "is not a file; expected a list of keys"),
        (("list", secret), "is not JSON"),
    ):
        code, said = run(*words)
        assert code == 2
        assert cause in said
    assert run("revoke", keys, "lab-3")[0] == 0
    assert {entry.state for entry in read_allowed(keys).clients["lab-3"]} == {"revoked"}


def test_the_aggregate_command_wants_signatures_where_it_is_given_a_list(home, tmp_path, capsys):
    make_update(tmp_path / "cyd", home / "package", "cyd", adapter=home / "start")
    words = ["aggregate", home / "ann", tmp_path / "cyd", "--package", home / "package", "--adapter", home / "start"]
    words += ["-o", tmp_path / "adapter", "--keys", home / "allowed.json"]
    assert main([str(word) for word in words]) == 0
    assert "cyd refused: it has no signature.json" in capsys.readouterr().err
    made = read_manifest(tmp_path / "adapter", AdapterManifest)
    assert [entry.client for entry in made.contributions] == ["ann"]


def test_who_did_not_sign_has_no_vote_on_the_settings(home, tmp_path):
    make_update(tmp_path / "ann", home / "package", "ann", key=home / "ann.pem")
    for client in ("mal", "mel"):
        make_update(tmp_path / client, home / "package", client, lora=LoraSettings(rank=2, alpha=4.0))
    collected = aggregate_updates(
        [tmp_path / client for client in ("mal", "mel", "ann")],
        home / "package",
        tmp_path / "adapter",
        keys=home / "allowed.json",
    )
    assert collected.manifest.lora == LORA


def test_an_edge_signs_what_it_relays(home, expected, tmp_path):
    aggregate_updates(
        [home / "ann", home / "bob"], home / "package", tmp_path / "edge", previous=home / "start", aggregator="svd"
    )
    relay_update(tmp_path / "edge", "ann", tmp_path / "update", key=home / "ann.pem")
    assert validate_update(tmp_path / "update", expected).tokens == 200


def test_an_update_refused_for_want_of_a_signature_may_come_again_with_it(home, expected, tmp_path):
    server = RoundServer(
        tmp_path / "rounds",
        1,
        Journal(tmp_path / "journal.jsonl"),
        config(cohort=None),
        lambda number, client, update: validate_update(update, replace(expected, asked=Asked(client, 100, 1000))),
    )
    order = server.open(check_ins())
    shutil.copytree(home / "ann", tmp_path / "ann", ignore=shutil.ignore_patterns(SIGNATURE_NAME))
    assert "has no signature.json" in server.receive(order, "ann", tmp_path / "ann").reason
    accepted = server.receive(order, "ann", home / "ann")
    assert accepted.accepted
    entries = list(server.journal.entries)
    assert server.receive(order, "ann", home / "ann") == accepted
    assert "has no signature.json" in server.receive(order, "ann", tmp_path / "ann").reason
    assert server.journal.entries == entries
    (tmp_path / "ann" / SIGNATURE_NAME).write_bytes(b"{")
    assert "in the name of ann; expected ben" in server.receive(order, "ben", tmp_path / "ann").reason
    assert "is not a directory" in server.receive(order, "cleo", tmp_path / "none").reason
    assert server.accepted.keys() == {"ann"}
    assert (server.work / "ann" / SIGNATURE_NAME).exists()


def test_keys_and_lists_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    allow(tmp_path / "allowed.json", new_key(tmp_path / "key.pem", "server"))
    read_key(Path("~/key.pem"))
    assert read_allowed(Path("~/allowed.json")).clients.keys() == {"server"}
    assert [key.state for key in server_keys("~/allowed.json")] == ["allowed"]


def test_a_key_that_is_none_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n")
    with pytest.raises(ConfigError, match="is no private key as PEM; expected one made by"):
        read_key(tmp_path / "key.pem")
    with pytest.raises(ConfigError, match="is not a file; expected a key made by"):
        read_key(tmp_path / "none.pem")
    with pytest.raises(OutputError, match="exists already"):
        new_key(tmp_path / "key.pem", "ann")


def test_a_run_makes_its_simulated_clients_keys_once(tmp_path):
    files = {client: tmp_path / client / "key.pem" for client in ("ann", "bob")}
    new_key(files["ann"], "ann")  # of a server that was killed before there was a list
    make_allowed(tmp_path / "allowed.json", files)
    before = [path.read_bytes() for path in (*files.values(), tmp_path / "allowed.json")]
    make_allowed(tmp_path / "allowed.json", files)
    assert [path.read_bytes() for path in (*files.values(), tmp_path / "allowed.json")] == before
    assert list(read_allowed(tmp_path / "allowed.json").clients) == ["ann", "bob"]
