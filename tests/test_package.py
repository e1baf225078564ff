"""Loading: a full checkpoint streams as transformers computes it, and what is damaged is refused."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_checkpoint, make_package
from federation import LORA, make_federation, plug_in
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_fedlarge import api
from hf_fedlarge.adapters import attach_lora, get_factors, peft_warnings
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import MANIFEST_NAME
from hf_fedlarge.errors import ArtifactError, ConfigError
from hf_fedlarge.evaluation import evaluate_model, load_model
from hf_fedlarge.package import MappedTensors, load_package, load_tokenizer, stream_checkpoint

IDS = torch.arange(5, 37).view(2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_checkpoint_computes_what_transformers_does(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, layers=3, max_shard_size="60KB")
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    streamed = stream_checkpoint(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
        loss = plain(IDS, labels=IDS).loss
        torch.testing.assert_close(streamed(IDS, labels=IDS).loss, loss, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_streamed_in_bf16_whatever_its_own_dtype(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", dtype=torch.float16)
    assert stream_checkpoint(checkpoint).dtype == torch.bfloat16


def test_an_adapter_plugs_into_a_streamed_checkpoint_as_into_a_plain_one(tmp_path):
    checkpoint, package = make_federation(tmp_path, "gpt2")
    api.start_adapter(package, tmp_path / "start", LORA, seed=0)
    from federation import make_update

    make_update(tmp_path / "ann", package, "ann", adapter=tmp_path / "start")
    api.aggregate([tmp_path / "ann"], package, tmp_path / "adapter", previous=tmp_path / "start")
    plain = plug_in(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), tmp_path / "adapter")
    streamed = plug_in(stream_checkpoint(checkpoint, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep_neurons", [1.0, 0.5])
def test_a_saved_adapter_is_one_of_the_full_model(tmp_path, keep_neurons):
    model = load_package(make_package(tmp_path / "package", "llama", keep_neurons=keep_neurons), dtype=torch.float32)
    architecture, layers = model.architecture, [0, 2, 3]
    adapted = attach_lora(model, architecture, LORA)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    api.save_adapter(adapted, tmp_path / "adapter")
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "package-full", dtype=torch.float32)
    plugged = plug_in(full, tmp_path / "adapter")
    assert plugged.peft_config["default"].base_model_name_or_path == model.package.base.id
    expected = get_factors(adapted, architecture, layers)
    assert {architecture.layer_of(f"{path}.") for path in expected} == {*layers}
    found = get_factors(plugged, describe(full.config), list(range(4)))
    assert set(found) == set(expected)
    assert all(torch.equal(*pair) for path in expected for pair in zip(found[path], expected[path], strict=True))


def test_only_plain_lora_of_a_package_s_blocks_is_saved(tmp_path):
    path = make_package(tmp_path / "package", "llama")
    plain = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrong = [
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head\.lora_B"),
        ({"rank_pattern": {"v_proj": 4}}, r"v_proj\.lora_A"),
        ({"alpha_pattern": {"v_proj": 4}}, r"v_proj\.lora_A"),
    ]
    for changes, name in wrong:
        with peft_warnings():
            model = get_peft_model(load_package(path, verify=False), replace(plain, **changes))
        with pytest.raises(ConfigError, match=f"plain LoRA .*{name}.* is something else"):
            api.save_adapter(model, tmp_path / "adapter")
    for model in (load_package(path), torch.nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match="takes a package's model with a LoRA adapter"):
            api.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_evaluation_of_a_merged_model_is_that_of_plain_transformers(tmp_path):
    checkpoint, _ = make_federation(tmp_path)
    rows = [{"text": f"some text {index}" * (1 + index % 3)} for index in range(10)]
    tokenizer = load_tokenizer(checkpoint)
    ours = evaluate_model(load_model(checkpoint), tokenizer, rows, batch_size=4)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    theirs = evaluate_model(plain, tokenizer, rows, batch_size=4)
    assert ours.tokens == theirs.tokens
    assert ours.loss == pytest.approx(theirs.loss, rel=5e-3)


def test_an_adapter_of_another_base_is_not_evaluated(tmp_path):
    checkpoint, package = make_federation(tmp_path)
    api.start_adapter(package, tmp_path / "start", LORA, seed=0)
    other = make_checkpoint(tmp_path / "other", layers=4, seed=1, tokenizer=True)
    load_model(checkpoint, tmp_path / "start")
    with pytest.raises(ArtifactError, match="belongs to the base"):
        load_model(other, tmp_path / "start")


def test_a_package_whose_layer_map_was_changed_has_another_digest(tmp_path):
    package = make_package(tmp_path / "package", "llama")
    before = load_package(package).package
    raw = json.loads((package / MANIFEST_NAME).read_text())
    raw["layers"][1]["block"], raw["layers"][2]["block"] = 1, None
    (package / MANIFEST_NAME).write_text(json.dumps(raw))
    after = load_package(package).package
    assert (before.kept_layers, after.kept_layers) == ([0, 2, 3], [0, 1, 3])
    assert before.digest != after.digest


def test_every_stage_is_a_function_of_its_command_s_name():
    from hf_fedlarge.cli import build_parser

    [commands] = [action for action in build_parser()._actions if action.dest == "command"]
    for name in commands.choices.keys() - {"keys", "flower"}:  # no stages: they make no artifact
        assert callable(getattr(api, name))
        assert name in api.__all__


def test_a_directory_without_a_tokenizer_says_so(tmp_path):
    make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "checkpoint")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_forgotten_are_there_again_when_they_are_used(tmp_path):
    def resident():
        return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    save_file({"x": torch.arange(2**22), "y": torch.ones(3)}, tmp_path / "a.safetensors")
    tensors = MappedTensors(tmp_path, ["a.safetensors"])
    values, total = tensors["x"], 2**21 * (2**22 - 1)
    assert values.sum() == total
    before = resident()
    tensors.forget()
    assert resident() < before - values.nbytes // 2
    assert values.sum() == total
