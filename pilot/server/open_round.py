"""One round's books: what was asked of which client, which replies were accepted, and what they sum to.

A reply is checked and spilled to disk as it arrives and folded into the mean at the close, in lease
order: memory is a piece of each, and the order of arrival makes no difference. What cannot be
accepted is refused with a reason, and its rows go back.
"""

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from pilot.errors import PilotError
from pilot.faults import fault_point
from pilot.rules.admission import REFUSALS_IN_A_ROW
from pilot.rules.aggregation import Merged, Spilled
from pilot.rules.outer import restores_lengths
from pilot.rules.validation import NOTHING, Asked, Figure, figure
from pilot.run.quarantine import keep_refused
from pilot.run.snapshot import SnapshotError
from pilot.run.state import RunState
from pilot.segment import Score
from pilot.server.admit import admit
from pilot.server.mailbox import Answer
from pilot.server.orders import AcceptedReply, ClientInRound, Last, SentOrder, Settled, reply_to
from pilot.server.report import Report
from pilot.server.roster import Client
from pilot.tensor_file import TensorFile
from pilot.wire.codec import CodecError, decode
from pilot.wire.incoming import sentence
from pilot.wire.messages import MAX_INTEGER, Part, StopReason, TrainReply, plain
from pilot.wire.records import num_bytes

# Orders to one client in one round of which none came to anything, before it has to wait for the next one.
MAX_FRUITLESS_ORDERS = 3


class OpenRound:
    """A round between its opening and its commit. `spool` is an empty directory of its own."""

    def __init__(
        self, number: int, state: RunState, report: Report, *, spool: Path, opened_at_s: float
    ) -> None:
        self.number, self.opened_at_s = number, opened_at_s
        self.clients: dict[str, ClientInRound] = {}  # those that were asked, by name
        self.sent: dict[str, SentOrder] = {}  # all orders, by their messages' ids, oldest first
        self.accepted: list[AcceptedReply] = []
        self.answered = 0  # replies that were not refused, with work or without
        self.rejected = 0  # replies whose content may not be merged
        self._asked: dict[str, Asked] = {}  # client → what it was to score of the validation rows
        self._scores: dict[str, list[Score]] = {}  # client → what it said
        self._state, self._report, self._spool = state, report, spool
        _make_empty(spool)

    # -- orders ----------------------------------------------------------------------------------

    @property
    def pending(self) -> list[SentOrder]:
        """Orders that have no answer yet, in the order in which their clients were first asked."""
        return [client.order for client in self.clients.values() if client.order is not None]

    @property
    def done(self) -> set[str]:
        """Clients that have replied and owe nothing more."""
        done = (Last.REPLIED, Last.USED_UP)
        return {name for name, client in self.clients.items() if client.last in done}

    @property
    def failures(self) -> dict[str, str]:
        """Client → what it answered that cannot be used."""
        return {name: client.failure for name, client in self.clients.items() if client.failure}

    @property
    def lost(self) -> dict[str, str]:
        """Client → why it has not answered."""
        return {name: client.loss for name, client in self.clients.items() if client.loss}

    def asked(self, name: str) -> None:
        """A message to the client was tried, even if it could not be sent."""
        self.clients.setdefault(name, ClientInRound())

    def add(self, order: SentOrder, *, instead_of: SentOrder | None = None) -> None:
        """The order is on its way; `instead_of` itself, as it was sent before."""
        if instead_of is not None:
            del self.sent[instead_of.message_id]  # whose bytes the new one counts
        client = self.clients.setdefault(order.client.name, ClientInRound())
        client.order, client.last = order, Last.PENDING
        self.sent[order.message_id] = order
        client.step_rows = order.step_tokens // self._state.config.sequence_len
        if order.asked.pieces:
            self._asked[order.client.name] = order.asked

    def may_have_order(self, name: str) -> bool:
        """Whether a client of that name could have an order now.

        It had none, or used up its lease, or its last order came to nothing, as when a worker is killed.
        With fixed steps there is no second try: what a round does must not depend on anybody's speed.
        """
        client = self.clients.get(name)
        if client is None:
            return True
        tries_left = client.fruitless < MAX_FRUITLESS_ORDERS
        if client.last is Last.USED_UP:
            return tries_left
        return client.last is Last.FRUITLESS and tries_left and not self._state.config.round_steps

    def used_up_lease(self, name: str) -> bool:
        """Whether the client has done all that it was leased."""
        return name in self.clients and self.clients[name].last is Last.USED_UP

    def supersede(self, newer: Client) -> str | None:
        """A newer node speaks for a client: what the older one owes is lost. Returns that message's id."""
        client = self.clients.get(newer.name)
        order = client.order if client else None
        if order is None or order.client.node_id == newer.node_id:
            return None
        self.lose(order, "a newer node has taken its name")
        return order.message_id

    # -- answers ---------------------------------------------------------------------------------

    def needs_model(self, answer: Answer) -> SentOrder | None:
        """The order that an answer to this round says to be none for its client's mirror; None: another
        answer."""
        order, reply = self._pending(answer), answer.message
        if order is None or not isinstance(reply, TrainReply) or not reply.needs_model:
            return None
        if reply.fence != order.fence or order.order is None or order.order.whole:
            return None
        order.client.mirror = reply.mirror or ""
        self._report.mirror_unfit(self.number, order.client.name)
        return order

    def _pending(self, answer: Answer) -> SentOrder | None:
        order = self.sent.get(answer.message_id)
        return order if order and self.clients[order.client.name].order is order else None

    def handle_answer(self, answer: Answer) -> Settled | None:
        """Accept or refuse an answer if it is to this round; None: it is not."""
        if (order := self._pending(answer)) is None:
            return None
        up = num_bytes(answer.parts)
        if answer.lost:
            self.lose(order, answer.error)
            return Settled(order, None)
        if answer.malformed:
            self._reject(order, None, dict, answer.error)
            return Settled(order, None, up)
        try:
            reply = reply_to(order, answer)
        except ValueError as error:
            self._refuse(order, str(error))
            return Settled(order, None, up)
        if reply.mirror is not None:
            order.client.mirror = reply.mirror
        self._add_scores(order, reply)
        try:
            accepted = self._spill(order, reply, answer.parts)
        except Exception as error:  # whatever a client's numbers and tensors may cause
            if isinstance(error, PilotError) and not isinstance(error, CodecError):
                raise  # it is this machine's, such as its disk
            reason = str(error) if isinstance(error, ValueError) else sentence(error)
            self._reject(order, reply, lambda: self._tensors_if_any(answer.parts), reason)
            return Settled(order, None, up)
        if accepted is not None:
            self._state.admission.accepted(order.client.name)  # for now: see `turn_away`
            self.accepted.append(accepted)
        self.answered += 1
        used_up = reply.stopped_by == StopReason.LEASE_USED_UP
        client = self._settle(order, Last.USED_UP if used_up else Last.REPLIED)
        client.fruitless += accepted is None
        return Settled(order, reply, up)

    def _settle(self, order: SentOrder, last: Last) -> ClientInRound:
        client = self.clients[order.client.name]
        client.order, client.last = None, last
        return client

    def _add_scores(self, order: SentOrder, reply: TrainReply) -> None:
        """Note what the client has scored; a client that tells no pieces has scored its slice as one."""
        scores, (first, end) = list(reply.scores), order.asked.own
        sums = reply.eval_nats is not None and reply.eval_bytes > 0 and reply.eval_rows > 0
        if not scores and sums and reply.eval_rows == end - first:
            scores = [Score(first, end, reply.eval_nats or 0.0, reply.eval_bytes)]
        if scores and order.client.name not in self._scores:
            self._scores[order.client.name] = scores

    def _spill(
        self, order: SentOrder, reply: TrainReply, parts: Sequence[Part]
    ) -> AcceptedReply | None:
        """Write the pseudo-gradient to disk if it may be merged; None if there is none.

        Raises ValueError with the reason if it may not.
        """
        if order.lease is None:
            return None
        lease_id, ledger = order.lease.lease_id, self._state.ledger
        if len(reply.consumed) > len(order.lease.segments):
            raise ValueError(
                f"it consumed {len(reply.consumed)} runs of rows of {len(order.lease.segments)}"
            )
        if reply.tokens == 0 and not reply.consumed:
            # what it learnt of its shards counts: they may have been too small for a single step
            ledger.commit(lease_id, [], reply.row_counts)
            return None
        path = self._spool / f"lease-{lease_id:08d}.safetensors"
        norm = admit(self._state, order.lease, reply, parts, path, step_tokens=order.step_tokens)
        ledger.accept(lease_id, reply.consumed, reply.row_counts)  # the rest is free again
        before = self._state.admission.in_a_row.get(order.client.name, 0)
        return AcceptedReply(order, reply, path, norm, before)

    # -- what comes to nothing -------------------------------------------------------------------

    def turn_away(self, name: str, reason: str) -> None:
        """The others' replies say that those of a client may not be merged: it counts as refused content."""
        turned = [one for one in self.accepted if one.order.client.name == name]
        self.accepted = [one for one in self.accepted if one not in turned]
        for one in turned[:1]:
            self._state.admission.in_a_row[name] = (
                one.refused_before
            )  # accepting them has cleared it
        for one in turned:
            self._reject(one.order, one.reply, functools.partial(TensorFile, one.path), reason)

    def drop(self, reason: str) -> None:
        """Nothing of this round is merged, which is no fault of its clients."""
        accepted, self.accepted = self.accepted, []
        for one in accepted:
            self._state.ledger.give_back(one.reply.fence.lease_id)
            self._report.reply_refused(one.order.client.name, one.order.fence, reason)

    def _tensors_if_any(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """The tensors of a refused reply, if they are any."""
        try:
            return decode(parts, shapes={n: t.shape for n, t in self._state.weights.items()})
        except CodecError:
            return {}

    def _refuse(self, order: SentOrder, reason: str) -> None:
        """The client has answered, and with something that cannot be used."""
        reason = plain(reason)
        self.clients[order.client.name].failure = reason
        self._give_back(order, reason)

    def _reject(
        self,
        order: SentOrder,
        reply: TrainReply | None,
        tensors: Callable[[], Mapping[str, Tensor]],
        reason: str,
    ) -> None:
        """The client has answered in form, and its content may not be merged: that is counted.

        `reply` None: not even a message could be made of it, so there is nothing to keep.
        """
        name, admission = order.client.name, self._state.admission
        self.rejected += 1
        admission.refused(name)
        self.clients[name].fruitless = MAX_FRUITLESS_ORDERS
        if self._state.config.quarantine and reply is not None:
            directory = self._spool.parent / "quarantine"
            keep_refused(directory, reply, name, tensors(), reason)
        self._refuse(order, reason)
        if (refused := admission.in_a_row[name]) >= REFUSALS_IN_A_ROW:
            cooling_s = self._state.config.cooling_time
            self._report.client_cooling(self.number, name, refused=refused, seconds=cooling_s)

    def lose(self, order: SentOrder, reason: str) -> None:
        """The client has not answered, which says nothing of its work."""
        self.clients[order.client.name].loss = reason
        self._give_back(order, reason)

    def _give_back(self, order: SentOrder, reason: str) -> None:
        self._settle(order, Last.FRUITLESS).fruitless += 1
        if order.lease is not None:
            self._state.ledger.give_back(order.lease.lease_id)
        self._report.reply_refused(order.client.name, order.fence, reason)

    def give_up(self, reason: str, reasons: Mapping[str, str] = MappingProxyType({})) -> None:
        """The wait is over: what is still out is refused for `reason`, or its client's; its rows go back."""
        for order in self.pending:
            self.lose(order, reasons.get(order.client.name, reason))

    # -- the close -------------------------------------------------------------------------------

    def leased_tokens(self, order: SentOrder) -> int:
        """The most tokens that an order can have trained on: those of its lease, if their number is known."""
        ledger, segments = self._state.ledger, order.lease.segments if order.lease else ()
        ends = [s.end_row or ledger.row_counts.get(s.shard) for s in segments]
        if not segments or None in ends:
            return MAX_INTEGER
        rows = sum((end or 0) - s.first_row for end, s in zip(ends, segments, strict=True))
        return rows * self._state.config.sequence_len

    @property
    def tokens(self) -> int:
        """Tokens of the replies accepted."""
        return sum(one.reply.tokens for one in self.accepted)

    @property
    def spilled(self) -> list[Spilled]:
        """The replies accepted, as they lie on disk, in lease order."""
        return [one.spilled for one in self.in_lease_order()]

    def merged(self) -> Merged | None:
        """The round's pseudo-gradient, from its replies in lease order; None without replies."""
        if not self.accepted:
            return None
        config = self._state.config
        return Merged(
            self.spilled,
            method=config.aggregation,
            trim_fraction=config.trim_fraction,
            restore_lengths=restores_lengths(config),
        )

    @property
    def outer_path(self) -> Path:
        """Where the outer step may put its state, until a snapshot takes it."""
        return self._spool / "outer.safetensors"

    def in_lease_order(self) -> list[AcceptedReply]:
        return sorted(self.accepted, key=lambda one: one.reply.fence.lease_id)

    @property
    def train_loss(self) -> float | None:
        """Nats per token over all replies accepted that say their loss."""
        losses = [
            (one.reply.loss_nats, one.reply.tokens)
            for one in self.in_lease_order()
            if one.reply.loss_nats is not None
        ]
        tokens = sum(tokens for _, tokens in losses)
        return sum(nats for nats, _ in losses) / tokens if tokens else None

    @property
    def code_lost(self) -> float | None:
        """What the form of `wire-up` could not say of the updates, as a share of their length: the mean by
        tokens of what the replies accepted say of theirs. Of their mean it is no more than about that."""
        shares = [
            (one.reply.code_lost, one.reply.tokens)
            for one in self.accepted
            if one.reply.code_lost is not None
        ]
        tokens = sum(tokens for _, tokens in shares)
        return sum(share * tokens for share, tokens in shares) / tokens if tokens else None

    def figure(self, last_bpb: float | None = None) -> Figure:
        """How good the model is that the clients received, by what they have scored; `last_bpb`: the one
        before."""
        return figure(self._asked, self._scores, last_bpb=last_bpb)

    def unscored(self, name: str) -> Asked:
        """Validation rows that the client `name` may score though another was asked to: that one never will."""
        done = {self._asked[client].own for client in self._scores}
        done |= {order.asked.own for order in self.pending}
        left = [asked for asked in self._asked.values() if asked.own not in done]
        if name in self._asked:
            return self._asked[name] if self._asked[name] in left else NOTHING
        return left[0].without_check if left else NOTHING

    def close(self, *, keep_as: Path | None = None) -> None:
        """The round is committed, or was only an evaluation: its replies are of no more use, or kept
        elsewhere."""
        fault_point("spool.remove")
        if keep_as is not None:
            with contextlib.suppress(OSError):
                self._spool.rename(keep_as)
        shutil.rmtree(self._spool, ignore_errors=True)


def _make_empty(spool: Path) -> None:
    """What a server that died had spilled is of no use: its round is done again."""
    try:
        shutil.rmtree(spool, ignore_errors=True)
        fault_point("spool.removed")
        spool.mkdir(parents=True)
        fault_point("spool.created")
    except OSError as error:
        raise SnapshotError(f"cannot make {spool}: {error}") from error
