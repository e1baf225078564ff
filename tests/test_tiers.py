"""What a client's memory is enough for."""

import pytest
import torch
from families import make_checkpoint
from federation import make_update

from hf_fedlarge.adapters import read_factors, read_state
from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.shrink import plan_shrink, shrink
from hf_fedlarge.tiers import derive_adapter, describe_fit, fit_memory

LORA = LoraSettings(rank=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiers") / "checkpoint", layers=6)


def fit(checkpoint, memory, tokens=512, lora=LORA):
    return fit_memory(checkpoint, memory, tokens, lora, "int8")


def test_more_memory_never_fits_less_and_what_fits_is_within_it(checkpoint):
    most = fit(checkpoint, 10**12)
    assert (most.keep_layers, most.keep_neurons, most.rank) == (1, 1, 32)
    seen = [most]
    while len(seen) < 8:
        found, last = fit(checkpoint, seen[-1].needed_bytes - 1), seen[-1]
        assert found.needed_bytes < last.needed_bytes
        assert (found.keep_layers, found.keep_neurons, found.rank) < (last.keep_layers, last.keep_neurons, last.rank)
        seen.append(found)
    assert seen[-1].rank == 4
    assert len(seen[-1].plan.kept) == 3
    with pytest.raises(ConfigError, match="the smallest package needs"):
        fit(checkpoint, seen[-1].needed_bytes - 1)


def test_more_tokens_need_more(checkpoint):
    assert fit(checkpoint, 10**12, tokens=4096).needed_bytes > fit(checkpoint, 10**12).needed_bytes


def test_the_rank_asked_for_is_the_most_and_may_be_below_the_least(checkpoint):
    assert fit(checkpoint, 10**12, lora=LoraSettings(rank=2)).rank == 2


def test_layers_go_where_neurons_cannot(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "phi3", layers=6)
    most = fit(checkpoint, 10**12)
    fits = fit(checkpoint, most.needed_bytes - most.plan.package_bytes // 4, lora=LoraSettings(rank=4))
    assert fits.keep_neurons == 1


def test_the_line_that_the_server_prints(checkpoint):
    line = describe_fit(fit(checkpoint, 3 * 10**9), 3 * 10**9, 512)
    assert line.startswith("fits in 3.0 GB at 512 tokens: keep 6 of 6 layers, r=32: ")


@pytest.fixture(scope="module")
def uneven(checkpoint, tmp_path_factory):
    """A large package, a small one without two layers, and the large one's adapter after a round."""
    path = tmp_path_factory.mktemp("uneven")
    shrink(plan_shrink(checkpoint, keep_layers=6), path / "large")
    shrink(plan_shrink(checkpoint, keep_layers="0,1,3,5"), path / "small")
    lora = LoraSettings(rank=8, alpha=16.0)
    start_adapter(path / "large", path / "start", lora, seed=0)
    make_update(path / "first", path / "large", "ann", seed=1, adapter=path / "start", lora=lora)
    aggregate_updates([path / "first"], path / "large", path / "one", previous=path / "start")
    return path


def product(factors, lora):
    return {module: lora.scale * (B_OR.double() @ A_RI.double()) for module, (A_RI, B_OR) in factors.items()}


def whole(directory, lora):
    """The products of adapter and carry together."""
    settings, factors = read_state(directory, lora)
    return product(factors, settings)


def test_a_tier_gets_the_best_part_of_the_adapter_in_its_rank(uneven, tmp_path):
    lora = LoraSettings(rank=3, alpha=16.0)
    manifest = derive_adapter(uneven / "one", uneven / "small", lora, tmp_path / "part")
    assert manifest.layers == [0, 1, 3, 5]
    full_lora = read_manifest(uneven / "one", AdapterManifest).lora
    for module, part in product(read_factors(tmp_path / "part"), lora).items():
        full = product({module: read_factors(uneven / "one")[module]}, full_lora)[module]
        singular = torch.linalg.svdvals(full)
        assert torch.linalg.norm(full - part).item() == pytest.approx(singular[3:].norm().item(), rel=1e-4)


def second_round(uneven, path, **choices):
    """Aggregate the updates `a` and `b`; `part` is what the small tier's client started from."""
    return aggregate_updates(
        [path / "a", path / "b"],
        uneven / "large",
        path / "two",
        previous=uneven / "one",
        tiers={path / "part": uneven / "small"},
        **choices,
    )


def test_tiers_meet_in_one_adapter_as_the_dense_sum_says(uneven, tmp_path):
    """A large client and a small one: each layer is the mean of the changes of those that have it."""
    lora, small = read_manifest(uneven / "one", AdapterManifest).lora, LoraSettings(rank=3, alpha=16.0)
    part = tmp_path / "part"
    derive_adapter(uneven / "one", uneven / "small", small, part)
    make_update(tmp_path / "a", uneven / "large", "ann", seed=2, adapter=uneven / "one", round_number=2, lora=lora)
    make_update(tmp_path / "b", uneven / "small", "ben", seed=3, adapter=part, round_number=2, lora=small, tokens=300)
    collected = second_round(uneven, tmp_path, carry_rank=64)
    assert collected.refused == ()
    ann, ben = product(read_factors(tmp_path / "a"), lora), product(read_factors(tmp_path / "b"), small)
    parent, had = product(read_factors(uneven / "one"), lora), product(read_factors(part), small)
    before, after = (whole(path, lora) for path in (uneven / "one", tmp_path / "two"))
    assert len(ben) < len(ann)
    for module, found in after.items():
        change = ann[module] - parent[module]
        if module in ben:
            change = 0.25 * change + 0.75 * (ben[module] - had[module])
        torch.testing.assert_close(found, before[module] + change, rtol=1e-4, atol=1e-5)


def test_an_update_of_a_tier_must_have_its_package(uneven, tmp_path):
    lora, small = read_manifest(uneven / "one", AdapterManifest).lora, LoraSettings(rank=3, alpha=16.0)
    part = tmp_path / "part"
    derive_adapter(uneven / "one", uneven / "small", small, part)
    make_update(tmp_path / "a", uneven / "large", "ann", adapter=uneven / "one", round_number=2, lora=lora)
    make_update(tmp_path / "b", uneven / "large", "ben", adapter=part, round_number=2, lora=small)
    collected = second_round(uneven, tmp_path)
    [(client, reason)] = collected.refused
    assert client == "ben"
    assert "it was trained on the package" in reason


def test_a_tier_larger_than_the_first_is_refused(uneven, tmp_path):
    with pytest.raises(ConfigError, match="rank 9 is no part of an adapter with the layers 0-5 and rank 8"):
        derive_adapter(uneven / "one", uneven / "small", LoraSettings(rank=9), tmp_path / "part")
