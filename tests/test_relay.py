"""Two levels of aggregation give what one gives."""

import pytest
import torch
from federation import LORA, make_federation, make_update

from hf_fedlarge.adapters import read_factors
from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.relay import relay_update


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A package, and an adapter of a first round to start from."""
    path = tmp_path_factory.mktemp("home")
    _, package = make_federation(path)
    start_adapter(package, path / "start", LORA, seed=0)
    return path


def two_levels(home, path, aggregator, updates):
    """The adapter by way of two edges, and the flat one."""
    package, start = home / "package", home / "start"
    edges = []
    for name, members in (("east", updates[:2]), ("west", updates[2:])):
        aggregate_updates(members, package, path / f"{name}-adapter", previous=start, aggregator=aggregator)
        relay_update(path / f"{name}-adapter", name, path / name)
        edges.append(path / name)
    for name, members in (("levels", edges), ("flat", updates)):
        aggregate_updates(members, package, path / name, previous=start, aggregator=aggregator)
    return path / "levels", path / "flat"


def products(directory):
    scale = read_manifest(directory, AdapterManifest).lora.scale
    return {module: scale * (B.double() @ A.double()) for module, (A, B) in read_factors(directory).items()}


def test_edges_of_clients_give_what_the_clients_give(home, tmp_path):
    """Clients that move along the same directions: their mean fits into the rank, at every level."""
    updates = []
    for number, tokens in enumerate((100, 300, 200, 50, 350)):
        updates.append(tmp_path / f"client-{number}")
        make_update(updates[-1], home / "package", f"client-{number}", adapter=home / "start", tokens=tokens)
    levels, flat = two_levels(home, tmp_path, "svd", updates)
    for module, found in products(levels).items():
        torch.testing.assert_close(found, products(flat)[module], rtol=1e-5, atol=1e-6)
    [east, west] = read_manifest(levels, AdapterManifest).contributions
    assert (east.client, east.tokens, west.tokens) == ("east", 400, 600)
    assert east.weight == pytest.approx(0.4)


def test_with_factors_averaged_no_rank_is_in_the_way(home, tmp_path):
    updates = []
    for seed in range(4):
        updates.append(tmp_path / f"client-{seed}")
        make_update(
            updates[-1], home / "package", f"client-{seed}", seed=seed, adapter=home / "start", tokens=100 + 70 * seed
        )
    levels, flat = two_levels(home, tmp_path, "fedavg", updates)
    for module, found in products(levels).items():
        torch.testing.assert_close(found, products(flat)[module], rtol=1e-5, atol=1e-6)


def test_what_an_update_cannot_hold_is_refused(home, tmp_path):
    for seed in range(2):
        make_update(tmp_path / str(seed), home / "package", f"client-{seed}", seed=seed, adapter=home / "start")
    updates = [tmp_path / "0", tmp_path / "1"]
    aggregate_updates(updates, home / "package", tmp_path / "carrying", previous=home / "start")
    with pytest.raises(ArtifactError, match="has a carry, which stays with a server"):
        relay_update(tmp_path / "carrying", "edge", tmp_path / "edge")
    with pytest.raises(ArtifactError, match="was not made of updates"):
        relay_update(home / "start", "edge", tmp_path / "edge")
    assert not (tmp_path / "edge").exists()


def test_the_command_makes_the_edge_s_update(home, tmp_path, capsys):
    make_update(tmp_path / "one", home / "package", "ann", adapter=home / "start")
    aggregate = f"aggregate {tmp_path}/one --package {home}/package --adapter {home}/start --aggregator svd"
    assert main([*aggregate.split(), "-o", str(tmp_path / "adapter")]) == 0
    assert main(["relay", str(tmp_path / "adapter"), "-o", str(tmp_path / "edge"), "--client", "east"]) == 0
    assert "10 examples, 100 tokens" in capsys.readouterr().out
    assert main(["relay", str(tmp_path / "edge"), "-o", str(tmp_path / "x"), "--client", "east"]) == 2
    assert "is of kind 'update'; expected an adapter" in capsys.readouterr().err
