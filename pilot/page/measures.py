"""A run in numbers, from its events: what the curves, bars and tables of the page show. Pure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pilot.page.timeline import Event, State, Timeline
from pilot.rules.accounts import ClientAccount, RunAccount, run_account

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
    clients: list[ClientSummary] = field(default_factory=list)
    finished: bool = False

    @property
    def whole_s(self) -> float:
        return sum(self.spent.values())

    @property
    def training_share(self) -> float | None:
        return self.spent.get(TRAINING, 0.0) / self.whole_s if self.whole_s else None


def measure(events: Sequence[Event], lanes: Timeline) -> Measures:
    """`events` of one run, oldest first, and the timeline made of them."""
    found = Measures(finished=any(event.get("event") == "run_finished" for event in events))
    _curves(events, lanes.began, found)
    found.paces = _paces(events, lanes.began)
    found.presences = _presences(events)
    _shards(events, found)
    account = run_account(events)
    _spent(events, account, found)
    found.clients = [
        _summary(name, lanes, found, account.clients.get(name)) for name in lanes.clients
    ]
    return found


def _curves(events: Sequence[Event], began: float, found: Measures) -> None:
    scores = {
        event["round"]: (event["val_bpb"], bool(event.get("complete", True)))
        for event in events
        if event.get("event") == "validation" and event.get("val_bpb") is not None
    }
    opened = [event["time"] for event in events if event.get("event") == "round_opened"]
    if 0 in scores and opened:
        found.points.append(Point(0, 0, opened[0] - began, None, *scores[0]))
    for event in _of_kind(events, "round_committed"):
        number, at_s = event["round_number"], event["time"] - began
        bpb, whole = scores.get(number, (None, True))
        loss = event.get("train_loss")
        tokens = event.get("total_tokens", 0)
        found.points.append(Point(number, tokens, at_s, loss, bpb, whole))


def _paces(events: Sequence[Event], began: float) -> list[Pace]:
    by_round: dict[tuple[int, str], list[Event]] = {}
    for event in _of_kind(events, "reply"):
        if event.get("tokens") and event.get("client"):
            by_round.setdefault((event["round"], event["client"]), []).append(event)
    paces = []
    for (number, client), replies in by_round.items():
        tokens = sum(reply["tokens"] for reply in replies)
        train_s = sum(reply.get("train_s") or 0.0 for reply in replies)
        nats = [reply.get("loss_nats") for reply in replies]
        used = [(reply.get("mfu"), reply.get("train_s") or 0.0) for reply in replies]
        known = train_s > 0 and all(mfu is not None for mfu, _ in used)
        mfu = sum(mfu * seconds for mfu, seconds in used if mfu is not None) if known else None
        paces.append(
            Pace(
                client,
                number,
                replies[-1]["time"] - began,
                tokens,
                None if None in nats else sum(n for n in nats if n is not None) / tokens,
                tokens / train_s if train_s else None,
                None if mfu is None else mfu / train_s,
            )
        )
    return paces


def _presences(events: Sequence[Event]) -> list[Presence]:
    asked: dict[int, list[str]] = {}
    presences = []
    for event in events:
        kind, number = event.get("event"), event.get("round")
        if kind == "round_opened" and isinstance(number, int):
            asked[number] = list(
                event.get("clients", [])
            )  # a round that is opened again begins again
        elif kind == "client_joined" and isinstance(number, int):
            names = asked.setdefault(number, [])
            if event["client"] not in names:
                names.append(event["client"])
        elif kind == "round_committed":
            number = event["round_number"]
            merged = list(dict.fromkeys(reply["client"] for reply in event.get("merged", [])))
            names = asked.pop(number, merged)
            presences.append(Presence(number, names, merged))
    return presences


def _shards(events: Sequence[Event], found: Measures) -> None:
    """Rows that the model holds: what a merge was taken back is not among them."""
    undone: set[int] = set()
    for event in _of_kind(events, "merge_taken_back"):
        first, last = event["taken_back"]
        undone |= set(range(first, last + 1))
    for event in _of_kind(events, "round_committed"):
        if event["round_number"] in undone:
            continue
        for reply in event.get("merged", []):
            for epoch, shard, first_row, end_row in reply["consumed"]:
                where = (epoch, shard)
                found.shards[where] = found.shards.get(where, 0) + max(0, end_row - first_row)
    for event in _of_kind(events, "reply"):
        counts = event.get("row_counts", [])
        pairs = counts.items() if isinstance(counts, Mapping) else counts
        found.shard_rows |= {int(shard): int(rows) for shard, rows in pairs}


def _spent(events: Sequence[Event], account: RunAccount, found: Measures) -> None:
    """What became of the time: of `round_time` events, or for older files of the spans named `idle`."""
    for event in _of_kind(events, "round_time"):
        if event.get("bytes_down") or event.get("bytes_up"):
            number, down, up = event["round"], event["bytes_down"], event["bytes_up"]
            found.traffic.append(Traffic(number, down, up))
    if account.phases:
        found.spent, found.goodput = dict(account.phases), account.goodput
        return
    opened = [event["time"] for event in events if event.get("event") == "round_opened"]
    committed = [event["time"] for event in events if event.get("event") == "round_committed"]
    if not opened or not committed:
        return
    began, ended = opened[0], committed[-1]
    for event in _of_kind(events, "idle"):
        if began < event["time"] <= ended:
            seconds = min(event["seconds"], event["time"] - began)
            found.spent[event["cause"]] = found.spent.get(event["cause"], 0.0) + seconds
    found.spent[TRAINING] = max(0.0, ended - began - found.whole_s)


def _summary(
    name: str, lanes: Timeline, found: Measures, account: ClientAccount | None
) -> ClientSummary:
    paces = [pace for pace in found.paces if pace.client == name]
    rates = [pace.tokens_per_s for pace in paces if pace.tokens_per_s is not None]
    used = [pace.mfu for pace in paces if pace.mfu is not None]
    there_s = lanes.there_s(name)
    trained_s = lanes.seconds(name).get(State.TRAINING, 0.0)
    return ClientSummary(
        name,
        asked=sum(name in presence.asked for presence in found.presences),
        merged=sum(name in presence.merged for presence in found.presences),
        tokens=sum(pace.tokens for pace in paces),
        tokens_per_s=statistics.median(rates) if rates else None,
        mfu=statistics.median(used) if used else None,
        training_share=trained_s / there_s if there_s else None,
        alive_share=lanes.alive_share(name),
        refused=sum(refusal.client == name for refusal in lanes.refusals),
        goodput=account.goodput if account and account.period_s else None,
        bytes_down=account.bytes_down if account else None,
        bytes_up=account.bytes_up if account else None,
    )


def _of_kind(events: Iterable[Event], kind: str) -> Iterable[Any]:
    return (event for event in events if event.get("event") == kind)
