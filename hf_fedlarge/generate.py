"""What a model answers to prompts: to look at what was trained, with nothing served.

Blocks are streamed, so that a model larger than memory answers, too; every token then reads it from the disk once,
for all the prompts that are answered together.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.data import json_line, load_prompts, write_jsonl
from hf_fedlarge.errors import ConfigError, DataError, OutputError
from hf_fedlarge.evaluation import generate_texts, load_model
from hf_fedlarge.hub import resolve_model
from hf_fedlarge.package import load_tokenizer
from hf_fedlarge.processor import computing_device, describe_device
from hf_fedlarge.progress import progress_bar
from hf_fedlarge.untrusted import printable


def generate(model_dir: Path, rows: Sequence[dict[str, Any]], *, adapter: Path | None = None, **how: Any) -> list[str]:
    """The greedy answers of a package or a checkpoint directory, in the order of `rows`.

    Args:
        model_dir: a package of ours, or any Hugging Face checkpoint with safetensors.
        rows: as `read_prompts` gives them.
        adapter: an adapter of ours to plug in, as `evaluation.load_model` does; it must belong to the model.
        how: `max_new_tokens`, `batch_size`, `plain` and `progress`, see `evaluation.generate_texts`.

    Raises:
        ArtifactError: not a model, or an adapter of another one.
        ConfigError: the model has no positions for so many tokens.
        DataError: a prompt is a chat, and the model's chat template is missing or refuses it.
    """
    model = load_model(model_dir, adapter)
    texts = generate_texts(model, load_tokenizer(model_dir), rows, **how)
    del model
    gc.collect()  # models are cycles, and hold an arena each
    return texts


def read_prompts(source: str) -> list[dict[str, Any]]:
    """Rows with a `prompt`, text or messages, and all else that they have in the file.

    What the assistant says at the end of `messages`, or a `completion`, is not shown to the model: it becomes
    `expected`, to be compared.

    Raises:
        DataError: as `data.load_prompts`, or messages of the assistant alone.
    """
    rows = []
    for number, row in enumerate(load_prompts(source), start=1):
        if "messages" in row:
            turns = row.pop("messages")
            asked = max((place for place, turn in enumerate(turns, start=1) if turn["role"] != "assistant"), default=0)
            if not asked:
                raise DataError(f"Row {number} of {source} has 'messages' of the assistant alone; put a user's first.")
            row |= {"prompt": turns[:asked], "completion": turns[asked:]}
        expected = row.pop("completion", None)
        rows.append(row | ({"expected": expected} if expected else {}))
    return rows


def answer(
    model: str,
    *,
    revision: str | None,
    adapter: Path | None,
    prompt: Sequence[str] | None,
    prompts: str | None,
    output: Path | None,
    **how: Any,
) -> None:
    """The command `generate`: print the answers, or write them.

    Args:
        model: a package, a checkpoint, or a Hub id.
        revision: the checkpoint's on the Hub.
        adapter: see `generate`.
        prompt: texts.
        prompts: in place of them, see `read_prompts`.
        output: a file for a JSON object a prompt: `prompt`, `completion`, and all else of its row.
        how: `max_new_tokens`, `batch_size` and `plain`, see `evaluation.generate_texts`.

    Raises:
        FedLargeError: as `generate` and `read_prompts`, or `output` can't be written.
    """
    for name in ("max_new_tokens", "batch_size"):
        if how[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {how[name]}; expected 1 or more.")
    if adapter:
        read_manifest(adapter, AdapterManifest)
    if not all(text.strip() for text in prompt or ()):
        raise ConfigError("--prompt is empty; give the text to answer.")
    rows = read_prompts(prompts) if prompts is not None else [{"prompt": text} for text in prompt or ()]
    if output:
        _check_file(output)
        for row in rows:
            json_line(row, output)
    directory = resolve_model(model, revision)
    print(describe_device(computing_device()), file=sys.stderr)
    with progress_bar("writing", len(rows) * how["max_new_tokens"], " tokens") as progress:
        texts = generate(directory, rows, adapter=adapter, progress=progress, **how)
    if output:
        write_jsonl(
            ({"prompt": row["prompt"], "completion": text} | row for row, text in zip(rows, texts, strict=True)), output
        )
        print(f"{output}: {len(rows)} answer{'s' if len(rows) > 1 else ''}")
        return
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        if len(rows) > 1:
            asked = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1].get("content") or ""
            print(f"[{number}] {printable(asked):.100}")
        print("\n".join(printable(line) for line in text.expandtabs().splitlines()))


def _check_file(output: Path) -> None:
    """Before anything is computed."""
    if output.exists():
        raise OutputError(f"{output} exists already; choose another file, or remove it.")
    if not output.parent.is_dir():
        raise OutputError(f"{output} can't be written: {output.parent} is no directory; make it.")
