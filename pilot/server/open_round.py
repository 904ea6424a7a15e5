"""One round's books: what was asked of whom, which replies were taken, and what they sum to.

A reply is checked and spilled to disk as it arrives and folded into the mean at the close, in lease
order: memory is one model, not one a client, and who was first makes no difference. What can't be taken
is refused with a reason, and its rows go back.
"""

import math
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pilot.faults import fault_point
from pilot.rules.admission import (
    REFUSALS_IN_A_ROW,
    norm_refusal,
    refusal,
    token_refusal,
    update_norm,
)
from pilot.rules.aggregation import Spilled, aggregate
from pilot.rules.ledger import Lease, LedgerError, Segment
from pilot.run.quarantine import keep_refused
from pilot.run.snapshot import SnapshotError
from pilot.run.state import MergedReply, RunState
from pilot.server.mailbox import Answer
from pilot.server.roster import Site
from pilot.server.telemetry import Telemetry
from pilot.wire.codec import CodecError, decode
from pilot.wire.messages import LEASE_USED_UP, Fence, Part, TrainReply, from_header

# Orders to one site in one round of which none came to anything, before it has to wait for the next one.
MAX_VAIN_ORDERS = 3


@dataclass(frozen=True)
class Work:
    """What one message asks of one site; `lease` is None if it shall only evaluate."""

    message_id: str
    site: Site
    fence: Fence
    lease: Lease | None
    sent_at_s: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """What became of an answer to an order of the round: its reply, or None if that was refused."""

    work: Work
    reply: TrainReply | None


@dataclass(frozen=True)
class Taken:
    """A reply that will be merged; its pseudo-gradient, of L2 norm `norm`, lies at `path`."""

    work: Work
    reply: TrainReply
    path: Path
    norm: float = 0.0

    @property
    def consumed(self) -> list[Segment]:
        return [Segment.from_list(values) for values in self.reply.consumed]

    @property
    def row_counts(self) -> dict[int, int]:
        return {int(shard): int(count) for shard, count in self.reply.row_counts}

    @property
    def spilled(self) -> Spilled:
        return Spilled(self.work.site.name, self.reply.tokens, self.path)

    def merged(self) -> MergedReply:
        """What the books keep of it."""
        reply = self.reply
        return MergedReply(self.work.site.name, reply.fence, reply.tokens, reply.consumed)


class OpenRound:
    """A round between its opening and its commit. `spool` is an empty directory of its own."""

    def __init__(
        self, number: int, state: RunState, telemetry: Telemetry, *, spool: Path, opened_at_s: float
    ) -> None:
        self.number, self.opened_at_s = number, opened_at_s
        self.asked: set[str] = set()  # sites that were sent an order
        self.pending: dict[str, Work] = {}
        self.taken: list[Taken] = []
        self.answered = 0  # replies that were not refused, with work or without
        self.used_up: set[str] = set()  # sites whose lease did not last: they may have another one
        self.rejected = 0  # replies whose content may not be merged
        self.failures: dict[str, str] = {}  # site → what it answered that can't be used
        self.lost: dict[str, str] = {}  # site → why it has not answered
        self._vain: Counter[str] = Counter()  # site → its orders that came to nothing
        self._undone: set[str] = set()  # sites whose last order came to nothing
        self.eval_bytes = self.eval_rows = 0
        self._eval_nats: list[float] = []
        self._state, self._telemetry, self._spool = state, telemetry, spool
        _make_empty(spool)

    @property
    def tokens(self) -> int:
        """Tokens of the replies taken."""
        return sum(taken.reply.tokens for taken in self.taken)

    def add(self, work: Work) -> None:
        self.pending[work.message_id] = work
        self.used_up.discard(work.site.name)
        self._undone.discard(work.site.name)

    def wants(self, name: str) -> bool:
        """Whether a site of that name could have an order now: it had none, used up its lease, or its last
        one came to nothing, as when a worker is killed; not if what it sent may not be merged. With fixed
        steps there is no second order: what a round does must not depend on anybody's speed."""
        again = self._vain[name] < MAX_VAIN_ORDERS and not self._state.config.round_steps
        return name not in self.asked or name in self.used_up or (again and name in self._undone)

    def supersede(self, site: Site) -> list[str]:
        """A newer node has taken the name of one that owes replies: those are lost. Returns their ids."""
        older = [
            (message_id, work)
            for message_id, work in self.pending.items()
            if work.site.name == site.name and work.site.node_id != site.node_id
        ]
        for message_id, work in older:
            del self.pending[message_id]
            self._lose(work, "a newer node has taken its name")
        return [message_id for message_id, _ in older]

    def take(self, answer: Answer) -> Receipt | None:
        """Take or refuse an answer if it is to this round; None: it is not."""
        work = self.pending.pop(answer.message_id, None)
        if work is None:
            return None
        if answer.lost:
            self._lose(work, answer.error)
            return Receipt(work, None)
        try:
            reply = _reply(answer, work.fence)
        except ValueError as error:
            self._refuse(work, str(error))
            return Receipt(work, None)
        self._add_evaluation(reply)
        try:
            taken = self._spill(work, reply, answer.parts)
        except (ValueError, TypeError, LedgerError, CodecError) as error:
            self._reject(work, reply, answer.parts, str(error))
            return Receipt(work, None)
        if taken is not None:
            self._state.admission.accepted(work.site.name)
            self.taken.append(taken)
        self.answered += 1
        if reply.stopped_by == LEASE_USED_UP:
            self.used_up.add(work.site.name)
        self._tell(work, reply)
        return Receipt(work, reply)

    def _add_evaluation(self, reply: TrainReply) -> None:
        if math.isfinite(reply.eval_nats) and reply.eval_rows > 0 and reply.eval_bytes > 0:
            self._eval_nats.append(reply.eval_nats)
            self.eval_bytes += reply.eval_bytes
            self.eval_rows += reply.eval_rows

    def _spill(self, work: Work, reply: TrainReply, parts: Sequence[Part]) -> Taken | None:
        """Write the pseudo-gradient down if it may be merged; None if there is none.

        Raises ValueError with the reason if it may not.
        """
        if work.lease is None:
            return None
        lease_id, ledger = work.lease.lease_id, self._state.ledger
        taken = Taken(work, reply, self._spool / f"lease-{lease_id:08d}.safetensors")
        if reply.tokens == 0 and not reply.consumed:
            # what it learnt of its shards counts: they may have been too small for a single step
            ledger.commit(lease_id, [], taken.row_counts)
            return None
        update, norm = self._admit(work.lease, taken, parts)
        try:
            fault_point("spill.write")
            save_file(update, taken.path)
            fault_point("spill.written")
        except (OSError, SafetensorError) as error:
            raise SnapshotError(f"cannot write {taken.path}: {error}") from error
        ledger.accept(lease_id, taken.consumed, taken.row_counts)  # the rest is free again
        return replace(taken, norm=norm)

    def _admit(
        self, lease: Lease, taken: Taken, parts: Sequence[Part]
    ) -> tuple[dict[str, Tensor], float]:
        """The update of a reply that may be merged, and its norm; raises ValueError with the reason if
        it may not."""
        config, tokens = self._state.config, taken.reply.tokens
        if strange := {part.dtype for part in parts} - {config.wire_dtype}:
            raise ValueError(f"its tensors came as {strange.pop()}, not {config.wire_dtype}")
        update = decode(parts)
        if reason := refusal(update, self._state.weights, tokens=tokens):
            raise ValueError(reason)
        self._state.ledger.check(lease.lease_id, taken.consumed, taken.row_counts)
        leased = [segment.rows for segment in lease.segments]
        rows = sum(segment.rows or 0 for segment in taken.consumed)
        leased_rows = None if None in leased else sum(count or 0 for count in leased)
        norm, earlier = update_norm(update), self._state.admission.norms
        reason = token_refusal(
            tokens, rows=rows, leased_rows=leased_rows, row_tokens=config.sequence_len
        ) or norm_refusal(norm, earlier, max_ratio=config.max_update_norm_ratio)
        if reason:
            raise ValueError(reason)
        return update, norm

    def _refuse(self, work: Work, reason: str) -> None:
        """The site has answered, and with something that can't be used."""
        self.failures[work.site.name] = reason
        self._give_back(work, reason)

    def _reject(self, work: Work, reply: TrainReply, parts: Sequence[Part], reason: str) -> None:
        """The site has answered in form, and its content may not be merged: that is counted."""
        self.rejected += 1
        self._state.admission.refused(work.site.name)
        self._vain[work.site.name] = MAX_VAIN_ORDERS
        if self._state.config.quarantine:
            directory = self._spool.parent / "quarantine"
            keep_refused(directory, reply, work.site.name, _whatever(parts), reason)
        self._refuse(work, reason)
        in_a_row = self._state.admission.in_a_row[work.site.name]
        if in_a_row >= REFUSALS_IN_A_ROW:
            self._telemetry.event(
                "client_cooling",
                f"Node {work.site.name} gets no work for {self._state.config.cooling_time:g} s: its last "
                f"{in_a_row} replies were refused",
                round=self.number,
                client=work.site.name,
                refused=in_a_row,
            )

    def _lose(self, work: Work, reason: str) -> None:
        """The site has not answered, which says nothing of its work."""
        self.lost[work.site.name] = reason
        self._give_back(work, reason)

    def _give_back(self, work: Work, reason: str) -> None:
        self._vain[work.site.name] += 1
        self._undone.add(work.site.name)
        if work.lease is not None:
            self._state.ledger.give_back(work.lease.lease_id)
        self._telemetry.event(
            "reply_refused",
            f"Reply of {work.site.name} in round {self.number} is refused: {reason}",
            round=self.number,
            client=work.site.name,
            fence=asdict(work.fence),
            reason=reason,
        )

    def _tell(self, work: Work, reply: TrainReply) -> None:
        values = asdict(reply) | {"round": self.number, "client": work.site.name}
        number = work.site.name.removeprefix("client_")
        self._telemetry.event(
            "reply",
            f"Client {number}: {reply.batches} batches" if work.lease else None,
            loss=reply.loss_nats / reply.tokens if reply.tokens else None,
            **values,
        )

    def give_up(
        self, reason: str, *, silent: Collection[str] = (), unbegun: Collection[str] = ()
    ) -> None:
        """Nobody waits any longer: what is still out is refused for `reason`, its rows go back."""
        reasons = dict.fromkeys(unbegun, "its client had not begun when the round ended")
        reasons |= dict.fromkeys(silent, "its client is silent")
        for work in list(self.pending.values()):
            self._lose(work, reasons.get(work.site.name, reason))
        self.pending.clear()

    # -- the close -------------------------------------------------------------------------------

    def mean(self) -> dict[str, Tensor] | None:
        """The round's pseudo-gradient, from its replies in lease order; None without replies."""
        config = self._state.config
        spilled = [taken.spilled for taken in self.in_lease_order()]
        method, trim_fraction = config.aggregation, config.trim_fraction
        return aggregate(spilled, method=method, trim_fraction=trim_fraction)

    def in_lease_order(self) -> list[Taken]:
        def lease_id(taken: Taken) -> int:
            return taken.reply.fence.lease_id

        return sorted(self.taken, key=lease_id)

    @property
    def train_loss(self) -> float | None:
        """Nats a token over all replies taken."""
        nats = sum(taken.reply.loss_nats for taken in self.in_lease_order())
        return nats / self.tokens if self.tokens and math.isfinite(nats) else None

    @property
    def val_bpb(self) -> float | None:
        """Bits a byte of the model that the clients received, over the validation rows that came."""
        # sorted, so that who was first makes no difference here either
        nats = sum(sorted(self._eval_nats))
        if not self.eval_bytes or not math.isfinite(nats):
            return None
        return nats / (math.log(2) * self.eval_bytes)

    def close(self) -> None:
        """The round is committed, or was only an evaluation: its replies are of no more use."""
        fault_point("spool.remove")
        shutil.rmtree(self._spool, ignore_errors=True)


def _make_empty(spool: Path) -> None:
    """Whatever a server that died had spilled is of no use: its round is done again."""
    try:
        shutil.rmtree(spool, ignore_errors=True)
        fault_point("spool.removed")
        spool.mkdir(parents=True)
        fault_point("spool.created")
    except OSError as error:
        raise SnapshotError(f"cannot make {spool}: {error}") from error


def _whatever(parts: Sequence[Part]) -> dict[str, Tensor]:
    """The tensors of a refused reply, if they are any."""
    try:
        return decode(parts)
    except CodecError:
        return {}


def _reply(answer: Answer, fence: Fence) -> TrainReply:
    """The reply in an answer; raises ValueError if there is none, or it is not the one asked for."""
    if answer.error:
        raise ValueError(answer.error)
    message = from_header(answer.header)
    if not isinstance(message, TrainReply):
        raise ValueError(f"answered an order with {type(message).__name__}")
    if message.fence != fence:
        raise ValueError(f"its fence is {message.fence}, not {fence}")
    if message.error:
        raise ValueError(message.error)
    return message
