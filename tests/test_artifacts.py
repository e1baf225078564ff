"""A manifest says what a directory is and nothing else passes for it; a directory appears whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest

from hf_fedlarge import artifacts
from hf_fedlarge.artifacts import (
    MANIFEST_NAME,
    AdapterManifest,
    CheckpointManifest,
    PackageManifest,
    UpdateManifest,
    check_output,
    describe_files,
    manifest_kind,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry, Contribution, FileEntry, LayerEntry
from hf_fedlarge.errors import ArtifactError, OutputError

MISSING = object()
A, B, C = ("abc"[number] * 64 for number in range(3))
FILES = {"model.safetensors": FileEntry(size=3, sha256=A), "config.json": FileEntry(size=4, sha256=B)}
BASE = BaseModelEntry(id="org/model", revision="main", digest=A, license="apache-2.0")
MANIFESTS = [
    PackageManifest(
        files=FILES,
        measured={"seconds": 1.5},
        base=BASE,
        model_type="llama",
        layers=[LayerEntry(layer=0, block=1), LayerEntry(layer=1, block=None), LayerEntry(layer=2, block=0)],
        embeddings="int8",
        codecs={"model.embed_tokens.weight": "int8", "model.layers.0.mlp.up_proj.weight": "nf4"},
    ),
    UpdateManifest(
        files=FILES,
        client="team-a",
        round=2,
        package=A,
        adapter=None,
        lora=LoraSettings(rank=8, targets=["q_proj"]),
        examples=10,
        tokens=1000,
        loss_before=3.5,
    ),
    AdapterManifest(
        files=FILES,
        base=BASE,
        package=A,
        parent=B,
        round=3,
        layers=[0, 2],
        lora=LoraSettings(),
        aggregator="exact",
        weighting="tokens",
        contributions=[Contribution(client="team-a", digest=C, weight=1.0, examples=10, tokens=1000)],
    ),
    CheckpointManifest(files=FILES, base=BASE, adapter=A, merged=["model.layers.0.mlp.up_proj.weight"]),
]
each_kind = pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest.kind)


def refusal(call, *arguments, error=ArtifactError):
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert message.isprintable()
    assert len(message) < 600
    return message


def make_artifact(directory, content=b"weights"):
    """A small directory of ours with one file."""
    directory.mkdir()
    (directory / "data.bin").write_bytes(content)
    write_manifest(directory, CheckpointManifest(files=describe_files(directory), base=BASE, adapter=A, merged=[]))
    return directory


def changed(manifest, tmp_path, **values):
    """A directory whose manifest has other values, MISSING: the key left out."""
    raw = {key: value for key, value in (manifest.model_dump(mode="json") | values).items() if value is not MISSING}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(raw))
    return tmp_path


# Manifests


@each_kind
def test_what_is_written_is_read_back(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    found = read_manifest(tmp_path, type(manifest))
    assert found == manifest
    assert found.digest == manifest.digest
    assert manifest_kind(tmp_path) == manifest.kind
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_the_kept_layers_are_in_the_order_of_the_blocks():
    assert MANIFESTS[0].kept_layers == [2, 0]
    assert MANIFESTS[0].total_bytes == 7


@each_kind
def test_the_digest_follows_everything_but_what_was_measured(manifest):
    digest = manifest.digest
    assert manifest.model_copy(update={"measured": {"seconds": 99.0}}).digest == digest
    assert manifest.model_copy(update={"files": dict(reversed(FILES.items()))}).digest == digest
    others = [
        {"files": {}},
        {"files": FILES | {"config.json": FileEntry(size=4, sha256=C)}},
        {"base": BASE.model_copy(update={"revision": None})} if hasattr(manifest, "base") else {"round": 7},
    ]
    assert len({digest, *(manifest.model_copy(update=other).digest for other in others)}) == 4


def test_the_digest_is_the_same_on_every_machine():
    assert MANIFESTS[3].digest == "d96c0ef79a818074653f684cc3eab429304d09b7d373292cd742706a8ba3820f"


@each_kind
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"surprise": 1}, ["surprise", "is not known"]),
        ({"format_version": 2}, ["format_version"]),
        ({"format_version": "1"}, ["format_version"]),
        ({"kind": "picture"}, ["'picture'", "expected"]),
        ({"files": MISSING}, ["files", "required"]),
        ({"files": {"../x": {"size": 1, "sha256": A}}}, ["files.../x"]),
        ({"files": {"a/b": {"size": 1, "sha256": A}}}, ["files.a/b"]),
        ({"files": {".hidden": {"size": 1, "sha256": A}}}, ["files..hidden"]),
        ({"files": {"x\n": {"size": 1, "sha256": A}}}, ["files.x"]),
        ({"\x1b[2J" + "x" * 9999: 1}, [r"\x1b[2Jxxx"]),
        ({"files": {"x": {"size": -1, "sha256": A}}}, ["files.x.size"]),
        ({"files": {"x": {"size": 1.0, "sha256": A}}}, ["files.x.size"]),
        ({"files": {"x": {"size": 1, "sha256": "A" * 64}}}, ["files.x.sha256"]),
        ({"measured": {"seconds": float("nan")}}, ["measured.seconds"]),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused_in_one_sentence(tmp_path, manifest, values, words):
    message = refusal(read_manifest, changed(manifest, tmp_path, **values), type(manifest))
    for word in words:
        assert word in message


@pytest.mark.parametrize("client", ["", "../up", "a b", "x" * 129, "-flag", 7])
def test_a_client_s_name_must_be_fit_for_a_file(tmp_path, client):
    message = refusal(read_manifest, changed(MANIFESTS[1], tmp_path, client=client), UpdateManifest)
    assert "client" in message


def test_another_kind_is_refused_by_name(tmp_path):
    write_manifest(tmp_path, MANIFESTS[1])
    message = refusal(read_manifest, tmp_path, AdapterManifest)
    assert "'update'" in message
    assert "an adapter" in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 99_999, b'{"kind": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    assert "is not JSON" in refusal(read_manifest, tmp_path, PackageManifest)
    assert manifest_kind(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"kind": ["package"]}', '{"kind": "picture"}', f'{{"kind": "{"x" * 9999}"}}']
)
def test_json_of_no_kind_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    assert "expected a package" in refusal(read_manifest, tmp_path, PackageManifest)
    assert manifest_kind(tmp_path) is None


def test_nothing_there_and_too_much_there_are_refused(tmp_path):
    assert "is not a directory" in refusal(read_manifest, tmp_path / "none", PackageManifest)
    assert MANIFEST_NAME in refusal(read_manifest, tmp_path, PackageManifest)
    with (tmp_path / MANIFEST_NAME).open("wb") as file:
        file.truncate(artifacts.MAX_MANIFEST_BYTES + 1)
    assert "at most" in refusal(read_manifest, tmp_path, PackageManifest)
    assert manifest_kind(tmp_path) is None


# Files


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_by_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ["lacks data.bin"]),
        (lambda path: path.with_name("extra").write_bytes(b""), ["holds extra", "remove it"]),
        (lambda path: path.with_name("folder").mkdir(), ["holds folder"]),
        (lambda path: path.with_name(".hidden").write_bytes(b""), ["holds .hidden"]),
        (lambda path: path.write_bytes(b"weight"), ["data.bin has 6 bytes", "says 7"]),
        (flip_a_bit, ["data.bin has the digest", "its manifest says"]),
        (replace_by_link, ["data.bin is not a regular file"]),
        (lambda path: (path.unlink(), path.mkdir()), ["data.bin is not a regular file"]),
        (lambda path: (path.unlink(), os.mkfifo(path)), ["data.bin is not a regular file"]),
    ],
)
def test_files_that_are_not_the_manifest_s_are_refused_by_name(tmp_path, damage, words):
    directory = make_artifact(tmp_path / "artifact")
    manifest = read_manifest(directory, CheckpointManifest)
    verify_files(directory, manifest)
    damage(directory / "data.bin")
    message = refusal(verify_files, directory, manifest)
    for word in words:
        assert word in message


def test_a_published_artifact_may_hold_links_and_a_card_but_nothing_else(tmp_path):
    directory = make_artifact(tmp_path / "artifact")
    manifest = read_manifest(directory, CheckpointManifest)
    replace_by_link(directory / "data.bin")
    (directory / "README.md").write_text("a card")
    verify_files(directory, manifest, published=True)
    flip_a_bit(tmp_path / "elsewhere")
    assert "data.bin has the digest" in refusal(lambda: verify_files(directory, manifest, published=True))
    (directory / "extra").write_bytes(b"")
    assert "holds extra" in refusal(lambda: verify_files(directory, manifest, published=True))


# Outputs


def test_an_output_appears_when_it_is_whole(tmp_path):
    output = tmp_path / "deep" / "output"
    with staged_directory(output) as staging:
        (staging / "data").write_text("x")
        assert not output.exists()
    assert (output / "data").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["output"]


def test_what_exists_is_left_alone(tmp_path):
    ours, foreign, empty = make_artifact(tmp_path / "ours"), tmp_path / "foreign", tmp_path / "empty"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    empty.mkdir()
    file = tmp_path / "file"
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(ours)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for output in (ours, foreign, empty, file, link, dangling):
        assert "--overwrite" in refusal(check_output, output, False, error=OutputError)
    for output in (foreign, file, link, dangling):
        assert "was not made by hf-fedlarge" in refusal(check_output, output, True, error=OutputError)
    check_output(ours, True)
    check_output(empty, True)
    check_output(tmp_path / "new", False)


def test_overwriting_replaces_the_old_and_only_when_the_new_is_whole(tmp_path):
    output = make_artifact(tmp_path / "output")
    with pytest.raises(RuntimeError, match="halfway"), staged_directory(output, overwrite=True):
        raise RuntimeError("halfway")
    verify_files(output, read_manifest(output, CheckpointManifest))
    with staged_directory(output, overwrite=True) as staging:
        (staging / "new").write_text("x")
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "disk")])
def test_a_failure_leaves_nothing_and_passes_on(tmp_path, error):
    def make():
        with staged_directory(tmp_path / "output") as staging:
            (staging / "data").write_text("x")
            raise error

    with pytest.raises(type(error)) as caught:
        make()
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_output_keeps_what_was_written(tmp_path):
    output = tmp_path / "output"

    def make(name, killed):
        with staged_directory(output, resume=True) as staging:
            (staging / name).write_text(name)
            if killed:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make("first", killed=True)
    assert not output.exists()
    make("second", killed=False)
    assert sorted(path.name for path in output.iterdir()) == ["first", "second"]


def test_without_resuming_the_remains_of_a_killed_run_are_swept(tmp_path):
    (tmp_path / ".output.partial").mkdir()
    (tmp_path / ".output.partial" / "stale").write_text("x")
    with staged_directory(tmp_path / "output") as staging:
        assert list(staging.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EACCES, "denied")],
)
@pytest.mark.parametrize("where", ["body", "fsync", "mkdir"])
def test_what_the_disk_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, number, reason, where):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    def make():
        with staged_directory(tmp_path / "output") as staging:
            (staging / "data").write_text("x")
            if where == "body":
                fail()

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    message = refusal(make, error=OutputError)
    assert "output could not be written" in message
    assert reason in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["file/output", "file/deep/output"])
def test_a_file_in_the_way_of_the_output_is_told(tmp_path, output):
    (tmp_path / "file").write_text("x")

    def make():
        with staged_directory(tmp_path / output):
            pass

    message = refusal(make, error=OutputError)
    assert "file" in message.partition("could not be written")[2]
