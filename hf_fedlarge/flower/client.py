"""The ClientApp: does what `trainers/join.py` does, for the one order that a message brings.

    flower-supernode … --node-config 'client="lab-3" data="mine.jsonl"'

The node's configuration is the client's own; nothing in it comes from the server. Flower starts a process for every
message, so a package is loaded anew for every round, unless a resident process does the work (`resident.py`). What has
to outlive it is in the cache: the package, the training in progress, the finished update.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from hf_fedlarge.config import checked
from hf_fedlarge.errors import FedLargeError
from hf_fedlarge.flower.letters import put_in, take_out
from hf_fedlarge.flower.resident import ask, mailbox_in
from hf_fedlarge.flower.work import NodeSettings, take_part
from hf_fedlarge.orders import (
    CHECK_INS,
    FAILED,
    ORDER,
    SECURE,
    VERDICTS,
    OrderDocument,
    as_bytes,
    describe_client,
    failure,
    inbox,
    read_document,
    write_document,
)
from hf_fedlarge.store import Store
from hf_fedlarge.voice import DEFAULT_CACHE, Ear

app = ClientApp()
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_LETTER = re.compile(
    rf"{re.escape(ORDER)}|artifacts/[0-9a-f]{{64}}\.json|objects/[0-9a-f]{{2}}/[0-9a-f]{{64}}"
    rf"|{SECURE}/\d+/\d+/(boxes/)?{_NAME}\.json|{VERDICTS}/\d+/{_NAME}/\d+\.json"
)


class TooLate(BaseException):
    """The round was closed while its update was made; not an `Exception`, of which libraries make others."""


@app.query()
def check_in(message: Message, context: Context) -> Message:
    """Say who this is, with how many examples and how much memory."""
    settings = _settings(context)
    said = describe_client(settings.client, settings.data, settings.memory_budget)
    return Message(put_in({f"{CHECK_INS}/{settings.client}.json": as_bytes(said)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with the update, a stage's message, or why there is none; with nothing where it was too late to begin."""
    _report(f"begun {time.time() - message.metadata.created_at:.1f} s after the order was sent")
    return Message(_answer(_settings(context), message.content), reply_to=message)


def _answer(settings: NodeSettings, content: RecordDict) -> RecordDict:
    """Do what an order says, in a store that lives as long as this process, or where a resident one finds it."""
    worker = Path(settings.worker).expanduser() if settings.worker else None
    mailbox = mailbox_in(worker, settings.client) if worker else Store("memory://flower")
    mailbox.remove("")
    for path, raw in take_out(content, _LETTER).items():
        mailbox.write(path, raw)
    order = read_document(mailbox, ORDER, OrderDocument)
    if order and order.state == "over":
        _hear_the_end(settings, mailbox)
        return RecordDict()
    work = order.work_of(settings.client) if order else None
    if work is None or not order.is_open:
        return RecordDict()
    place = inbox(order.round, settings.client, order.attempt)
    try:
        with _until(order.closes_at if order.late == "refuse" else None):
            _ear(settings, mailbox).order()  # before anything is done that it says
            if not (worker and ask(worker, settings, work, _report)):
                take_part(settings, mailbox, work, _report)
    except (FedLargeError, TooLate) as error:
        _report(f"{error}")
        write_document(mailbox, f"{place}/{FAILED}", failure(str(error).replace(mailbox.url, "Flower")))
    names = mailbox.names(place)
    return put_in({f"{place}/{name}": mailbox.read(f"{place}/{name}", work.update_bytes) for name in names})


def _ear(settings: NodeSettings, mailbox: Store) -> Ear:
    cache = Path(settings.cache) if settings.cache else DEFAULT_CACHE
    return Ear(mailbox, settings.client, cache.expanduser(), settings.server_key, _report)


def _hear_the_end(settings: NodeSettings, mailbox: Store) -> None:
    try:
        over = _ear(settings, mailbox).hear()
        _report(f"the federation is over after round {over.round}")
    except FedLargeError as error:
        _report(f"{error}")


@contextmanager
def _until(end: float | None) -> Iterator[None]:
    """Within it, `TooLate` is raised at `end`, in seconds since 1970: a node does one thing at a time."""

    def stop(*_: object) -> None:
        raise TooLate("The round was closed before the update was ready.")

    if end is None:
        yield
        return
    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(end - time.time(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def _settings(context: Context) -> NodeSettings:
    values = {name.replace("-", "_"): value for name, value in context.node_config.items()}
    return checked(NodeSettings, values, "--node-config")


def _report(line: str) -> None:
    print(line, flush=True)
