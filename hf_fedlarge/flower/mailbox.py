"""The server's store, whose files Flower carries: what `StoreClients` writes goes to the clients, and answers come in.

    order.json, artifacts/, objects/    sent to each client that the order asks, with nobody else's name in it,
    verdicts/0001/NAME/                 what became of its last update,
    secure/0001/1/                      and, in stages of secure aggregation, who takes part and what this one is to get
    check_ins/NAME.json                 what a node answered when it was asked who it is
    inbox/0001/NAME/1/                  what the message for this client, round and attempt was answered with

An order is signed anew for each client, for it names that one alone.
A stage of secure aggregation is a message of its own. A message is sent again where the node that had it is gone and
the client is there again, be it as another node; what a client has finished it sends without training again. Who was in
the round before is sent what changed in the adapter, and all of it if it answers that this is of no use. An answer
belongs to the message that it answers (`reply_to`), whatever it says, and is taken only for the place that the message
was about: late ones, foreign ones and second ones have no message that is waited for. The answers themselves are
believed as little as those of any store.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from hf_fedlarge.artifacts import MANIFEST_NAME, SERVER_FILES, AdapterManifest
from hf_fedlarge.errors import ArtifactError, StoreError
from hf_fedlarge.flower.letters import put_in, take_out
from hf_fedlarge.keys import PrivateKey
from hf_fedlarge.orders import (
    AGREEMENT,
    CHECK_INS,
    FAILED,
    INBOX,
    MAX_NOTE_BYTES,
    MAX_ORDER_BYTES,
    ORDER,
    PACKAGE,
    ROSTER,
    VERDICTS,
    WHOLE,
    OrderDocument,
    Work,
    as_bytes,
    boxes_name,
    failure,
    inbox,
    read_document,
    secure,
    write_document,
)
from hf_fedlarge.rounds import Report
from hf_fedlarge.store import Store, artifact_path, object_path
from hf_fedlarge.untrusted import printable
from hf_fedlarge.voice import signed

# How long after a round's end its messages live: for clients to say that they are late, and be free for the next one.
GRACE_SECONDS = 60.0
_LONG = 30 * 86400.0  # where there is no deadline, or late updates are kept
_WHO_SECONDS = 60.0  # a SuperLink that was killed may have lost the question or its answer
_MOST_FAILURES = 60  # a minute at the default poll
_CHECK_IN = re.compile(rf"{CHECK_INS}/(?P<client>[A-Za-z0-9][A-Za-z0-9._-]{{0,127}})\.json")
_NOTHING = re.compile(r"(?!)")
_FILE = r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}"
# The message or its node is gone: nothing that the client did or said.
_LOST = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}


def _number(name: str) -> int:
    return int(name.removesuffix(".json"))


def _for_one(work: Work, client: str, whole: bool) -> Work:
    """What a work asks of one client, and names no other."""
    change = work.change
    if change is not None:
        change = change.model_copy(update={"clients": [client]}) if client in change.clients and not whole else None
    return work.model_copy(update={"clients": [client], "change": change})


@dataclass(frozen=True)
class _Node:
    """A SuperNode since it was last started; `name` is what the SuperLink's operator registered it as, if anything."""

    id: int
    since: str
    name: str


@dataclass(frozen=True)
class _Letter:
    """A message that is not answered yet; without a client it asks the node who it is.

    `answer` is the file at `place` that will complete the answer; with `partial` it brings what changed in an adapter,
    and may be answered with `WHOLE`, and `PACKAGE` if need be, alone.
    """

    node: _Node
    expires: float
    allowed: re.Pattern[str]
    most_bytes: int
    client: str | None = None
    place: str = ""
    answer: str = ""
    partial: bool = False


class Mailbox(Store):
    """A store in a directory of the server's own; looking into it has Flower's messages sent and fetched.

    Args:
        home: the directory.
        grid: Flower's.
        report: told who answered what can't be taken, and which messages were lost.
        key: signs orders; None: they are not signed.
    """

    def __init__(self, home: Path, grid: Grid, report: Report, key: PrivateKey | None = None) -> None:
        super().__init__(str(home.absolute()))
        self.url = "Flower"  # where people see what comes in
        self._grid, self._report, self._key = grid, report, key
        self._clients: dict[str, _Node] = {}
        self._strangers: dict[_Node, str | None] = {}  # who is not asked again, until a name is free that another had
        self._letters: dict[str, _Letter] = {}
        self._failures: Counter[str] = Counter()  # of looks for the answer to a letter

    def names(self, path: str) -> list[str]:
        """What lies directly under `path`, after what came for it was fetched.

        Raises:
            StoreError: the SuperLink can't be reached, or the directory can't be read.
        """
        if path == CHECK_INS or path.startswith(f"{INBOX}/"):
            nodes = self._online()
            self._collect()
            self._ask_who(nodes)
            if path != CHECK_INS:
                self._send_order(path)
        return super().names(path)

    # Who is there

    def _online(self) -> list[_Node]:
        nodes = [_Node(node.node_id, node.last_activated_at, node.name) for node in self._reach(self._grid.get_nodes)]
        self._clients = {client: node for client, node in self._clients.items() if node in nodes}
        self._strangers = {
            node: taken for node, taken in self._strangers.items() if taken is None or taken in self._clients
        }
        for name in super().names(CHECK_INS):  # also of whoever was there for a server that was killed
            if name.removesuffix(".json") not in self._clients:
                self.remove(f"{CHECK_INS}/{name}")
        return nodes

    def _ask_who(self, nodes: list[_Node]) -> None:
        known = {letter.node for letter in self._letters.values() if letter.client is None}
        known |= self._strangers.keys() | set(self._clients.values())
        for node in nodes:
            if node in known:
                continue
            letter = _Letter(node, time.time() + _WHO_SECONDS, _CHECK_IN, MAX_NOTE_BYTES)
            self._send(letter, RecordDict(), MessageType.QUERY)

    def _welcome(self, node: _Node, files: dict[str, bytes]) -> None:
        """A node said who it is: as it was registered, or, where it has no name there, as no other node is called."""
        if len(files) != 1:
            raise ArtifactError(f"it answered with {len(files)} check-ins; expected one.")
        [path] = files
        client = _CHECK_IN.fullmatch(path)["client"]
        if node.name not in ("", client):
            raise ArtifactError(f"it says that it is {client}; it is registered as {node.name!a:.200}.")
        if client in self._clients:  # for a while also of a node that was killed and is there again as this one
            self._strangers[node] = client
            raise ArtifactError(f"it says that it is {client}, as another node did; give each a name of its own.")
        self._clients[client] = node

    # What is sent

    def _send_order(self, path: str) -> None:
        """Send the order that is open, if it is for the round at `path`, to whom it asks and didn't send it to."""
        order = read_document(self, ORDER, OrderDocument)
        if order is None or not order.is_open or path != inbox(order.round):
            return
        places = {client: inbox(order.round, client, order.attempt) for work in order.work for client in work.clients}
        if order.late == "refuse":
            wanted = {("", ""), *((place, order.answer_name) for place in places.values())}
            self._letters = {id: one for id, one in self._letters.items() if (one.place, one.answer) in wanted}
        sent = {(letter.place, letter.node) for letter in self._letters.values()}
        for work in order.work:
            contents: dict[bool, dict[str, bytes]] = {}
            for client in work.clients:
                node, place = self._clients.get(client), places[client]
                there = set(super().names(place))
                if node is None or (place, node) in sent or {FAILED, order.answer_name} & there:
                    continue
                own = _for_one(work, client, whole=order.is_later_stage or WHOLE in there)
                partial = own.change is not None
                if partial not in contents:  # what a stage after the first is about is in the client's cache
                    contents[partial] = {} if order.is_later_stage else self._adapter(own)
                said = as_bytes(signed(order.model_copy(update={"work": [own]}), self._key))
                files = {ORDER: said} | contents[partial] | self._told(order, client)
                if order.late == "buffer" or order.closes_at is None:
                    expires = time.time() + _LONG
                else:
                    expires = order.closes_at + GRACE_SECONDS
                allowed = re.compile(f"{re.escape(place)}/{_FILE}")
                letter = _Letter(node, expires, allowed, work.update_bytes, client, place, order.answer_name, partial)
                self._send(letter, put_in(files), MessageType.TRAIN, str(order.round))

    def say_goodbye(self, seconds: float, poll: float) -> None:
        """Tell clients that are there that the federation is over, and what became of their updates.

        Args:
            seconds: that they are waited for, but for those that are still at work on something else; as long again at
                the most for those of whom it has to be asked who they are, as after a restart.
            poll: seconds between two looks for their answers.

        Raises:
            StoreError: the SuperLink can't be reached.
        """
        order = read_document(self, ORDER, OrderDocument)
        self._ask_who(self._online())
        busy = {letter.node for letter in self._letters.values() if letter.client is not None}
        self._letters = {id: letter for id, letter in self._letters.items() if letter.client is None}
        self._await(busy, seconds, poll)
        self._letters = {}
        for client, node in self._clients.items():
            letter = _Letter(node, time.time() + seconds, _NOTHING, 0, client)
            files = {ORDER: as_bytes(signed(order, self._key))} | self._told(order, client)
            self._send(letter, put_in(files), MessageType.TRAIN)
        self._await(busy, seconds, poll)

    def _await(self, busy: set[_Node], seconds: float, poll: float) -> None:
        """Fetch answers until there are all but those of nodes at work."""
        end = time.monotonic() + seconds
        self._collect()
        while any(letter.node not in busy for letter in self._letters.values()) and time.monotonic() < end:
            time.sleep(poll)
            self._collect()

    def _told(self, order: OrderDocument, client: str) -> dict[str, bytes]:
        """What the server has written for a client: its last verdict, and what the stage needs."""
        rounds = [name for name in sorted(self.names(VERDICTS)) if name.isdecimal()]
        homes = [f"{VERDICTS}/{number}/{client}" for number in rounds]
        said = [f"{home}/{name}" for home in homes for name in sorted(self.names(home), key=_number)]
        paths = said[-1:]
        if order.is_later_stage:
            home = secure(order.round, order.attempt)
            paths += [f"{home}/{name}" for name in (ROSTER, AGREEMENT, boxes_name(client))]
        found = {path: self.read(path, MAX_ORDER_BYTES) for path in paths}
        return {path: raw for path, raw in found.items() if raw is not None}

    def _adapter(self, work: Work) -> dict[str, bytes]:
        """An adapter's files as a client's store has to have them, without those that only the server needs, and of
        those of which the work has what changed that."""
        raw = self.read(artifact_path(work.adapter), AdapterManifest.max_bytes)
        files = AdapterManifest.model_validate_json(raw).files | (work.change.files if work.change else {})
        entries = {object_path(entry.sha256): entry.size for name, entry in files.items() if name not in SERVER_FILES}
        return {artifact_path(work.adapter): raw} | {path: self.read(path, size) for path, size in entries.items()}

    def _send(self, letter: _Letter, content: RecordDict, kind: str, group: str = "") -> None:
        ttl = letter.expires - time.time()
        message = Message(content, letter.node.id, kind, ttl=ttl, group_id=group)
        for id in self._reach(self._grid.push_messages, [message]):
            if id:  # else the node has gone since
                self._letters[id] = letter

    # What comes

    def _collect(self) -> None:
        """Fetch the answers that are there, one at a time: one that can't be read spoils no other.

        Neither does one that the SuperLink fails on, which may be its fault or the answer's: after some looks it is
        given up, and who was to give it is asked again.
        """
        for id, letter in list(self._letters.items()):
            try:
                reply = self._reply_to(id)
                if reply is not None:
                    del self._letters[id]
                    self._take(letter, reply)
                elif time.time() > letter.expires:
                    del self._letters[id]
            except StoreError as error:
                if not isinstance(error.__cause__, httpx.HTTPStatusError):
                    raise
                self._failures[id] += 1
                if self._failures[id] == _MOST_FAILURES:
                    del self._letters[id]
                    self._report(f"  no answer from {letter.client or f'node {letter.node.id}'}: {error}")
            except ArtifactError as error:
                self._letters.pop(id, None)
                self._refuse(letter, str(error))

    def _reply_to(self, id: str) -> Message | None:
        try:
            replies = list(self._reach(self._grid.pull_messages, [id]))
        except StoreError:
            raise
        except Exception as error:  # whatever Flower's parsers say of bytes that somebody else made
            raise ArtifactError(f"its message can't be read ({type(error).__name__}: {error!s:.200}).") from error
        return next((reply for reply in replies if reply.metadata.reply_to_message_id == id), None)

    def _take(self, letter: _Letter, reply: Message) -> None:
        if reply.has_error():
            if reply.error.code not in _LOST:
                raise ArtifactError(f"its app failed: {reply.error.reason!s:.1000}")
            said = printable(f"{reply.error.reason!s:.200}")
            self._report(f"  no answer from {letter.client or f'node {letter.node.id}'}: {said}")
            return
        files = take_out(reply.content, letter.allowed, letter.most_bytes)
        if letter.client is None:
            self._welcome(letter.node, files)
        elif letter.partial and files.keys() - {f"{letter.place}/{PACKAGE}"} == {f"{letter.place}/{WHOLE}"}:
            pass  # then the order is sent again, with the whole adapter
        elif files and not {f"{letter.place}/{name}" for name in (FAILED, letter.answer)} & files.keys():
            raise ArtifactError(f"its message lacks {letter.answer}, which it was asked for.")
        elif not files and letter.place:
            self._report(f"  {letter.client} says that {letter.place} is over; its clock and this one have to agree")
        for path in sorted(files, key=lambda path: path.endswith(f"/{MANIFEST_NAME}")):  # the manifest last
            self.write(path, files[path])

    def _refuse(self, letter: _Letter, reason: str) -> None:
        if letter.client is None:
            self._strangers.setdefault(letter.node, None)
            self._report(printable(f"node {letter.node.id} can't take part: {reason}"))
        elif letter.place:
            write_document(self, f"{letter.place}/{FAILED}", failure(reason))

    def _reach(self, method: Callable[..., Iterable[Any]], *arguments: Any) -> Iterable[Any]:
        """What the grid gives; a SuperLink that can't be reached just now is what a store that can't be is."""
        try:
            return method(*arguments)
        except httpx.TransportError as error:
            raise StoreError(f"The SuperLink can't be reached ({error}).") from error
        except httpx.HTTPStatusError as error:
            raise StoreError(f"The SuperLink failed (HTTP status {error.response.status_code}).") from error
