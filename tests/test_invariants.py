"""Equalities that hold whatever the numbers: ways of doing the same thing must do the same thing."""

import pytest
import torch
from federation import LORA, TRAINING, make_examples, make_federation, make_update

from hf_fedlarge.adapters import attach_lora, get_factors, read_factors, set_factors
from hf_fedlarge.architectures import describe, load_config
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import load_package
from hf_fedlarge.trainers.client import ClientArguments, train_client
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("invariants")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=1)
    make_examples(path / "data.jsonl", count=16)
    return path


def train(home, output, client="ann", adapter="start"):
    arguments = ClientArguments(
        package=str(home / "package"),
        adapter=str(home / adapter),
        data=str(home / "data.jsonl"),
        held_out=0.0,
        output=str(output),
        client=client,
    )
    return train_client(arguments, StreamingLoraConfig(output_dir=str(output), **TRAINING))


def products(directory):
    return {module: B_OR.double() @ A_RI.double() for module, (A_RI, B_OR) in read_factors(directory).items()}


def test_one_client_and_one_round_are_central_training(home, tmp_path):
    """fedavg gives the client's factors bit for bit; exact gives its products."""
    train(home, tmp_path / "update")
    for aggregator in ("fedavg", "exact"):
        aggregate_updates(
            [tmp_path / "update"],
            home / "package",
            tmp_path / aggregator,
            aggregator=aggregator,
            previous=home / "start",
        )
    trained = read_factors(tmp_path / "update")
    for module, (A_RI, B_OR) in read_factors(tmp_path / "fedavg").items():
        assert torch.equal(A_RI, trained[module].A_RI)
        assert torch.equal(B_OR, trained[module].B_OR)
    expected = products(tmp_path / "update")
    for module, product in products(tmp_path / "exact").items():
        assert torch.dist(product, expected[module]) <= 1e-6 * expected[module].norm()


@pytest.mark.parametrize("aggregator", ["fedavg", "exact"])
def test_identical_clients_are_one(home, tmp_path, aggregator):
    for client in ("ann", "bob", "cyd"):
        train(home, tmp_path / client, client=client)
    updates = [tmp_path / client for client in ("ann", "bob", "cyd")]
    for name, given in (("three", updates), ("one", updates[:1])):
        aggregate_updates(given, home / "package", tmp_path / name, aggregator=aggregator, previous=home / "start")
    one = products(tmp_path / "one")
    for module, product in products(tmp_path / "three").items():
        assert torch.dist(product, one[module]) <= 1e-6 * one[module].norm()


def test_an_adapter_survives_the_way_through_a_model(home, tmp_path):
    """Directory → package's blocks → directory's numbers: nothing is lost, moved or rounded."""
    make_update(tmp_path / "update", home / "package", "ann", seed=5)
    factors = read_factors(tmp_path / "update")
    model = load_package(home / "package")
    wrapped = attach_lora(model, model.architecture, LORA)
    set_factors(wrapped, factors, model.architecture, model.package.kept_layers)
    returned = get_factors(wrapped, model.architecture, model.package.kept_layers)
    assert returned.keys() == factors.keys()
    for module, (A_RI, B_OR) in returned.items():
        assert torch.equal(A_RI, factors[module].A_RI)
        assert torch.equal(B_OR, factors[module].B_OR)


def test_an_adapter_names_only_modules_of_the_full_model(home, tmp_path):
    make_update(tmp_path / "update", home / "package", "ann")
    full = describe(load_config(home / "checkpoint"))
    for module, (A_RI, B_OR) in read_factors(tmp_path / "update").items():
        assert full.parameters[f"{module}.weight"] == (B_OR.shape[0], A_RI.shape[1])
        assert full.layer_of(f"{module}.") in (0, 2, 3)
