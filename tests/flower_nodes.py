"""Nodes without a process: threads that speak to a SuperLink as `flower-supernode` does, by Flower's own code."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from flower_processes import Flower
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from hf_fedlarge.artifacts import MANIFEST_NAME
from hf_fedlarge.flower.letters import put_in
from hf_fedlarge.orders import CHECK_INS, ORDER, CheckInDocument, OrderDocument, as_bytes, inbox


class Line:
    """What a node has to speak with the SuperLink; `lock` is held while a message is read, if there is one."""

    def __init__(self, calls: tuple[Any, ...], lock: threading.Lock | None = None) -> None:
        _, self._receive, self._send, _, _, self._pull, self._push, self._confirm = calls
        self._lock = lock or threading.Lock()

    def next(self) -> tuple[Message, RecordDict] | None:
        """The next message and what it holds; None: there is none yet."""
        if (found := self._receive()) is None:
            return None
        message, tree = found
        run = message.metadata.run_id
        read = {"pull_object_fn": partial(self._pull, run), "confirm_object_received_fn": partial(self._confirm, run)}
        with self._lock:
            whole = pull_and_inflate_object_from_tree(tree, **read, return_type=Message)
        return message, whole.content

    def prepared(self, message: Message, content: RecordDict) -> Callable[[], None]:
        """What sends a reply."""
        made = Message(content, reply_to=message)
        made.metadata.__dict__["_message_id"] = made.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(made), get_all_nested_objects(made)

        def send() -> None:
            with no_object_id_recompute():
                wanted, session = self._send(made, tree, 1.0)
                push_objects(objects, partial(self._push, made.metadata.run_id, session), object_ids_to_push=wanted)

        return send


@contextmanager
def connected(processes: Flower, lock: threading.Lock | None = None) -> Iterator[Line]:
    """A node that is there within the `with`."""
    address, ca = f"127.0.0.1:{processes.port}", (processes.tls / "ca.pem").read_bytes()
    with http_request_response(address, False, ca) as calls:
        yield Line(calls, lock)


class Prepared:
    """Nodes that answer with what lies in HOME/NAME/ROUND; where its manifest names no adapter it says the order's.

    Attributes:
        orders: round and client of each order that came, oldest first.
    """

    def __init__(self, processes: Flower, home: Path, names: Iterable[str]) -> None:
        self.processes, self.home, self.over = processes, home, threading.Event()
        self.orders: list[tuple[int, str]] = []
        self.threads = [threading.Thread(target=self._take_part, args=(name,)) for name in names]

    def start(self) -> None:
        """Have them connect."""
        for thread in self.threads:
            thread.start()

    def _take_part(self, name: str) -> None:
        with connected(self.processes) as line:
            while not self.over.wait(0.5):
                try:
                    if (found := line.next()) is not None:
                        message, content = found
                        line.prepared(message, self._answer(name, message, content))()
                except Exception:  # the run is over, or the SuperLink was killed; a SuperNode goes on as well
                    traceback.print_exc()

    def _answer(self, name: str, message: Message, content: RecordDict) -> RecordDict:
        if message.metadata.message_type == "query":
            return put_in({f"{CHECK_INS}/{name}.json": as_bytes(CheckInDocument(client=name, examples=6))})
        order = OrderDocument.model_validate_json(content["files"][ORDER].data)
        if order.state != "open":
            return RecordDict()
        self.orders.append((order.round, name))
        files = {path.name: path.read_bytes() for path in (self.home / name / str(order.round)).iterdir()}
        said = json.loads(files[MANIFEST_NAME])
        said["adapter"] = said.get("adapter") or order.work[0].adapter
        files[MANIFEST_NAME] = json.dumps(said).encode()
        place = inbox(order.round, name, order.attempt)
        return put_in({f"{place}/{file}": raw for file, raw in files.items()})

    def end(self) -> None:
        """Have them leave."""
        self.over.set()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join(30)
                assert not thread.is_alive()
