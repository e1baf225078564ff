"""Bytes down, and a budget that refuses before anything is sent."""

import shutil

import pytest
import torch
from federation import LORA, make_federation, make_update
from safetensors.torch import load_file, save_file

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import MANIFEST_NAME, describe_files, read_manifest, write_manifest
from hf_fedlarge.artifacts import AdapterManifest as Manifest
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import Codec
from hf_fedlarge.errors import ArtifactError, BudgetError, FedLargeError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.traffic import Budget, changed_bytes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`package`, the adapter `start`, and `next`, in which every B differs from it and no A."""
    path = tmp_path_factory.mktemp("traffic")
    _, package = make_federation(path)
    start_adapter(package, path / "start", LORA, seed=3)
    codec = Codec(name="int8")
    make_update(path / "ann", package, "ann", adapter=path / "start", codec=codec, frozen="A")
    how = {"previous": path / "start", "codec": codec, "aggregator": "fedavg"}
    aggregate_updates([path / "ann"], package, path / "next", **how)
    return path


def size(directory, *names):
    return sum((directory / name).stat().st_size for name in names)


def test_a_client_without_an_adapter_gets_all_of_it(home):
    everything = size(home / "next", MANIFEST_NAME, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    assert changed_bytes(home / "next", None) == everything


def test_only_tensors_whose_bits_differ_go_down(home, tmp_path):
    changed = {name: tensor for name, tensor in load_file(home / "next" / ADAPTER_WEIGHTS).items() if "lora_B" in name}
    save_file(changed, tmp_path / "changed.safetensors", {"format": "pt"})
    expected = size(home / "next", MANIFEST_NAME) + size(tmp_path, "changed.safetensors")
    assert changed_bytes(home / "next", home / "start") == pytest.approx(expected, abs=8)
    assert changed_bytes(home / "next", home / "start") < 0.7 * changed_bytes(home / "next", None)


def test_where_nothing_changed_only_the_manifest_goes_down(home):
    assert changed_bytes(home / "next", home / "next") == size(home / "next", MANIFEST_NAME)


def test_zero_and_minus_zero_differ(home, tmp_path):
    shutil.copytree(home / "start", tmp_path / "signed")
    tensors = load_file(tmp_path / "signed" / ADAPTER_WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    assert (tensors[name] == 0).all()
    save_file(tensors | {name: -torch.zeros_like(tensors[name])}, tmp_path / "signed" / ADAPTER_WEIGHTS)
    manifest = read_manifest(tmp_path / "signed", Manifest)
    write_manifest(tmp_path / "signed", manifest.model_copy(update={"files": describe_files(tmp_path / "signed")}))
    sent = changed_bytes(tmp_path / "signed", home / "start") - size(tmp_path / "signed", MANIFEST_NAME)
    assert tensors[name].nbytes < sent < tensors[name].nbytes + 300


def test_what_is_no_adapter_is_refused(home):
    with pytest.raises(ArtifactError, match="expected an adapter"):
        changed_bytes(home / "next", home / "ann")


def test_a_budget_is_spent_to_its_last_byte_and_no_further():
    budget = Budget(1000).spend(400, "Round 1").spend(0, "nothing")
    assert budget == Budget(1000, spent=400)
    assert budget.spend(600, "Round 2").spent == 1000
    with pytest.raises(
        BudgetError, match=r"Round 2 needs 601 bytes, but 400 of the budget's 1000 .* and 600 left: raise `budget`, or"
    ):
        budget.spend(601, "Round 2")
    assert issubclass(BudgetError, FedLargeError)
