"""Clients on a shared model: the bytes of a process of their own, frozen factors, and what a failure leaves."""

import gc

import pytest
import torch
from federation import LORA, TRAINING, make_examples, make_federation
from safetensors.torch import load_file

from hf_fedlarge.adapters import ADAPTER_WEIGHTS
from hf_fedlarge.artifacts import AdapterManifest, UpdateManifest, read_manifest, write_manifest
from hf_fedlarge.errors import DataError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.trainers import worker as module
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig, StreamingLoraTrainer
from hf_fedlarge.trainers.worker import Worker

DROPOUT = LORA.model_copy(update={"dropout": 0.2})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, adapters to start from, and the examples of three clients."""
    path = tmp_path_factory.mktemp("worker")
    make_federation(path)
    for number, (name, lora) in enumerate({"plain": LORA, "dropout": DROPOUT}.items()):
        start_adapter(path / "package", path / name, lora, seed=number)
    for number, name in enumerate("abc"):
        make_examples(path / f"{name}.jsonl", count=8 + 3 * number, seed=number)
    train(path, path / "warm", "c", "plain")
    for trains in "AB":
        # As it is after a round: nothing in it is zero any more.
        start_adapter(path / "package", path / trains, LORA, seed=5)
        (path / trains / ADAPTER_WEIGHTS).write_bytes((path / "warm" / ADAPTER_WEIGHTS).read_bytes())
        files = read_manifest(path / "warm", UpdateManifest).files
        state = read_manifest(path / trains, AdapterManifest)
        files = state.files | {ADAPTER_WEIGHTS: files[ADAPTER_WEIGHTS]}
        write_manifest(path / trains, state.model_copy(update={"trains": trains, "files": files}))
    return path


def train(home, output, client, adapter, worker=None, **training):
    arguments = ClientArguments(
        package=str(home / "package"),
        adapter=str(home / adapter),
        data=str(home / f"{client}.jsonl"),
        output=str(output),
        client=client,
        held_out=0.2,
    )
    return train_client(arguments, StreamingLoraConfig(output_dir=str(output), **TRAINING | training), worker)


def weights(directory):
    return load_file(directory / ADAPTER_WEIGHTS)


# What each trains otherwise: other data, dropout, optimizer, form of batches, noise, factor, precision.
CLIENTS = {
    "a": {"client": "a", "adapter": "dropout"},
    "b": {"client": "b", "adapter": "dropout", "optim": "sgd", "per_device_train_batch_size": 1, "max_steps": 7},
    "c": {"client": "c", "adapter": "dropout", "packing": True, "max_length": 96, "neftune_noise_alpha": 5.0},
    "frozen": {"client": "a", "adapter": "B", "gradient_accumulation_steps": 2},
    "full": {"client": "a", "adapter": "plain", "bf16": False},
    "again": {"client": "a", "adapter": "plain"},
}


def test_on_a_shared_model_every_client_makes_the_update_of_a_process_of_its_own(home, tmp_path):
    """Whatever was trained before it, in both orders and twice."""
    alone = {name: train(home, tmp_path / name, **options) for name, options in CLIENTS.items()}
    worker = Worker()
    for number, name in enumerate([*CLIENTS, *reversed(CLIENTS), *CLIENTS]):
        shared = train(home, tmp_path / str(number), worker=worker, **CLIENTS[name])
        assert shared.digest == alone[name].digest, name
    assert len({update.digest for update in alone.values()}) == len(CLIENTS)


def test_a_package_is_loaded_once_and_an_adapter_read_once(home, tmp_path, monkeypatch):
    calls = []
    for name in ("load_package", "load_tokenizer", "read_factors", "verify_files"):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _p=plain, **k: calls.append(_n) or _p(*a, **k))
    worker = Worker()
    for number, client in enumerate("abcab"):
        train(home, tmp_path / str(number), client, "plain", worker)
    assert sorted(calls) == ["load_package", "load_tokenizer", "read_factors", "verify_files"]
    # Another adapter of the same settings needs no other model.
    train(home, tmp_path / "next", "a", "B", worker)
    assert calls[4:] == ["verify_files", "read_factors"]
    train(home, tmp_path / "other", "a", "dropout", worker)
    assert calls.count("load_package") == 2


def test_nothing_of_a_client_is_left_on_the_model(home, tmp_path):
    worker, kept = Worker(), []
    for number, client in enumerate("abc"):
        train(home, tmp_path / str(number), client, "plain", worker)
        model = worker._opened.model
        base = model.get_base_model()
        marks = {name for each in (model, base) for name in vars(each)} & {
            "_original_forward",
            "_is_accelerate_prepared",
        }
        assert not marks
        assert all(parameter.grad is None for parameter in model.parameters())
        kept.append((model, vars(base)["forward"], vars(model).get("forward"), vars(base.config).copy()))
    assert kept[0] == kept[1] == kept[2]
    gc.collect()
    assert not [each for each in gc.get_objects() if isinstance(each, StreamingLoraTrainer)]


def test_a_model_on_which_a_client_failed_is_not_lent_again(home, tmp_path):
    alone = train(home, tmp_path / "alone", "a", "plain")
    worker = Worker()
    train(home, tmp_path / "first", "b", "plain", worker)
    model = worker._opened.model
    with pytest.raises(DataError):
        train(home, tmp_path / "bad", "b", "plain", worker, max_length=2)
    assert train(home, tmp_path / "shared", "a", "plain", worker).digest == alone.digest
    assert worker._opened.model is not model


def test_the_collector_looks_at_everything_again_when_a_worker_has_gone(home, tmp_path):
    gc.unfreeze()
    worker = Worker()
    for number in range(2):
        train(home, tmp_path / str(number), "a", "plain", worker)
    assert gc.get_freeze_count() > 0
    del worker
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_frozen_factor_comes_back_bit_for_bit_and_the_other_is_trained(home, tmp_path, trains):
    train(home, tmp_path / "update", "a", trains)
    start, update = weights(home / trains), weights(tmp_path / "update")
    assert start.keys() == update.keys()
    for name, tensor in update.items():
        assert torch.equal(tensor, start[name]) == (f"lora_{trains}" not in name), name


@pytest.mark.parametrize("trains", ["A", "B"])
def test_a_step_on_one_factor_is_that_factor_s_step_on_both(home, tmp_path, trains):
    """The gradient of one factor doesn't depend on whether the other one is trained, too."""
    start_adapter(home / "package", tmp_path / "both", LORA, seed=5)
    for path in (home / trains).iterdir():
        (tmp_path / "both" / path.name).write_bytes(path.read_bytes())
    state = read_manifest(home / trains, AdapterManifest)
    write_manifest(tmp_path / "both", state.model_copy(update={"trains": "both"}))
    descent = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1, "max_grad_norm": 0.0}
    train(home, tmp_path / "one", "a", trains, **descent)
    train(home, tmp_path / "two", "a", tmp_path / "both", **descent)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one if f"lora_{trains}" in name)


def test_measured_says_what_a_client_spent_besides_its_steps(home, tmp_path):
    figures = train(home, tmp_path / "update", "a", "plain").measured
    parts = [figures[f"{part}_seconds"] for part in ("train", "evaluation", "overhead")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(figures["seconds"], abs=0.01)
