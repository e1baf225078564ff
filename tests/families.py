"""Tiny random models of every supported family, as configurations and as checkpoint directories.

Widths are the smallest that NF4's blocks of 64 divide; the tokenizer has the 256 bytes, so that any text encodes.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import PackageManifest, read_manifest
from hf_fedlarge.calibrate import fit_package
from hf_fedlarge.fit import FitPlan
from hf_fedlarge.neurons import indices_name
from hf_fedlarge.package import MappedTensors, package_config
from hf_fedlarge.quantize import decode
from hf_fedlarge.rounding import dense
from hf_fedlarge.shrink import plan_shrink, shrink
from hf_fedlarge.surrogate import bias_name, second_name, weight_name

HIDDEN = 64
VOCABULARY = 300
EOS, IM_START, IM_END, PAD = range(4)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Which marks nothing, and takes nothing but a user's and an assistant's turns by turns.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)

_IDS = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCABULARY}
# A wide initialization: logits far from uniform, so that greedy tokens and gradients are not noise.
_WIDE = {"initializer_range": 0.1}
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "max_position_embeddings": 512}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = _IDS | _WIDE | _SIZES | _HEADS
_GEMMA = _COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


# Between them: grouped heads, biases, tied and untied heads, sliding windows, soft caps, scaled embeddings, q/k norms,
# fused projections, transposed matrices, parallel blocks, learned positions, projections around
# the blocks, a biased head, blocks that return tuples.
FAMILIES = {
    "llama": lambda layers: LlamaConfig(num_hidden_layers=layers, **_COMMON),
    "mistral": lambda layers: MistralConfig(num_hidden_layers=layers, sliding_window=8, **_COMMON),
    "qwen2": lambda layers: Qwen2Config(num_hidden_layers=layers, tie_word_embeddings=False, **_COMMON),
    "qwen3": lambda layers: Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=True, head_dim=16, **_COMMON),
    "gemma2": lambda layers: Gemma2Config(num_hidden_layers=layers, layer_types=_alternating(layers), **_GEMMA),
    "gemma3": lambda layers: Gemma3TextConfig(num_hidden_layers=layers, layer_types=_alternating(layers), **_GEMMA),
    "phi3": lambda layers: Phi3Config(num_hidden_layers=layers, **_COMMON),
    "gpt2": lambda layers: GPT2Config(n_layer=layers, n_embd=HIDDEN, n_head=4, n_positions=512, **_IDS, **_WIDE),
    "gptj": lambda layers: GPTJConfig(
        n_layer=layers,
        n_embd=HIDDEN,
        n_head=4,
        n_positions=512,
        rotary_dim=8,
        tie_word_embeddings=False,
        **_IDS,
        **_WIDE,
    ),
    "gpt_neox": lambda layers: GPTNeoXConfig(
        num_hidden_layers=layers, num_attention_heads=4, tie_word_embeddings=False, **_IDS, **_WIDE, **_SIZES
    ),
    "opt": lambda layers: _opt(layers, word_embed_proj_dim=HIDDEN),
    "opt_projected": lambda layers: _opt(layers, word_embed_proj_dim=HIDDEN // 2, do_layer_norm_before=False),
}


def _opt(layers: int, **options: object) -> OPTConfig:
    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_size=HIDDEN,
        ffn_dim=2 * HIDDEN,
        max_position_embeddings=512,
        init_std=0.1,
        **_IDS,
        **options,
    )


def make_config(family: str, layers: int = 2) -> PretrainedConfig:
    """The family's tiny configuration, without dropout."""
    config = FAMILIES[family](layers)
    for field in ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    return config


def make_model(family: str, layers: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.nn.Module:
    """A random model; biases and norms are random as well, so that a misplaced one shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, layers), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval()


def make_tokenizer(path: Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a ChatML template, saved into `path` if given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[EOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=[SPECIAL[IM_START], SPECIAL[IM_END]],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    if path is not None:
        fast.save_pretrained(path)
    return fast


def make_checkpoint(
    path: Path,
    family: str = "llama",
    layers: int = 2,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: bool = False,
    max_shard_size: str | int = "5GB",
) -> Path:
    """A checkpoint directory as `save_pretrained` writes it; returns `path`."""
    make_model(family, layers, dtype, seed).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tokenizer(path)
    return path


def make_package(
    path: Path,
    family: str,
    layers: int = 4,
    keep: str = "0,2,3",
    embeddings: str = "int8",
    surrogate_codec: str | None = None,
    keep_neurons: float = 1.0,
    surrogate_rank: int | None = None,
) -> Path:
    """A package of the family with a dropped layer in its middle, a surrogate there if asked for; returns `path`."""
    checkpoint = make_checkpoint(path.with_name(f"{path.name}-full"), family, layers)
    plan = plan_shrink(checkpoint, keep_layers=keep, keep_neurons=keep_neurons, embeddings=embeddings)
    fitted = None
    if surrogate_codec or plan.widths:
        sequences = torch.randint(4, 260, (8, 1, 32), generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as work:
            fit_plan = FitPlan(plan.kept, surrogate_codec, plan.widths, surrogate_rank=surrogate_rank)
            fitted = fit_package(plan, fit_plan, list(sequences), Path(work))
    shrink(plan, path, fitted=fitted)
    return path


def _adding(W: torch.Tensor, b: torch.Tensor) -> Callable[..., object]:
    """A hook that makes a block's output h into h + h Wᵀ + b."""

    def hook(block: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + torch.nn.functional.linear(hidden, W, b)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


def make_dense(package: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A plain transformers model with exactly the package's weights, dequantized to `dtype`: the reference.

    Neurons that the package lacks are there with zeros.
    """
    manifest = read_manifest(package, PackageManifest)
    config = package_config(package)
    architecture = describe(config)
    tensors = MappedTensors(package, [name for name in manifest.files if name.endswith(".safetensors")])
    kept = {entry.block: tensors[indices_name(entry.layer)].long() for entry in manifest.layers if entry.neurons}
    architecture = replace(architecture, neurons=kept)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        rows, columns = architecture.neurons_out(module), architecture.neurons_in(module)
        if name not in manifest.codecs:
            values = tensors[name]
        else:
            values = dense(decode(name, manifest.codecs[name], tensors), dtype)
        stored = parameter.data.T if architecture.is_transposed(name) else parameter.data
        stored.zero_()
        if rows is not None:
            stored[rows] = values.to(dtype)
        elif columns is not None and leaf == "weight":
            stored[:, columns] = values
        else:
            stored.copy_(values)
    for entry in manifest.surrogates:
        W = dense(decode(weight_name(entry.layers[0]), entry.codec, tensors), dtype)
        if entry.rank:
            W = dense(decode(second_name(entry.layers[0]), entry.codec, tensors), dtype) @ W
        block = model.get_submodule(architecture.blocks)[manifest.kept_layers.index(entry.layers[0] - 1)]
        block.register_forward_hook(_adding(W, tensors[bias_name(entry.layers[0])].to(dtype)))
    return model.eval().requires_grad_(False)
