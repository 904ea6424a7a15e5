"""A Flower `Grid` within this process, for faults that real nodes can't be made to show on demand.

Messages go to handlers, one thread a node and one message at a time, as Flower's nodes take them.
What comes back are real Flower messages with real records.
"""

import queue
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[str, RecordDict], RecordDict]


class LocalGrid:
    """Nodes are handlers: (message type, content) → content; an exception becomes Flower's error 2.

    A handler that returns an exception has sent what Flower cannot read: pulling it raises that.
    """

    def __init__(self, handlers: dict[int, Handler]) -> None:
        # Flower refuses to make messages outside a run
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.online = set(handlers)
        self._inboxes: dict[int, queue.Queue[tuple[str, Message]]] = {}
        self._replies: dict[str, Message | Exception] = {}
        for node_id, handler in handlers.items():
            self.add(node_id, handler)

    def add(self, node_id: int, handler: Handler) -> None:
        inbox: queue.Queue[tuple[str, Message]] = queue.Queue()
        self._inboxes[node_id] = inbox
        self.online.add(node_id)
        threading.Thread(target=self._serve, args=(inbox, handler), daemon=True).start()

    def _serve(self, inbox: "queue.Queue[tuple[str, Message]]", handler: Handler) -> None:
        while True:
            message_id, message = inbox.get()
            try:
                content = handler(message.metadata.message_type, message.content)
                unreadable = isinstance(content, Exception)
                reply = content if unreadable else Message(content, reply_to=message)
            except Exception as error:  # noqa: BLE001  # as Flower does: whatever an app raises
                reply = Message(Error(2, str(error)), reply_to=message)
            self._replies[message_id] = reply

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id) for node_id in sorted(self.online)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.online:
                ids.append(uuid.uuid4().hex)
                self._inboxes[message.metadata.dst_node_id].put((ids[-1], message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._replies.pop(i) for i in message_ids if i in self._replies]
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def repeat(self, message_id: str, reply: Any) -> None:
        """Let a reply arrive once more."""
        self._replies[message_id] = reply
