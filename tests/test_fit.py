"""Fitting a small model against the full one, block by block."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_dense, make_model, make_package
from safetensors.torch import load_file, save_file

from hf_fedlarge.artifacts import PackageManifest, file_entry, read_manifest, verify_files
from hf_fedlarge.calibrate import fit_package, plan_package
from hf_fedlarge.calibrate import make_package as calibrated_package
from hf_fedlarge.config import PackageSettings
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.fit import FitPlan
from hf_fedlarge.package import load_package, stream_checkpoint
from hf_fedlarge.shrink import plan_shrink, shrink

IDS = torch.randint(4, 260, (12, 1, 32), generator=torch.Generator().manual_seed(3))
NARROW = sorted(set(FAMILIES) - {"phi3"})


def narrow_plan(checkpoint, keep="0,2,3", share=0.5):
    plan = plan_shrink(checkpoint, keep_layers=keep, keep_neurons=share)
    return plan, FitPlan(plan.kept, "nf4", plan.widths)


@pytest.mark.parametrize("family", NARROW)
def test_a_package_without_some_neurons_computes_what_one_with_zeros_for_them_does(family, tmp_path):
    path = make_package(tmp_path / "package", family, surrogate_codec="int8", keep_neurons=0.5)
    streamed, dense = load_package(path, dtype=torch.float32), make_dense(path)
    entries = read_manifest(path, PackageManifest).layers
    count = streamed.architecture.neuron_count
    assert [entry.neurons for entry in entries] == [count // 2, None, count // 2, count // 2]
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS[0]).logits, dense(IDS[0]).logits, rtol=1e-4, atol=1e-4)


def test_a_fit_holds_whole_blocks_also_where_training_would_not(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=4)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)  # products of fp32
    found = []
    for name, limit in (("whole", 2**30), ("rows", 0)):
        monkeypatch.setattr("hf_fedlarge.arena.UNASKED_BLOCK_BYTES", limit)
        plan, fit_plan = narrow_plan(checkpoint)
        (tmp_path / name).mkdir()
        found.append(fit_package(plan, fit_plan, list(IDS), tmp_path / name).matrices)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("family", NARROW)
def test_fitted_outputs_make_the_small_model_more_like_the_full_one(family, tmp_path):
    """On text that was not fitted on, against the same neurons without a fit."""
    checkpoint = make_checkpoint(tmp_path / "full", family, layers=4)
    plan, fit_plan = narrow_plan(checkpoint)
    (tmp_path / "work").mkdir()
    many = torch.randint(4, 260, (64, 1, 32), generator=torch.Generator().manual_seed(1))
    fitted = fit_package(plan, fit_plan, list(many), tmp_path / "work")
    shrink(plan, tmp_path / "fitted", fitted=fitted)
    full = stream_checkpoint(checkpoint, dtype=torch.float32)
    weights = load_file(checkpoint / "model.safetensors")
    for name in list(fitted.matrices):
        del fitted.matrices[name]  # then it is the checkpoint's
        if full.architecture.in_block(name) == f"{full.architecture.feed_forward.output}.weight":
            stored = weights[name if name in weights else name.removeprefix(f"{full.architecture.prefix}.")]
            stored = stored.T if full.architecture.is_transposed(name) else stored
            fitted.matrices[name] = stored[:, fitted.neurons[full.architecture.layer_of(name)]]
    shrink(plan, tmp_path / "plain", fitted=fitted)
    with torch.no_grad():
        truth = full(IDS[0]).logits
        errors = [
            (load_package(tmp_path / name, dtype=torch.float32)(IDS[0]).logits - truth).norm()
            for name in ("fitted", "plain")
        ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("family", ["llama", "phi3"])  # with gate and up in one matrix
def test_errors_of_rounding_make_up_for_one_another(family, tmp_path, monkeypatch):
    """Nothing is left out here, so rounding is all that is lost."""
    checkpoint = make_checkpoint(tmp_path / "full", family, layers=3)
    plan = plan_shrink(checkpoint, keep_layers="1.0")
    many = torch.randint(4, 260, (64, 1, 32), generator=torch.Generator().manual_seed(1))
    errors = []
    for name in ("plain", "gptq"):
        if name == "plain":
            monkeypatch.setattr("hf_fedlarge.fit.compensated", lambda W, gram: W)
        (tmp_path / f"{name}.work").mkdir()
        widths = dict.fromkeys(plan.kept, plan.architecture.neuron_count)
        fitted = fit_package(plan, FitPlan(plan.kept, None, widths), list(many), tmp_path / f"{name}.work")
        monkeypatch.undo()
        matrices = {weight for layer in plan.kept for weight in plan.architecture.linear_weights(layer)}
        assert fitted.matrices.keys() == matrices
        shrink(plan, tmp_path / name, fitted=fitted)
        with torch.no_grad():
            truth = stream_checkpoint(checkpoint, dtype=torch.float32)(IDS[:, 0]).logits
            errors.append((load_package(tmp_path / name, dtype=torch.float32)(IDS[:, 0]).logits - truth).norm())
    assert errors[1] < 0.95 * errors[0]  # inputs of a random model have little in common


def test_an_interrupted_fit_goes_on_and_ends_the_same(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=5, tokenizer=True)
    settings = PackageSettings(keep_layers="0,1,3,4", keep_neurons=0.5)
    plan = plan_package(checkpoint, settings)

    def interrupt(done):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated_package(plan, settings, tmp_path / "package", fitting=interrupt)
    assert not (tmp_path / "package").exists()
    assert (tmp_path / ".package.fit").exists()
    steps = []
    manifest = calibrated_package(plan, settings, tmp_path / "package", fitting=steps.append)
    assert steps == [4, 5]
    assert not (tmp_path / ".package.fit").exists()
    verify_files(tmp_path / "package", manifest)
    whole = calibrated_package(plan, settings, tmp_path / "whole", fitting=steps.append)
    assert whole.digest == manifest.digest
    assert steps == [4, 5, 1, 2, 3, 4, 5]


def test_a_fit_of_which_a_layer_is_missing_begins_anew(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=3)
    plan = plan_shrink(checkpoint, keep_layers="0,2")
    fit_plan, work = FitPlan(plan.kept, "nf4", {}), tmp_path / "work"
    work.mkdir()
    [entry] = fit_package(plan, fit_plan, list(IDS), work).surrogates
    steps = []
    assert fit_package(plan, fit_plan, list(IDS), work, steps.append).surrogates == [entry]
    assert steps == []
    (work / "layer-00001.safetensors").unlink()  # the surrogate's
    assert fit_package(plan, fit_plan, list(IDS), work, steps.append).surrogates == [entry]
    assert steps == [1, 2, 3]


def test_a_fit_that_was_half_removed_is_not_gone_on_with(tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=3)
    settings = PackageSettings(keep_layers="0,2")
    plan = replace(plan_shrink(checkpoint, keep_layers="0,2"), sequences=list(IDS))

    def killed(directory):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.calibrate.shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            calibrated_package(plan, settings, tmp_path / "package")
    assert not (tmp_path / ".package.fit").exists()
    shutil.rmtree(tmp_path / "package")
    steps = []
    assert calibrated_package(plan, settings, tmp_path / "package", fitting=steps.append).surrogates
    assert steps == [1, 2, 3]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("settings", [{}, {"keep_layers": "0,1"}, {"keep_layers": 2, "layer_choice": "loss"}])
def test_a_model_that_computes_no_numbers_is_refused_by_the_layer(settings, tmp_path):
    model, checkpoint, settings = make_model("llama", layers=3), tmp_path / "full", PackageSettings(**settings)
    model.model.layers[1].mlp.down_proj.weight.detach().fill_(float("nan"))
    model.save_pretrained(checkpoint)
    with pytest.raises(ArtifactError, match="infinity or NaN in layer 1"):
        calibrated_package(plan_package(checkpoint, settings, sequences=list(IDS)), settings, tmp_path / "package")


def test_what_is_left_of_another_fit_is_not_used(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=4, tokenizer=True)
    wide, narrow = (PackageSettings(keep_layers="1.0", keep_neurons=share) for share in (0.6, 0.5))
    plan = plan_package(checkpoint, narrow)

    def interrupt(done):
        raise KeyboardInterrupt

    other = PackageSettings(keep_layers="0,1,3", keep_neurons=0.5)
    with pytest.raises(KeyboardInterrupt):
        calibrated_package(plan_package(checkpoint, other), other, tmp_path / "package", fitting=interrupt)
    steps = []
    calibrated_package(plan, narrow, tmp_path / "package", fitting=steps.append)
    assert steps == [1, 2, 3, 4]
    # To whole blocks of 64 neurons, both shares are the same.
    assert plan_package(checkpoint, wide).widths == plan.widths


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_every_matrix_of_a_package_with_surrogates_is_rounded_so(family, tmp_path, monkeypatch):
    checkpoint = make_checkpoint(tmp_path / "full", family, layers=3)
    rounded = []
    monkeypatch.setattr("hf_fedlarge.fit.compensated", lambda W, gram: rounded.append(W.shape) or W)
    settings = PackageSettings(keep_layers="0,2")
    plan = replace(plan_shrink(checkpoint, keep_layers="0,2"), sequences=list(IDS))
    assert calibrated_package(plan, settings, tmp_path / "package").surrogates
    assert len(rounded) == 2 * len(plan.architecture.linears)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_of_neurons_that_can_not_be_is_refused(share, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "llama")
    with pytest.raises(ConfigError, match=r"--keep-neurons .* above 0 and up to 1"):
        plan_shrink(checkpoint, keep_neurons=share)


def test_a_family_whose_neurons_can_not_be_told_apart_is_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "phi3")
    with pytest.raises(ConfigError, match="phi3 can't lose neurons"):
        plan_shrink(checkpoint, keep_neurons=0.5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept[:-1],
        lambda kept: kept.flip(0),
        lambda kept: kept + 100,
        lambda kept: kept - 1 - kept[0],
        lambda kept: kept.long(),
        lambda kept: kept[None],
        lambda kept: None,
    ],
)
def test_numbers_of_neurons_that_do_not_fit_are_refused(spoil, tmp_path):
    path = make_package(tmp_path / "package", "llama", keep_neurons=0.5)
    tensors = load_file(path / "fitted.safetensors")
    spoiled = spoil(tensors.pop("neurons.2"))
    save_file(tensors | ({} if spoiled is None else {"neurons.2": spoiled.contiguous()}), path / "fitted.safetensors")
    _relist(path)
    with pytest.raises(ArtifactError, match=r"lacks neurons\.2, increasing numbers of 64 of 128"):
        load_package(path)


def _relist(path: Path) -> None:
    """Make the manifest agree with a file that was changed."""
    raw = json.loads((path / "fedlarge.json").read_text())
    raw["files"]["fitted.safetensors"] = file_entry(path / "fitted.safetensors").model_dump()
    (path / "fedlarge.json").write_text(json.dumps(raw))
