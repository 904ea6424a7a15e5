"""A run in numbers, from its events: what the curves, bars and tables of the page show. Pure.

Events are read one by one and not kept, so that a page can follow a long run.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pilot.page.timeline import Event, State, Timeline
from pilot.rules.accounts import ClientAccount, RunAccounting

TRAINING = "training"


@dataclass(frozen=True)
class Point:
    """The model after a round: `train_loss` in nats per token, `bpb` in bits per byte, None where unknown."""

    round_number: int
    tokens: int  # committed so far
    at_s: float
    train_loss: float | None
    bpb: float | None
    whole: bool = True  # the bpb is of all validation rows


@dataclass(frozen=True)
class Pace:
    """How a client trained in a round: nats per token, tokens per second; `mfu` a share, None if unknown."""

    client: str
    round_number: int
    at_s: float
    tokens: int
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None


@dataclass(frozen=True)
class Presence:
    """One round: clients with an order, and those whose work was merged."""

    round_number: int
    asked: list[str]
    merged: list[str]


@dataclass(frozen=True)
class Traffic:
    """Bytes of tensors of one round, from the server to clients and back."""

    round_number: int
    down: int
    up: int


@dataclass(frozen=True)
class Energy:
    """What a client's training took; None where nothing says. `money` in the unit of the run's prices."""

    kwh: float | None = None
    grams: float | None = None  # of CO2
    money: float | None = None

    def __add__(self, other: "Energy") -> "Energy":
        return Energy(
            _either(self.kwh, other.kwh),
            _either(self.grams, other.grams),
            _either(self.money, other.money),
        )


def _either(one: float | None, other: float | None) -> float | None:
    return (one or 0.0) + (other or 0.0) if one is not None or other is not None else None


@dataclass(frozen=True)
class ClientSummary:
    """One line of the table of clients; shares of 1, None where nothing says."""

    client: str
    asked: int
    merged: int
    tokens: int
    tokens_per_s: float | None
    mfu: float | None
    training_share: float | None  # of the time since it came
    alive_share: float | None
    refused: int
    goodput: float | None
    bytes_down: int | None
    bytes_up: int | None


@dataclass
class Measures:
    """Everything that the figures of one run need, besides its timeline."""

    points: list[Point] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)
    presences: list[Presence] = field(default_factory=list)
    shards: dict[tuple[int, int], int] = field(default_factory=dict)  # (epoch, shard) → rows merged
    shard_rows: dict[int, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)  # seconds by what the federation did
    goodput: float | None = None
    traffic: list[Traffic] = field(default_factory=list)
    energy: dict[str, Energy] = field(default_factory=dict)  # by client; empty where nothing says
    clients: list[ClientSummary] = field(default_factory=list)
    finished: bool = False
    events: int = 0
    replies: int = 0  # accepted

    @property
    def whole_s(self) -> float:
        return sum(self.spent.values())

    @property
    def training_share(self) -> float | None:
        return self.spent.get(TRAINING, 0.0) / self.whole_s if self.whole_s else None


@dataclass
class _Work:
    """What a client did in a round, of all its replies."""

    at_s: float
    tokens: int = 0
    train_s: float = 0.0
    nats: float | None = 0.0
    used_s: float | None = 0.0  # seconds times MFU

    def add(self, at_s: float, reply: Event) -> None:
        seconds = reply.get("train_s") or 0.0
        nats, mfu = reply.get("loss_nats"), reply.get("mfu")
        self.at_s = at_s
        self.tokens += reply["tokens"]
        self.train_s += seconds
        self.nats = None if nats is None or self.nats is None else self.nats + nats
        self.used_s = None if mfu is None or self.used_s is None else self.used_s + mfu * seconds


class Measuring:
    """Follows the events of a run, oldest first; `measures` may be asked for at any time."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._events = self._replies = 0
        self._finished = False
        self._scores: dict[int, tuple[float, bool]] = {}
        self._opened_s: float | None = None
        self._commits: list[tuple[int, float, int, float | None]] = []
        self._work: dict[tuple[int, str], _Work] = {}
        self._asked: dict[int, list[str]] = {}
        self._presences: list[Presence] = []
        self._rows: dict[tuple[int, int], int] = {}
        self._rows_of: dict[int, list[tuple[tuple[int, int], int]]] = {}  # by round
        self._shard_rows: dict[int, int] = {}
        self._accounting = RunAccounting()
        self._idle: list[tuple[str, float]] = []  # since the last commit
        self._idle_s: dict[str, float] = {}
        self._traffic: list[Traffic] = []
        self._energy: dict[str, Energy] = {}

    def read(self, event: Event) -> None:
        """Raises KeyError, TypeError, ValueError or AttributeError for one that no version of pilot writes."""
        if self._began is None:
            self._began = event["time"]
        self._events += 1
        at_s = event["time"] - self._began
        kind, number = event["event"], event.get("round")
        if kind == "reply":
            self._reply(event, at_s)
        elif kind == "validation" and event.get("val_bpb") is not None:
            self._scores[event["round"]] = (event["val_bpb"], bool(event.get("complete", True)))
        elif kind == "round_opened" and isinstance(number, int):
            if self._opened_s is None:
                self._opened_s = at_s
            # a round that is opened again begins again
            self._asked[number] = list(event.get("clients", []))
        elif kind == "client_joined" and isinstance(number, int):
            names = self._asked.setdefault(number, [])
            if event["client"] not in names:
                names.append(event["client"])
        elif kind == "round_committed":
            self._committed(event, at_s)
        elif kind == "merge_taken_back":
            first, last = event["taken_back"]
            for undone in range(first, last + 1):
                for where, rows in self._rows_of.pop(undone, []):
                    self._rows[where] -= rows
        elif kind == "round_time":
            self._accounting.read(event)
            if event.get("bytes_down") or event.get("bytes_up"):
                self._traffic.append(
                    Traffic(event["round"], event["bytes_down"], event["bytes_up"])
                )
        elif kind == "idle" and self._opened_s is not None and at_s > self._opened_s:
            self._idle.append((event["cause"], min(event["seconds"], at_s - self._opened_s)))
        elif kind == "energy":
            used = Energy(*(event.get(name) for name in ("kwh", "grams", "money")))
            client = str(event.get("client") or "")
            self._energy[client] = self._energy.get(client, Energy()) + used
        elif kind == "run_finished":
            self._finished = True

    def _reply(self, event: Event, at_s: float) -> None:
        self._replies += 1
        if event.get("tokens") and event.get("client"):
            where = (event["round"], event["client"])
            self._work.setdefault(where, _Work(at_s)).add(at_s, event)
        counts = event.get("row_counts", [])
        pairs = counts.items() if isinstance(counts, Mapping) else counts
        self._shard_rows |= {int(shard): int(rows) for shard, rows in pairs}

    def _committed(self, event: Event, at_s: float) -> None:
        number, merged = event["round_number"], event.get("merged", [])
        tokens, loss = event.get("total_tokens", 0), event.get("train_loss")
        self._commits.append((number, at_s, tokens, loss))
        names = list(dict.fromkeys(reply["client"] for reply in merged))
        self._presences.append(Presence(number, self._asked.pop(number, names), names))
        parts = self._rows_of[number] = []
        for reply in merged:
            for epoch, shard, first_row, end_row in reply["consumed"]:
                where, rows = (epoch, shard), max(0, end_row - first_row)
                parts.append((where, rows))
                self._rows[where] = self._rows.get(where, 0) + rows
        for cause, seconds in self._idle:
            self._idle_s[cause] = self._idle_s.get(cause, 0.0) + seconds
        self._idle.clear()

    def measures(self, lanes: Timeline) -> Measures:
        """The run so far; `lanes` of the same events."""
        account = self._accounting.account()
        found = Measures(
            points=self._points(),
            paces=self._paces(),
            presences=list(self._presences),
            shards={where: rows for where, rows in self._rows.items() if rows},
            shard_rows=dict(self._shard_rows),
            spent=self._spent(account.phases),
            goodput=account.goodput if account.phases else None,
            traffic=list(self._traffic),
            energy=dict(self._energy),
            finished=self._finished,
            events=self._events,
            replies=self._replies,
        )
        found.clients = _summaries(lanes, found, account.clients)
        return found

    def _points(self) -> list[Point]:
        points = []
        if 0 in self._scores and self._opened_s is not None:
            points.append(Point(0, 0, self._opened_s, None, *self._scores[0]))
        for number, at_s, tokens, loss in self._commits:
            bpb, whole = self._scores.get(number, (None, True))
            points.append(Point(number, tokens, at_s, loss, bpb, whole))
        return points

    def _paces(self) -> list[Pace]:
        return [
            Pace(
                client,
                number,
                work.at_s,
                work.tokens,
                None if work.nats is None else work.nats / work.tokens,
                work.tokens / work.train_s if work.train_s else None,
                work.used_s / work.train_s if work.used_s is not None and work.train_s else None,
            )
            for (number, client), work in self._work.items()
        ]

    def _spent(self, phases: Mapping[str, float]) -> dict[str, float]:
        """What became of the time: of `round_time` events, or for older files of the spans named `idle`."""
        if phases:
            return dict(phases)
        if self._opened_s is None or not self._commits:
            return {}
        rest_s = self._commits[-1][1] - self._opened_s - sum(self._idle_s.values())
        return self._idle_s | {TRAINING: max(0.0, rest_s)}


def measure(events: Iterable[Event], lanes: Timeline) -> Measures:
    """`events` of one run, oldest first, and the timeline made of them."""
    measuring = Measuring()
    for event in events:
        measuring.read(event)
    return measuring.measures(lanes)


def _summaries(
    lanes: Timeline, found: Measures, accounts: Mapping[str, ClientAccount]
) -> list[ClientSummary]:
    asked = Counter(name for presence in found.presences for name in presence.asked)
    merged = Counter(name for presence in found.presences for name in presence.merged)
    refused = Counter(refusal.client for refusal in lanes.refusals)
    paces: dict[str, list[Pace]] = {}
    for pace in found.paces:
        paces.setdefault(pace.client, []).append(pace)
    summaries = []
    for name in lanes.clients:
        own, account, there_s = paces.get(name, []), accounts.get(name), lanes.there_s(name)
        trained_s = lanes.seconds(name).get(State.TRAINING, 0.0)
        summaries.append(
            ClientSummary(
                name,
                asked=asked[name],
                merged=merged[name],
                tokens=sum(pace.tokens for pace in own),
                tokens_per_s=_median(pace.tokens_per_s for pace in own),
                mfu=_median(pace.mfu for pace in own),
                training_share=trained_s / there_s if there_s else None,
                alive_share=lanes.alive_share(name),
                refused=refused[name],
                goodput=account.goodput if account and account.period_s else None,
                bytes_down=account.bytes_down if account else None,
                bytes_up=account.bytes_up if account else None,
            )
        )
    return summaries


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
