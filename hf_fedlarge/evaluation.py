"""Held-out loss of a checkpoint or a package, with or without an adapter, and what it writes.

The loss is the mean of −log p over labelled tokens of all examples together, so that figures of the small and the
full model compare.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fedlarge.adapters import attach_lora, read_factors, read_state, set_factors
from hf_fedlarge.artifacts import (
    SERVER_FILES,
    UNPUBLISHED_FILES,
    AdapterManifest,
    PackageManifest,
    manifest_kind,
    read_manifest,
    verify_files,
)
from hf_fedlarge.data import from_tokens
from hf_fedlarge.encoding import (
    IGNORED,
    encode_example,
    has_counted,
    like_length,
    nothing_counts,
    pad_id,
    padded,
    render_chat,
    warn_of_cut,
)
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError
from hf_fedlarge.package import load_package, load_tokenizer, stream_checkpoint
from hf_fedlarge.positions import check_length
from hf_fedlarge.processor import computing_device
from hf_fedlarge.progress import by_tenths
from hf_fedlarge.templates import tools_of
from hf_fedlarge.tensors import checkpoint_digest

_EXAMPLES = 8  # in a pass, where a model computes a batch as it is
_LONG = 10  # passes, from which on it is told how far an evaluation is


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per labelled token, over so many tokens of so many examples."""

    loss: float
    tokens: int
    examples: int


def evaluate(
    model_dir: Path,
    data: Sequence[dict[str, Any]],
    *,
    adapter: Path | None = None,
    max_length: int = 1024,
    batch_size: int | None = None,
    assistant_only: bool = False,
    verify: bool = True,
    report: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluate a package or a checkpoint directory on `data`.

    Args:
        model_dir: a package of ours, or any Hugging Face checkpoint with safetensors.
        data: examples as `data.load_examples` gives them.
        adapter: an adapter of ours to plug in; it must belong to the model.
        max_length: tokens an example is cut at.
        batch_size: examples in a pass over the model; None: as many as have 16,384 tokens, or 8 where a block can't
            compute some of them at a time (`engine.takes_apart`).
        assistant_only: count only what the assistant says in `messages`.
        verify: check digests first, the adapter's against its base's among them; the base is read whole for it.
        report: told of each tenth of a long evaluation in a line.

    Raises:
        ArtifactError: not a model, or an adapter of another one.
        ConfigError: the model has no positions for `max_length` tokens.
        DataError: no labelled token.
    """
    model = load_model(model_dir, adapter, verify=verify)
    check_length(model.architecture.model_type, model.architecture.positions, max_length)
    found = evaluate_model(
        model,
        load_tokenizer(model_dir),
        data,
        max_length=max_length,
        batch_size=batch_size,
        assistant_only=assistant_only,
        report=report,
    )
    del model
    gc.collect()  # models are cycles, and hold an arena each
    return found


def load_model(model_dir: Path, adapter: Path | None = None, *, verify: bool = True) -> torch.nn.Module:
    """A package or a checkpoint, its blocks streamed, with an adapter of ours plugged in if one is given.

    Args:
        model_dir: a package of ours, or any Hugging Face checkpoint with safetensors.
        adapter: an adapter of ours of the same base. A package takes what concerns the layers that it kept, and no
            carry: clients have none. A checkpoint takes all, as merging does.
        verify: check digests first.

    Raises:
        ArtifactError: neither a package nor a checkpoint, damaged, or the adapter is of another base.
    """
    device = computing_device()
    is_package = manifest_kind(model_dir) == "package"
    manifest = None
    if adapter:
        manifest = read_manifest(adapter, AdapterManifest)
        if verify:
            unneeded = UNPUBLISHED_FILES | SERVER_FILES if is_package else UNPUBLISHED_FILES
            verify_files(adapter, manifest, published=True, unneeded=unneeded)
            base = read_manifest(model_dir, PackageManifest).base.digest if is_package else checkpoint_digest(model_dir)
            if manifest.base.digest != base:
                raise ArtifactError(
                    f"{adapter} belongs to the base {manifest.base.digest[:12]}…, but {model_dir} is of {base[:12]}…; "
                    "give the adapter of the same base."
                )
    if is_package:
        model = load_package(model_dir, device=device, verify=verify)
        layers = model.package.kept_layers
    else:
        model = stream_checkpoint(model_dir, device=device).eval()
        layers = list(range(model.architecture.layers))
    if manifest is None:
        return model
    lora, factors = (manifest.lora, read_factors(adapter)) if is_package else read_state(adapter, manifest.lora)
    here = {module: pair for module, pair in factors.items() if model.architecture.layer_of(f"{module}.") in layers}
    wrapped = attach_lora(model, model.architecture, lora)
    set_factors(wrapped, here, model.architecture, layers)
    return wrapped.eval()


def evaluate_model(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[dict[str, Any]], **how: Any
) -> Evaluation:
    """Evaluate a loaded model; it is in eval mode meanwhile, and left as it was.

    Args:
        model: any causal language model, streamed or not.
        tokenizer: its own.
        data: examples as `data.load_examples` gives them.
        how: `max_length`, `batch_size`, `assistant_only` and `report`, see `evaluate`.

    Raises:
        DataError: no example has a labelled token within `max_length`.
    """
    total, tokens = 0.0, []
    for loss, counts in _batch_losses(model, tokenizer, data, **how):
        total += loss
        tokens += counts
    return Evaluation(loss=total / sum(tokens), tokens=sum(tokens), examples=len(tokens))


def example_losses(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, data: Sequence[dict[str, Any]], **how: Any
) -> tuple[np.ndarray, np.ndarray]:
    """For every example with a labelled token: the sum of its losses, in nats, and how many tokens they are of.

    The order is that of the examples' lengths, the same for every model with this tokenizer.

    Args:
        model: a streamed one.
        tokenizer, data, how: see `evaluate_model`.

    Raises:
        DataError: no example has a labelled token within `max_length`.
    """
    sums, tokens = [], []
    with model.streamed_head.recording() as recorded:
        for _, counts in _batch_losses(model, tokenizer, data, **how):
            sums += [float(losses.double().sum()) for losses in torch.cat(recorded).split(counts)]
            tokens += counts
            recorded.clear()
    return np.array(sums), np.array(tokens)


@torch.no_grad()
def _batch_losses(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[dict[str, Any]],
    *,
    max_length: int = 1024,
    batch_size: int | None = None,
    assistant_only: bool = False,
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[float, list[int]]]:
    """For every batch the sum of its losses, and how many labelled tokens each of its examples has."""
    cut = 0

    def encoded() -> Iterator[dict[str, list[int]]]:
        nonlocal cut
        for row in data:
            whole = encode_example(row, tokenizer, None, assistant_only)
            cut += len(whole["input_ids"]) > max_length
            example = {name: values[:max_length] for name, values in whole.items()}
            if has_counted(example):
                yield example

    examples = from_tokens(encoded())
    if cut:
        warn_of_cut(cut, len(data), "held out", max_length)
    if not len(examples):
        raise nothing_counts(len(data), max_length)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    divides = hasattr(model, "streamed_head") and model.engine.takes_apart
    batches = like_length(examples, batch_size or (None if divides else _EXAMPLES))
    told = by_tenths(report, "evaluating", len(batches), "passes") if report and len(batches) >= _LONG else None
    for done, numbers in enumerate(batches, 1):
        batch = padded(examples[numbers], tokenizer)
        outputs = model(
            **{key: value.to(device) for key, value in batch.items()}, num_items_in_batch=1, use_cache=False
        )
        yield float(outputs.loss), (batch["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
        if told:
            told(done)
    model.train(training)


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    plain: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of `rows`.

    Prompts of like length are continued together, so that a streamed model is read once for a token of each.

    Args:
        model: a streamed one, with or without an adapter.
        tokenizer: its own.
        rows: with a `prompt`, messages or a text, and perhaps `tools` for messages. A text is a user's message where
            the tokenizer has a chat template.
        max_new_tokens: where an answer is cut.
        batch_size: prompts continued together.
        plain: continue texts as they are, whatever the tokenizer has.
        progress: called with how many tokens are done, of `max_new_tokens` a row, after each step.

    Raises:
        DataError: messages, and the tokenizer's template is missing or refuses them.
        ConfigError: the model has no positions for so many tokens.
    """
    ids = [_prompt_ids(row, tokenizer, plain) for row in rows]
    positions, longest = model.architecture.positions, max(map(len, ids))
    if positions is not None and longest + max_new_tokens > positions:
        raise ConfigError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones are more than the {positions} that this "
            f"{model.architecture.model_type} model has positions for; shorten the prompt, or ask for fewer tokens."
        )
    order, pad = sorted(range(len(ids)), key=lambda row: len(ids[row])), pad_id(tokenizer)
    device = next(model.parameters()).device
    texts = [""] * len(ids)
    for start in range(0, len(ids), batch_size):
        part = order[start : start + batch_size]
        width = len(ids[part[-1]])  # the longest
        padding = [width - len(ids[row]) for row in part]
        output = model.generate(
            input_ids=torch.tensor([[pad] * n + ids[row] for n, row in zip(padding, part, strict=True)], device=device),
            attention_mask=torch.tensor([[0] * n + [1] * (width - n) for n in padding], device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            streamer=_Steps(progress, start * max_new_tokens, len(part)) if progress else None,
        )
        for row, tokens in zip(part, output[:, width:], strict=True):
            texts[row] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if progress:
            progress((start + len(part)) * max_new_tokens)
    return texts


def _prompt_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, plain: bool) -> list[int]:
    prompt, tools = row["prompt"], None
    if not isinstance(prompt, str):
        tools = tools_of(row)
    elif plain or not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    else:
        prompt = [{"role": "user", "content": prompt}]
    return render_chat(tokenizer, prompt, tools=tools, add_generation_prompt=True)["input_ids"]


class _Steps:
    """What `generate` tells of its steps, as transformers' streamers are told: the prompts, then a token of each."""

    def __init__(self, progress: Callable[[int], None], before: int, rows: int) -> None:
        self._progress, self._done, self._rows = progress, before - rows, rows

    def put(self, tokens: torch.Tensor) -> None:
        self._done += self._rows
        self._progress(self._done)

    def end(self) -> None:
        pass


def as_record(evaluation: Evaluation) -> dict[str, float]:
    """The evaluation as plain data; an infinite or undefined loss is an error, not a figure.

    Raises:
        DataError: the loss is not finite.
    """
    if not math.isfinite(evaluation.loss):
        raise DataError(
            f"The loss over {evaluation.tokens} tokens is {evaluation.loss}; the model or its adapter is broken."
        )
    return asdict(evaluation)
