"""The machine of a simulated client: how it answers an order, and what may happen to it meanwhile."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pilot.rehearse.machine import Machine, Physics, Surroundings
from pilot.segment import Score, Segment, first_rows
from pilot.wire.code_hashes import code_hashes
from pilot.wire.codec import encode
from pilot.wire.messages import (
    Fence,
    Heartbeat,
    HelloReply,
    StopReason,
    TrainOrder,
    TrainReply,
    to_header,
)

FINGERPRINTS = {"tokenizer": "rehearsed", "validation rows": "rehearsed"}
UPDATE_SIZE = 64  # numbers of the update that stands for one
_LINE_SLOWED = 10.0
_ROW_BYTES = 4  # of text a token, in validation rows
_BREAKS_WITHIN = 8  # messages, or parts of them: two rounds
_NOISE = 0.3  # of an update, against what all updates have in common


@dataclass
class _Work:
    """One order on its way through a client; `due_s` of what comes next, `begun_s` of the first step."""

    order: TrainOrder
    message_id: str
    rate: float  # tokens per second
    received_s: float
    segments: list[Segment]  # without open ends
    row_tokens: int
    state: str = ""  # of the heartbeat; "" before there is one
    due_s: float = 0.0
    evaluating_s: float | None = None  # since when its devices work
    begun_s: float | None = None
    stopped_by: str = ""
    scored: bool = False
    reply: TrainReply | None = None  # once it is on its way
    plan: int = 0  # counts the plans: one that was replaced does nothing

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step: the batch, or the client's part of it."""
        return self.order.step_rows

    @property
    def rows(self) -> int:
        return sum(segment.rows or 0 for segment in self.segments)


class SimulatedClient:
    """Follows orders as `site/` would, as far as the server can see."""

    def __init__(self, machine: Machine, physics: Physics, world: Surroundings, seed: int) -> None:
        self.machine, self.physics, self.world = machine, physics, world
        self.clock = world.clock
        self._rng = random.Random(f"{seed} {machine.name}")
        self._tokens_per_s = machine.tokens_per_s
        self.node_id = 0  # 0: its machine is off
        self._frozen_s = self._cut_s = self._slow_s = 0.0  # until when
        self.leaving = ""
        self._late_s, self._breaks = 0.0, (0, 0.0)  # messages that are left, and for how long then
        self._next_reply: set[str] = set()  # what is to be wrong with it
        self._fence: Fence | None = None  # of the order before
        self.work: _Work | None = None
        self.trained_tokens = 0
        self.on: list[
            tuple[float, float]
        ] = []  # when its machine was on, and when its devices worked
        self.busy: list[tuple[float, float]] = []
        self._up_since_s = 0.0

    # -- what happens to it ----------------------------------------------------------------------

    @property
    def up(self) -> bool:
        return self.node_id != 0

    @property
    def _stands(self) -> bool:
        return self.clock.now_s() < self._frozen_s

    @property
    def reaches_redis(self) -> bool:
        now_s = self.clock.now_s()
        return self.up and not self._stands and now_s >= self._cut_s and self.world.redis_is_there

    def suffer(self, event: str, seconds: float) -> None:
        """`event` of a trace (`trace.py`) happens to it now. What can't happen to it does not."""
        now_s = self.clock.now_s()
        match event:
            case "up" if not self.up:
                self.node_id = self.world.new_node(self, self.machine.boot_s)
                self._frozen_s = self._cut_s = self._slow_s = 0.0
                self.leaving, self._up_since_s = "", now_s
                self.world.clear_stop(self.machine.name)
            case "down" if self.up:
                self._die()
            case "notice" if self.up and not self.leaving:
                self._leave(seconds)
            case "freeze" if self.up:
                self._freeze(seconds)
            case "cut":
                self._cut_s = max(self._cut_s, now_s + seconds)
                self.clock.at(self._cut_s, self.look)
            case "slow":
                self._slow_s = max(self._slow_s, now_s + seconds)
            case "crash" if self.up and self.work is not None and self.work.reply is None:
                self._stop_working()
                self.world.crashed(self.work.message_id)
                self.work = None
            case "break":
                self._breaks = (self._rng.randint(1, _BREAKS_WITHIN), seconds)
            case "late":
                self._late_s = seconds
            case "lie" | "stale" | "double":
                self._next_reply.add(event)
            case "speed" if seconds > 0:
                self._tokens_per_s = seconds

    def _die(self) -> None:
        self._stop_working()
        self.on.append((self._up_since_s, self.clock.now_s()))
        self.world.node_died(self.node_id)
        self.node_id, self.work = 0, None

    def end(self) -> None:
        """The rehearsal is over: what it does now ends with it."""
        if self.up:
            self._die()

    def _stop_working(self) -> None:
        """Its devices stand still from now on; what they have done is done, whether or not it arrives."""
        work = self.work
        if work is None or work.reply is not None or work.evaluating_s is None:
            return
        self.busy.append((work.evaluating_s, self.clock.now_s()))
        self.trained_tokens += self._rows_done(work) * work.row_tokens

    def _leave(self, seconds: float) -> None:
        self.leaving = f"notice: {seconds:.0f} s"
        self.world.announce_stop(self.machine.name, self.leaving)
        node_id = self.node_id
        self.clock.after(seconds, lambda: self._die() if self.node_id == node_id else None)
        self.look()

    def _freeze(self, seconds: float) -> None:
        self._frozen_s = max(self._frozen_s, self.clock.now_s() + seconds)
        self.clock.at(self._frozen_s, self.look)
        if (work := self.work) is not None:
            if work.begun_s is not None and work.state == "training":
                work.begun_s += seconds
            self._plan(work, work.due_s + seconds)

    # -- orders ----------------------------------------------------------------------------------

    def hello(self, answer: Callable[[dict[str, object]], None]) -> None:
        """Answer what it is."""
        reply = HelloReply(
            devices=self.machine.devices,
            host=self.machine.name,
            shards=list(range(self.physics.config.num_shards)),
            fingerprints=FINGERPRINTS | code_hashes(),
            redis=self.clock.now_s() >= self._cut_s,
        )
        answer(to_header(reply) | {"node_name": self.machine.name})

    def _broken(self) -> bool:
        """Whether its machine has just been killed: it is at a message."""
        left, seconds = self._breaks
        self._breaks = (max(0, left - 1), seconds)
        if left != 1 or not self.up:
            return False
        self._die()
        self.clock.after(seconds, lambda: self.suffer("up", 0.0))
        return True

    def receive(self, message_id: str, order: TrainOrder) -> None:
        """An order has reached its SuperNode: fetch the model, start, score, train, answer."""
        if self._broken():
            return
        speed = self._tokens_per_s * math.exp(self._rng.gauss(0.0, self.machine.jitter))
        segments = [self._closed(segment) for segment in order.segments]
        now_s = self.clock.now_s()
        row_tokens = self.physics.config.sequence_len
        self.work = work = _Work(order, message_id, speed, now_s, segments, row_tokens)
        fetch_s = self._line_s(self.physics.order_bytes, self.machine.download_bytes_s)
        self._plan(work, now_s + fetch_s + self.machine.start_s)

    def _closed(self, segment: Segment) -> Segment:
        end = segment.end_row
        return replace(segment, end_row=self.physics.shard_rows if end is None else end)

    def _line_s(self, size: int, bytes_s: float) -> float:
        slowed = _LINE_SLOWED if self.clock.now_s() < self._slow_s else 1.0
        return slowed * size / bytes_s

    def _plan(self, work: _Work, due_s: float) -> None:
        work.due_s, work.plan = due_s, work.plan + 1
        plan = work.plan
        self.clock.at(due_s, lambda: self._next(work, plan))

    def _next(self, work: _Work, plan: int) -> None:
        if self.work is not work or work.plan != plan:
            return
        if self._stands:
            self._plan(work, self._frozen_s)
        elif work.state == "":
            self._evaluate(work)
        elif work.state == "evaluating":
            self._begin(work)
        elif work.state == "training":
            self._send(work)
        else:
            self._arrive(work)

    def _evaluate(self, work: _Work) -> None:
        work.state, work.evaluating_s = "evaluating", self.clock.now_s()
        rows = sum(end - first for first, end in self._pieces(work.order))
        seconds = rows * self.physics.config.sequence_len / (self.machine.scoring * work.rate)
        self._plan(work, self.clock.now_s() + seconds)
        self.look()

    def _begin(self, work: _Work) -> None:
        now_s, order, config = self.clock.now_s(), work.order, self.physics.config
        work.state, work.scored = "training", True
        if not work.segments:
            work.stopped_by = StopReason.NOTHING_LEASED
            return self._plan(work, now_s)
        work.begun_s = now_s
        steps = work.rows // work.step_rows
        steps += order.lease_is_tail and work.rows % work.step_rows > 0
        work.stopped_by = StopReason.LEASE_USED_UP
        if 0 < config.round_steps <= steps:
            steps, work.stopped_by = config.round_steps, StopReason.STEPS_DONE
        due_s = now_s + steps * work.step_rows * work.row_tokens / work.rate
        if (deadline_s := work.received_s + order.seconds_left) < due_s:
            due_s, work.stopped_by = max(now_s, deadline_s), StopReason.DEADLINE
        self._plan(work, due_s)
        self.look()

    def look(self) -> None:
        """See whether the work is to stop: what Redis says, or that it is leaving."""
        work = self.work
        if work is None or self._stands or work.state == "sending":
            return
        why = self.leaving
        if not why and self.reaches_redis:
            why = self.world.over(work.order.fence) or self.world.stops.get(self.machine.name, "")
        if why:
            work.stopped_by = why
            micro_rows = min(work.step_rows, self.physics.micro_rows * self.machine.devices)
            micro_s = micro_rows * work.row_tokens / work.rate
            wait_s = self._rng.uniform(0, micro_s) if work.begun_s is not None else 0.1
            work.state = "training"  # for a moment: it answers next
            self._plan(work, min(work.due_s, self.clock.now_s() + wait_s))

    def _steps_s(self, work: _Work) -> float:
        return 0.0 if work.begun_s is None else max(0.0, self.clock.now_s() - work.begun_s)

    def _rows_done(self, work: _Work) -> int:
        """Whole optimizer steps' rows by now; the last step of a tail may be shorter."""
        rows = work.step_rows
        steps = math.floor(self._steps_s(work) * work.rate / (rows * work.row_tokens) + 1e-6)
        return min(
            work.rows if work.order.lease_is_tail else work.rows // rows * rows, steps * rows
        )

    def _send(self, work: _Work) -> None:
        rows, train_s = self._rows_done(work), self._steps_s(work)
        self._stop_working()
        work.reply, work.state = self._reply(work, rows, train_s), "sending"
        if self._broken():
            return
        size = self.physics.reply_bytes if rows else 1000
        late_s, self._late_s = self._late_s, 0.0
        line_s = self._line_s(size, self.machine.upload_bytes_s)
        self._plan(work, self.clock.now_s() + line_s + late_s)

    def _arrive(self, work: _Work) -> None:
        assert work.reply is not None
        if self._broken():
            return
        self.work, tokens = None, work.reply.tokens
        update = self._update(tokens / (work.step_rows * work.row_tokens)) if tokens else {}
        wrong, reply = self._next_reply, work.reply
        if "lie" in wrong and tokens:
            wrong.remove("lie")
            update["w"] = update["w"] * math.nan
        if "stale" in wrong and self._fence is not None:
            wrong.remove("stale")
            reply = replace(reply, fence=self._fence)
        self._fence = work.order.fence
        header = to_header(reply) | {"node_name": self.machine.name}
        parts = encode(update, wire=self.physics.config.wire_up)
        self.world.reply(work.message_id, header, parts, twice="double" in wrong)
        wrong.discard("double")
        self._broken()

    def _update(self, steps: float) -> dict[str, torch.Tensor]:
        noise = torch.tensor([self._rng.gauss(0.0, _NOISE) for _ in range(UPDATE_SIZE)])
        return {"w": (1.0 + noise) * 1e-3 * steps}

    def _reply(self, work: _Work, rows: int, train_s: float) -> TrainReply:
        config, shard_rows = self.physics.config, self.physics.shard_rows
        consumed = first_rows(work.segments, rows, shard_rows=shard_rows)
        tokens = rows * config.sequence_len
        pieces = self._pieces(work.order) if work.scored else []
        return TrainReply(
            fence=work.order.fence,
            client=work.order.client,
            stopped_by=work.stopped_by,
            steps=-(-rows // work.step_rows),
            batches=rows,
            tokens=tokens,
            loss_nats=3.0 * tokens,
            train_s=train_s,
            total_s=self.clock.now_s() - work.received_s,
            consumed=consumed,
            row_counts={segment.shard: self.physics.shard_rows for segment in consumed},
            scores=[self._score(piece, work.order) for piece in pieces],
        )

    def _pieces(self, order: TrainOrder) -> list[tuple[int, int]]:
        if order.eval_pieces:
            return [(first, end) for first, end in order.eval_pieces]
        own = (order.eval_first_row, order.eval_end_row)
        return [own] if own[1] > own[0] else []

    def _score(self, piece: tuple[int, int], order: TrainOrder) -> Score:
        """A figure that falls with the tokens, the same for all: nothing is learnt here."""
        size = (piece[1] - piece[0]) * self.physics.config.sequence_len * _ROW_BYTES
        bpb = 0.7 + 2.0 / (1.0 + 20.0 * order.committed_tokens / max(1, order.total_tokens))
        return Score(*piece, nats=size * bpb * math.log(2), num_bytes=size)

    # -- what Redis holds ------------------------------------------------------------------------

    def heartbeat(self) -> Heartbeat | None:
        """What it would write now; None while it writes none."""
        work = self.work
        if work is None or not work.state or not self.reaches_redis:
            return None
        config, reply = self.physics.config, work.reply
        rows = reply.tokens // config.sequence_len if reply else self._rows_done(work)
        return Heartbeat(
            state=work.state,
            step=-(-rows // work.step_rows),
            tokens=rows * config.sequence_len,
            loss=3.0,
            tokens_per_s=work.rate if rows else 0.0,
            shard=work.segments[0].shard if work.segments else -1,
        )
