"""Adapter and carry as one adapter, for peft alone."""

import pytest
import torch
from federation import LORA, make_federation, make_update, plug_in
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_fedlarge.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterReader, read_factors
from hf_fedlarge.artifacts import CARRY_WEIGHTS
from hf_fedlarge.cli import main
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.export import export_adapter
from hf_fedlarge.merge import merge


def product(factors):
    return factors.B_OR @ factors.A_RI


def make_adapter(path, family="llama", lora=LORA, **how):
    """A checkpoint, and an adapter that leaves a carry beside it unless told otherwise."""
    checkpoint, package = make_federation(path, family)
    updates = [path / name for name in ("ann", "bob", "cyd")]
    for seed, update in enumerate(updates):
        make_update(update, package, update.name, seed=seed, lora=lora)
    aggregate_updates(updates, package, path / "adapter", **how)
    return checkpoint, path / "adapter"


@pytest.mark.parametrize(("family", "rslora"), [("llama", False), ("gpt2", True)])
def test_peft_alone_computes_what_the_merged_checkpoint_does(tmp_path, capsys, family, rslora):
    lora = LORA.model_copy(update={"rslora": rslora})
    checkpoint, adapter = make_adapter(tmp_path, family, lora)
    output = tmp_path / "export"
    assert main(["export", str(adapter), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: an adapter of rank 12 for peft\n"
    assert sorted(path.name for path in output.iterdir()) == ["README.md", ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    assert "of rank 12" in (output / "README.md").read_text()

    config, carry = LoraConfig.from_pretrained(output), AdapterReader(adapter, CARRY_WEIGHTS)
    factors, whole = read_factors(adapter), read_factors(output)
    assert factors.keys() == whole.keys()
    assert (config.r, config.use_rslora, config.layers_to_transform) == (12, False, [0, 2, 3])
    for module, (A_RI, B_OR) in whole.items():
        expected = product(factors[module]) + (product(carry.read(module)) if module in carry else 0)
        torch.testing.assert_close(config.lora_alpha / config.r * B_OR @ A_RI, lora.scale * expected)

    merge(checkpoint, adapter, tmp_path / "merged")
    ids = torch.arange(5, 25)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    found, alone = (
        plug_in(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), directory)(ids).logits
        for directory in (output, adapter)
    )
    assert (found - merged).norm() < 0.1 * (alone - merged).norm()  # merged is in bf16


def test_without_a_carry_it_is_the_adapter(tmp_path):
    _, adapter = make_adapter(tmp_path, carry_rank=0)
    assert export_adapter(adapter, tmp_path / "export") == LORA
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "export" / name).read_bytes() == (adapter / name).read_bytes()


def test_what_was_exported_is_no_adapter_of_a_round_and_is_not_replaced(tmp_path, capsys):
    checkpoint, adapter = make_adapter(tmp_path)
    export_adapter(adapter, tmp_path / "export")
    assert main(["merge", str(checkpoint), str(tmp_path / "export"), "-o", str(tmp_path / "merged")]) == 2
    assert "has no fedlarge.json, so it is not an adapter" in capsys.readouterr().err
    assert main(["export", str(adapter), "-o", str(tmp_path / "export")]) == 2
    assert "exists already" in capsys.readouterr().err
    (adapter / CARRY_WEIGHTS).unlink()
    assert main(["export", str(adapter), "-o", str(tmp_path / "other")]) == 2
    assert "lacks carry.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
