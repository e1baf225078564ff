"""Corrections: how they are stored, that they are added wherever a matrix is used, and what they are trained for."""

import json

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_dense, make_package
from torch import nn

from hf_fedlarge.artifacts import PackageManifest, describe_files, read_manifest, write_manifest
from hf_fedlarge.calibrate import make_package as make_fitted_package
from hf_fedlarge.calibrate import plan_package
from hf_fedlarge.config import PackageSettings
from hf_fedlarge.corrections import corrected, store_correction
from hf_fedlarge.data import from_rows, write_jsonl
from hf_fedlarge.entries import HealedEntry
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.heal import divergence
from hf_fedlarge.loss import StreamedHead
from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
from hf_fedlarge.quantize import DenseWeight
from hf_fedlarge.rounding import dense, round_trip
from hf_fedlarge.shrink import CORRECTIONS_NAME, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_corrected_matrix_is_the_stored_one_and_the_product(dtype):
    generator = torch.Generator().manual_seed(0)
    W_OI, A_RI, B_OR = (torch.randn(size, generator=generator) for size in ((192, 128), (3, 128), (192, 3)))
    _, weight = round_trip("w", "nf4", W_OI)
    tensors, values = store_correction("w", A_RI, B_OR)
    whole = corrected("w", weight, 3, tensors)
    expected = dense(weight, dtype) + (values.B_OR @ values.A_RI).to(dtype)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    found = torch.empty(192, 128, dtype=dtype)
    whole.read_rows(0, 192, found)
    torch.testing.assert_close(found, expected, **tolerance)
    part = torch.empty(64, 128, dtype=dtype)
    whole.read_rows(64, 128, part)
    torch.testing.assert_close(part, expected[64:128], **tolerance)
    index = torch.tensor([7, 0, 190])
    torch.testing.assert_close(whole.gather(index, dtype), expected[index], **tolerance)
    for stored, given in zip(values, (A_RI, B_OR), strict=True):
        assert (stored - given).abs().max() <= given.abs().max() / 127  # int8


def correct(package, rank=2):
    """Give a package corrections of random factors; parameter name → their product."""
    manifest = read_manifest(package, PackageManifest)
    model = load_package(package, dtype=torch.float32)
    generator, tensors, products = torch.Generator().manual_seed(1), {}, {}
    for name, codec in manifest.codecs.items():
        if codec != "nf4" or model.architecture.layer_of(name) is None:
            continue
        rows, columns = model.architecture.shape_of(name)
        if model.architecture.is_transposed(name):
            rows, columns = columns, rows
        A_RI, B_OR = (0.05 * torch.randn(size, generator=generator) for size in ((rank, columns), (rows, rank)))
        found, values = store_correction(name, A_RI, B_OR)
        tensors |= found
        product = values.B_OR @ values.A_RI
        products[name] = product.T if model.architecture.is_transposed(name) else product
    write_tensors(package / CORRECTIONS_NAME, tensors)
    (package / "fedlarge.json").unlink()
    entry = HealedEntry(rank=rank, without=1.0, divergence=0.5)
    write_manifest(package, manifest.model_copy(update={"files": describe_files(package), "healed": entry}))
    return products


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_its_corrections(tmp_path, family):
    package = make_package(tmp_path / "package", family)
    reference = make_dense(package)
    products = correct(package)
    assert products
    with torch.no_grad():
        parameters = dict(reference.named_parameters())
        for name, product in products.items():
            parameters[name].add_(product)
    ids = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = load_package(package, dtype=torch.float32)(ids).logits
        expected = reference(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (
        found - load_package(make_package(tmp_path / "other", family), dtype=torch.float32)(ids).logits
    ).abs().max() > 1e-2


def test_a_package_whose_corrections_are_missing_or_of_another_rank_is_refused(tmp_path):
    package = make_package(tmp_path / "package", "llama")
    correct(package)
    manifest = read_manifest(package, PackageManifest)
    for rank in (1, 3):
        healed = manifest.healed.model_copy(update={"rank": rank})
        write_manifest(package, manifest.model_copy(update={"healed": healed}))
        with pytest.raises(ArtifactError, match="correction_A"):
            load_package(package)
    (package / CORRECTIONS_NAME).unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != CORRECTIONS_NAME}
    write_manifest(package, manifest.model_copy(update={"files": files}))
    with pytest.raises(ArtifactError, match="correction_A"):
        load_package(package)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.5, None), (1.0, 3.0)])
def test_the_divergence_and_its_gradient_are_those_of_all_logits_at_once(scale, cap):
    generator = torch.Generator().manual_seed(0)
    heads, states = [], []
    for _ in range(2):
        rows = torch.randn(700, 16, generator=generator)
        transform = type("Transform", (), {"scale": scale, "cap": cap})()
        heads.append(StreamedHead(DenseWeight(rows), None, transform, torch.float32, torch.device("cpu")))
        states.append(torch.randn(300, 16, generator=generator))
    found, gradient = divergence(heads[0], states[0], heads[1], states[1], True)
    hidden = states[0].clone().requires_grad_()
    logs = []
    for head, own in zip(heads, (hidden, states[1]), strict=True):
        z = scale * own @ dense(head.weight, torch.float32).T
        logs.append(torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), -1))
    expected = nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-3, atol=1e-6)
    assert divergence(heads[0], states[0], heads[1], states[1], False)[1] is None


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr("hf_fedlarge.calibrate.TOKENS", 2048)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    home = tmp_path_factory.mktemp("heal")
    make_checkpoint(home / "checkpoint", layers=3, tokenizer=True)
    rows = [{"text": " ".join(f"{(3 * number + place) % 17}" for place in range(90))} for number in range(60)]
    write_jsonl(from_rows(rows), home / "public.jsonl")
    return home


def heal(home, output, **changes):
    settings = {"keep_layers": "0,2", "keep_neurons": 0.5, "calibration": str(home / "public.jsonl")}
    settings = PackageSettings(**settings | {"heal_steps": 40, "heal_rank": 4} | changes)
    plan = plan_package(home / "checkpoint", settings)
    return make_fitted_package(plan, settings, output)


def test_healing_brings_what_the_package_says_near_what_the_full_model_says(checkpoint, tmp_path):
    manifest = heal(checkpoint, tmp_path / "healed")
    plain = heal(checkpoint, tmp_path / "plain", heal_steps=0)
    assert manifest.healed.divergence < manifest.healed.without
    assert plain.healed is None
    assert '"healed"' not in (tmp_path / "plain" / "fedlarge.json").read_text()
    assert set(manifest.files) - set(plain.files) == {CORRECTIONS_NAME}
    same = {name for name in plain.files if plain.files[name] == manifest.files.get(name)}
    assert same == set(plain.files)
    text = " ".join(f"{(3 * 61 + place) % 17}" for place in range(90))  # of the kind that it was healed on
    ids = torch.tensor([load_tokenizer(checkpoint / "checkpoint")(text)["input_ids"][:128]])
    models = {"full": stream_checkpoint(checkpoint / "checkpoint")}
    models |= {name: load_package(tmp_path / name) for name in ("plain", "healed")}
    with torch.no_grad():
        logs = {name: torch.log_softmax(model(ids).logits.float(), -1) for name, model in models.items()}
    plain, healed = (
        nn.functional.kl_div(logs[name], logs["full"], log_target=True, reduction="sum") for name in ("plain", "healed")
    )
    assert healed < plain
    assert not list(tmp_path.glob(".*"))


def test_the_same_healing_gives_the_same_package_and_goes_on_from_the_fit(checkpoint, tmp_path, monkeypatch):
    first = heal(checkpoint, tmp_path / "first")
    torch.manual_seed(99)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.calibrate.heal", killed)
        with pytest.raises(KeyboardInterrupt):
            heal(checkpoint, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with monkeypatch.context() as patched:
        patched.setattr("hf_fedlarge.fit._fit_block", killed)  # nothing is fitted again
        assert heal(checkpoint, tmp_path / "second").digest == first.digest
    assert json.loads((tmp_path / "second" / "fedlarge.json").read_text())["healed"]["rank"] == 4


@pytest.mark.parametrize("surrogate", ["linear", "none"])
def test_a_package_that_lost_layers_can_be_healed(checkpoint, tmp_path, surrogate):
    manifest = heal(checkpoint, tmp_path / "package", keep_layers="0,2", keep_neurons=1.0, surrogate=surrogate)
    assert manifest.kept_layers == [0, 2]
    assert manifest.healed.divergence < manifest.healed.without
    load_package(tmp_path / "package")


def test_a_package_that_lost_nothing_but_precision_can_be_healed_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.fit.compensated", lambda W_OI, gram_II: W_OI)  # or next to nothing would be lost
    settings = {"keep_layers": 1.0, "keep_neurons": 1.0, "embeddings": "bf16"}
    manifest = heal(checkpoint, tmp_path / "package", **settings)
    assert manifest.healed.divergence < manifest.healed.without
    config = json.loads((tmp_path / "package" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hf_fedlarge"  # stock loaders would leave corrections out


def test_a_model_with_a_projection_behind_its_blocks_can_be_healed(checkpoint, tmp_path):
    make_checkpoint(tmp_path / "checkpoint", "opt_projected", layers=3, tokenizer=True)
    settings = {"calibration": str(checkpoint / "public.jsonl"), "keep_neurons": 0.5, "heal_steps": 8}
    plan = plan_package(tmp_path / "checkpoint", PackageSettings(**settings))
    assert make_fitted_package(plan, PackageSettings(**settings), tmp_path / "package").healed


@pytest.mark.parametrize("rate", [50.0, 1e30])
def test_corrections_that_are_of_no_use_are_left_out(checkpoint, tmp_path, monkeypatch, rate):
    monkeypatch.setattr("hf_fedlarge.heal._LEARNING_RATE", rate)
    manifest = heal(checkpoint, tmp_path / "package")
    assert manifest.digest == heal(checkpoint, tmp_path / "plain", heal_steps=0).digest
    assert manifest.healed is None
    assert CORRECTIONS_NAME not in manifest.files
    load_package(tmp_path / "package")
