"""What the server knows of an open round at a moment: who works, who has fallen silent, how far they are.

Heartbeats tell it within seconds; Flower needs about a minute to miss a node. To be silent is no
verdict: the round is planned without such a client, but its reply is taken if it comes in time.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pilot.rules.rounds import RoundView, silence_s
from pilot.server.open_round import OpenRound, Work
from pilot.server.telemetry import Telemetry
from pilot.wire.messages import TrainReply

Beats = Mapping[str, "Beat"]

# A client that was sent work and has given no sign of life for so long, and so many times as long as
# it took before, is not coming.
_START_MIN_S = 45.0
_START_FACTOR = 4.0
# At the end of a round, a client that fell silent is waited for as long as all together need to train what
# it has trained, and at most so long since: one that was only frozen or cut off for a moment has a whole reply
# to give, but the others stand still meanwhile.
_REPRIEVE_S = 10.0

log = logging.getLogger("pilot")


@dataclass(frozen=True)
class Beat:
    """A client's last sign of life: how far it is, `age_s` seconds ago. Of no shard: -1."""

    state: str = ""
    step: int = 0
    tokens: int = 0
    loss: float = 0.0  # nats a token
    tokens_per_s: float = 0.0
    shard: int = -1
    shard_row: int = 0
    shard_rows: int = 0  # 0: not known yet
    age_s: float = 0.0

    @staticmethod
    def of(values: Mapping[str, str]) -> "Beat":
        """What Redis holds, which may be anything: what is no finite number counts as not said."""
        known: dict[str, Any] = {}
        for declared in fields(Beat):
            text = values.get("age" if declared.name == "age_s" else declared.name)
            try:
                value = None if text is None else declared.type(text)  # type: ignore[operator]
            except ValueError:
                continue
            if value is not None and (isinstance(value, str) or math.isfinite(value)):
                known[declared.name] = value
        return Beat(**known)


@dataclass
class RoundMonitor:
    """Follows one round; `heartbeat_s` is how often its clients beat."""

    open_round: OpenRound
    telemetry: Telemetry
    heartbeat_s: float
    ended_at_s: float | None = None
    silent: set[str] = field(default_factory=set)  # clients that owe a reply and are not heard
    beats: Beats = field(default_factory=dict)
    _heard_s: dict[str, float] = field(default_factory=dict)  # when a client was last heard
    _blind_s: float = -math.inf  # when Redis last failed: nobody can be heard then
    _silent_since_s: dict[str, float] = field(default_factory=dict)
    _looked_at_s: float = 0.0

    def look(
        self, heartbeats: Mapping[str, Mapping[str, str]], now_s: float, *, blind: bool = False
    ) -> None:
        """Take in the last signs of life of those that owe a reply; changes are told once.

        `blind`: Redis fails. Nobody becomes silent then, and afterwards all have time to be heard again.
        """
        self._looked_at_s = now_s
        self.beats = beats = self._of_their_orders(heartbeats, now_s)
        if blind:
            self._blind_s = now_s
            return
        silent = set()
        for work in self.open_round.pending.values():
            name = work.site.name
            if name in beats:
                if self._heard_s.get(name, -math.inf) < work.sent_at_s:
                    work.site.start_s = now_s - work.sent_at_s
                self._heard_s[name] = now_s - beats[name].age_s
            if self._is_silent(work, beats.get(name), now_s):
                silent.add(name)
        owing = {work.site.name for work in self.open_round.pending.values()}
        for name in sorted(silent - self.silent):
            self._tell("client_silent", name, "is silent: the round goes on without it")
        for name in sorted((self.silent - silent) & owing):
            self._tell("client_back", name, "is heard again")
        self.silent = silent
        self._silent_since_s = {n: self._silent_since_s.get(n, now_s) for n in silent}

    def _of_their_orders(
        self, heartbeats: Mapping[str, Mapping[str, str]], now_s: float
    ) -> dict[str, Beat]:
        """Without those that came before the order: they are of another one of this round."""
        sent_s = {w.site.name: w.sent_at_s for w in self.open_round.pending.values()}
        beats = {name: Beat.of(values) for name, values in heartbeats.items()}
        return {n: b for n, b in beats.items() if now_s - b.age_s >= sent_s.get(n, -math.inf)}

    def _is_silent(self, work: Work, beat: Beat | None, now_s: float) -> bool:
        if beat is None:
            starts = [w.site.start_s or 0.0 for w in (work, *self.open_round.pending.values())]
            longest_s = starts[0] or max(starts)  # its own, else what others needed
            # 0: its first round and everybody's, or it can't reach Redis: nothing follows from silence
            if not longest_s or work.site.hello.warning:
                return False
            since_s = max(work.sent_at_s, self._blind_s, self._heard_s.get(work.site.name, 0.0))
            return now_s - since_s > max(_START_MIN_S, _START_FACTOR * longest_s)
        if beat.state == "sending":  # the worker is done: Flower carries its reply
            return False
        return beat.age_s > silence_s(self.heartbeat_s)

    def _tell(self, kind: str, name: str, what: str) -> None:
        number = self.open_round.number
        self.telemetry.event(kind, f"Node {name} {what}", round=number, client=name)

    def view(self, now_s: float, *, waiting: int, rows_left: bool) -> RoundView:
        """The round as the rules see it; `waiting` clients could take work, `rows_left` to lease."""
        working = {name: b for name, b in self.beats.items() if name not in self.silent}
        training = {name: beat for name, beat in working.items() if beat.step > 0}
        trained = {taken.work.site.name for taken in self.open_round.taken}
        tokens = sum(beat.tokens for beat in self.beats.values())
        return RoundView(
            elapsed_s=now_s - self.open_round.opened_at_s,
            tokens=self.open_round.tokens + tokens,
            training=len(training.keys() | trained),
            pending=len(self.open_round.pending),
            replied=self.open_round.answered,
            silent=len(self.silent),
            waiting=waiting,
            tokens_per_s=sum(beat.tokens_per_s for beat in training.values()),
            rows_left=rows_left,
        )

    @property
    def awaited(self) -> list[Work]:
        """Whose reply is worth waiting for: who is heard, or was so until a moment ago; once the round has
        ended, not who had not begun by then."""
        unbegun = self.unbegun
        return [
            work
            for work in self.open_round.pending.values()
            if work.site.name not in unbegun
            and self._looked_at_s - self._silent_since_s.get(work.site.name, math.inf)
            < self._reprieve_s(work.site.name)
        ]

    @property
    def unbegun(self) -> set[str]:
        """Clients of a round that has ended that have not begun, as far as heartbeats tell."""
        if self.ended_at_s is None or not self._heard_s:
            return set()
        unheard = [
            work.site
            for work in self.open_round.pending.values()
            if self._heard_s.get(work.site.name, -math.inf) < work.sent_at_s
            and self._blind_s < work.sent_at_s  # else it may have begun
        ]
        return {site.name for site in unheard if not site.hello.warning}

    def _reprieve_s(self, name: str) -> float:
        sites = [work.site for work in self.open_round.pending.values()]
        sites += [taken.work.site for taken in self.open_round.taken]
        rates = {site.name: site.tokens_per_s or 0.0 for site in sites}
        beat, rate = self.beats.get(name), sum(rates.values())
        return min(_REPRIEVE_S, beat.tokens / rate) if beat and rate else _REPRIEVE_S

    def measure(self, work: Work, reply: TrainReply, now_s: float) -> None:
        """Learn from a reply what this site's rounds cost besides training."""
        site = work.site
        if reply.tokens > 0 and reply.train_s > 0:  # who had no time to train is not slow
            site.tokens_per_s = reply.tokens / reply.train_s
            site.fixed_cost_s = max(0.0, now_s - work.sent_at_s - reply.train_s)
        if self.ended_at_s is not None:
            site.upload_s = now_s - self.ended_at_s


def uploads_s(works: Collection[Work]) -> list[float]:
    """What the sites of `works` needed for their last reply; empty if one's is not known yet."""
    known = [work.site.upload_s for work in works]
    return [s for s in known if s is not None] if None not in known else []
