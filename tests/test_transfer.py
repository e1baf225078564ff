"""The transfer report, where the answer is known."""

import gc
import json
import tracemalloc
import weakref

import numpy as np
import pytest
from federation import LORA, make_examples, make_federation, make_update

from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.data import load_examples
from hf_fedlarge.evaluation import evaluate, example_losses, load_model
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.transfer import _interval, _share, gradient_agreement, transfer_report

HOW = {"max_length": 64, "batch_size": 5}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, its package, an adapter that changes nothing, one that changes much, and examples."""
    path = tmp_path_factory.mktemp("transfer")
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=0)
    make_update(path / "update", path / "package", "a")
    aggregate_updates([path / "update"], path / "package", path / "adapter")
    make_examples(path / "data.jsonl")
    return path


def report_of(home, adapter, **options):
    data = load_examples(str(home / "data.jsonl"))
    return transfer_report(home / "checkpoint", home / "package", home / adapter, data, **HOW, **options)


def test_losses_of_examples_add_up_to_the_evaluation(home):
    data, tokenizer = load_examples(str(home / "data.jsonl")), load_tokenizer(home / "package")
    sums, tokens = example_losses(load_model(home / "package"), tokenizer, data, **HOW)
    whole = evaluate(home / "package", data, **HOW)
    assert (len(sums), tokens.sum()) == (whole.examples, whole.tokens)
    assert sums.sum() / tokens.sum() == pytest.approx(whole.loss, rel=1e-6)
    # Each by itself, in another order.
    alone = [evaluate(home / "package", data.select([place]), **HOW) for place in range(len(data))]
    assert np.sort(sums) == pytest.approx(np.sort([one.loss * one.tokens for one in alone]), rel=0.02)


def test_no_model_is_kept_behind_its_evaluation(home, monkeypatch):
    loaded = []

    def load(*args, **options):
        assert not any(model() for model in loaded), "an earlier one is still there"
        model = load_model(*args, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("hf_fedlarge.transfer.load_model", load)
    monkeypatch.setattr("hf_fedlarge.evaluation.load_model", load)
    gc.disable()
    try:
        report_of(home, "start")
        evaluate(home / "package", load_examples(str(home / "data.jsonl")), **HOW)
        assert len(loaded) == 5
        assert not any(model() for model in loaded)
    finally:
        gc.enable()


def test_resampling_many_examples_takes_little_memory_and_is_as_at_once():
    of, count = np.random.default_rng(1).random(5000), np.full(5000, 3)
    tracemalloc.start()
    found = _interval(lambda a, n: a / n, of, count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # all at once are 80 MB of places and as much of values
    drawn = np.random.default_rng(0).integers(5000, size=(2000, 5000))
    low, high = np.quantile(of[drawn].sum(axis=1) / count[drawn].sum(axis=1), [0.025, 0.975])
    assert found == {"value": of.sum() / count.sum(), "low": low, "high": high}


def test_an_adapter_that_changes_nothing_gains_nothing(home):
    report = report_of(home, "start")
    assert report["gain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert report["loss"]["base"] == report["loss"]["full_model"]
    assert report["loss"]["package"] == report["loss"]["package_trained"]
    assert report["share_kept"] is None
    assert "reference" not in report["loss"]


def test_the_reference_itself_keeps_all_of_its_gain(home):
    report = report_of(home, "adapter", reference=home / "adapter")
    assert report["share_kept"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    entry, data = report["loss"]["full_model"], load_examples(str(home / "data.jsonl"))
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] == pytest.approx(evaluate(home / "checkpoint", data, adapter=home / "adapter", **HOW).loss)
    assert report["gain"]["value"] == pytest.approx(report["loss"]["base"]["value"] - entry["value"])
    assert report["examples"] == 12


def test_of_a_reference_that_gains_nothing_there_is_no_share(home, tmp_path, capsys):
    words = [str(home / name) for name in ("checkpoint", "package", "adapter")]
    words += ["--data", str(home / "data.jsonl"), "--max-length", "64", "--reference", str(home / "start")]
    assert main(["transfer", *words, "--json", str(tmp_path / "out.json")]) == 0
    assert "the reference gains nothing" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert report["share_kept"] is None
    assert report["loss"]["reference"] == report["loss"]["base"]


def test_a_share_has_no_interval_where_some_resample_has_no_gain():
    base, plugged_in, reference = np.array([2.0, 1.0]), np.array([1.5, 1.0]), np.array([1.0, 1.0])
    assert _interval(_share, base, plugged_in, reference) == {"value": 0.5, "low": None, "high": None}
    assert _interval(_share, base, plugged_in, base - 1)["low"] == 0.0


def test_gradients_of_the_same_model_agree_and_a_dropped_layer_makes_them_differ(home):
    data = load_examples(str(home / "data.jsonl"))
    cosines = gradient_agreement(home / "checkpoint", home / "package", home / "adapter", data, **HOW)
    assert sorted(cosines) == [0, 2, 3]
    assert all(-1 <= cosine < 0.999 for cosine in cosines.values())
    assert main(["shrink", str(home / "checkpoint"), "-o", str(home / "whole"), "--keep-layers", "1.0"]) == 0
    start_adapter(home / "whole", home / "whole-start", LORA, seed=0)
    same = gradient_agreement(home / "checkpoint", home / "whole", home / "whole-start", data, **HOW)
    assert min(same.values()) > max(cosines.values())
    assert min(same.values()) > 0.8  # 4 bits, random weights


def test_the_command_prints_a_table_and_writes_the_figures(home, tmp_path, capsys):
    words = [str(home / name) for name in ("checkpoint", "package", "adapter")]
    words += ["--data", str(home / "data.jsonl"), "--examples", "1", "--max-length", "64", "--gradients"]
    assert main(["transfer", *words, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "full model with the adapter" in printed
    assert "layer 2: gradients agree by" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["gain"]["low"] is None  # of a single example
    assert sorted(report["gradient_agreement"]) == ["0", "2", "3"]


def test_an_adapter_of_another_base_is_refused(home, tmp_path, capsys):
    make_federation(tmp_path, "qwen2")
    words = [str(tmp_path / "checkpoint"), str(tmp_path / "package"), str(home / "adapter")]
    assert main(["transfer", *words, "--data", str(home / "data.jsonl")]) == 2
    assert "belongs to the base" in capsys.readouterr().err
