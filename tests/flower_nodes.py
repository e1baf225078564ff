"""Nodes without a process: threads that speak to a SuperLink as `flower-supernode` does, by Flower's own code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
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
