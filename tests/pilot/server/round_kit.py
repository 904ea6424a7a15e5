"""A round of three clients, and answers to it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from pilot.config import RunConfig
from pilot.rules.ledger import Ledger
from pilot.rules.validation import Asked
from pilot.run.events import read_events
from pilot.run.state import RunState
from pilot.segment import Segment
from pilot.server.mailbox import Answer, answer_of
from pilot.server.open_round import OpenRound, SentOrder
from pilot.server.report import Report
from pilot.server.roster import Client
from pilot.server.telemetry import Telemetry
from pilot.wire.codec import encode
from pilot.wire.messages import Fence, HelloReply, Part, TrainReply, to_header
from pilot.wire.records import to_records

from ..rules.aggregation_kit import gathered

ROW_TOKENS, SHARD_ROWS = 8, 10
STEP_TOKENS = 4 * ROW_TOKENS
CONFIG = RunConfig(
    run_name="r",
    sequence_len=ROW_TOKENS,
    total_batch_size=STEP_TOKENS,
    num_shards=6,
    outer_lr=1.0,  # the mean as it is
)


def said(message_id: str, header: dict[str, Any], parts: Iterable[Part] = ()) -> Answer:
    """What a client's header and parts become on their way to the round."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return answer_of(message_id, 0, Message(to_records(header, parts), 1, "train"))


class Round:
    """A round of three clients that have two shards of ten rows each, and what tests do with it."""

    def __init__(self, directory: Path) -> None:
        ledger = Ledger(num_shards=6, epochs=2, shard_order=lambda _: range(6))
        weights = {"w": torch.zeros(3), "b": torch.zeros(2, 2)}
        self.state = RunState(CONFIG, weights, ledger, total_tokens=10**6)
        self.spool, self.events = directory / "spool", directory / "events.jsonl"
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        self.open = OpenRound(3, self.state, Report(telemetry), spool=self.spool, opened_at_s=0.0)
        self.orders: dict[str, SentOrder] = {}
        for number, name in enumerate("abc"):
            self.order(name, number, {2 * number, 2 * number + 1})

    def order(self, name: str, number: int, shards: set[int]) -> None:
        self.state.ledger.register(name, shards)
        lease = self.state.ledger.lease(name, 4)
        assert lease is not None
        fence = Fence("r", 1, 3, lease.lease_id)
        slice_ = (2 * number, 2 * number + 2)  # two validation rows each
        client, asked = Client(name, number, HelloReply()), Asked(slice_, (slice_,))
        order = SentOrder(f"m-{name}", client, fence, lease, asked=asked, step_tokens=STEP_TOKENS)
        self.orders[name] = order
        self.open.add(order)

    def reply(self, name: str, rows: int = 4, **changes: Any) -> TrainReply:
        order = self.orders[name]
        assert order.lease is not None
        first = order.lease.segments[0]
        consumed = [Segment(first.epoch, first.shard, 0, rows)] if rows else []
        reply = TrainReply(
            fence=order.fence,
            client=name,
            steps=1,
            tokens=rows * ROW_TOKENS,
            loss_nats=2.0 * rows * ROW_TOKENS,
            eval_nats=10.0,
            eval_bytes=5,
            eval_rows=2,
            train_s=2.0,
            consumed=consumed,
        )
        return replace(reply, **changes)

    def answer(self, name: str, reply: TrainReply, value: float = 1.0) -> Answer:
        update = {key: torch.full_like(t, value) for key, t in self.state.weights.items()}
        return said(f"m-{name}", to_header(reply), encode(update) if reply.tokens else [])

    def accept(self, name: str, value: float = 1.0, **changes: Any) -> bool:
        """Whether the answer was to this round, accepted or refused."""
        answer = self.answer(name, self.reply(name, **changes), value)
        return self.open.handle_answer(answer) is not None

    def mean(self) -> dict[str, torch.Tensor] | None:
        merged = self.open.merged()
        return None if merged is None else gathered(merged)

    def refusals(self) -> list[str]:
        return [e["reason"] for e in read_events(self.events) if e["event"] == "reply_refused"]

    @property
    def rows_open(self) -> set[int]:
        return set(self.state.ledger.open)
