"""What a client brings into a federation: its examples, keys and limits, none of which comes from the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fedlarge.data import load_examples
from hf_fedlarge.jobs import training_of
from hf_fedlarge.keys import read_allowed, read_key
from hf_fedlarge.orders import CheckInDocument, OrderDocument, describe_client
from hf_fedlarge.store import Store
from hf_fedlarge.trainers.fetch import check_result
from hf_fedlarge.voice import DEFAULT_CACHE, server_keys


@dataclass(frozen=True)
class Site:
    """`join.join` says what each is."""

    client: str
    data: str
    eval_data: str | None = None
    cache: Path | None = None
    key: Path | None = None
    packages: str | None = None
    keys: Path | None = None
    server_key: str | None = None
    memory_budget: str | None = None
    result: Path | None = None

    @property
    def directory(self) -> Path:
        """Where packages and unfinished work are kept."""
        return (self.cache or DEFAULT_CACHE).expanduser()

    def check_in(self) -> CheckInDocument:
        """What this client says of itself, when everything that it was given has been read and found good.

        Raises:
            FedLargeError: as `join.join`, before it looks into the store.
        """
        check_in = describe_client(self.client, self.data, self.memory_budget)
        if self.eval_data is not None:
            load_examples(self.eval_data)
        if self.key is not None:
            read_key(self.key)
        if self.keys is not None:
            read_allowed(self.keys)
        if self.server_key is not None:
            server_keys(self.server_key)
        if self.result is not None:
            check_result(self.result)
        return check_in

    def package_store(self, store: Store) -> Store:
        """Where packages are, if orders are in `store`."""
        return Store(self.packages) if self.packages else store

    def package(self, digest: str) -> Path:
        """Where a package is kept, for all clients of this machine."""
        return self.directory / "packages" / digest

    def training(self, order: OrderDocument | None) -> dict[str, Any]:
        """The training arguments that an order, or the program's defaults, and this client's own memory make."""
        own = {"memory_budget": self.memory_budget} if self.memory_budget else {}
        if order is None:
            return own
        return training_of(self.client, order.round, order.seed, order.training.model_dump(exclude_none=True)) | own
