"""A store never gives what it wasn't asked for, sends nothing twice, and goes on where a download broke off."""

import contextlib
import json
import os
import shutil
import socket
import threading
import uuid
from pathlib import Path

import pytest
from filelock import FileLock
from hub_double import WRITER, connected

from hf_fedlarge import store as module
from hf_fedlarge.artifacts import (
    MANIFEST_NAME,
    SERVER_FILES,
    AdapterManifest,
    PackageManifest,
    UpdateManifest,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry
from hf_fedlarge.errors import ArtifactError, ConfigError, OutputError, StoreError
from hf_fedlarge.retention import discard
from hf_fedlarge.store import Store

DIGEST = "a" * 64


def make_package(path, **files):
    """A package as the store sees one: a manifest and files of any bytes."""
    path.mkdir()
    for name, content in ({"model": b"m" * 1000, "config": b"{}"} | files).items():
        (path / name).write_bytes(content)
    manifest = PackageManifest(
        files=describe_files(path),
        base=BaseModelEntry(id="me/model", digest=DIGEST),
        model_type="llama",
        layers=[],
        embeddings="int8",
        codecs={},
    )
    write_manifest(path, manifest)
    return path


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on this machine."""
    reason = "needs s3fs, moto[s3], flask and flask-cors, which the extra dev brings"
    pytest.importorskip("s3fs", reason=reason)
    server = pytest.importorskip("moto.server", reason=reason).ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "x")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        Store("s3://bucket").fs.mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One of the Hub's, by a double on this machine."""
    with connected(tmp_path / "hub", monkeypatch) as double:
        monkeypatch.setenv("HF_TOKEN", WRITER)
        double.create("me/store")
        yield "hf://me/store"


@pytest.fixture(params=["local", "memory", "s3", "hf"])
def store(request, tmp_path):
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}")
    if request.param == "hf":
        return Store(f"{request.getfixturevalue('repository')}/{uuid.uuid4().hex}")
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def package(tmp_path):
    return make_package(tmp_path / "package")


@pytest.fixture
def calls(monkeypatch):
    """What a store asks of its file system, in order: the operation and the bytes read."""
    made = []
    plain = Store._call

    def counted(self, operation, *arguments, **options):
        result = plain(self, operation, *arguments, **options)
        made.append((operation, len(result) if operation == "cat_file" else 0))
        return result

    monkeypatch.setattr(Store, "_call", counted)
    return made


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def objects(store):
    """Paths of the store's files, largest first."""
    return sorted(store.fs.find(f"{store._root}/objects"), key=store.fs.size, reverse=True)


def test_what_is_put_is_got_bit_for_bit(store, package, tmp_path):
    digest = store.put(package)
    assert digest == read_manifest(package, PackageManifest).digest
    store.get(digest, tmp_path / "cache" / digest, PackageManifest)
    assert contents(tmp_path / "cache" / digest) == contents(package)


def test_what_is_there_is_not_sent_again(store, package, tmp_path, calls):
    sending = {"put_file", "pipe_file"}
    store.put(package)
    assert sum(operation in sending for operation, _ in calls) == 3
    calls.clear()
    store.put(package)
    assert not sending & {operation for operation, _ in calls}
    other = make_package(tmp_path / "other", config=b"{ }")
    store.put(other)
    assert sum(operation in sending for operation, _ in calls) == 2  # its manifest, and the file that differs


def test_what_is_here_is_not_fetched_again(store, package, tmp_path, calls):
    digest = store.put(package)
    store.get(digest, tmp_path / "here", PackageManifest)
    calls.clear()
    store.get(digest, tmp_path / "here", PackageManifest)
    assert not calls


def test_a_damaged_copy_is_fetched_again(store, package, tmp_path):
    digest = store.put(package)
    store.get(digest, tmp_path / "here", PackageManifest)
    (tmp_path / "here" / "model").write_bytes(b"x" * 1000)
    store.get(digest, tmp_path / "here", PackageManifest)
    assert contents(tmp_path / "here") == contents(package)


def test_another_artifact_takes_the_place_of_one_but_not_of_what_is_not_ours(store, package, tmp_path):
    first, second = store.put(package), store.put(make_package(tmp_path / "other", config=b"{ }"))
    store.get(first, tmp_path / "here", PackageManifest)
    assert store.get(second, tmp_path / "here", PackageManifest).digest == second
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("dear")
    with pytest.raises(OutputError, match="was not made by hf-fedlarge"):
        store.get(first, tmp_path / "letters", PackageManifest)


def test_a_put_that_is_interrupted_shows_nothing(store, package, tmp_path, monkeypatch):
    upload = Store._upload

    def broken(self, source, path):
        if source.name == MANIFEST_NAME:
            raise StoreError("the cable is out")
        upload(self, source, path)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "_upload", broken)
        with pytest.raises(StoreError, match="cable"):
            store.put(package)
    digest = read_manifest(package, PackageManifest).digest
    with pytest.raises(StoreError, match=r"artifacts/.*\.json is not there"):
        store.get(digest, tmp_path / "here", PackageManifest)
    store.put(package)
    store.get(digest, tmp_path / "here", PackageManifest)


def test_a_file_that_was_cut_short_in_the_store_is_put_again(store, package, tmp_path):
    digest = store.put(package)
    [model, _] = objects(store)
    store.fs.pipe_file(model, b"m" * 10)
    store.put(package)
    store.get(digest, tmp_path / "here", PackageManifest)


@pytest.mark.parametrize("change", [lambda raw: b"", lambda raw: raw[:40], lambda raw: bytes(len(raw))])
def test_a_manifest_that_is_damaged_in_the_store_is_put_again(store, package, tmp_path, change):
    digest = store.put(package)
    path = f"artifacts/{digest}.json"
    store.write(path, change(store.read(path, 10**6)))
    with pytest.raises(ArtifactError, match="is refused"):
        store.get(digest, tmp_path / "here", PackageManifest)
    store.put(package)
    store.get(digest, tmp_path / "here", PackageManifest)


def test_what_a_directory_names_is_on_the_disk(package, tmp_path, monkeypatch):
    store, synced = Store(str(tmp_path / "store")), []
    mv, fsync = store.fs.mv, os.fsync

    def syncing(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    def renamed(source, target):
        assert Path(source).stat().st_ino == synced[-1]
        mv(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(store.fs, "mv", renamed)
    store.put(package)
    store.write("order.json", b"{}")
    assert len(synced) == 4


def test_a_file_is_seen_in_a_directory_when_it_is_whole(package, tmp_path, monkeypatch):
    store = Store(str(tmp_path / "store"))

    def cut(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise OSError("the power is gone")

    monkeypatch.setattr(store.fs, "put_file", cut)
    with pytest.raises(StoreError, match="the power is gone"):
        store.send(package, "inbox/ann")
    assert store.names("inbox/ann") == []
    assert len(list((tmp_path / "store" / "inbox" / "ann").iterdir())) == 1


def test_a_damaged_artifact_is_not_put(store, package):
    (package / "model").write_bytes(b"x" * 1000)
    with pytest.raises(ArtifactError, match="has the digest"):
        store.put(package)
    with pytest.raises(ArtifactError, match="expected an artifact"):
        store.put(package.parent)
    assert store.names("objects") == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content[:-1], "has 999 bytes; its manifest says 1000"),
        (lambda content: content + b"m", "has 1001 bytes; its manifest says 1000"),
        (lambda content: b"M" + content[1:], r"has the SHA-256 \w{12}…; its manifest says \w{12}…"),
    ],
    ids=["shorter", "longer", "flipped"],
)
def test_a_file_that_is_not_what_the_manifest_says_is_never_kept(store, package, tmp_path, change, sentence):
    digest = store.put(package)
    [model, _] = objects(store)
    store.fs.pipe_file(model, change(store.fs.cat_file(model)))
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(ArtifactError, match=sentence):
            store.get(digest, cache / digest, PackageManifest)
        assert not (cache / digest).exists()
        assert not any(path.stat().st_size in (999, 1000, 1001) for path in cache.rglob("*") if path.is_file())
    store.fs.pipe_file(model, b"m" * 1000)
    store.get(digest, cache / digest, PackageManifest)
    verify_files(cache / digest, read_manifest(cache / digest, PackageManifest))


def test_a_manifest_under_another_s_digest_or_of_another_kind_is_refused(store, package, tmp_path):
    first, second = store.put(package), store.put(make_package(tmp_path / "other", config=b"{ }"))
    store.write(f"artifacts/{first}.json", store.read(f"artifacts/{second}.json", 10**6))
    with pytest.raises(ArtifactError, match=f"describes the artifact {second[:12]}…; expected {first[:12]}…"):
        store.get(first, tmp_path / "here", PackageManifest)
    with pytest.raises(ArtifactError, match="is of kind 'package'; expected an adapter"):
        store.get(second, tmp_path / "here", AdapterManifest)
    store.write(f"artifacts/{first}.json", b"{")
    with pytest.raises(ArtifactError, match="is not JSON"):
        store.get(first, tmp_path / "here", PackageManifest)
    with pytest.raises(ArtifactError, match="expected 64 hexadecimal digits"):
        store.get("../../etc/passwd", tmp_path / "here", PackageManifest)
    assert not (tmp_path / "here").exists()


def test_a_manifest_that_is_too_large_is_not_even_read(store, package, tmp_path, monkeypatch, calls):
    digest = store.put(package)
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(ArtifactError, match="expected at most 100"):
        store.get(digest, tmp_path / "here", PackageManifest)
    assert not [read for operation, read in calls if operation == "cat_file"]


def test_more_than_was_announced_is_not_fetched(store, package, tmp_path, calls):
    digest = store.put(package)
    calls.clear()
    with pytest.raises(ArtifactError, match="lists 1002 bytes of files; expected 1001 at most"):
        store.get(digest, tmp_path / "here", PackageManifest, most_bytes=1001)
    assert len([read for operation, read in calls if operation == "cat_file"]) == 1  # the manifest
    store.get(digest, tmp_path / "here", PackageManifest, most_bytes=1002)


def test_another_process_that_fetches_the_same_is_not_waited_for_for_ever(store, package, tmp_path, monkeypatch):
    digest = store.put(package)
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".here.lock"), pytest.raises(OutputError, match=r"\.here\.lock was held for 0\.1 s"):
        store.get(digest, tmp_path / "here", PackageManifest)
    store.get(digest, tmp_path / "here", PackageManifest)


def test_what_does_not_fit_on_the_disk_is_not_begun(store, package, tmp_path, monkeypatch, calls):
    digest = store.put(package)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    calls.clear()
    with pytest.raises(OutputError, match=r"takes 1002 bytes, but \d+ are free"):
        store.get(digest, tmp_path / "here", PackageManifest)
    assert len([read for operation, read in calls if operation == "cat_file"]) == 1


def test_a_download_that_broke_off_goes_on_with_what_is_missing(store, package, tmp_path, monkeypatch, calls):
    digest = store.put(package)
    manifest = (package / MANIFEST_NAME).stat().st_size
    monkeypatch.setattr(module, "CHUNK_BYTES", 300)
    counted, left = Store._call, 3

    def breaking(self, operation, *arguments, **options):
        nonlocal left
        if operation == "cat_file":
            left -= 1
            if left < 0:
                raise StoreError("the line is dead")
        return counted(self, operation, *arguments, **options)

    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Store, "_call", breaking)
        with pytest.raises(StoreError, match="dead"):
            store.get(digest, tmp_path / "cache" / digest, PackageManifest)
    assert not (tmp_path / "cache" / digest).exists()
    # The manifest, the small file and the first part of the large one.
    assert [read for operation, read in calls if operation == "cat_file"] == [manifest, 2, 300]
    calls.clear()
    store.get(digest, tmp_path / "cache" / digest, PackageManifest)
    assert [read for operation, read in calls if operation == "cat_file"] == [manifest, 300, 300, 100]
    assert contents(tmp_path / "cache" / digest) == contents(package)


def test_a_partial_download_that_is_damaged_is_fetched_from_the_start(store, package, tmp_path):
    digest = store.put(package)
    staging = tmp_path / "cache" / f".{digest}.partial"
    entry = read_manifest(package, PackageManifest).files["model"]
    staging.mkdir(parents=True)
    (staging / f".{entry.sha256}").write_bytes(b"evil")
    (staging / "extra.py").write_bytes(b"evil")
    store.get(digest, tmp_path / "cache" / digest, PackageManifest)
    assert contents(tmp_path / "cache" / digest) == contents(package)


def test_a_damaged_file_that_a_download_goes_on_with_is_fetched_once_again_and_refused(store, package, tmp_path, calls):
    store.put(package)
    [model, _] = objects(store)
    store.fs.pipe_file(model, b"M" * 1000)
    entry = read_manifest(package, PackageManifest).files["model"]
    (tmp_path / "partial").write_bytes(b"m" * 400)
    calls.clear()
    with pytest.raises(ArtifactError, match="was discarded"):
        store.get_file(entry, tmp_path / "partial")
    assert [read for operation, read in calls if operation == "cat_file"] == [600, 1000]
    assert not (tmp_path / "partial").exists()


def test_what_only_the_server_needs_stays_there(store, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "carry.safetensors"):
        (adapter / name).write_bytes(name.encode())
    base = BaseModelEntry(id="me/model", digest=DIGEST)
    manifest = AdapterManifest(
        files=describe_files(adapter),
        base=base,
        package=DIGEST,
        parent=None,
        round=0,
        layers=[],
        lora=LoraSettings(),
        aggregator=None,
    )
    write_manifest(adapter, manifest)
    digest = store.put(adapter, leave_out=SERVER_FILES)
    assert len(objects(store)) == 2
    store.get(digest, tmp_path / "here", AdapterManifest, leave_out=SERVER_FILES)
    assert set(contents(tmp_path / "here")) == set(contents(adapter)) - {"carry.safetensors"}
    with pytest.raises(StoreError, match="is not there, although a manifest lists it"):
        store.get(digest, tmp_path / "whole", AdapterManifest)


def test_what_is_discarded_takes_along_the_files_that_nothing_else_has(store, package, tmp_path):
    other = make_package(tmp_path / "other", config=b"{ }")
    first, second = store.put(package), store.put(other)
    discard(store, read_manifest(package, PackageManifest))
    assert [store.fs.size(path) for path in objects(store)] == [1000, 3]
    with pytest.raises(StoreError, match=r"artifacts/.*\.json is not there; .* it was removed with an old round"):
        store.get(first, tmp_path / "here", PackageManifest)
    store.get(second, tmp_path / "here", PackageManifest)
    discard(store, read_manifest(package, PackageManifest))
    store.put(package)
    store.write("artifacts/other.json", b"[]")
    with pytest.raises(ArtifactError, match="is no manifest; nothing is removed until it is gone"):
        discard(store, read_manifest(other, PackageManifest))
    assert len(objects(store)) == 3


def test_a_removal_that_was_interrupted_is_done_by_the_next(store, package, tmp_path, monkeypatch):
    digest, manifest = store.put(package), read_manifest(package, PackageManifest)
    remove, left = Store.remove, 1

    def dying(self, path):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        remove(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "remove", dying)
        with pytest.raises(KeyboardInterrupt):
            discard(store, manifest)
    with pytest.raises(StoreError, match="is not there, although a manifest lists it: it was removed"):
        store.get(digest, tmp_path / "here", PackageManifest)
    discard(store, manifest)
    assert not objects(store)
    assert store.names("artifacts") == []


def test_a_manifest_in_the_store_does_not_say_what_is_removed(tmp_path, package):
    (tmp_path / "mine").mkdir()
    store = Store(str(tmp_path / "store"))
    digest = store.put(package)
    hostile = {"files": {"x": {"sha256": "../../../mine", "size": 1}}}
    store.write(f"artifacts/{digest}.json", json.dumps(hostile).encode())
    discard(store, read_manifest(package, PackageManifest))
    assert (tmp_path / "mine").exists()
    assert store.names("artifacts") == []
    assert not objects(store)


def make_update(path, content=b"u" * 100):
    path.mkdir()
    (path / "weights").write_bytes(content)
    manifest = UpdateManifest(
        files=describe_files(path),
        client="ann",
        round=1,
        package=DIGEST,
        adapter=None,
        lora=LoraSettings(),
        examples=1,
        tokens=1,
    )
    write_manifest(path, manifest)
    return path


def fetch(store, destination, most_bytes=100, manifest_bytes=2000):
    bounds = {"most_bytes": most_bytes, "manifest_bytes": manifest_bytes}
    return store.fetch("inbox/ann", destination, UpdateManifest, **bounds)


def test_an_update_is_sent_to_a_place_of_its_own(store, tmp_path):
    update = make_update(tmp_path / "update")
    assert fetch(store, tmp_path / "got") is None
    store.send(update, "inbox/ann")
    assert store.names("inbox/ann") == [MANIFEST_NAME, "weights"]
    fetch(store, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(update)
    store.remove("inbox")
    store.remove("inbox")
    assert store.names("inbox/ann") == []


def test_an_update_is_bounded_before_it_is_fetched(store, tmp_path):
    store.send(make_update(tmp_path / "update"), "inbox/ann")
    with pytest.raises(ArtifactError, match="lists 100 bytes of files; expected 99 at most"):
        fetch(store, tmp_path / "got", most_bytes=99)
    with pytest.raises(ArtifactError, match="expected at most 50"):
        fetch(store, tmp_path / "got", manifest_bytes=50)
    assert not (tmp_path / "got").exists()


def test_an_update_whose_files_are_not_there_yet_is_no_reason_to_refuse_it(store, tmp_path):
    update = make_update(tmp_path / "update")
    store.write(f"inbox/ann/{MANIFEST_NAME}", (update / MANIFEST_NAME).read_bytes())
    with pytest.raises(StoreError, match="weights is not there"):
        fetch(store, tmp_path / "got")
    store.send(update, "inbox/ann")
    fetch(store, tmp_path / "got")


def test_a_link_or_a_pipe_in_a_shared_directory_is_not_followed(tmp_path):
    store = Store(str(tmp_path / "store"))
    update = make_update(tmp_path / "update")
    store.send(update, "inbox/ann")
    (tmp_path / "store" / "inbox" / "ann" / "weights").unlink()
    (tmp_path / "store" / "inbox" / "ann" / "weights").symlink_to(update / "weights")
    with pytest.raises(ArtifactError, match="is not a plain file"):
        fetch(store, tmp_path / "got")
    (tmp_path / "store" / "inbox" / "ann" / MANIFEST_NAME).unlink()
    os.mkfifo(tmp_path / "store" / "inbox" / "ann" / MANIFEST_NAME)
    with pytest.raises(ArtifactError, match="is not a plain file"):
        fetch(store, tmp_path / "got")


def put_socket(path):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, put_socket, lambda path: path.symlink_to("../../update/weights")])
def test_what_takes_a_file_s_place_after_it_was_looked_at_is_not_read_or_waited_for(tmp_path, monkeypatch, put):
    """As somebody can in a shared directory who watches when it is opened."""
    monkeypatch.chdir(tmp_path)  # a socket's path may be no longer than 107 letters
    store = Store(str(tmp_path / "store"))
    store.send(make_update(tmp_path / "update"), "inbox/ann")
    weights = Path("store/inbox/ann/weights")
    weights.unlink()
    put(weights)
    monkeypatch.setattr(Store, "_size", lambda self, path: {"weights": 100}.get(path.rpartition("/")[2], 1000))
    with pytest.raises(ArtifactError, match="weights is not a plain file; remove it"):
        fetch(store, tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_client_s_folder_that_is_a_link_is_not_entered(tmp_path):
    store = Store(str(tmp_path / "store"))
    mine = make_update(tmp_path / "mine")
    before = contents(mine)
    (tmp_path / "store" / "inbox").mkdir(parents=True)
    (tmp_path / "store" / "inbox" / "ann").symlink_to(mine)
    with pytest.raises(ArtifactError, match="is behind ann, which is no directory; remove that"):
        fetch(store, tmp_path / "got")
    with pytest.raises(StoreError, match=r"can't be written: .* is behind ann"):
        store.send(make_update(tmp_path / "other", b"o" * 100), "inbox/ann")
    store.remove("inbox/ann")
    assert contents(mine) == before


@pytest.mark.parametrize("hook", ["what is written", "what it is renamed to"])
def test_a_link_where_a_file_is_written_is_replaced_and_not_followed(tmp_path, hook):
    store, mine = Store(str(tmp_path / "store")), tmp_path / "mine"
    update = make_update(tmp_path / "update")
    mine.write_text("dear")
    (tmp_path / "store" / "inbox" / "ann").mkdir(parents=True)
    for name in ("weights", MANIFEST_NAME):
        place = tmp_path / "store" / "inbox" / "ann"
        (place / (f".{name}.partial" if hook == "what is written" else name)).symlink_to(mine)
    store.send(update, "inbox/ann")
    store.write("inbox/ann/failed.json", b"{}")
    assert mine.read_text() == "dear"
    assert contents(place) == contents(update) | {"failed.json": b"{}"}
    assert not any(path.is_symlink() for path in place.iterdir())


def test_a_link_that_somebody_makes_while_a_file_is_written_is_not_followed(tmp_path, monkeypatch):
    store, mine = Store(str(tmp_path / "store")), tmp_path / "mine"
    mine.write_text("dear")
    store.write("order.json", b"{}")
    unlink = os.unlink

    def unlinked(path, **options):
        with contextlib.suppress(FileNotFoundError):
            unlink(path, **options)
        (tmp_path / "store" / path).symlink_to(mine)

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", unlinked)
        with pytest.raises(StoreError, match=r"failed: File exists \(.order.json.partial\)"):
            store.write("order.json", b"[]")
    assert (mine.read_text(), store.read("order.json", 10)) == ("dear", b"{}")
    store.write("order.json", b"[]")
    assert store.names("") == ["order.json"]


def test_a_store_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    Store(str(tmp_path / "store")).write("inbox/x", b"1")
    assert Store(f"file://{tmp_path}/store/").read("inbox/x", 1) == b"1"


def test_a_store_that_cannot_be_opened_or_written_is_said(tmp_path, package):
    with pytest.raises(ConfigError, match="nonsense://x can't be opened as a store"):
        Store("nonsense://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/store failed: Not a directory \("):
        Store(str(tmp_path / "file" / "store")).put(package)


def test_documents_are_replaced_whole(store):
    store.write("order.json", json.dumps({"round": 1}).encode())
    store.write("order.json", b"{}")
    assert store.read("order.json", 2) == b"{}"
    with pytest.raises(ArtifactError, match="has 2 bytes; expected at most 1"):
        store.read("order.json", 1)
    assert store.read("missing.json", 10) is None
    store.write("order.json", b"")
    assert store.read("order.json", 10) == b""
    assert store.names("") == ["order.json"]


def test_two_stores_at_one_place_are_the_same(tmp_path, package):
    digest = Store(str(tmp_path / "store")).put(package)
    shutil.move(tmp_path / "store", tmp_path / "moved")
    Store(f"file://{tmp_path / 'moved'}").get(digest, tmp_path / "here", PackageManifest)


def test_a_place_that_hangs_up_when_it_is_opened_is_said_in_a_sentence():
    """Ftp connects at once, and its library says nothing of where."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        hanging_up = threading.Thread(target=lambda: server.accept()[0].close())
        hanging_up.start()
        url = f"ftp://127.0.0.1:{server.getsockname()[1]}/x"
        with pytest.raises(ConfigError, match=f"{url} can't be opened as a store: EOFError"):
            Store(url)
        hanging_up.join()
