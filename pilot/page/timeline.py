"""Who trained when: the events of a run as intervals per client. Pure.

Events tell when an order was sent and when its reply came; what happened in between is the client's word in
the reply, in seconds. They are laid out backwards from the end of training: that is the end of the round for a
client that the round stopped, and otherwise the reply's arrival less what this client's replies usually take to
travel. Before training comes evaluation, before that what it takes to begin. So borders within an order are
estimates, good to about a second; its beginning and its end are the server's own times.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from pilot.rules.rounds import EndReason
from pilot.wire.messages import StopReason

Event = Mapping[str, Any]


class State(StrEnum):
    """What a client does, or what became of what it did; the word that the page shows."""

    STARTING = "starting"  # an order is out, and nobody knows of a step
    EVALUATING = "evaluating"
    TRAINING = "training"
    SENDING = "sending"
    REFUSED = "refused"  # an order of which nothing was merged
    KILLED = "killed"  # a process of it, or its node, died with the order; and until the next one
    SILENT = "silent"
    DRAINED = "drained"  # it said goodbye, and has no order yet
    LEFT_OUT = "left out"  # it is there, and the server gives it no order


_AWAY = (State.SILENT, State.KILLED, State.DRAINED)
# What a refusal's reason says if its client's process or node is gone: of pilot and of Flower (docs/flower.md)
_DEATHS = (
    "killed by signal",
    "node is gone",
    "node unavailable",
    "stopped responding",
    "newer node has taken its name",
    "worker process",
)
_OF_CLIENT = ("client_silent", "client_back", "client_drained", "client_left_out", "client_cooling")
_GOODBYE_EXCEPTIONS = {*StopReason, *EndReason, ""} - {StopReason.LEAVING}


@dataclass(frozen=True)
class Interval:
    """A client in one state from `start_s` to `end_s`, in seconds since the run's first event."""

    client: str
    state: State
    start_s: float
    end_s: float
    round_number: int | None = None
    detail: str = ""

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Refusal:
    """A reply that was not merged, at `at_s`. `client` "": of nobody that the server knows."""

    at_s: float
    client: str
    round_number: int | None
    reason: str


@dataclass(frozen=True)
class Timeline:
    """All that the lanes show; times in seconds since the run's first event at `began`, a Unix time."""

    began: float
    end_s: float
    clients: list[str]  # in the order in which they came
    intervals: list[Interval]
    refusals: list[Refusal]
    outages: list[tuple[float, float]]  # spans without a server
    commits: list[tuple[int, float]]  # (round, when it was on disk)

    def seconds(self, client: str) -> Mapping[State, float]:
        """How long `client` was in each state."""
        return self._seconds.get(client, {})

    def there_s(self, client: str) -> float:
        """From its first interval to the end of the run."""
        came_s = self._came_s.get(client)
        return 0.0 if came_s is None else self.end_s - came_s

    @cached_property
    def _seconds(self) -> dict[str, dict[State, float]]:
        found: dict[str, dict[State, float]] = {}
        for one in self.intervals:
            states = found.setdefault(one.client, {})
            states[one.state] = states.get(one.state, 0.0) + one.length_s
        return found

    @cached_property
    def _came_s(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in self.intervals:
            found[one.client] = min(one.start_s, found.get(one.client, one.start_s))
        return found

    def alive_share(self, client: str) -> float | None:
        """The share of that time in which it was neither silent, killed nor drained. None: it never came."""
        there_s = self.there_s(client)
        if not there_s:
            return None
        seconds = self.seconds(client)
        return max(0.0, 1 - sum(seconds.get(state, 0.0) for state in _AWAY) / there_s)


@dataclass
class _Order:
    sent_s: float
    round_number: int


@dataclass
class _Lane:
    """One client while its events are read."""

    name: str
    orders: list[_Order] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    silences: list[Interval] = field(default_factory=list)
    silent_since: tuple[float, int | None] | None = None
    away: tuple[State, float, str] | None = None  # it is gone since then, and why
    sendings_s: list[float] = field(default_factory=list)  # those that are known

    def heard(self, at_s: float) -> None:
        """It did something, or was given something to do: it is neither silent nor gone."""
        self.back(at_s)
        if self.away is not None:
            state, since_s, why = self.away
            self._add(state, since_s, at_s, None, why)
            self.away = None

    def back(self, at_s: float) -> None:
        if self.silent_since is not None:
            since_s, number = self.silent_since
            self.silences.append(Interval(self.name, State.SILENT, since_s, at_s, number))
            self.silent_since = None

    def take_order(self, number: int | None, at_s: float, fallback_s: float = 0.0) -> _Order:
        """The oldest open order of round `number`; an unknown one was sent `fallback_s` ago."""
        for order in self.orders:
            if order.round_number == number:
                self.orders.remove(order)
                return order
        last_s = max((interval.end_s for interval in self.intervals), default=0.0)
        return _Order(min(at_s, max(last_s, at_s - fallback_s)), number or 0)

    def lose(self, order: _Order, at_s: float, reason: str) -> None:
        state = State.KILLED if is_death(reason) else State.REFUSED
        self._add(state, order.sent_s, at_s, order.round_number, reason)
        if state is State.KILLED:
            self.away = (state, at_s, reason)

    def answer(self, order: _Order, at_s: float, reply: Event, ended_s: float | None) -> None:
        """Lay out one order by what its reply says; `ended_s`: when its round ended, if it has."""
        total_s, train_s = _number(reply, "total_s"), _number(reply, "train_s")
        encode_s = _number(reply, "encode_s")
        stopped_by_round = str(reply.get("stopped_by", "")) in tuple(EndReason)
        if stopped_by_round and ended_s is not None and order.sent_s < ended_s <= at_s:
            trained_s = ended_s
            self.sendings_s.append(at_s - ended_s)
        else:
            usual_s = statistics.median(self.sendings_s) if self.sendings_s else 0.0
            room_s = max(0.0, at_s - order.sent_s - total_s)
            trained_s = at_s - encode_s - min(usual_s, room_s)
        eval_s = 0.0
        if reply.get("eval_rows"):
            known = "eval_s" in reply
            eval_s = _number(reply, "eval_s") if known else max(0.0, total_s - train_s - encode_s)
        marks = [order.sent_s, trained_s - train_s - eval_s, trained_s - train_s, trained_s, at_s]
        for i in range(1, len(marks)):  # within the order, in this order
            marks[i] = min(max(marks[i], marks[i - 1]), at_s)
        states = (State.STARTING, State.EVALUATING, State.TRAINING, State.SENDING)
        details = ("", "", _trained(reply), "")
        for state, start_s, end_s, detail in zip(states, marks, marks[1:], details, strict=False):
            self._add(state, start_s, end_s, order.round_number, detail)
        goodbye = str(reply.get("stopped_by", ""))
        if goodbye not in _GOODBYE_EXCEPTIONS:
            self.away = (State.DRAINED, at_s, goodbye)

    def until(self, end_s: float) -> tuple[list[Interval], list[Interval]]:
        """Its intervals and its silences, those that last until `end_s` among them."""
        lane = replace(self, intervals=list(self.intervals), silences=list(self.silences))
        for order in self.orders:  # a run that is not over, or was stopped
            lane._add(State.STARTING, order.sent_s, end_s, order.round_number)
        lane.heard(end_s)
        return lane.intervals, lane.silences

    def _add(
        self, state: State, start_s: float, end_s: float, number: int | None, detail: str = ""
    ) -> None:
        if end_s > start_s:
            self.intervals.append(Interval(self.name, state, start_s, end_s, number, detail))


class TimelineReader:
    """Follows the events of a run, oldest first; `timeline` may be asked for at any time."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.lanes: dict[str, _Lane] = {}
        self.ended: dict[int, float] = {}
        self.refusals: list[Refusal] = []
        self.outages: list[tuple[float, float]] = []
        self.commits: list[tuple[int, float]] = []
        self.last_s = 0.0

    def read(self, event: Event) -> None:
        if self.began is None:
            self.began = float(event["time"])
        at_s = max(self.last_s, float(event["time"]) - self.began)  # clocks may be set back
        number = event.get("round")
        number = number if isinstance(number, int) else None
        kind = event.get("event")
        if kind == "run_started":
            self._server_began(self.last_s)
        elif kind == "idle" and event.get("cause") == "server-away":
            self.outages.append((max(0.0, at_s - _number(event, "seconds")), at_s))
        elif kind == "round_opened":
            for name in event.get("clients", []):
                self._order(str(name), number, at_s)
        elif kind == "client_joined":
            self._order(str(event.get("client")), number, at_s)
        elif kind == "round_ended" and number is not None:
            self.ended[number] = at_s
        elif kind == "round_committed":
            self.commits.append((int(_number(event, "round_number")), at_s))
        elif kind in ("reply", "reply_refused"):
            self._reply(event, number, at_s)
        elif kind in _OF_CLIENT and event.get("client"):
            self._of_client(str(kind), self._lane(str(event["client"])), number, at_s, event)
        self.last_s = at_s

    def _lane(self, name: str) -> _Lane:
        return self.lanes.setdefault(name, _Lane(name))

    def _order(self, name: str, number: int | None, at_s: float) -> None:
        lane = self._lane(name)
        lane.heard(at_s)
        lane.orders.append(_Order(at_s, number or 0))

    def _reply(self, event: Event, number: int | None, at_s: float) -> None:
        name = str(event.get("client") or "")
        if event["event"] == "reply":
            lane = self._lane(name)
            lane.heard(at_s)
            order = lane.take_order(number, at_s, _number(event, "total_s"))
            lane.answer(order, at_s, event, self.ended.get(number) if number else None)
            return
        reason = str(event.get("reason", ""))
        self.refusals.append(Refusal(at_s, name, _round_of(event), reason))
        lane = self.lanes.get(name, _Lane(name))
        if any(order.round_number == number for order in lane.orders):
            lane.lose(lane.take_order(number, at_s), at_s, reason)

    def _of_client(
        self, kind: str, lane: _Lane, number: int | None, at_s: float, event: Event
    ) -> None:
        if kind == "client_silent" and lane.silent_since is None:
            lane.silent_since = (at_s, number)
        elif kind == "client_back":
            lane.back(at_s)
        elif kind == "client_drained" and lane.away is None and not lane.orders:
            lane.away = (State.DRAINED, at_s, str(event.get("reason", "")))
        elif kind in ("client_left_out", "client_cooling") and lane.away is None:
            lane.away = (State.LEFT_OUT, at_s, str(event.get("reason") or event.get("message", "")))

    def _server_began(self, gone_s: float) -> None:
        """What was open when the last server said its last word is lost with it."""
        for lane in self.lanes.values():
            lane.heard(gone_s)
            while lane.orders:
                lane.lose(lane.orders.pop(0), gone_s, "the server ended before the reply came")
        self.ended.clear()

    def timeline(self) -> Timeline:
        """The run so far. Raises ValueError before the first event."""
        if self.began is None:
            raise ValueError("there are no events")
        intervals = []
        for lane in self.lanes.values():
            intervals += _with_silences(*lane.until(self.last_s))
        return Timeline(
            self.began,
            self.last_s,
            list(self.lanes),
            intervals,
            list(self.refusals),
            list(self.outages),
            list(self.commits),
        )


def timeline(events: Iterable[Event]) -> Timeline:
    """The run as intervals. `events` oldest first, each with its `time`; raises ValueError without any."""
    reader = TimelineReader()
    for event in events:
        reader.read(event)
    return reader.timeline()


def is_death(reason: str) -> bool:
    """Whether the reason of a refusal says that a process of its client, or its node, is gone."""
    return any(words in reason.lower() for words in _DEATHS)


def coarse(intervals: Sequence[Interval], width_s: float) -> list[Interval]:
    """As few intervals as fit pieces of `width_s` seconds, each in the state that fills most of the piece.

    For runs with more intervals than a picture has pixels.
    """
    pieces: dict[tuple[str, int], dict[State, float]] = {}
    for one in intervals:
        for piece in range(int(one.start_s // width_s), int(one.end_s // width_s) + 1):
            start_s, end_s = piece * width_s, (piece + 1) * width_s
            share_s = min(end_s, one.end_s) - max(start_s, one.start_s)
            if share_s > 0:
                states = pieces.setdefault((one.client, piece), {})
                states[one.state] = states.get(one.state, 0.0) + share_s
    merged: list[Interval] = []
    for (client, piece), states in sorted(pieces.items()):
        state = max(states, key=lambda s: (states[s], s))
        start_s, end_s = piece * width_s, (piece + 1) * width_s
        last = merged[-1] if merged else None
        if last and (last.client, last.state) == (client, state) and last.end_s == start_s:
            merged[-1] = replace(last, end_s=end_s)
        else:
            merged.append(Interval(client, state, start_s, end_s))
    return merged


def _with_silences(intervals: list[Interval], silences: list[Interval]) -> list[Interval]:
    """`intervals` with the `silences` cut out of them and put in their place, in order of time."""
    silences = [one for one in silences if one.length_s > 0]  # one after the other
    kept, first = list(silences), 0
    for one in sorted(intervals, key=lambda one: one.start_s):
        while first < len(silences) and silences[first].end_s <= one.start_s:
            first += 1
        start_s = one.start_s
        for i in range(first, len(silences)):
            silence = silences[i]
            if silence.start_s >= one.end_s:
                break
            if silence.start_s > start_s:
                kept.append(replace(one, start_s=start_s, end_s=silence.start_s))
            start_s = silence.end_s
        if start_s < one.end_s:
            kept.append(one if start_s == one.start_s else replace(one, start_s=start_s))
    return sorted(kept, key=lambda one: one.start_s)


def _trained(reply: Event) -> str:
    return f"{int(_number(reply, 'tokens')):,} tokens"


def _round_of(event: Event) -> int | None:
    number = event.get("round")
    fence = event.get("fence")
    if number is None and isinstance(fence, Mapping):
        number = fence.get("round_number")
    return number if isinstance(number, int) else None


def _number(event: Event, name: str) -> float:
    value = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
