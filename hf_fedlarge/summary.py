"""A run's `summary.json`, as far as model cards tell it: every key may be missing, and others are left alone."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.ledger import PrivacyEntry
from hf_fedlarge.records import first_problem


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Losses(_Part):
    """Held-out losses at the end."""

    base: float | None = None
    package: float | None = None
    merged: float | None = None


class ClientRow(_Part):
    """A client's part in a round."""

    client: str | None = None
    weight: float | None = None
    examples: int | None = None
    tokens: int | None = None


class Refusal(_Part):
    """An update that didn't count. Why may name paths of its client or the server, and isn't read."""

    client: str | None = None


class SecureRow(_Part):
    """What a round's secure aggregation summed up: so many clients' updates, and nobody's own."""

    clients: int | None = None


class RoundRow(_Part):
    """A round."""

    round: int | None = None
    loss_small: float | None = None
    loss_full: float | None = None
    bytes_down_per_client: int | None = None
    bytes_up_per_client: int | None = None
    seconds: float | None = None
    clients: list[ClientRow] = []
    refused: list[Refusal] = []
    secure: SecureRow | None = None


class PackageFacts(_Part):
    """What clients had of the model."""

    layers: int
    kept: list[int]
    embeddings: str


class Summary(_Part):
    """What a card prints of `summary.json`; every key may be missing, and keys it doesn't know are left alone.

    `data` is what simulated clients were made of, and `eval_data` what was evaluated on (None: a part of that).
    `adapter` is the digest of the run's last one, whose figures these are.
    """

    loss: Losses = Losses()
    rounds: list[RoundRow] = []
    bytes_down: int | None = None
    bytes_up: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    simulated: bool | None = None
    data: str | None = None
    eval_data: str | None = None
    aggregator: str | None = None
    held_out_examples: int | None = None
    package: PackageFacts | None = None
    privacy: PrivacyEntry | None = None
    adapter: str | None = None


def read_summary(raw: dict[str, Any]) -> Summary:
    """A summary.

    Raises:
        ArtifactError: a value is of a wrong type.
    """
    try:
        return Summary.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(
            f"The run's summary doesn't fit a model card: {first_problem(error)}; correct it, or publish without it."
        ) from error
