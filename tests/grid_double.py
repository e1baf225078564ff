"""Flower's grid without its processes: nodes that do one thing at a time, and messages that live until their end."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


@dataclass
class Node:
    """A SuperNode; `answer` makes a reply of a message, or None: it is at work on it for ever."""

    id: int
    answer: object
    since: str = "1"
    name: str = ""
    online: bool = True
    seen: list[Message] = field(default_factory=list)


class GridDouble(Grid):
    """Delivers a message when an answer to it is looked for.

    Attributes:
        unreachable: exceptions to raise in place of the next calls, one each.
        late: message id → an answer to be found now, where the node gave none at first.
    """

    def __init__(self, *nodes: Node) -> None:
        self.nodes, self.unreachable, self.late = list(nodes), [], {}
        self._pushed: dict[str, tuple[Node, Message]] = {}
        self._delivered: set[str] = set()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1

    @property
    def run(self):
        raise NotImplementedError

    set_run = create_message = get_node_ids = send_and_receive = None

    def _fail(self):
        if self.unreachable:
            raise self.unreachable.pop()

    def get_nodes(self):
        self._fail()
        online = [node for node in self.nodes if node.online]
        return [SimpleNamespace(node_id=node.id, last_activated_at=node.since, name=node.name) for node in online]

    def push_messages(self, messages):
        self._fail()
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            [node] = [node for node in self.nodes if node.id == message.metadata.dst_node_id]
            ids.append(message.metadata.message_id)
            self._pushed[ids[-1]] = node, message
        return ids

    def pull_messages(self, message_ids):
        self._fail()
        return [reply for id in message_ids if (reply := self._pull(id)) is not None]

    def _pull(self, id):
        node, message = self._pushed[id]
        if message.metadata.created_at + message.metadata.ttl < time.time():
            return Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "expired"), reply_to=message)
        if not node.online:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "no heartbeat"), reply_to=message)
        if id not in self._delivered:
            self._delivered.add(id)
            node.seen.append(message)
            return node.answer(message)
        return self.late.pop(id, None)
