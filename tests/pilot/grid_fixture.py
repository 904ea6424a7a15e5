"""A Flower `Grid` and a clock that do what a test says, with real Flower messages."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from pilot.wire.messages import Part
from pilot.wire.records import from_records, to_records


class ManualClock:
    def __init__(self, at_s: float = 1000.0) -> None:
        self.at_s = at_s

    def now_s(self) -> float:
        return self.at_s

    def sleep(self, seconds: float) -> None:
        self.at_s += seconds


class ManualGrid:
    """Keeps what was pushed; answers come when the test says so.

    Like Flower's grids: a node that isn't online drops out of a push (`unknown` says how), a reply
    can be pulled once, and an id that nobody knows gives error 3.
    """

    def __init__(self, *nodes: int, unknown: str = "left out") -> None:
        # Flower refuses to make messages outside a run
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.online, self.unknown = set(nodes), unknown
        self.activated: dict[int, str] = {}  # when a node was let in, if not at first
        self.pushed: dict[str, Message] = {}
        self.ready: dict[str, Message] = {}
        self.pulls = 0

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node_id, last_activated_at=self.activated.get(node_id, "at first"))
            for node_id in sorted(self.online)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            if message.metadata.dst_node_id in self.online:
                message_id = f"m{len(self.pushed)}"
                self.pushed[message_id] = message
                yield message_id
            elif self.unknown == "empty":
                yield ""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls += 1
        return [self.ready.pop(i) for i in message_ids if i in self.ready]

    def header(self, message_id: str) -> dict[str, Any]:
        return from_records(self.pushed[message_id].content)[0]

    def to(self, node_id: int) -> list[str]:
        """The ids of what was sent to a node, oldest first."""
        sent = self.pushed.items()
        return [i for i, message in sent if message.metadata.dst_node_id == node_id]

    def answer(self, message_id: str, header: dict[str, Any], parts: Iterable[Part] = ()) -> None:
        self.answer_with(message_id, to_records(header, parts))

    def answer_with(self, message_id: str, content: RecordDict) -> None:
        self.ready[message_id] = Message(content, reply_to=self.pushed[message_id])

    def fail(self, message_id: str, code: int, reason: str | None = None) -> None:
        self.ready[message_id] = Message(Error(code, reason), reply_to=self.pushed[message_id])
