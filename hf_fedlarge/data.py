"""Examples to train and evaluate on, loaded and checked.

A data set has one of three forms, preferred in this order: chat `messages`; `prompt` with `completion`, where trl's
`SFTTrainer` labels the completion only; plain `text`. Chats may have `tools`, which their template renders. Further
columns stay, so that one can split by them, until `training_columns` drops them.

Local files are parsed here, not by `datasets.load_dataset`: its Arrow cache would leave a copy of private data on disk
and may serve an old one, its JSON reader turns text that looks like a date into a timestamp, and its errors don't say
which line is wrong. The price is that a local file has to fit in memory. Public data sets of the Hub go through the
usual Hugging Face cache.

Left out: compressed files, and several files at once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from hf_fedlarge.errors import ConfigError, DataError, OutputError
from hf_fedlarge.stdlib_corpus import standard_library_pairs

STDLIB = "stdlib"
FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
PROMPTS = (("messages",), ("prompt",))
TOOLS = "tools"

_SHAPES: dict[str, tuple[type, str]] = {"messages": (list, "a list of messages"), "text": (str, "a string")}
_PLAIN_CHAT = datasets.List({name: datasets.Value("string") for name in ("role", "content")})
_TOKENS = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels")])
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def load_examples(source: str, *, split: str = "train", revision: str | None = None) -> Dataset:
    """Load examples in one of the three forms.

    Args:
        source: a .jsonl, .json (a list of objects), .csv or .parquet file, the name `stdlib`, or a data set of the Hub
            (`owner/name`). What exists as a path is taken as a path, also behind `~`.
        split: the Hub data set's split, slices such as `train[:100]` included; a local source has only `train`.
        revision: the Hub data set's commit, tag or branch.

    Raises:
        DataError: nothing there, not readable, no usable column, or a row that is empty or of another shape.
        ConfigError: a split or a revision of a local source.
    """
    return usable_columns(_load(source, split, revision), source)


def load_prompts(source: str) -> Dataset:
    """Load what a model shall answer: `messages`, or `prompt` as text or as messages, checked as in examples.

    All columns stay; a `completion` isn't looked at.

    Args:
        source: see `load_examples`; of a data set of the Hub its `train` split.

    Raises:
        DataError: nothing there, not readable, no such column, or a row that is empty or of another shape.
    """
    dataset = _load(source, "train", None)
    _check_rows(dataset, source, PROMPTS)
    return dataset


def public_name(source: str | None) -> str | None:
    """What data may be called in public: an id of the Hub as it is, of a file its name alone, not where it lies."""
    path = Path(source or "")
    return path.name if path.suffix.lower() in _READERS else source


def usable_columns(dataset: Dataset, source: str) -> Dataset:
    """Keep the columns of the preferred form and those of no form, after checking every value of the form.

    `source` is what errors call the data set.

    Raises:
        DataError: no examples, no usable column, or a value that is empty or of another shape; the row is named.
    """
    form = _check_rows(dataset, source)
    others = {column for other in FORMS for column in other} - set(form)
    return dataset.remove_columns([column for column in dataset.column_names if column in others])


def training_columns(dataset: Dataset) -> Dataset:
    """Keep only the columns of the data set's form and a chat's `tools`: trainers read meaning into others, too.

    Raises:
        DataError: no usable column.
    """
    form = _form(dataset, "The data set")
    chats = any(isinstance(value, list) for value in dataset[:1][form[0]])
    return dataset.select_columns([*form, *({TOOLS} & set(dataset.column_names) if chats else ())])


def hide_progress() -> None:
    """Keep `datasets` from drawing a bar for each small step on each client's examples."""
    datasets.disable_progress_bars()


def from_rows(rows: list[dict[str, Any]]) -> Dataset:
    """Rows held in memory as a data set; what a row's objects lack of the keys of others is null there.

    Raises:
        DataError: a column mixes types.
    """
    return _from_rows(rows, "The data set", on_mixed_types=None)


def from_tokens(examples: Iterable[dict[str, list[int]]]) -> Dataset:
    """`input_ids` and `labels` of examples as a data set, of 8 bytes a token.

    Python's lists of them take ten times as much, so no more than a thousand examples are lists at a time.
    """
    batches, rest = [], iter(examples)
    while len(batch := pa.RecordBatch.from_pylist(list(islice(rest, 1000)), schema=_TOKENS)):
        batches.append(batch)
    # Else its name would be the digest of a pickle of all of them.
    name = datasets.fingerprint.generate_random_fingerprint()
    return Dataset(pa.Table.from_batches(batches, schema=_TOKENS), fingerprint=name)


def list_lengths(dataset: Dataset, column: str) -> list[int]:
    """How many values each row has in a column of lists."""
    tables = dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return [length for table in tables for length in pc.list_value_length(table[column]).to_pylist()]


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """All examples of the parts, in order."""
    return datasets.concatenate_datasets(list(parts))


def digest_of(dataset: Dataset) -> str:
    """SHA-256 of all rows in their order, as JSON; values that JSON hasn't as Python writes them."""
    found = hashlib.sha256()
    for row in dataset:
        found.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return found.hexdigest()


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one JSON object a line, by way of a temporary name; `load_examples` gives the same rows back.

    Raises:
        DataError: a column holds what JSON can't, such as dates or bytes.
        OutputError: the file can't be written.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json_line(row, path))
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def json_line(row: dict[str, Any], path: Path) -> str:
    """A row as a line of JSON for the file `path`.

    Raises:
        DataError: a column holds what JSON can't, such as dates or bytes.
    """
    try:
        return json.dumps(row, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise DataError(f"{path} can't be written as JSON, so convert or drop that column: {error}.") from error


def _load(source: str, split: str, revision: str | None) -> Dataset:
    path = Path(os.path.expanduser(source))
    local = path.exists() or path.suffix.lower() in _READERS or source == STDLIB
    if local and (split != "train" or revision is not None):
        raise ConfigError(f"{source} is local and has no splits or revisions; leave split and revision out.")
    if path.exists():
        return _read_file(path)
    if path.suffix.lower() in _READERS:
        raise DataError(f"There is no such file as {source}.")
    if source == STDLIB:
        return Dataset.from_list(standard_library_pairs())
    if _HUB_ID.fullmatch(source):
        return _load_from_hub(source, split, revision)
    raise DataError(f"{source!r} is not a file, {STDLIB!r}, or a Hub data set's id such as 'owner/name'.")


def _load_from_hub(source: str, split: str, revision: str | None) -> Dataset:
    try:
        dataset = datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:  # whatever datasets, pyarrow, httpx or fsspec raise is about this one data set
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise DataError(f"{source} can't be loaded from the Hub: {_reason(cause or error)}.") from error
    return _without_nulls(dataset, source)


def _read_file(path: Path) -> Dataset:
    reader = _READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise DataError(f"{path} exists but is not a file that ends in {', '.join(_READERS)}.")
    try:
        return reader(path)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or _reason(error)}.") from error


def _read_jsonl(path: Path) -> Dataset:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parse(line, f"Line {number} of {path} is not a JSON object")
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of {path} is not a JSON object; expected one a line.")
            rows.append(row)
    return _from_rows(rows, path)


def _read_json(path: Path) -> Dataset:
    rows = _parse(path.read_bytes(), f"{path} is not JSON (one object a line belongs in a .jsonl)")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is not a list of JSON objects; one object a line belongs in a .jsonl.")
    return _from_rows(rows, path)


def _parse(text: bytes, problem: str) -> Any:
    try:
        value = json.loads(text)
        if re.search(rb"\\u[dD]", text):  # half of a surrogate pair is a letter of JSON and none of a table
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise DataError(f"{problem}: {_reason(error)}.") from error


def _read_csv(path: Path) -> Dataset:
    """Every value stays a string: what looks like a number in one client's file may not in another's."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        limit = csv.field_size_limit(sys.maxsize)  # of all readers: 131,072 letters a value unless told
        try:
            lines = [(reader.line_num, line) for line in reader if line]
        except (csv.Error, ValueError) as error:
            raise DataError(f"{path} is not CSV at or after line {reader.line_num}: {_reason(error)}.") from error
        finally:
            csv.field_size_limit(limit)
    header = lines[0][1] if lines else []
    if len(set(header)) < len(header):
        raise DataError(f"{path} names a column twice in its header: {', '.join(header)}.")
    for number, line in lines:
        if len(line) != len(header):
            raise DataError(f"Line {number} of {path} has {len(line)} values; its header names {len(header)} columns.")
    return _from_rows([dict(zip(header, line, strict=True)) for _, line in lines[1:]], path)


def _read_parquet(path: Path) -> Dataset:
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        # Without the metadata columns are what they hold, not what a stranger's file declares them to be.
        dataset = Dataset(table.replace_schema_metadata(None))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{path} is not Parquet that can be used: {_reason(error)}.") from error
    return _without_nulls(dataset, path)


_READERS: dict[str, Callable[[Path], Dataset]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_rows(rows: list[dict[str, Any]], path: Path | str, on_mixed_types: str | None = "use_json") -> Dataset:
    """A table of the rows. Told `use_json`, it keeps as JSON what has not one type: otherwise each of a chat's tool
    calls would get the arguments of all others, as null."""
    # `Dataset.from_list` would drop every column that the first row lacks.
    columns = dict.fromkeys(column for row in rows for column in row)
    values = {column: [row.get(column) for row in rows] for column in columns}
    try:
        return Dataset.from_dict(values, on_mixed_types=on_mixed_types)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise DataError(f"{path} doesn't fit a table with one type a column: {_reason(error)}.") from error


def _without_nulls(dataset: Dataset, source: Path | str) -> Dataset:
    """Chats and tools of a table that has one type a column: without the keys that are only there for other rows."""
    chats = [
        column
        for column in ("messages", "prompt", "completion", TOOLS)
        if column in dataset.column_names
        and pa.types.is_nested(dataset.data.schema.field(column).type)
        and dataset.features[column] != _PLAIN_CHAT
    ]
    if not chats:
        return dataset
    rebuilt = _from_rows([_pruned(row) for row in dataset.select_columns(chats)], source)
    rest = [column for column in dataset.column_names if column not in chats]
    return datasets.concatenate_datasets([rebuilt, dataset.select_columns(rest)], axis=1) if rest else rebuilt


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def _form(dataset: Dataset, source: str, forms: Sequence[tuple[str, ...]] = FORMS) -> tuple[str, ...]:
    columns = dataset.column_names
    for form in forms:
        if set(form) <= set(columns):
            return form
    *others, last = (" with ".join(map(repr, form)) for form in forms)
    raise DataError(f"{source} has the columns {', '.join(columns)}; expected {', '.join(others)}, or {last}.")


def _check_rows(dataset: Dataset, source: str, forms: Sequence[tuple[str, ...]] = FORMS) -> tuple[str, ...]:
    """The preferred form, every value of which was checked."""
    if len(dataset) == 0:
        raise DataError(f"{source} holds no examples.")
    form = _form(dataset, source, forms)
    checked = [*form, *({TOOLS} & set(dataset.column_names))]
    number = 0
    for batch in dataset.select_columns(checked).iter(batch_size=1000):
        for row in zip(*(batch[column] for column in checked), strict=True):
            number += 1
            _check_row(dict(zip(checked, row, strict=True)), f"Row {number} of {source}")
    return form


def _check_row(row: dict[str, Any], where: str) -> None:
    tools = row.pop(TOOLS, None)
    for column, value in row.items():
        shape, wanted = _SHAPES.get(column, ((str, list), "a string or a list of messages"))
        if not value or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where} has an empty {column!r}; fill it or remove the row.")
        if not isinstance(value, shape):
            raise DataError(f"{where} has {column!r} of type {type(value).__name__}; expected {wanted}.")
        if isinstance(value, list) and not all(_is_message(message) for message in value):
            raise DataError(f"{where} has a message in {column!r} without a role or without text as content.")
    if len({type(value) for value in row.values()}) > 1:
        raise DataError(f"{where} mixes a string and messages; 'prompt' and 'completion' must be of the same kind.")
    if tools is not None and isinstance(next(iter(row.values())), list):
        tools = _parse(tools.encode(), f"{where} has 'tools' that are not JSON") if isinstance(tools, str) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"{where} has 'tools' that are no list of objects; describe each tool by one.")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    content = message.get("content") or ("calls" if message.get("tool_calls") else None)
    return all(isinstance(part, str) and part.strip() for part in (message.get("role"), content))


def _reason(error: BaseException) -> str:
    """The first line of an error as the tail of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
