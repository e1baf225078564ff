"""Models of known shapes with random weights, for benchmarks that need a size and not an understanding."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_fedlarge.architectures import describe
from hf_fedlarge.tensors import INDEX_NAME, SafetensorsWriter, plan_shards, shard_names

# A toy, TinyLlama-1.1B's, Llama-2-7B's (whole, and cut to four layers) and SmolLM2-1.7B's sizes.
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 320},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 49152, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},
}
SHAPES["7b-block"] = SHAPES["7b"] | {"num_hidden_layers": 4}
_SHARD_BYTES = 2**30


def write_checkpoint(shape: str, directory: Path, layers: int | None = None) -> None:
    """A Llama checkpoint in bf16 of `shape`, with `layers` decoder blocks where given, written tensor by tensor."""
    config = LlamaConfig(**SHAPES[shape] | {"num_hidden_layers": layers or SHAPES[shape]["num_hidden_layers"]})
    config.dtype, config.architectures = torch.bfloat16, ["LlamaForCausalLM"]
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(directory)

    parameters = describe(config).parameters
    shards = plan_shards({name: 2 * torch.Size(size).numel() for name, size in parameters.items()}, _SHARD_BYTES)
    names = shard_names(len(shards))
    generator = torch.Generator().manual_seed(0)
    # Drawing billions of normal values takes minutes; every matrix is a piece of one pool, from a place of its own.
    pool = torch.empty(2**26 + 2**20, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    for file, shard in zip(names, shards, strict=True):
        infos = {name: (torch.bfloat16, parameters[name]) for name in shard}
        with SafetensorsWriter(directory / file, infos) as writer:
            for name in shard:
                if len(parameters[name]) == 1:
                    writer.write(name, torch.ones(parameters[name], dtype=torch.bfloat16))
                    continue
                left = torch.Size(parameters[name]).numel()
                while left:
                    start = int(torch.randint(2**20, (), generator=generator))
                    piece = pool[start : start + min(left, 2**26)]
                    writer.write(name, piece)
                    left -= len(piece)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / INDEX_NAME).write_text(json.dumps(index))
