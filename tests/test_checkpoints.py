"""What a checkpoint says of its head against what it stores: transformers is the reference."""

import json

import pytest
import torch
from families import make_checkpoint, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_fedlarge import checkpoints
from hf_fedlarge.checkpoints import open_checkpoint
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.package import load_package, stream_checkpoint
from hf_fedlarge.rounding import dense
from hf_fedlarge.shrink import plan_shrink, shrink

IDS = torch.arange(5, 37).view(2, 16)
TIED = {"qwen3": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
every_tied = pytest.mark.parametrize("family", TIED)


def edit(checkpoint, change):
    """Change the stored tensors in place."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def loss_of(model):
    with torch.no_grad():
        return float(model(IDS, labels=IDS).loss)


@every_tied
def test_a_head_of_its_own_counts_though_the_config_says_tied(family, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_COMPARED_BYTES", 4096)
    checkpoint = make_checkpoint(tmp_path / "full", family)

    def tune(tensors):  # some of the last rows, which only a comparison of all finds
        tensors["lm_head.weight"] = tensors[TIED[family]].clone()
        tensors["lm_head.weight"][-20:] += 1

    edit(checkpoint, tune)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert loss_of(stream_checkpoint(checkpoint, dtype=torch.float32)) == pytest.approx(loss_of(plain), rel=1e-5)
    assert loss_of(plain) != pytest.approx(loss_of(make_model(family, dtype=torch.float32)), rel=1e-3)

    plan = plan_shrink(checkpoint, keep_layers="1.0", embeddings="bf16")
    manifest = shrink(plan, tmp_path / "package")
    assert manifest.codecs["lm_head.weight"] == "dense"
    assert json.loads((tmp_path / "package" / "config.json").read_text())["tie_word_embeddings"] is False
    head = dense(load_package(tmp_path / "package").streamed_head.weight, torch.bfloat16)
    assert torch.equal(head, load_file(checkpoint / "model.safetensors")["lm_head.weight"])


@every_tied
def test_a_tied_matrix_is_found_under_either_name_and_under_both(family, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", family)
    expected = loss_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))

    def both(tensors):
        tensors["lm_head.weight"] = tensors[TIED[family]].clone()

    for change in (both, lambda tensors: tensors.pop(TIED[family])):
        edit(checkpoint, change)
        assert open_checkpoint(checkpoint).architecture.tied
        assert "lm_head.weight" not in plan_shrink(checkpoint).codecs
        assert loss_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)) == expected
        assert loss_of(stream_checkpoint(checkpoint, dtype=torch.float32)) == pytest.approx(expected, rel=1e-5)
    edit(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ArtifactError, match=f"lacks the tensor {TIED[family]}"):
        open_checkpoint(checkpoint)
