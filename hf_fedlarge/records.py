"""Frozen records of values that others wrote, and what to say where one is wrong."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from hf_fedlarge.errors import ConfigError


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints as `where: what`; a key may be hostile, so it is shown short and printable."""
    problem = error.errors()[0]
    where = ascii(".".join(str(part) for part in problem["loc"]))[1:-1][:120]
    return f"{where}: {problem['msg']}" if where else problem["msg"]


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
        raise ConfigError(f"{where and f'{where}: '}{first_problem(error)}.") from error
