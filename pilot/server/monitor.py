"""What the server knows of an open round at a moment: which clients work, which are silent, how far they are.

Heartbeats show it within seconds; Flower needs about a minute to miss a node. Silence is no verdict: the
round is planned without a silent client, but its reply is accepted if it comes in time.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pilot.coordination.heartbeats import Heard
from pilot.rules.rounds import (
    MAX_LATE_ROUNDS,
    EndReason,
    RoundView,
    begin_patience_s,
    silence_s,
    waits_for_beginning,
)
from pilot.server.idle import Cause
from pilot.server.open_round import OpenRound
from pilot.server.orders import SentOrder
from pilot.server.report import Report
from pilot.wire.messages import StopReason, TrainReply

# A client that was sent work and has sent no heartbeat for this long, and for this many times as long as
# it took before, is not coming.
_START_MIN_S = 45.0
_START_FACTOR = 4.0
# At the end of a round, the others stand still while a silent client is waited for, which may only have been
# frozen or cut off for a moment and has a whole reply to give. So the wait is as long as all together need to
# train what it has trained, but no longer than this after it fell silent.
_REPRIEVE_S = 10.0
# A client that cannot hear the end of a round is waited for if it ends by itself within this share of its
# length.
_UNAWARE_SHARE = 0.25
# No client trains this many times faster than its orders and replies show (seconds of overhead, of training).
_FASTEST_FACTOR = 100.0
_SHORTEST_ROUND_S = 1e-3
# No client has trained this many times more in a round than its rate lets expect by then
_AHEAD_FACTOR = 4.0
# What a client says it was stopped by, if the round was over before its first step
_OVER = {*EndReason, StopReason.LATER_ROUND, StopReason.DEADLINE}
# States of heartbeats in which a client does not train yet
_IDLE_STATES = {"evaluating": Cause.EVALUATION, "packing": Cause.PACKING}


@dataclass
class RoundMonitor:
    """Follows one round; `heartbeat_s` is how often its clients send heartbeats."""

    open_round: OpenRound
    report: Report
    heartbeat_s: float
    ended_at_s: float | None = None
    silent: set[str] = field(default_factory=set)  # clients that owe a reply and are not heard
    heard: Mapping[str, Heard] = field(default_factory=dict)  # client → its last heartbeat
    started_s: dict[str, float] = field(default_factory=dict)  # order → seconds to first heartbeat
    _heard_at_s: dict[str, float] = field(default_factory=dict)  # when a client was last heard
    _blind_at_s: float = -math.inf  # when Redis last failed: no client can be heard then
    _silent_since_s: dict[str, float] = field(default_factory=dict)
    _updated_at_s: float = 0.0
    _begun: set[str] = field(default_factory=set)  # orders, by message id, with a step done
    _late: set[str] = field(default_factory=set)  # clients for whom the round was over too soon

    def update(self, heard: Mapping[str, Heard], now_s: float, *, blind: bool = False) -> None:
        """Take in the last heartbeats of the clients that owe a reply; changes are reported once.

        `blind`: Redis fails. No client becomes silent then, and afterwards all have time to be heard again.
        """
        self._updated_at_s = now_s
        self.heard = heard = self._of_their_orders(heard, now_s)
        if blind:
            self._blind_at_s = now_s
            return
        silent = set()
        pending = self.open_round.pending
        slowest_s = max((order.client.start_s or 0.0 for order in pending), default=0.0)
        for order in pending:
            name = order.client.name
            if name in heard:
                if self._heard_at_s.get(name, -math.inf) < order.sent_at_s:
                    order.client.start_s = now_s - order.sent_at_s
                    self.started_s[order.message_id] = order.client.start_s
                self._heard_at_s[name] = now_s - heard[name].age_s
                if heard[name].heartbeat.step > 0 and order.message_id not in self._begun:
                    self._begin(order, now_s)
            if self._is_silent(order, now_s, slowest_s):
                silent.add(name)
        owing = {order.client.name for order in pending}
        for name in sorted(silent - self.silent):
            self.report.client_silent(self.open_round.number, name)
        for name in sorted((self.silent - silent) & owing):
            self.report.client_back(self.open_round.number, name)
        self.silent = silent
        self._silent_since_s = {n: self._silent_since_s.get(n, now_s) for n in silent}

    def _of_their_orders(self, heard: Mapping[str, Heard], now_s: float) -> dict[str, Heard]:
        """Without those that came before the order: they are of another one of this round."""
        sent_s = {order.client.name: order.sent_at_s for order in self.open_round.pending}
        return {
            name: last
            for name, last in heard.items()
            if now_s - last.age_s >= sent_s.get(name, -math.inf)
        }

    def _is_silent(self, order: SentOrder, now_s: float, slowest_s: float) -> bool:
        """`slowest_s`: the longest that one of those that owe a reply has ever needed for a heartbeat."""
        client = order.client
        if (last := self.heard.get(client.name)) is not None:
            if last.heartbeat.state == "sending":  # the worker is done: Flower carries its reply
                return False
            return last.age_s > silence_s(self.heartbeat_s)
        longest_s = client.start_s or slowest_s  # its own, else what others needed
        # 0: its first round and everybody's, or it can't reach Redis: nothing follows from silence
        if not longest_s or client.blind:
            return False
        since_s = max(order.sent_at_s, self._blind_at_s, self._heard_at_s.get(client.name, 0.0))
        return now_s - since_s > max(_START_MIN_S, _START_FACTOR * longest_s)

    def view(self, now_s: float, *, waiting: int = 0, rows_left: bool = True) -> RoundView:
        """The round as the rules see it; `waiting` clients could take work, `rows_left` to lease."""
        beats = {name: last.heartbeat for name, last in self.heard.items()}
        training = {n: b for n, b in beats.items() if n not in self.silent and b.step > 0}
        trained = {one.order.client.name for one in self.open_round.accepted}
        begin_left_s = self._begin_left_s(now_s, trained)
        return RoundView(
            elapsed_s=now_s - self.open_round.opened_at_s,
            tokens=self.open_round.tokens + sum(self._trained(now_s).values()),
            training=len(training.keys() | trained),
            pending=len(self.open_round.pending),
            replied=self.open_round.answered,
            silent=len(self.silent),
            waiting=waiting,
            tokens_per_s=sum(beat.tokens_per_s for beat in training.values()),
            rows_left=rows_left,
            starting=len(begin_left_s),
            begin_left_s=max(begin_left_s.values(), default=0.0),
        )

    def _begin(self, order: SentOrder, now_s: float) -> None:
        self._begun.add(order.message_id)
        order.client.begin_s = now_s - order.sent_at_s

    def _begin_left_s(self, now_s: float, trained: Collection[str]) -> dict[str, float]:
        """Client → seconds in which it may still take its first step of this round; all that are waited for.

        Each has this once a round: not with another lease, nor after its order came to nothing. While Redis
        fails for this server it cannot see who has begun, and nobody is waited for.
        """
        if self._blind_at_s == self._updated_at_s:
            return {}
        # the slowest counts for those that have never begun, and so is never one of them
        known = [order.client.begin_s for order in self.open_round.pending if order.client.begin_s]
        slowest = [max(known)] if known else []
        left = {}
        for order in self.open_round.pending:
            client, name = order.client, order.client.name
            if order.lease is None or client.blind or name in self.silent:
                continue
            if name in trained or self.open_round.clients[name].fruitless:
                continue
            if order.message_id in self._begun or not waits_for_beginning(client.late_rounds):
                continue
            due_s = order.sent_at_s + begin_patience_s(client.begin_s, slowest)
            if now_s < due_s:
                left[name] = due_s - now_s
        return left

    def _trained(self, now_s: float) -> dict[str, int]:
        """Tokens of the open orders so far, by client: what heartbeats say, as far as it can be true.

        Nobody has trained on more rows than it was leased, nor much faster than ever before: otherwise one
        client that says so would end every round before the others have begun.
        """
        trained = {}
        for order in self.open_round.pending:
            name, rate = order.client.name, order.client.tokens_per_s
            if (last := self.heard.get(name)) is None:
                continue
            most = self.open_round.leased_tokens(order)
            if rate:
                most = min(most, int(_AHEAD_FACTOR * rate * (now_s - order.sent_at_s)) + 1)
            trained[name] = min(last.heartbeat.tokens, most)
        return trained

    @property
    def idle_cause(self) -> Cause | None:
        """Why no client of the round trains now, as far as heartbeats tell; None: one does, or may."""
        if self.ended_at_s is not None or not self.open_round.pending:
            return Cause.REPLIES
        if self._blind_at_s == self._updated_at_s:
            return None
        owing = [order.client for order in self.open_round.pending]
        left = [client.name for client in owing if client.name not in self.silent]
        if not left:
            return Cause.SILENCE
        states = {self.heard[name].heartbeat.state for name in left if name in self.heard}
        if "training" in states or any(client.blind for client in owing):
            return None
        for state, cause in _IDLE_STATES.items():
            if state in states:
                return cause
        return Cause.REPLIES if states == {"sending"} else Cause.START

    @property
    def awaited(self) -> list[SentOrder]:
        """Orders whose reply is worth waiting for.

        Left out are clients that have been silent for longer than their reprieve and, once the round has
        ended, those that had not begun by then, or do not know it and train on.
        """
        left_out = self.unbegun | self.unaware
        rate = self._tokens_per_s if self._silent_since_s else 0.0
        return [
            order
            for order in self.open_round.pending
            if order.client.name not in left_out
            and self._updated_at_s - self._silent_since_s.get(order.client.name, math.inf)
            < self._reprieve_s(order.client.name, rate)
        ]

    @property
    def worth_waiting_s(self) -> float:
        """Seconds that the clients which have replied may stand still for those that are awaited: as long as
        these have trained, all together."""
        waiting = len(self.open_round.done)
        if self.ended_at_s is None or not waiting:
            return math.inf
        return (self.ended_at_s - self.open_round.opened_at_s) * len(self.awaited) / waiting

    @property
    def unbegun(self) -> set[str]:
        """Clients of a round that has ended that have not begun, as far as heartbeats show."""
        if self.ended_at_s is None or not self._heard_at_s:
            return set()
        unheard = [
            order.client
            for order in self.open_round.pending
            if self._heard_at_s.get(order.client.name, -math.inf) < order.sent_at_s
            and self._blind_at_s < order.sent_at_s  # else it may have begun
        ]
        return {client.name for client in unheard if not client.blind}

    @property
    def unaware(self) -> set[str]:
        """Clients without Redis that train on after the end of the round, by the seconds of their order."""
        if self.ended_at_s is None:
            return set()
        length_s = self.ended_at_s - self.open_round.opened_at_s
        until_s = self.ended_at_s + min(_REPRIEVE_S, _UNAWARE_SHARE * length_s)
        pending = self.open_round.pending
        return {one.client.name for one in pending if one.client.blind and one.due_s > until_s}

    @property
    def why_not_awaited(self) -> dict[str, str]:
        """Client → why its reply is not waited for any more, in words for people."""
        why = dict.fromkeys(self.unbegun, "its client had not begun when the round ended")
        why |= dict.fromkeys(self.silent, "its client is silent")
        without = "its client cannot use Redis and did not hear that the round was over"
        return why | dict.fromkeys(self.unaware, without)

    @property
    def _tokens_per_s(self) -> float:
        """Of all clients of the round, as they trained before."""
        clients = [order.client for order in self.open_round.pending]
        clients += [one.order.client for one in self.open_round.accepted]
        return sum({client.name: client.tokens_per_s or 0.0 for client in clients}.values())

    def _reprieve_s(self, name: str, rate: float) -> float:
        """`rate`: what all clients together train in a second."""
        last = self.heard.get(name)
        return min(_REPRIEVE_S, last.heartbeat.tokens / rate) if last and rate else _REPRIEVE_S

    def measure(self, order: SentOrder, reply: TrainReply, now_s: float) -> None:
        """Learn from a reply what this client's rounds cost besides training."""
        client, away_s = order.client, now_s - order.sent_at_s
        if reply.tokens > 0 and reply.train_s > 0:  # a client without time to train is not slow
            # what it says of its time decides on shares and leases: it is believed as far as it can be true
            train_s = min(
                max(reply.train_s, away_s / _FASTEST_FACTOR), max(away_s, _SHORTEST_ROUND_S)
            )
            client.tokens_per_s = reply.tokens / train_s
            client.fixed_cost_s = max(0.0, away_s - train_s)
        if reply.tokens > 0:
            client.late_rounds = 0
            if order.message_id not in self._begun:  # between two heartbeats: it took no longer
                self._begin(order, now_s)
        elif order.lease is not None and self.ended_at_s and reply.stopped_by in _OVER:
            self._note_late(order)
        if self.ended_at_s is not None:
            client.sent_within(now_s - self.ended_at_s)

    def note_late_beginners(self) -> None:
        """At the close: clients that have not begun take longer to than was known; the next round knows it."""
        unbegun = self.unbegun
        for order in self.open_round.pending:
            if order.client.name in unbegun and order.lease is not None:
                self._note_late(order)

    def _note_late(self, order: SentOrder) -> None:
        client, ended_at_s = order.client, self.ended_at_s
        if ended_at_s is None or client.name in self._late | self.silent:
            return
        if client.name in {one.order.client.name for one in self.open_round.accepted}:
            return  # it has given work, and came too late with another lease only
        self._late.add(client.name)
        client.late_rounds += 1
        client.begin_s = max(client.begin_s or 0.0, ended_at_s - order.sent_at_s)
        if client.late_rounds == MAX_LATE_ROUNDS:
            self.report.client_too_late(
                self.open_round.number,
                client.name,
                rounds=client.late_rounds,
                begin_s=client.begin_s,
                round_s=ended_at_s - self.open_round.opened_at_s,
            )

    def note_slow_uploads(self, waited_s: float) -> None:
        """Clients still awaited after `waited_s` take longer than they did: next time the wait is longer."""
        for order in self.awaited:
            order.client.sends_no_faster_than(waited_s)


def uploads_s(orders: Collection[SentOrder]) -> list[float]:
    """What the clients of `orders` needed for their last reply; empty if one's is not known yet."""
    known = [order.client.upload_s for order in orders]
    return [s for s in known if s is not None] if None not in known else []
