"""What was asked of a client in a round, and what came of it."""

from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from pilot.rules.aggregation import Spilled
from pilot.rules.ledger import Lease
from pilot.rules.validation import NOTHING, Asked
from pilot.run.state import Contribution, MergedReply
from pilot.server.mailbox import Answer
from pilot.server.roster import Client
from pilot.wire.messages import Fence, TrainOrder, TrainReply


@dataclass(frozen=True)
class SentOrder:
    """What one message asks of one client; `lease` is None if it is only to evaluate.

    At `due_s` it ends by its own time, if nothing else has ended it (0: not known). `bytes_down`: of tensors,
    in all messages with this order. `asked_again`: it did not fit the client's mirror once.
    """

    message_id: str
    client: Client
    fence: Fence
    lease: Lease | None
    sent_at_s: float = 0.0
    due_s: float = 0.0
    asked: Asked = NOTHING  # of the validation rows
    order: TrainOrder | None = None  # as it was sent
    bytes_down: int = 0
    asked_again: bool = False
    step_tokens: int = field(kw_only=True)  # of each of its optimizer steps


@dataclass(frozen=True)
class Settled:
    """An order that has its answer: the reply, or None if that was refused. Its tensors had `bytes_up`."""

    order: SentOrder
    reply: TrainReply | None
    bytes_up: int = 0

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes of tensors that the order took."""
        return {"bytes_down": self.order.bytes_down, "bytes_up": self.bytes_up}


@dataclass(frozen=True)
class AcceptedReply:
    """A reply that will be merged; its pseudo-gradient, of L2 norm `norm`, lies at `path`."""

    order: SentOrder
    reply: TrainReply
    path: Path
    norm: float = 0.0
    refused_before: int = 0  # replies of its client in a row, before this one

    @property
    def steps(self) -> float:
        """Its optimizer steps; one that was short counts in part."""
        return self.reply.tokens / self.order.step_tokens

    @property
    def spilled(self) -> Spilled:
        return Spilled(self.order.client.name, self.reply.tokens, self.path, self.steps)

    @property
    def contribution(self) -> Contribution:
        """What the books learn from it."""
        reply = self.reply
        merged = MergedReply(self.order.client.name, reply.fence, reply.tokens, reply.consumed)
        return Contribution(merged, reply.row_counts, self.norm, self.steps)


class Last(Enum):
    """What became of a client's last order in the round."""

    UNSENT = auto()  # its node was gone before the message could leave
    PENDING = auto()  # it owes a reply
    REPLIED = auto()  # it did what it was asked to
    USED_UP = auto()  # the same, but its lease did not last: it may have another one
    FRUITLESS = auto()  # it failed, was lost or was refused


@dataclass
class ClientInRound:
    """What one client has been asked and has done in the round."""

    last: Last = Last.UNSENT
    order: SentOrder | None = None  # while it is pending
    step_rows: int = 0  # of its orders in this round; 0: it has had none
    fruitless: int = 0  # its orders that came to nothing
    failure: str = ""  # the last thing it answered that cannot be used
    loss: str = ""  # why it has not answered


def reply_to(order: SentOrder, answer: Answer) -> TrainReply:
    """The reply in an answer; raises ValueError if there is none, or it is not the one asked for."""
    if answer.error:
        raise ValueError(answer.error)
    message = answer.message
    if not isinstance(message, TrainReply):
        raise ValueError(f"answered an order with {type(message).__name__}")
    if message.fence != order.fence:
        raise ValueError(f"its fence is {message.fence}, not {order.fence}")
    if message.client != order.client.name:
        raise ValueError(f'it is in the name of "{message.client}", not of {order.client.name}')
    if message.error:
        raise ValueError(message.error)
    if message.needs_model:
        raise ValueError("it asks for the whole model, which it was sent")
    return message
