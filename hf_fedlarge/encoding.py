"""Examples as tokens and labels, as trl's SFTTrainer makes them (a test compares the two), in batches.

Only the answer counts where there is a prompt, and an example is cut at `max_length`.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_fedlarge.data import list_lengths
from hf_fedlarge.errors import DataError
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.templates import tools_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
IGNORED = -100
_TOKENS = 2**14  # in a pass over a streamed model's blocks, which reads all of them; a block computes some at a time


@functools.cache
def warn_of_cut(cut: int, given: int, which: str, max_length: int) -> None:
    """Say, once a process and not in every round, that examples are longer than `max_length` tokens and were cut."""
    logger.warning(
        "%d of %d examples (%s) are longer than max_length (%d) tokens and were cut.", cut, given, which, max_length
    )


def encode_example(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None, assistant_only: bool = False
) -> dict[str, list[int]]:
    """`input_ids` and `labels` (−100 where nothing counts) of one example in any of the three forms.

    It is cut at `max_length` tokens; None: it is whole.

    Raises:
        DataError: it is a chat, and the tokenizer's template is missing or refuses it.
    """
    eos = tokenizer.eos_token or ""
    if "messages" in row:
        encoded = render_chat(tokenizer, row["messages"], assistant_only, tools=tools_of(row))
        ids = encoded["input_ids"]
        counted = encoded["assistant_masks"] if assistant_only else [1] * len(ids)
    elif "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            ending = "" if completion.endswith(eos) else eos
            start = tokenizer(prompt)["input_ids"]
            ids = tokenizer(prompt + completion + ending)["input_ids"]
        else:
            tools = tools_of(row)
            start = render_chat(tokenizer, prompt, tools=tools, add_generation_prompt=True)["input_ids"]
            ids = render_chat(tokenizer, prompt + completion, tools=tools)["input_ids"]
        shared = next((place for place, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
        shared = min(shared, len(ids))  # a template may render the prompt alone as more than the whole
        counted = [0] * shared + [1] * (len(ids) - shared)
    else:
        ending = "" if row["text"].endswith(eos) else eos
        ids = tokenizer(row["text"] + ending)["input_ids"]
        counted = [1] * len(ids)
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, counted, strict=True)]
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], assistant_only: bool = False, **options: Any
) -> dict[str, Any]:
    """Messages as `apply_chat_template` makes tokens of them, of which `assistant_masks` marks those of the assistant.

    Raises:
        DataError: as `encode_example`.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "The examples are chats, but the model's tokenizer has no chat template; take an instruction-tuned model, "
            "or examples with 'prompt' and 'completion' or 'text' as plain strings."
        )
    if assistant_only:
        options |= {"return_assistant_tokens_mask": True, "chat_template": marking_template(tokenizer)}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    except (TemplateError, ValueError, TypeError) as error:  # a template is a program
        raise DataError(f"The model's chat template can't be used for an example: {error}") from error


def marking_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that marks what the assistant says, as trl chooses it; None: the tokenizer's own does.

    Raises:
        DataError: neither the tokenizer nor trl has one.
    """
    own = tokenizer.chat_template
    try:
        return None if own and has_generation_markers(own) else get_training_chat_template(tokenizer)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            "assistant_only_loss (--assistant-only) needs a chat template that marks what the assistant says, but "
            f"{'trl knows none for this model, whose own does not' if own else 'this model has no chat template'}; "
            "leave it out, so that all that is said counts, or take a local copy of the checkpoint with {% generation "
            "%} … {% endgeneration %} around the assistant's turns in its chat_template.jinja."
        ) from error


def has_counted(example: dict[str, list[int]]) -> bool:
    """Whether a loss is computed of any of its tokens: the first is predicted by nothing."""
    return any(label != IGNORED for label in example["labels"][1:])


def nothing_counts(examples: int, max_length: int) -> DataError:
    """The error where no example has anything counted."""
    return DataError(f"None of the {examples} examples has a labelled token within {max_length} tokens.")


def check_examples(
    checkpoint: Path, evaluated: Dataset, trained: Dataset | None, *, max_length: int, assistant_only: bool
) -> None:
    """Refuse what can't be rendered or has nothing to count, tried on some of all examples and without the model.

    Args:
        checkpoint: the directory that has the tokenizer.
        evaluated: what will be evaluated.
        trained: what clients will train on; None: nobody here has it.
        max_length, assistant_only: as `evaluate` is given them, and trainers are.

    Raises:
        DataError: as `evaluate`, or as training would.
    """
    tokenizer = load_tokenizer(checkpoint)
    encode = functools.partial(
        encode_example, tokenizer=tokenizer, max_length=max_length, assistant_only=assistant_only
    )
    if assistant_only:
        marking_template(tokenizer)
        if trained is not None and not isinstance(trained[0].get("messages", trained[0].get("prompt")), list):
            raise DataError(
                "assistant_only_loss counts what the assistant says in chats, but what clients train on are none; "
                "leave it out."
            )
    if trained is not None and trained is not evaluated:
        for row in _some(trained):
            encode(row)
    counted = [has_counted(encode(row)) for row in _some(evaluated)]
    if not any(counted) and not any(has_counted(encode(row)) for row in evaluated):
        raise nothing_counts(len(evaluated), max_length)


def _some(data: Dataset) -> Dataset:
    """Examples from all of the data, fewer than a thousand."""
    return data.select(range(0, len(data), max(1, len(data) // 500)))


def like_length(examples: Dataset, size: int | None) -> list[list[int]]:
    """The numbers of examples by `data.from_tokens` in batches, those of like length together, the longest last.

    Args:
        examples: `encode_example`'s.
        size: of a batch; None: as many as have `_TOKENS` with their padding, at least one.
    """
    lengths = list_lengths(examples, "input_ids")
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        most = max(1, _TOKENS // lengths[number]) if size is None else size
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(number)
    return batches


def padded(part: dict[str, list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `attention_mask` (B, S) of B examples, of which the last is the longest."""
    width = len(part["input_ids"][-1])
    return {
        key: torch.tensor([row + [filler] * (width - len(row)) for row in part[key]])
        for key, filler in (("input_ids", pad_id(tokenizer)), ("labels", IGNORED))
    } | {"attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part["input_ids"]])}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do, as padding is masked."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
