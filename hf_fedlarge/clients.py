"""What a run's clients are to it, and those simulated on the server's machine: a data set split among them.

run/check_ins.json              who is there, with how many examples
run/clients/NAME/train.jsonl    and held_out.jsonl
run/held_out.jsonl              the clients' held-out examples together
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

from hf_fedlarge.artifacts import write_json
from hf_fedlarge.budget import parse_bytes
from hf_fedlarge.config import FederationConfig
from hf_fedlarge.data import STDLIB, concatenate, load_examples, training_columns, write_jsonl
from hf_fedlarge.errors import ConfigError, FedLargeError
from hf_fedlarge.partition import hold_out, split_by_config
from hf_fedlarge.plan import CheckIn

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fedlarge.jobs import Down, Jobs, Train
    from hf_fedlarge.server import Order, RoundServer

    Begin = Callable[[Dataset, Dataset | None], None]

CHECK_INS = "check_ins.json"
HELD_OUT = "held_out.jsonl"
SERVED = "store.json"  # of a run whose clients a store or Flower reaches


def split_clients(config: FederationConfig) -> dict[str, Dataset]:
    """The data as each client has it; nothing is written.

    Raises:
        ConfigError: no data, or fewer clients than a round or its aggregator wants.
        DataError: the data can't be read or split.
    """
    settings = config.data
    if settings is None:
        raise ConfigError("The federation has no data, which simulated clients are made of; add it, or serve a store.")
    local = settings.source == STDLIB or Path(os.path.expanduser(settings.source)).exists()
    hub = {} if local else {"split": settings.hub_split, "revision": settings.hub_revision}
    clients = split_by_config(load_examples(settings.source, **hub), settings, config.seed)
    needed = max(config.cohort or 1, config.min_updates, config.fewest_updates)
    if len(clients) < needed:
        raise ConfigError(f"The data makes {len(clients)} clients; {needed} are wanted in a round.")
    return clients


def check_in(
    clients: dict[str, Dataset], config: FederationConfig, run: Path, eval_data: Dataset | None
) -> list[CheckIn]:
    """Write each client's files into the run directory, and last of all who checked in.

    Without `eval_data` what they hold out is evaluated.

    Raises:
        ConfigError: no client has enough examples for one to be held out.
    """
    settings, together, check_ins = config.data, [], []
    memories = cycle(settings.memory) if settings.memory else None
    for name, examples in clients.items():
        if settings.max_examples and settings.max_examples < len(examples):
            examples = examples.shuffle(seed=config.seed).select(range(settings.max_examples))
        kept, held_out = hold_out(training_columns(examples), settings.held_out, config.seed)
        home = run / "clients" / name
        home.mkdir(parents=True, exist_ok=True)
        write_jsonl(kept, home / "train.jsonl")
        if held_out is not None:
            write_jsonl(held_out, home / "held_out.jsonl")
            together.append(held_out)
        memory = parse_bytes(next(memories)) if memories else psutil.virtual_memory().total
        check_ins.append(CheckIn(name, examples=len(kept), memory_bytes=memory))
    if not together and eval_data is None:
        raise ConfigError("No client has an example to hold out; give each at least two.")
    write_jsonl(concatenate(together) if eval_data is None else eval_data, run / HELD_OUT)
    write_check_ins(run, check_ins)
    return check_ins


def write_check_ins(run: Path, check_ins: list[CheckIn]) -> None:
    """Write down who is there."""
    write_json(run / CHECK_INS, [asdict(known) for known in check_ins])


def read_check_ins(run: Path) -> list[CheckIn]:
    """Who checked in to a run."""
    return [CheckIn(**entry) for entry in json.loads((run / CHECK_INS).read_text())]


class Clients(Protocol):
    """How a run's clients are reached; `SimulatedClients` and `serve.StoreClients` are two ways.

    `down` says what goes down of adapters, `simulated` whether the server has the clients' data.
    """

    down: Down
    simulated: bool

    def check(self, config: FederationConfig, run: Path) -> None:
        """Refuse what can't be run, before a checkpoint is fetched for it.

        Raises:
            FedLargeError: as a setting, the examples, or the place where the clients are met, is wrong.
        """

    def prepare(self, config: FederationConfig, run: Path, begin: Begin) -> str | None:
        """Make the run's held-out examples, once, of what `check` found.

        Before anything is written `begin` is called, which may refuse them, with the examples that will be evaluated,
        and all that will be trained on if the server has them. Returns what is to be reported.
        """

    def check_in(self, jobs: Jobs, server: RoundServer) -> None:
        """Have the run's check-ins say who is there for the round, before its clients are drawn."""

    def answers(
        self, jobs: Jobs, server: RoundServer, order: Order, asked: Callable[[str], None]
    ) -> Iterator[tuple[str, str | None]]:
        """Ask whom the round waits for, calling `asked`, and yield who answered, until nobody is waited for.

        With a client comes why there is no update; None: it lies at `server.work / client`. Whoever takes it hands it
        to `server` before the next one is asked for.
        """

    def end(self, adapter: Path) -> None:
        """The last round is committed, and this is what came of it."""


class SimulatedClients:
    """A run's clients, trained one after the other by a function (`Clients` says what each method is for).

    Args:
        train: trains one client and writes its update; what it raises of ours is reported, and the client is left out.
    """

    down = "changed"
    simulated = True

    def __init__(self, train: Train) -> None:
        self._train = train
        self._examples: dict[str, Dataset] = {}  # as each client has them
        self._eval_data: Dataset | None = None

    def check(self, config: FederationConfig, run: Path) -> None:
        """Split the data among them, once; nothing is written."""
        if config.secure:
            raise ConfigError(
                "secure hides clients' updates from a server, but simulated clients are on it; serve a store, or leave "
                "it out."
            )
        if (run / SERVED).exists():
            raise ConfigError(
                f"{run} was begun with clients that aren't simulated; go on as it was begun (serve, or flwr run), or "
                "choose another --output."
            )
        if not (run / CHECK_INS).exists():
            self._examples = split_clients(config)
            self._eval_data = load_examples(config.eval_data) if config.eval_data else None

    def prepare(self, config: FederationConfig, run: Path, begin: Begin) -> str | None:
        """Write down what each of them has, once."""
        if (run / CHECK_INS).exists():
            return None
        trained = concatenate(list(self._examples.values()))
        begin(trained if self._eval_data is None else self._eval_data, trained)
        check_ins = check_in(self._examples, config, run, self._eval_data)
        self._examples, self._eval_data = {}, None
        return f"{len(check_ins)} clients checked in with {sum(entry.examples for entry in check_ins)} examples"

    def check_in(self, jobs: Jobs, server: RoundServer) -> None:
        """They are all there from the beginning."""

    def answers(
        self, jobs: Jobs, server: RoundServer, order: Order, asked: Callable[[str], None]
    ) -> Iterator[tuple[str, str | None]]:
        """Train whom the round still waits for."""
        while waiting := server.waiting(order):
            client = waiting[0]
            asked(client)
            update = server.work / client
            problem = None
            # Trained before the server was killed: an update appears whole or not at all.
            if not update.exists():
                try:
                    self._train(jobs.job(client, order.round, update))
                except FedLargeError as error:
                    problem = str(error)
            yield client, problem

    def end(self, adapter: Path) -> None:
        """Nobody has to be told."""
