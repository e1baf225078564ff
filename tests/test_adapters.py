"""An adapter trained on some layers is an ordinary PEFT adapter of the full model, and comes back as it was."""

import json

import pytest
import torch
from families import FAMILIES, make_config, make_model, make_package
from federation import plug_in
from peft import LoraConfig
from safetensors.torch import load_file

from hf_fedlarge.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    attach_lora,
    expected_shapes,
    get_factors,
    initial_factors,
    read_factors,
    set_factors,
    target_linears,
    tensor_shapes,
    write_adapter,
)
from hf_fedlarge.architectures import describe
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.entries import BaseModelEntry
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.package import load_package
from hf_fedlarge.tensors import Factors

KEPT = [0, 2, 3]
LORA = LoraSettings(rank=4, alpha=10.0)
BASE = BaseModelEntry(id="org/model", revision="a" * 40, digest="0" * 64)
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(0))


def some_factors(architecture, layers=KEPT, lora=LORA):
    generator = torch.Generator().manual_seed(1)
    return {
        module: Factors(torch.randn(a, generator=generator) * 0.2, torch.randn(b, generator=generator) * 0.2)
        for module, (a, b) in expected_shapes(architecture, layers, lora).items()
    }


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for module, factors in expected.items():
        assert all(torch.equal(*pair) for pair in zip(found[module], factors, strict=True)), module


def adapted_paths(model):
    return {path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}


# On a model


@every_family
def test_expected_shapes_are_those_peft_gives_every_matrix_of_the_blocks(family):
    model = make_model(family, layers=4)
    architecture = describe(model.config)
    adapted = attach_lora(model, architecture, LORA)
    expected = expected_shapes(architecture, range(4), LORA)
    assert len(expected) == 4 * len(architecture.linears)
    found = get_factors(adapted, architecture, list(range(4)))
    assert {module: (A.shape, B.shape) for module, (A, B) in found.items()} == expected
    assert adapted_paths(adapted) == set(expected)


@every_family
def test_only_the_adapter_trains_and_it_is_in_fp32(family):
    model = make_model(family, dtype=torch.bfloat16)
    adapted = attach_lora(model, describe(model.config), LORA)
    trainable = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
    assert len(trainable) == 2 * 2 * len(describe(model.config).linears)


@every_family
def test_factors_set_in_global_numbers_lie_on_the_package_s_blocks_and_come_back(tmp_path, family):
    model = load_package(make_package(tmp_path / "package", family))
    factors = some_factors(model.architecture)
    adapted = attach_lora(model, model.architecture, LORA)
    set_factors(adapted, factors, model.architecture, model.package.kept_layers)
    assert_equal(get_factors(adapted, model.architecture, KEPT), factors)
    modules, blocks = dict(adapted.get_base_model().named_modules()), model.architecture.blocks
    for block, layer in enumerate(KEPT):
        for path in model.architecture.linears:
            A_RI, B_OR = factors[f"{blocks}.{layer}.{path}"]
            lora = modules[f"{blocks}.{block}.{path}"]
            assert torch.equal(lora.lora_A["default"].weight, A_RI)
            assert torch.equal(lora.lora_B["default"].weight, B_OR)


def test_an_adapter_for_blocks_that_lost_neurons_comes_back_with_zeros_for_them(tmp_path):
    model = load_package(make_package(tmp_path / "package", "llama", keep_neurons=0.5))
    factors = some_factors(model.architecture)
    adapted = attach_lora(model, model.architecture, LORA)
    set_factors(adapted, factors, model.architecture, KEPT)
    returned = get_factors(adapted, model.architecture, KEPT)
    for block, layer in enumerate(KEPT):
        missing = torch.ones(128, dtype=torch.bool)
        missing[model.architecture.neurons[block]] = False
        for path, zeros in (("mlp.gate_proj", "B"), ("mlp.down_proj", "A"), ("self_attn.o_proj", None)):
            (A, B), (A_was, B_was) = (which[f"model.layers.{layer}.{path}"] for which in (returned, factors))
            assert (A.shape, B.shape) == (A_was.shape, B_was.shape)
            assert torch.equal(A, A_was.masked_fill(missing, 0) if zeros == "A" else A_was)
            assert torch.equal(B, B_was.masked_fill(missing[:, None], 0) if zeros == "B" else B_was)


def test_factors_are_copies_that_later_training_does_not_change():
    model = make_model("llama")
    architecture = describe(model.config)
    adapted = attach_lora(model, architecture, LORA)
    factors = get_factors(adapted, architecture, [0, 1])
    before = {module: [matrix.clone() for matrix in pair] for module, pair in factors.items()}
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(1)
    assert_equal(factors, before)


def test_a_fresh_adapter_is_the_same_everywhere_and_changes_nothing_yet():
    architecture = describe(make_config("llama", layers=4))
    factors = initial_factors(architecture, KEPT, LORA, seed=3)
    assert_equal(initial_factors(architecture, KEPT, LORA, seed=3), factors)
    assert set(factors) == set(expected_shapes(architecture, KEPT, LORA))
    assert all((B_OR == 0).all() for _, B_OR in factors.values())
    other = initial_factors(architecture, KEPT, LORA, seed=4)
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"
    assert not torch.equal(other[first].A_RI, factors[first].A_RI)
    assert not torch.equal(factors[second].A_RI, factors[first].A_RI)
    # As wide as peft's own.
    theirs = get_factors(attach_lora(make_model("llama", layers=4), architecture, LORA), architecture, list(range(4)))
    for module in factors:
        bound = factors[module].A_RI.shape[1] ** -0.5
        for A_RI in (factors[module].A_RI, theirs[module].A_RI):
            assert 0.9 * bound < A_RI.abs().max() <= bound


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_counts_as_often_as_its_settings_say(rslora):
    lora, model = LoraSettings(rank=4, alpha=10.0, rslora=rslora), make_model("llama", dtype=torch.float32)
    architecture = describe(model.config)
    factors = some_factors(architecture, [0, 1], lora)
    adapted = attach_lora(model, architecture, lora)
    set_factors(adapted, factors, architecture, [0, 1])
    module, hidden = "model.layers.1.mlp.up_proj", torch.randn(5, 64)
    A_RI, B_OR = factors[module]
    layer = adapted.get_base_model().get_submodule(module)
    with torch.no_grad():
        expected = layer.base_layer(hidden) + lora.scale * hidden @ A_RI.T @ B_OR.T
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-4, atol=1e-5)
    assert lora.scale == (5.0 if rslora else 2.5)


# Targets


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", None, 7),
        ("llama", ["q_proj", "down_proj"], ["self_attn.q_proj", "mlp.down_proj"]),
        ("gpt2", ["c_proj"], ["attn.c_proj", "mlp.c_proj"]),
        ("gpt2", ["attn.c_proj"], ["attn.c_proj"]),
        ("opt_projected", ["fc1"], ["fc1"]),
    ],
)
def test_targets_are_last_names_or_paths(tmp_path, family, targets, expected):
    lora = LORA.model_copy(update={"targets": targets})
    model = make_model(family, layers=4)
    architecture = describe(model.config)
    found = target_linears(architecture, lora)
    assert found == list(architecture.linears) if targets is None else found == expected
    # peft, which matches by suffix, puts them nowhere else.
    factors = some_factors(architecture, KEPT, lora)
    write_adapter(tmp_path, factors, lora, architecture, BASE)
    assert adapted_paths(plug_in(make_model(family, layers=4), tmp_path)) == set(factors)
    assert adapted_paths(attach_lora(model, architecture, lora)) == set(expected_shapes(architecture, range(4), lora))


@pytest.mark.parametrize(
    "target", ["proj", "k_proj.weight", "lm_head", "project_in", "", "model.layers.0.self_attn.q_proj"]
)
def test_an_unknown_target_is_refused_with_the_choice(target):
    architecture = describe(make_config("opt_projected"))
    with pytest.raises(ConfigError, match="choose among") as caught:
        target_linears(architecture, LORA.model_copy(update={"targets": ["fc1", target]}))
    assert repr(target) in str(caught.value)
    assert "self_attn.k_proj" in str(caught.value)
    with pytest.raises(ConfigError, match="choose among"):
        expected_shapes(architecture, [0], LORA.model_copy(update={"targets": [target]}))


# As a directory


@every_family
def test_an_adapter_of_some_layers_loads_on_the_full_model_with_peft_alone(tmp_path, family):
    # `plug_in` is PeftModel.from_pretrained without a warning about peft itself. Of missing keys peft warns, and that
    # is an error here; unexpected ones would be missing among the paths.
    architecture = describe(make_config(family, layers=4))
    factors = some_factors(architecture)
    write_adapter(tmp_path, factors, LORA, architecture, BASE)
    plugged = plug_in(make_model(family, layers=4, dtype=torch.float32), tmp_path)
    assert adapted_paths(plugged) == set(factors)
    assert_equal(get_factors(plugged, architecture, list(range(4))), factors)

    # The same as the adapter set by hand, with zeros on the dropped layer.
    model = make_model(family, layers=4, dtype=torch.float32)
    by_hand = attach_lora(model, architecture, LORA)
    set_factors(by_hand, initial_factors(architecture, [1], LORA, seed=0) | factors, architecture, list(range(4)))
    with torch.no_grad():
        expected = by_hand.eval()(IDS).logits
        torch.testing.assert_close(plugged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plugged.unload()(IDS).logits, expected, atol=1e-2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_s_own_merge_adds_scale_b_a_the_right_way_round(tmp_path, family):
    base = make_model(family, layers=4, dtype=torch.float32)
    architecture, before = describe(base.config), {name: value.clone() for name, value in base.state_dict().items()}
    factors = some_factors(architecture)
    write_adapter(tmp_path, factors, LORA, architecture, BASE)
    after = plug_in(base, tmp_path).merge_and_unload().state_dict()
    for module, (A_RI, B_OR) in factors.items():
        delta = LORA.scale * B_OR @ A_RI
        found = after[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(found, delta.T if family == "gpt2" else delta, rtol=1e-4, atol=1e-5)


@every_family
def test_what_is_written_is_read_back_under_the_names_that_are_checked(tmp_path, family):
    architecture = describe(make_config(family, layers=4))
    factors = some_factors(architecture)
    write_adapter(tmp_path, factors, LORA, architecture, BASE)
    assert_equal(read_factors(tmp_path), factors)
    stored = load_file(tmp_path / ADAPTER_WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    assert shapes == tensor_shapes(expected_shapes(architecture, KEPT, LORA))
    assert sorted(path.name for path in tmp_path.iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]


def test_the_configuration_says_what_the_adapter_is_in_an_order_of_its_own(tmp_path):
    architecture = describe(make_config("llama", layers=4))
    lora = LoraSettings(rank=8, alpha=3.0, rslora=True, dropout=0.1)
    write_adapter(tmp_path, some_factors(architecture, KEPT, lora), lora, architecture, BASE)
    found = LoraConfig.from_pretrained(tmp_path)
    assert (found.r, found.lora_alpha, found.use_rslora, found.lora_dropout) == (8, 3.0, True, 0.1)
    assert (found.layers_to_transform, found.layers_pattern) == (KEPT, "layers")
    assert (found.base_model_name_or_path, found.revision, found.inference_mode) == (BASE.id, BASE.revision, True)
    # A set's order differs from one process to the next, and with it the file's digest.
    raw = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert raw["target_modules"] == sorted(architecture.linears)


def test_the_order_of_the_factors_does_not_change_the_file(tmp_path):
    architecture = describe(make_config("llama", layers=4))
    factors = some_factors(architecture)
    for name, given in (("a", factors), ("b", dict(reversed(factors.items())))):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, given, LORA, architecture, BASE)
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
