"""Frozen records of values that others wrote, and what to say where one is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from hf_fedlarge.errors import ConfigError


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints as `where: what`; what it is of may be hostile, so it is shown short."""
    problem = error.errors()[0]
    where = ascii(".".join(str(part) for part in problem["loc"]))[1:-1][:120]
    if problem["type"] == "extra_forbidden":
        return f"{where} is not known"
    if problem["type"] == "value_error":
        what = str(problem["ctx"]["error"])
    else:
        what = problem["msg"]
        if isinstance(problem["input"], str | int | float):
            what += f", found {ascii(problem['input'])[:80]}"
    return f"{where}: {what}" if where else what


class Record(BaseModel):
    """A frozen record that refuses unknown keys and never converts types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Growing(Record):
    """A record with a field that came `later`: where it is None it isn't written, and digests stay what they were."""

    later: ClassVar[str | None] = None

    @model_serializer(mode="wrap")
    def _without_later(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if key != self.later or value is not None}


RecordT = TypeVar("RecordT", bound=Record)


def checked(kind: type[RecordT], values: dict[str, Any], where: str = "") -> RecordT:
    """A record of a user's values.

    Args:
        kind: of what kind.
        values: by key.
        where: the file they are from.

    Raises:
        ConfigError: the message names `where` and the key.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        said, problem = first_problem(error), error.errors()[0]
        if problem["type"] == "extra_forbidden":
            said += _expected(kind, problem["loc"])
        raise ConfigError(f"{where and f'{where}: '}{said}.") from error


def _expected(kind: type[Record] | None, location: tuple[str | int, ...]) -> str:
    """What a record's user may have meant by a key that the record, or one in it, doesn't have."""
    *parents, key = location
    for part in parents:
        if kind and part in kind.model_fields:  # and not the key of a dict of records
            kind = _record_in(kind.model_fields[part].annotation)
    if kind is None:
        return ""
    near = nearest(str(key), kind.model_fields)
    return f"; the nearest key is {near}" if near else f"; expected {', '.join(kind.model_fields)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Which of some known words a user may have meant; None if none is like it."""
    return next(iter(get_close_matches(word, known, 1, cutoff=0.75)), None)


def _record_in(annotation: Any) -> type[Record] | None:
    """The record that a field of this type holds: by itself, in a union, or as a dict's value."""
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return annotation
    return next(filter(None, map(_record_in, get_args(annotation))), None)
