"""Calibration: text into sequences, layers by score, and the package that comes of it."""

import json

import pytest
import torch
from families import make_checkpoint, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from hf_fedlarge.artifacts import PackageManifest, read_manifest, verify_files
from hf_fedlarge.calibrate import calibration_sequences, calibration_text, make_package, plan_package
from hf_fedlarge.choice import choose
from hf_fedlarge.config import PackageSettings
from hf_fedlarge.data import from_tokens, load_examples
from hf_fedlarge.encoding import encode_example, padded
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError
from hf_fedlarge.package import load_package, load_tokenizer
from hf_fedlarge.stdlib_corpus import standard_library_prose

IDS = torch.randint(4, 260, (6, 1, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "full", "llama", layers=5, tokenizer=True)


def package_of(checkpoint, output, **settings):
    settings = PackageSettings(keep_layers=3, **settings)
    plan = plan_package(checkpoint, settings)
    return make_package(plan, settings, output)


def test_text_becomes_sequences_of_one_length():
    texts = [{"text": text} for text in ("abcd", "efgh", "0123456789", "ijkl", "mn")]
    sequences = calibration_sequences(make_tokenizer(), texts, tokens=40, length=8)
    # Every text ends with an end-of-text token. Short ones are joined, the long one begins a sequence and is cut.
    assert [make_tokenizer().decode(ids[0], skip_special_tokens=True) for ids in sequences] == [
        "abcdefg",
        "01234567",
        "ijklmn",
    ]
    assert {tuple(ids.shape) for ids in sequences} == {(1, 8)}
    assert len(calibration_sequences(make_tokenizer(), texts, tokens=16, length=8)) == 2
    with pytest.raises(DataError, match="has 51 tokens; expected 60"):
        calibration_sequences(make_tokenizer(), [{"text": "x" * 50}], tokens=100, length=60)


def with_bos():
    """A tokenizer that puts a token before every text."""
    tokenizer = make_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_every_piece_of_a_long_text_begins_as_a_training_example_does():
    tokenizer = with_bos()
    [*texts] = ({"text": text} for text in ("0123456789ABCDEF", "short", "shorter"))
    sequences = calibration_sequences(tokenizer, texts, tokens=40, length=8)
    assert all(ids[0, 0] == tokenizer.bos_token_id for ids in sequences)
    found = [tokenizer.decode(ids[0], skip_special_tokens=True) for ids in sequences]
    assert found == ["0123456", "789ABCD", "short"]
    [chat] = [{"messages": [{"role": "user", "content": "0123456789ABCDEF"}]}]  # whose template begins without it
    first, second = calibration_sequences(tokenizer, [chat], tokens=16, length=8)
    assert not (torch.cat([first, second]) == tokenizer.bos_token_id).any()


def test_a_tokenizer_may_lack_an_end_of_text_token():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    [ids] = calibration_sequences(tokenizer, [{"text": "abcd"}, {"prompt": "ef", "completion": "gh"}], length=8)
    assert tokenizer.decode(ids[0]) == "abcdefgh"
    examples = from_tokens(encode_example({"text": text}, tokenizer, 8) for text in ("a", "bc"))
    batch = padded(examples[:], tokenizer)
    assert batch["input_ids"][0, 1] == 0
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_python_s_documentation_is_the_default_text(checkpoint, tmp_path):
    manifest = package_of(checkpoint, tmp_path / "package")
    verify_files(tmp_path / "package", manifest)
    assert manifest == read_manifest(tmp_path / "package", PackageManifest)
    assert [entry.layers for entry in manifest.surrogates] == [[2], [3]] or len(manifest.surrogates) == 1
    assert manifest.digest == package_of(checkpoint, tmp_path / "again").digest


def test_own_text_can_be_given(checkpoint, tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "A public text of my own. " * 60}) + "\n")
    one = package_of(checkpoint, tmp_path / "one", calibration=str(data))
    assert one.digest != package_of(checkpoint, tmp_path / "other").digest
    data.write_text(json.dumps({"text": "short"}) + "\n")
    with pytest.raises(DataError, match="calibration text has"):
        package_of(checkpoint, tmp_path / "short", calibration=str(data))
    assert not (tmp_path / "short").exists()


def test_a_small_text_is_filled_up_with_python_s_documentation(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.calibrate.TOKENS", 1024)
    data = tmp_path / "text.jsonl"
    documentation = torch.cat(calibration_text(checkpoint, PackageSettings()))
    for words, own in ((60, 3), (600, 8)):
        data.write_text(json.dumps({"text": "ab cdef " * words}) + "\n")
        found = torch.cat(calibration_text(checkpoint, PackageSettings(calibration=str(data))))
        given = calibration_sequences(load_tokenizer(checkpoint), load_examples(str(data)), tokens=1024)
        assert found.shape == documentation.shape == (8, 128)
        assert len(given) == own
        assert torch.equal(found[:own], torch.cat(given))
        assert torch.equal(found[own:], documentation[: 8 - own])


def test_no_surrogate_where_none_is_asked_for_or_nothing_is_dropped(checkpoint, tmp_path):
    assert not package_of(checkpoint, tmp_path / "none", surrogate="none").surrogates
    settings = PackageSettings(keep_layers="1.0", calibration="missing.jsonl")  # which nobody reads
    assert not make_package(plan_package(checkpoint, settings), settings, tmp_path / "whole").surrogates


@pytest.mark.parametrize(
    ("given", "sentences"),
    [
        ({"keep_layers": 5, "surrogate_rank": 4, "layer_choice": "loss"}, 2 * ["no layer is dropped"]),
        ({"keep_layers": 5, "calibration": "x.jsonl"}, ["calibration has no effect: there is nothing to fit"]),
        ({"keep_layers": "0,1,4", "layer_choice": "loss"}, ["layer_choice has no effect: keep_layers says"]),
        ({"keep_layers": 3, "surrogate": "none", "surrogate_codec": "int8"}, ["surrogate_codec has no effect"]),
        ({"keep_layers": 3, "heal_rank": 4}, ["heal_rank has no effect: heal_steps is 0"]),
        ({"keep_layers": 3, "heal_rank": 4, "heal_steps": 1, "surrogate_rank": 4, "calibration": "x.jsonl"}, []),
        ({"keep_layers": 5}, []),
    ],
)
def test_settings_that_have_nothing_to_act_on_are_said(given, sentences, checkpoint, caplog):
    plan_package(checkpoint, PackageSettings(**given))
    assert len(caplog.messages) == len(sentences)
    assert all(sentence in message for sentence, message in zip(sentences, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("given", "kept", "width"),
    [({}, 5, 64), ({"keep_layers": 3}, 3, 128), ({"keep_neurons": 0.5}, 5, 64), ({"keep_neurons": 1.0}, 5, 128)],
)
def test_what_is_not_said_follows_from_what_is(given, kept, width, checkpoint):
    plan = plan_package(checkpoint, PackageSettings(**given))
    assert len(plan.kept) == kept
    assert plan.widths == ({} if width == 128 else dict.fromkeys(range(5), width))
    assert ("  neurons  layer 0-4: 64\n" in plan.describe()) == (width == 64)


def test_a_dropped_first_layer_leaves_no_place_for_a_surrogate(checkpoint):
    with pytest.raises(ConfigError, match="layer 0 is dropped"):
        plan_package(checkpoint, PackageSettings(keep_layers="1-4"))


@pytest.mark.parametrize("choice", ["influence", "loss", "gradient"])
def test_the_layer_that_does_least_goes_first(choice, checkpoint, tmp_path):
    """Layer 3 is made to do next to nothing, and the others much: less would be as little as bf16's rounding."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_(1e-3 if number == 3 else 4)
    model.save_pretrained(tmp_path / "idle")
    make_tokenizer(tmp_path / "idle")
    scores = choose(tmp_path / "idle", list(IDS), choice, 4).scores
    assert scores[0] == float("inf")
    # A random model's loss may also fall where a layer goes.
    assert min(range(5), key=lambda layer: abs(scores[layer])) == 3
    plan = plan_package(tmp_path / "idle", PackageSettings(keep_layers=4, layer_choice=choice))
    assert len(plan.kept) == 4
    assert plan.dropped[0] == min(range(5), key=plan.scores.__getitem__)
    assert f"scores   by {choice}: one pass over 32,768 tokens" in plan.describe()
    assert "layer   3 scores" in plan.describe()


def test_the_text_is_read_once(checkpoint, tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": "A public text of my own. " * 60}) + "\n")
    settings = PackageSettings(keep_layers=4, layer_choice="influence", calibration=str(data))
    plan = plan_package(checkpoint, settings)
    data.unlink()
    assert make_package(plan, settings, tmp_path / "package").surrogates


def test_a_surrogate_makes_the_small_model_more_like_the_full_one(checkpoint, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    package_of(checkpoint, tmp_path / "with")
    package_of(checkpoint, tmp_path / "without", surrogate="none")
    # Text that was not calibrated on.
    ids = torch.cat(calibration_sequences(make_tokenizer(), standard_library_prose(), tokens=20_000)[-6:])
    with torch.no_grad():
        truth = full(ids).logits
        errors = [
            (load_package(tmp_path / name, dtype=torch.float32)(ids).logits - truth).norm()
            for name in ("with", "without")
        ]
    assert errors[0] < errors[1]


def test_stock_transformers_refuses_a_package_with_surrogates(checkpoint, tmp_path):
    package_of(checkpoint, tmp_path / "package", embeddings="bf16")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "package")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers": [1]}, "do not stand right"),
        ({"layers": [4, 5]}, "do not stand right"),
        ({"codec": "int8"}, "surrogates.2.weight"),
    ],
)
def test_a_manifest_that_does_not_fit_its_surrogates_is_refused(checkpoint, tmp_path, change, match):
    settings = PackageSettings(keep_layers="0,1,4")
    plan = plan_package(checkpoint, settings)
    manifest = make_package(plan, settings, tmp_path / "package")
    raw = manifest.model_dump(mode="json")
    raw["surrogates"][0] |= change
    (tmp_path / "package" / "fedlarge.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=match):
        load_package(tmp_path / "package")
