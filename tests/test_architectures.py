"""Every family is described as it is, what does not fit is refused, and dropping layers changes no other layer."""

import json
from functools import partial

import pytest
import torch
from families import FAMILIES, HIDDEN, make_checkpoint, make_config, make_model
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hf_fedlarge import architectures
from hf_fedlarge.architectures import describe, load_config, logit_transform, shrink_config
from hf_fedlarge.errors import ArchitectureError, ArtifactError

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LLAMA_LIKE = {*LLAMA, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
OPT = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"}
# family → path of the blocks, their matrices, embedding, whether the head is tied
LAYOUTS = {
    "llama": ("model.layers", LLAMA_LIKE, "model.embed_tokens", False),
    "mistral": ("model.layers", LLAMA_LIKE, "model.embed_tokens", False),
    "qwen2": ("model.layers", LLAMA_LIKE, "model.embed_tokens", False),
    "qwen3": ("model.layers", LLAMA_LIKE, "model.embed_tokens", True),
    "gemma2": ("model.layers", LLAMA_LIKE, "model.embed_tokens", True),
    "gemma3": ("model.layers", LLAMA_LIKE, "model.embed_tokens", True),
    "phi3": (
        "model.layers",
        {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
        "model.embed_tokens",
        False,
    ),
    "gpt2": ("transformer.h", GPT2, "transformer.wte", True),
    "gptj": (
        "transformer.h",
        {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"},
        "transformer.wte",
        False,
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        "gpt_neox.embed_in",
        False,
    ),
    "opt": ("model.decoder.layers", OPT, "model.decoder.embed_tokens", True),
    "opt_projected": ("model.decoder.layers", OPT, "model.decoder.embed_tokens", True),
}
every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
TINY = {
    "vocab_size": 300,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 3,
}


def tiny(model_type, **options):
    known = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **{key: TINY[key] for key in TINY if hasattr(known, key)} | options)


def refusal(call, *arguments, error=ArchitectureError):
    with pytest.raises(error) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def stored_names(checkpoint):
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        return set(file.keys())


# What is found


@every_family
def test_a_family_is_described_as_it_is(family):
    blocks, linears, embedding, tied = LAYOUTS[family]
    config = make_config(family, layers=3)
    found, model = describe(config), AutoModelForCausalLM.from_config(config)
    assert found.model_type == config.model_type
    assert (found.blocks, found.layers) == (blocks, 3)
    assert set(found.linears) == linears
    assert found.transposed == (GPT2 if family == "gpt2" else frozenset())
    assert (found.embedding, found.head, found.tied) == (embedding, "lm_head", tied)
    assert found.prefix == blocks.partition(".")[0]
    assert found.parameters == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in found.parameters) == (not tied)


FEED_FORWARD = {
    "gpt2": (("mlp.c_fc",), "mlp.c_proj", "attn.c_proj"),
    "gpt_neox": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "attention.dense"),
    "gptj": (("mlp.fc_in",), "mlp.fc_out", "attn.out_proj"),
    "opt": (("fc1",), "fc2", "self_attn.out_proj"),
    "opt_projected": (("fc1",), "fc2", "self_attn.out_proj"),
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_leads_back_from_attention_and_from_neurons_is_found(family):
    found = describe(make_config(family))
    default = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "self_attn.o_proj"
    inputs, output, attention = FEED_FORWARD.get(family, default)
    assert found.attention_output == attention
    if family == "phi3":  # gate and up in one matrix
        assert found.feed_forward is None
        assert found.neuron_count == 0
        return
    assert (found.feed_forward.inputs, found.feed_forward.output) == (inputs, output)
    assert found.neuron_count == make_model(family).get_submodule(f"{found.blocks}.0.{output}").weight.numel() // 64


def test_names_are_numbered_and_renumbered_inside_the_blocks_only():
    found = describe(make_config("gpt2", layers=12))
    assert found.layer_of("transformer.h.11.attn.c_attn.weight") == 11
    assert found.layer_of("transformer.wte.weight") is None
    assert found.layer_of("transformer.h.1") is None
    assert found.in_layer("transformer.h.11.mlp.c_fc.bias", 3) == "transformer.h.3.mlp.c_fc.bias"
    assert found.in_layer("transformer.wte.weight", 3) == "transformer.wte.weight"
    assert found.is_transposed("transformer.h.11.mlp.c_fc.weight")
    assert not found.is_transposed("transformer.h.11.mlp.c_fc.bias")
    assert not found.is_transposed("transformer.wte.weight")
    assert set(found.linear_weights(2)) == {f"transformer.h.2.{path}.weight" for path in GPT2}


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 4.0}),
        ("nanochat", {"final_logit_softcapping": 3.0}),
        ("llama", {}),
    ],
)
def test_the_logits_transform_is_what_the_model_does(model_type, options):
    config = tiny(model_type, **options)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(4, 300, (2, 5))
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
        logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        transform = logit_transform(config)
        logits = logits * transform.scale
        if transform.cap is not None:
            logits = transform.cap * torch.tanh(logits / transform.cap)
        torch.testing.assert_close(logits, model(ids).logits)
    assert (transform.scale, transform.cap) != (1.0, None) or model_type == "llama"


# What is refused


@pytest.mark.parametrize(
    ("model_type", "options", "words"),
    [
        ("t5", {}, ["T5", "encoder-decoder"]),
        ("mixtral", {}, ["mixtral", "mixture of experts"]),
        ("qwen3_moe", {}, ["qwen3_moe", "mixture of experts"]),
        ("mamba", {}, ["mamba", "state-space"]),
        ("xlstm", {}, ["xlstm", "state-space or recurrent"]),
        ("bert", {}, ["bert", "both directions"]),
        ("gemma3", {}, ["gemma3", "multimodal"]),
        ("git", {}, ["git", "multimodal"]),
        ("vit", {}, ["vit", "no causal language model"]),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, ["lfm2", "differ in their parameters"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["gpt2", "scale_attn_by_inverse_layer_idx"]),
        ("diffllama", {}, ["diffllama", "lambda_std_dev"]),
        ("minicpm3", {}, ["minicpm3", "scale_depth"]),
        ("modernbert-decoder", {}, ["modernbert", "differ in their parameters"]),  # layer 0 has no norm
        ("bert", {"is_decoder": True}, ["bert", "between its blocks and its head"]),
        ("ctrl", {}, ["ctrl", "0 stacks"]),
        ("blt", {}, ["blt", "0 stacks"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_name_with_the_reason(model_type, options, words):
    message = refusal(
        describe, AutoConfig.for_model(model_type, **options) if model_type == "blt" else tiny(model_type, **options)
    )
    for word in words:
        assert word.lower() in message.lower()


def test_the_architecture_in_the_config_is_the_name_in_the_message():
    config = tiny("mixtral")
    config.architectures = ["MyMixtralForCausalLM"]
    assert refusal(describe, config).startswith("MyMixtralForCausalLM can't be used: it is a mixture of experts")


def test_blocks_of_different_widths_are_refused(monkeypatch):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(HIDDEN, 7)
    monkeypatch.setattr(architectures, "empty_model", lambda config, dtype: model)
    assert "differ in their parameters" in refusal(describe, make_config("llama"))


def write_config(directory, **values):
    config = json.loads((directory / "config.json").read_text()) if (directory / "config.json").exists() else {}
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory


def test_a_checkpoint_s_config_is_read(tmp_path):
    make_config("llama", layers=5).save_pretrained(tmp_path)
    assert load_config(tmp_path).num_hidden_layers == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "made_up"}, ["unknown architecture", "'made_up'"]),
        ({"model_type": None}, ["unknown architecture"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "made_up"}, ["custom code", "never run"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized already (gptq)"]),
        ({"quantization_config": "?"}, ["quantized already"]),
    ],
)
def test_a_config_that_can_not_be_used_is_refused(tmp_path, values, words):
    make_config("llama").save_pretrained(tmp_path)
    message = refusal(load_config, write_config(tmp_path, **values))
    for word in words:
        assert word in message


def test_custom_code_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    refusal(load_config, write_config(tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Config"}))
    assert not (tmp_path / "ran").exists()


def test_custom_code_beside_a_family_of_transformers_is_not_run_nor_handed_on(tmp_path, caplog):
    make_config("phi3").save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write_config(tmp_path, auto_map=auto_map)
    for _ in range(2):
        config = load_config(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "auto_map" not in config.to_dict()
    assert "auto_map" not in shrink_config(config, [0]).to_diff_dict()
    assert [record.message.partition("config.json ")[2] for record in caplog.records] == [
        "names custom code, which isn't run; transformers' own phi3 is used."
    ]
    assert "custom code" in refusal(partial(load_config, of_package=True), tmp_path)  # a client's


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 99_999, None])
def test_no_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert "config.json" in refusal(load_config, tmp_path, error=ArtifactError)


# Dropping layers


def test_lists_with_an_entry_a_layer_are_cut_and_no_others():
    config = make_config("gemma3", layers=4)
    config.eos_token_id = [0, 1, 2, 3]
    small = shrink_config(config, [0, 1, 3])
    assert small.num_hidden_layers == 3
    assert small.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert small.eos_token_id == [0, 1, 2, 3]
    assert config.num_hidden_layers == 4
    assert len(config.layer_types) == 4


def test_the_family_s_own_name_of_the_number_of_layers_is_set():
    small = shrink_config(make_config("gpt2", layers=4), [1, 2])
    assert (small.n_layer, small.num_hidden_layers) == (2, 2)
    assert "num_hidden_layers" not in small.to_dict()


def test_the_layers_below_qwen_s_window_are_counted():
    config = Qwen2Config(num_hidden_layers=4, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    small = shrink_config(config, [0, 2, 3])
    assert small.max_window_layers == 1
    assert small.layer_types == [config.layer_types[layer] for layer in (0, 2, 3)]


def test_everything_else_in_the_config_stays():
    config = LlamaConfig(num_hidden_layers=4, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    before, after = config.to_dict(), shrink_config(config, [0, 3]).to_dict()
    assert {key for key in before if before[key] != after[key]} == {"num_hidden_layers"}


@every_family
def test_a_kept_layer_computes_what_it_did_in_the_full_model(family):
    kept = [0, 2, 3]
    full = make_model(family, layers=4, dtype=torch.float32)
    found = describe(full.config)
    small = AutoModelForCausalLM.from_config(shrink_config(full.config, kept), dtype=torch.float32).eval()
    weights = full.state_dict()
    small.load_state_dict(
        {
            name: weights[name if found.layer_of(name) is None else found.in_layer(name, kept[found.layer_of(name)])]
            for name in small.state_dict()
        }
    )

    def last_layers(model, numbers):
        """Outputs of these blocks on the same inputs, longer than the sliding window."""
        seen, blocks = {}, model.get_submodule(found.blocks)

        def swap_input(module, args, kwargs):
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(2, 24, HIDDEN, generator=generator)
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        for number in numbers:
            blocks[number].register_forward_pre_hook(swap_input, with_kwargs=True)
            blocks[number].register_forward_hook(
                lambda module, args, output, number=number: seen.update({number: output})
            )
        with torch.no_grad():
            model(torch.randint(4, 260, (2, 24)), use_cache=False)
        return [seen[number][0] if isinstance(seen[number], tuple) else seen[number] for number in numbers]

    for ours, theirs in zip(last_layers(small, range(3)), last_layers(full, kept), strict=True):
        assert torch.equal(ours, theirs)


# Names in checkpoints


@every_family
def test_every_parameter_is_found_in_what_save_pretrained_writes(tmp_path, family):
    stored = stored_names(make_checkpoint(tmp_path, family))
    names = describe(load_config(tmp_path)).tensor_names(stored, tmp_path)
    assert set(names) == set(describe(load_config(tmp_path)).parameters)
    assert set(names.values()) == stored


def test_checkpoints_without_the_base_model_s_prefix_and_with_old_buffers_are_read(tmp_path):
    found = describe(make_config("gpt2"))
    bare = {name.removeprefix("transformer.") for name in found.parameters}
    buffers = {"h.0.attn.bias", "h.1.attn.masked_bias", "lm_head.weight"}
    names = found.tensor_names(bare | buffers, tmp_path)
    assert names["transformer.h.1.mlp.c_fc.weight"] == "h.1.mlp.c_fc.weight"
    assert set(names.values()) == bare


def test_a_head_under_its_old_name_is_found(tmp_path):
    found = describe(make_config("gpt_neox"))
    stored = {name.replace("lm_head.", "embed_out.") for name in found.parameters}
    assert found.tensor_names(stored, tmp_path)["lm_head.weight"] == "embed_out.weight"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_missing_tensor_and_a_layer_too_many_are_refused(tmp_path, family):
    found = describe(make_config(family))
    stored = {name.removeprefix("transformer.") for name in found.parameters}
    missing = found.linear_weights(1)[0]
    message = refusal(
        found.tensor_names, stored - {missing.removeprefix("transformer.")}, tmp_path, error=ArtifactError
    )
    assert missing in message
    extra = found.in_layer(missing, 2).removeprefix("transformer.")
    message = refusal(found.tensor_names, stored | {extra}, tmp_path, error=ArtifactError)
    assert extra in message
    assert "there are 2 layers" in message
