"""Checkpoints read and written one tensor at a time agree with the safetensors library, damage included."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_fedlarge.artifacts import sha256_of
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointReader,
    SafetensorsWriter,
    checkpoint_digest,
    plan_shards,
    read_header,
    shard_names,
)

TENSORS = {
    "matrix": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(6).bfloat16().view(2, 3),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "codes": torch.arange(-5, 5).to(torch.int8),
    "flags": torch.tensor([True, False, True]),
    "wide": torch.arange(3),
}
INFOS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def write(path, names, **options):
    with SafetensorsWriter(path, INFOS, **options) as writer:
        for name in names:
            writer.write(name, TENSORS[name])
        return writer.close()


def assert_holds_tensors(path):
    found = load_file(path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def save_sharded(directory):
    """Two shards of two tensors each, and their index."""
    directory.mkdir(exist_ok=True)
    shards = {"one.safetensors": ["matrix", "half"], "two.safetensors": ["scalar", "codes"]}
    for file, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    save_index(directory, weight_map)
    return weight_map


def save_index(directory, weight_map):
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Writing


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS))], ids=["in order", "backwards"])
def test_what_is_written_is_what_safetensors_reads_and_its_digest_is_the_file_s(tmp_path, order):
    path = tmp_path / "a.safetensors"
    entry = write(path, order)
    assert_holds_tensors(path)
    assert entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert entry.size == path.stat().st_size


def test_what_is_written_in_order_is_not_read_again_for_its_digest(tmp_path, monkeypatch):
    read_again = []
    monkeypatch.setattr("hf_fedlarge.tensors.file_entry", lambda path: read_again.append(path))
    write(tmp_path / "a.safetensors", list(TENSORS))
    assert not read_again
    write(tmp_path / "b.safetensors", list(reversed(TENSORS)))
    assert read_again


def test_rows_may_come_one_part_after_the_other_mixed_with_other_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, INFOS) as writer:
        writer.write("matrix", TENSORS["matrix"][:3])
        for name in TENSORS:
            writer.write(name, TENSORS[name][3:] if name == "matrix" else TENSORS[name])
    assert_holds_tensors(path)


def test_a_view_that_is_not_contiguous_is_written_as_it_reads(tmp_path):
    view = TENSORS["matrix"].T
    with SafetensorsWriter(tmp_path / "a.safetensors", {"view": (view.dtype, tuple(view.shape))}) as writer:
        writer.write("view", view)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["view"], view)


def test_the_header_names_the_format_transformers_asks_for_or_what_was_given(tmp_path):
    write(tmp_path / "a.safetensors", TENSORS)
    write(tmp_path / "b.safetensors", TENSORS, metadata={"made": "here"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    with safe_open(tmp_path / "b.safetensors", framework="pt") as file:
        assert file.metadata() == {"made": "here"}


def test_too_little_or_too_much_is_our_own_bug(tmp_path):
    writer = SafetensorsWriter(tmp_path / "a.safetensors", {"x": (torch.float32, (4,))})
    writer.write("x", torch.zeros(2))
    with pytest.raises(AssertionError, match="not written: x"):
        writer.close()
    with pytest.raises(AssertionError, match="x: more bytes than announced"), writer:
        writer.write("x", torch.zeros(3))


# Reading


def test_a_single_file_and_shards_are_read_alike(tmp_path):
    weight_map = save_sharded(tmp_path / "shards")
    (tmp_path / "single").mkdir()
    save_file({name: TENSORS[name] for name in weight_map}, tmp_path / "single" / SINGLE_NAME)
    for directory in (tmp_path / "shards", tmp_path / "single"):
        reader = CheckpointReader(directory)
        assert set(reader.infos) == set(weight_map)
        for name in weight_map:
            assert torch.equal(reader.read(name), TENSORS[name])
            assert reader.infos[name].shape == tuple(TENSORS[name].shape)
            assert reader.infos[name].dtype == TENSORS[name].dtype
            assert reader.infos[name].nbytes == TENSORS[name].nbytes


def test_where_both_are_the_single_file_counts_as_in_transformers(tmp_path):
    save_sharded(tmp_path)
    save_file({"only": torch.zeros(2)}, tmp_path / SINGLE_NAME)
    assert set(CheckpointReader(tmp_path).infos) == {"only"}


def test_metadata_of_a_shard_is_read_and_may_be_absent(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    assert CheckpointReader(tmp_path).metadata(SINGLE_NAME) == {"format": "pt"}
    save_file({"x": torch.zeros(1)}, tmp_path / SINGLE_NAME)
    assert CheckpointReader(tmp_path).metadata(SINGLE_NAME) == {}


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("max_bytes", [1, 20, 45, 10**9])
def test_row_ranges_give_every_row_once_in_multiples(tmp_path, max_bytes, multiple):
    save_file({"matrix": TENSORS["matrix"]}, tmp_path / SINGLE_NAME)
    reader = CheckpointReader(tmp_path)
    ranges = reader.row_ranges("matrix", max_bytes, multiple)
    blocks = [reader.read_rows("matrix", start, stop) for start, stop in ranges]
    assert torch.equal(torch.cat(blocks), TENSORS["matrix"])
    assert [len(rows) for rows in blocks] == [stop - start for start, stop in ranges]
    assert all(len(rows) % multiple == 0 for rows in blocks[:-1])
    assert all(rows.nbytes <= max(max_bytes, multiple * 20) for rows in blocks)


def test_rows_of_a_scalar_and_of_nothing(tmp_path):
    save_file({name: TENSORS[name] for name in ("scalar", "none")}, tmp_path / SINGLE_NAME)
    reader = CheckpointReader(tmp_path)
    assert [reader.read_rows("scalar", *rows).item() for rows in reader.row_ranges("scalar", 10)] == [2.5]
    assert reader.row_ranges("none", 10) == []


# Damage


def refused(directory, *words):
    with pytest.raises(ArtifactError) as caught:
        CheckpointReader(directory)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_shard_is_named(tmp_path):
    save_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    refused(tmp_path, "two.safetensors", "missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": "one.safetensors"}, ("one.safetensors holds codes", "but it does not")),
        ({"ghost": "one.safetensors"}, ("one.safetensors holds ghost",)),
        ({"codes": "../two.safetensors"}, ("'../two.safetensors'", "plain file name")),
        ({"codes": "/etc/passwd"}, ("'/etc/passwd'", "plain file name")),
        ({"codes": ".."}, ("is not a readable safetensors file",)),
        ({"codes": 7}, ("is not an index of shards",)),
        (dict.fromkeys(["matrix", "half", "scalar", "codes"], 7), ("names 7", "plain file name")),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, words):
    save_index(tmp_path, save_sharded(tmp_path) | change)
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\udcff", "[" * 99999]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    save_sharded(tmp_path)
    (tmp_path / INDEX_NAME).write_bytes(content.encode(errors="surrogateescape"))
    refused(tmp_path, INDEX_NAME, "is not an index of shards")


def test_only_pickled_weights_are_refused_with_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "neither", SINGLE_NAME, "found pytorch_model.bin", "save_pretrained")
    (tmp_path / "pytorch_model.bin").unlink()
    refused(tmp_path, "neither")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"\x80" * 99]
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / SINGLE_NAME
    save_file(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    refused(tmp_path, SINGLE_NAME, "is not a readable safetensors file")


def test_a_type_that_is_not_supported_is_named(tmp_path):
    save_file({"small": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / SINGLE_NAME)
    refused(tmp_path, "small", "F8_E4M3", "supported are")


def test_a_header_is_read_in_the_order_of_the_data(tmp_path):
    write(tmp_path / "a.safetensors", TENSORS)
    assert list(read_header(tmp_path / "a.safetensors")) == list(TENSORS)


# Shards and digests


def test_shards_are_filled_in_order_and_a_giant_has_its_own():
    assert plan_shards({"a": 4, "b": 4, "c": 3, "d": 99, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards({"a": 99}, 8) == [["a"]]
    assert shard_names(1) == [SINGLE_NAME]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_the_digest_of_a_checkpoint_follows_what_it_computes(tmp_path):
    weight_map = save_sharded(tmp_path)
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        checkpoint_digest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    digest = checkpoint_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    assert checkpoint_digest(tmp_path) == digest
    (tmp_path / "config.json").write_text("{ }")
    assert checkpoint_digest(tmp_path) != digest
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / weight_map["codes"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert checkpoint_digest(tmp_path) != digest
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
