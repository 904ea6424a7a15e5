"""Messages over a Flower `Grid`: sent one by one, answered, failed, or given up.

What Flower leaves open is closed here (docs/flower.md): an unknown node drops out of a push without a word, a
reply can be pulled only once, an error names no node, and a node that restarts between two polls
never answers and never fails. So each message is pushed alone and remembered, and one whose node has been
away, or another process, for `LOST_AFTER_S` counts as lost.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from pilot.rules.rounds import Clock
from pilot.server.puller import Puller, Pulls
from pilot.wire.incoming import Reply, read
from pilot.wire.messages import Header, Part, plain
from pilot.wire.records import to_records

# A node that comes back within this time has only been slow to say that it is alive.
LOST_AFTER_S = 10.0
# Twice what Flower needs to notice a node that was killed.
FORGET_AFTER_S = 120.0

# what Flower says when a node or a ClientApp died (docs/flower.md)
_LOST_CODES = {
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
}


@dataclass(frozen=True)
class Answer:
    """What became of one message; `error` is a sentence if there is no message in answer.

    `name` is what the client calls itself. `lost`: there is no answer, so nothing is known of the client's
    work, neither good nor bad. `malformed`: there is one, and no reply could be made of it.
    """

    message_id: str
    node_id: int
    message: Reply | None = None
    parts: list[Part] = field(default_factory=list)
    error: str = ""
    lost: bool = False
    malformed: bool = False
    name: str = ""


@dataclass
class _Pending:
    """`activated_at`: when Flower had let the node in, as first seen after the sending; a node with a key keeps
    its id through restarts, and only this tells that another process answers to it now."""

    node_id: int
    activated_at: str | None = None
    absent_since_s: float | None = None
    forget_at_s: float = math.inf


class Mailbox:
    """All messages of a server that have no answer yet."""

    def __init__(self, grid: Grid, clock: Clock, *, puller: Pulls | None = None) -> None:
        self._grid, self._clock, self._puller = grid, clock, puller or Puller(grid)
        self._pending: dict[str, _Pending] = {}
        self._at_work: Counter[int] = Counter()  # messages without an answer, by node

    def nodes(self) -> set[int]:
        """Nodes that Flower believes to be online."""
        return {node.node_id for node in self._grid.get_nodes()}

    def busy(self, node_id: int) -> bool:
        """Whether a message to the node has no answer yet: a node takes one at a time."""
        return self._at_work[node_id] > 0

    @property
    def sends_at_once(self) -> bool:
        """Whether a message has left as bytes when `send` returns: a simulation keeps it until its answer."""
        return type(self._grid).__name__ == "HttpGrid"

    def send(
        self, node_id: int, kind: str, header: Header, parts: Iterable[Part] | ArrayRecord = ()
    ) -> str:
        """Send one message ("query" or "train"); returns its id, "" if the node is not there.

        `parts` as in `to_records`.
        """
        message = Message(to_records(header, parts), node_id, kind)
        ids = list(self._grid.push_messages([message]))
        if not ids or not ids[0]:
            return ""
        self._pending[ids[0]] = _Pending(node_id)
        self._at_work[node_id] += 1
        return ids[0]

    def abandon(self, message_id: str) -> None:
        """Nobody waits for this answer any longer. For `FORGET_AFTER_S` it may still come, and its node
        counts as busy; then it is forgotten, since a node that was away and rejoined under its old
        id never answers."""
        if message_id in self._pending:
            self._pending[message_id].forget_at_s = self._clock.now_s() + FORGET_AFTER_S

    def poll(self) -> Iterator[Answer]:
        """The answers that have come since the last call; each message gets exactly one.

        The next one is asked for when the one before has been dealt with. Its tensors should be gone by then
        (`parts.clear()`): they are the largest things in this process.
        """
        for message_id, reply in self._puller.pull(list(self._pending)):
            if message_id in self._pending:
                answer = self._open(message_id, reply)
                del reply
                yield answer
        yield from self._lost()

    def _open(self, message_id: str, reply: Message | Exception) -> Answer:
        node_id = self._forget(message_id)
        if isinstance(reply, Message) and reply.has_error():
            reason = f"Flower error {reply.error.code}: {reply.error.reason or 'no reason given'}"
            lost = reply.error.code in _LOST_CODES
            return Answer(message_id, node_id, error=plain(reason), lost=lost)
        return answer_of(message_id, node_id, reply)

    def _forget(self, message_id: str) -> int:
        """No answer to it is waited for; its node."""
        node_id = self._pending.pop(message_id).node_id
        self._at_work[node_id] -= 1
        if not self._at_work[node_id]:
            del self._at_work[node_id]  # nodes come under ever new ids
        return node_id

    def _lost(self) -> list[Answer]:
        online = {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}
        now_s = self._clock.now_s()
        lost = []
        for message_id, pending in list(self._pending.items()):
            if now_s >= pending.forget_at_s:
                self._forget(message_id)
                continue
            if pending.activated_at is None:
                pending.activated_at = online.get(pending.node_id)
            if pending.node_id in online and online[pending.node_id] == pending.activated_at:
                pending.absent_since_s = None
                continue
            if pending.absent_since_s is None:
                pending.absent_since_s = now_s
            if now_s - pending.absent_since_s >= LOST_AFTER_S:
                self._forget(message_id)
                reason = "its node restarted" if pending.node_id in online else "its node is gone"
                lost.append(Answer(message_id, pending.node_id, error=reason, lost=True))
        return lost


def answer_of(message_id: str, node_id: int, reply: Message | Exception) -> Answer:
    """The answer that a reply is, whatever its client has put into it."""
    said = read(reply)
    return Answer(
        message_id,
        node_id,
        said.message,
        list(said.parts),
        said.error,
        malformed=bool(said.error),
        name=said.name,
    )
