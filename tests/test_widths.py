"""How many neurons each layer keeps: where they cost least, against answers that are known."""

import itertools

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_dense, make_tokenizer
from transformers import AutoModelForCausalLM

from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import PackageManifest, read_manifest
from hf_fedlarge.calibrate import make_package, plan_package
from hf_fedlarge.cli import main
from hf_fedlarge.config import PackageSettings
from hf_fedlarge.package import load_package, stream_checkpoint
from hf_fedlarge.walk import Walk
from hf_fedlarge.widths import _gain, allot, choose_widths

IDS = torch.randint(4, 260, (12, 1, 32), generator=torch.Generator().manual_seed(3))


def total_cost(costs, neurons, widths):
    return sum(sum(costs[layer][: (neurons - width + 63) // 64]) for layer, width in widths.items())


@pytest.mark.parametrize(("neurons", "step"), [(256, 64), (300, 64), (512, 128), (600, 128)])
def test_no_other_widths_cost_less(neurons, step):
    count = (neurons - 1) // 64
    draw = torch.rand(3, count, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [3.0], [0.2]])
    costs = {layer: row.sort().values.tolist() for layer, row in zip((0, 2, 5), draw, strict=True)}
    left = [neurons, *range((neurons - 1) // step * step, 0, -step)]
    for total in range(3 * step, 3 * neurons, 64):
        widths = allot(costs, neurons, total, step)
        assert total - step < sum(widths.values()) <= total
        possible = [
            total_cost(costs, neurons, dict(zip(costs, chosen, strict=True)))
            for chosen in itertools.product(left, repeat=3)
            if sum(chosen) == sum(widths.values())
        ]
        assert total_cost(costs, neurons, widths) <= min(possible) + 1e-6


def test_every_layer_keeps_some_and_none_loses_any_where_all_stay():
    costs = {0: [0.0, 0.0, 0.0], 1: [9.0, 9.0, 9.0]}
    assert allot(costs, 256, 320, 64) == {0: 64, 1: 256}
    assert allot(costs, 256, 256, 64) == {0: 64, 1: 192}
    assert allot(costs, 256, 512, 64) == {0: 256, 1: 256}
    assert allot(costs, 256, 384, 128) == {0: 128, 1: 256}


@pytest.fixture
def idle(tmp_path):
    """A model whose layer 2 hardly uses its feed-forward layer, and whose layer 0 uses it most."""
    checkpoint = make_checkpoint(tmp_path / "full", "gpt2", layers=4)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for number, layer in enumerate(model.transformer.h):
            layer.mlp.c_proj.weight.mul_({0: 4.0, 2: 1e-3}.get(number, 1.0))
    model.save_pretrained(checkpoint)
    make_tokenizer(checkpoint)
    return checkpoint


def test_layers_keep_as_many_as_they_are_missed_by(idle):
    done = []
    widths = choose_widths(idle, [0, 1, 2], list(IDS), 128, done.append)
    assert sum(widths.values()) == 3 * 128
    assert widths[2] == 64
    assert widths[0] > widths[1] >= widths[2]
    assert done == [1, 2, 3, 4]


def test_a_share_below_a_sixth_leaves_every_layer_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.widths._STEPS", 1.5)  # of 256 neurons: 192
    checkpoint = make_checkpoint(tmp_path / "full", "gpt2", layers=3)
    assert choose_widths(checkpoint, [0, 1, 2], list(IDS), 64) == dict.fromkeys(range(3), 64)
    assert choose_widths(checkpoint, [0, 2], list(IDS), 128) == {0: 128, 2: 128}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"phi3"}))
def test_an_error_counts_as_much_as_is_left_of_it_behind_the_block(family, tmp_path):
    """Between a matrix and the block's states there may be a norm, which makes nothing of the matrix' own size."""
    found = []
    for factor in (1.0, 8.0):
        checkpoint = make_checkpoint(tmp_path / f"times {factor}", family, layers=2, dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        architecture = describe(model.config)
        path = f"{architecture.blocks}.0.{architecture.feed_forward.output}"
        with torch.no_grad():
            model.get_submodule(path).weight.mul_(factor)
        model.save_pretrained(checkpoint)
        walk = Walk(stream_checkpoint(checkpoint), IDS[0])
        hidden = walk.embed(torch.cat(list(IDS)))
        found.append(_gain(walk, 0, architecture.feed_forward.output, hidden))
    if family in ("gemma2", "gemma3"):
        assert found[0] / found[1] == pytest.approx(64, rel=0.2)
    elif family == "opt_projected":  # the norm is of the sum
        assert found[0] / found[1] > 2
    else:
        assert found == pytest.approx([1, 1], rel=0.05)


def test_layers_and_their_widths_are_chosen_together(idle, tmp_path):
    settings = PackageSettings(keep_layers=3, keep_neurons=0.5, layer_choice="influence")
    plan = plan_package(idle, settings, sequences=list(IDS))
    assert len(plan.kept) == 3
    assert len(plan.scores) == 4
    assert sum(plan.widths.get(layer, 256) for layer in plan.kept) == 3 * 128
    assert len({plan.widths.get(layer, 256) for layer in plan.kept}) > 1
    make_package(plan, settings, tmp_path / "package")
    assert load_package(tmp_path / "package").package.kept_layers == list(plan.kept)


def test_a_dry_run_computes_no_layer_and_says_what_is_still_to_be_chosen(idle, tmp_path, capsys, monkeypatch):
    def computed(*_):
        raise AssertionError

    monkeypatch.setattr("hf_fedlarge.calibrate.choose", computed)
    monkeypatch.setattr("hf_fedlarge.calibrate.choose_widths", computed)
    words = ["shrink", str(idle), "-o", str(tmp_path / "output"), "--dry-run", "--layer-choice", "loss"]
    assert main([*words, "--keep-layers", "3", "--keep-neurons", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "neurons  layer 0-1, 3: 128\n" in said
    assert "MB → about " in said
    assert "open     layers and widths, even here: the calibration text decides when the package is made" in said
    assert main([*words, "--keep-layers", "0-2"]) == 0
    said = capsys.readouterr().out
    assert "about" not in said
    assert "open  " not in said


def test_a_package_of_such_widths_computes_what_one_with_zeros_for_neurons_that_went_does(idle, tmp_path):
    settings = PackageSettings(keep_neurons=0.5, embeddings="bf16")
    plan = plan_package(idle, settings, sequences=list(IDS))
    even = plan_package(idle, settings.model_copy(update={"width_choice": "uniform"}), sequences=list(IDS))
    assert set(even.widths.values()) == {128}
    assert plan.package_bytes == even.package_bytes
    assert plan.widths[2] == 64
    assert "neurons  layer 0: 256; layer 1: 128; layer 2-3: 64\n" in plan.describe()
    make_package(plan, settings, tmp_path / "package")
    entries = read_manifest(tmp_path / "package", PackageManifest).layers
    assert [entry.neurons for entry in entries] == [plan.widths.get(layer) for layer in range(4)]
    streamed, dense = load_package(tmp_path / "package", dtype=torch.float32), make_dense(tmp_path / "package")
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS[0]).logits, dense(IDS[0]).logits, rtol=1e-4, atol=1e-4)
