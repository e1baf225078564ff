"""Attach a streaming engine to a Hugging Face model.

The engine attaches to a model and not to a Trainer: `Trainer`, evaluation and `generate` of transformers work on it as
on any other, and so does a loop that takes the model's own loss or logits; one that multiplies by the head's weight
gets an error. Decoder blocks stream (`hf_fedlarge.engine`), the embedding looks up only the rows a batch uses, and the
head and the loss go through the vocabulary by slices (`hf_fedlarge.loss`).
"""

from __future__ import annotations

import types
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_fedlarge.architectures import Architecture
from hf_fedlarge.engine import StreamingEngine
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.gated import replace_gates
from hf_fedlarge.linear import FrozenLinear
from hf_fedlarge.loss import StreamedHead, causal_loss, freeze_head
from hf_fedlarge.memory import keep_freed_memory
from hf_fedlarge.norm import replace_norms
from hf_fedlarge.quantize import DenseWeight, FrozenWeight
from hf_fedlarge.sequences import ATTENTION, lay_end_to_end, masks_of_one
from hf_fedlarge.surrogate import put_behind


def attach(
    model: PreTrainedModel,
    architecture: Architecture,
    weights: dict[str, FrozenWeight],
    head: StreamedHead,
    device: torch.device,
    micro_batch_size: int | None = None,
    surrogates: dict[int, tuple[list[FrozenWeight], torch.Tensor]] | None = None,
) -> StreamingEngine:
    """Make `model`, whose matrices are empty, stream them from `weights`.

    Args:
        model: its vectors are filled in; block matrices, embedding and head may be on the meta device.
        architecture: where its blocks, embedding and head are.
        weights: parameter name → stored matrix, for every block matrix and the embedding.
        head: the output head.
        device: where to compute.
        micro_batch_size: see `StreamingEngine`.
        surrogates: the number of a block → the matrices and b of what stands behind it (see `surrogate.put_behind`).
    """
    blocks = []
    for number, block in enumerate(model.get_submodule(architecture.blocks)):
        linears = []
        for path in architecture.linears:
            weight = weights[f"{architecture.blocks}.{number}.{path}.weight"]
            # What is stored dense lies as the model has it; bitsandbytes wants (out, in).
            turned = path in architecture.transposed and not isinstance(weight, DenseWeight)
            linears.append(FrozenLinear(block.get_submodule(path), weight, turned))
        if surrogates and number in surrogates:
            linears += put_behind(block, *surrogates[number])
        replace_norms(block)
        replace_gates(block)
        blocks.append((block, linears))
    takes_apart = model._supports_attention_backend and model.config._attn_implementation == "sdpa"
    if takes_apart:
        model.config._attn_implementation = ATTENTION
    if device.type == "cpu":
        keep_freed_memory()
    engine = StreamingEngine(blocks, head.dtype, device, takes_apart, micro_batch_size)

    embedding, output = model.get_submodule(architecture.embedding), model.get_submodule(architecture.head)
    placeholder = torch.full((1,), torch.nan, dtype=head.dtype, device=device)
    _stream_embedding(embedding, weights[f"{architecture.embedding}.weight"], placeholder)
    freeze_head(output, head)
    _stream_loss(model, architecture.head, head, engine)
    return engine


def _stream_embedding(module: nn.Embedding, weight: FrozenWeight, placeholder: torch.Tensor) -> None:
    """Make an embedding look up only the rows that a batch uses, by its own `forward` (Gemma's scales them)."""
    forward = module.forward
    hidden = placeholder.expand(weight.shape)
    module.weight = nn.Parameter(hidden, requires_grad=False)
    module.padding_idx = None  # only matters to gradients, and is checked against the table's length

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        used, places = ids.unique(return_inverse=True)
        module.weight.data = weight.gather(used, placeholder.dtype)
        try:
            return forward(places)
        finally:
            module.weight.data = hidden

    module.forward = lookup


def _stream_loss(model: PreTrainedModel, path: str, head: StreamedHead, engine: StreamingEngine) -> None:
    """With `labels`, make the model's forward leave out padding and stream the loss; it returns no logits."""
    plain, embedding, output = model.forward, model.get_input_embeddings(), model.get_submodule(path)

    @wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if labels is None:
            return plain(input_ids, *args, **kwargs)
        if self.get_submodule(path) is not output:
            raise ConfigError(
                f"{path} has an adapter, which a streamed loss would not train; leave it out of the adapter's targets."
            )
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ConfigError(
                f"A loss behind {cache.get_seq_length()} cached tokens is not supported; give all tokens at once, with "
                "the label -100 where nothing counts."
            )
        kwargs |= {"use_cache": False}
        row = None
        # NEFTune's noise (arXiv 2310.05914) depends on the length of a row: then rows stay as they are.
        is_noisy = self.training and getattr(embedding, "neftune_noise_alpha", None) is not None
        if engine.takes_apart and input_ids is not None and not args and not is_noisy:
            row = lay_end_to_end(input_ids, labels, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if row is None:
            outputs = self.base_model(input_ids, *args, **kwargs)
        else:
            labels = row.labels
            kwargs |= {"attention_mask": None, "position_ids": row.position_ids}
            with engine.batch(row.spans), masks_of_one(row.spans):
                outputs = self.base_model(row.input_ids, **kwargs)
        loss = causal_loss(head, outputs.last_hidden_state, labels, num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss)

    model.forward = types.MethodType(forward, model)
