"""Where a round's time went, and its goodput: from what server and clients have measured, as pure arithmetic.

Goodput is the share of a client's time in which it took training steps whose result was merged: their seconds,
divided by the seconds from the end of the last round's training to the end of this one's (docs/protocol.md).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_SHORTEST_S = 1e-3


@dataclass(frozen=True)
class Spent:
    """What seconds of one client went into; those of an order add up to the time from sending to arrival."""

    start_s: float = 0.0  # the order's way, and what it takes until the first heartbeat
    load_s: float = 0.0  # building the model, restoring the inner state, and what else has no name
    evaluation_s: float = 0.0
    packing_s: float = 0.0  # waiting for rows
    training_s: float = 0.0
    encoding_s: float = 0.0
    sending_s: float = 0.0  # the reply's way

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Spent)}
        )

    @property
    def whole_s(self) -> float:
        return sum(asdict(self).values())


def spent_on_order(
    away_s: float,
    start_s: float | None,
    *,
    total_s: float,
    ready_s: float,
    eval_s: float,
    train_s: float,
    pack_s: float,
    encode_s: float,
) -> Spent:
    """The account of one order that was out for `away_s`; what else is known is its client's word.

    `start_s`: from its sending to the first heartbeat as the server saw it; None: none was seen, and both ways
    count as the reply's. The rest as in `TrainReply`: each is believed as far as the whole has room for it.
    """
    left_s = max(0.0, away_s)

    def at_most(seconds: float) -> float:
        nonlocal left_s
        taken_s = min(max(0.0, seconds), left_s)
        left_s -= taken_s
        return taken_s

    start_s = at_most(0.0 if start_s is None else start_s)
    training_s = at_most(train_s - pack_s)
    evaluation_s, packing_s, encoding_s = at_most(eval_s), at_most(pack_s), at_most(encode_s)
    began_s = ready_s if start_s else 0.0  # of the client's own time, what `start_s` has in it
    load_s = at_most(total_s - began_s - eval_s - train_s - encode_s)
    return Spent(start_s, load_s, evaluation_s, packing_s, training_s, encoding_s, left_s)


@dataclass(frozen=True)
class OrderFacts:
    """One order of a round, as its books end; `spent` None: no reply that could be read has come."""

    client: str
    sent_at_s: float
    bytes_down: int = 0
    bytes_up: int = 0
    spent: Spent | None = None
    merged: bool = False


@dataclass(frozen=True)
class ClientAccount:
    """One client's part of a round. `goodput_s` of its `period_s` seconds were steps that were merged."""

    spent: Spent
    period_s: float
    goodput_s: float
    bytes_down: int
    bytes_up: int

    @property
    def goodput(self) -> float:
        return self.goodput_s / max(self.period_s, _SHORTEST_S)

    def to_json(self) -> dict[str, Any]:
        spent = {name: round(seconds, 3) for name, seconds in asdict(self.spent).items()}
        periods = {"period_s": round(self.period_s, 3), "goodput_s": round(self.goodput_s, 3)}
        down_up = {"bytes_down": self.bytes_down, "bytes_up": self.bytes_up}
        return {"goodput": round(self.goodput, 4), **periods, **spent, **down_up}


def client_accounts(
    orders: Iterable[OrderFacts], *, before: Iterable[str], last_end_s: float, end_s: float
) -> dict[str, ClientAccount]:
    """Client → its account of a round whose training ended at `end_s`, that of the last one at `last_end_s`.

    The period of a client that had no order in the last round (`before`: those that had) begins with its first
    one in this round. Nobody's period is shorter than its merged steps, which another clock has measured.
    """
    known, by_client = set(before), dict[str, list[OrderFacts]]()
    for order in orders:
        by_client.setdefault(order.client, []).append(order)
    accounts = {}
    for name, own in by_client.items():
        since_s = last_end_s if name in known else min(order.sent_at_s for order in own)
        goodput_s = sum(o.spent.training_s for o in own if o.spent is not None and o.merged)
        accounts[name] = ClientAccount(
            sum((order.spent for order in own if order.spent is not None), Spent()),
            max(end_s - since_s, goodput_s, _SHORTEST_S),
            goodput_s,
            sum(order.bytes_down for order in own),
            sum(order.bytes_up for order in own),
        )
    return accounts


def goodput(accounts: Collection[ClientAccount]) -> float | None:
    """The federation's: merged steps over all clients' time. None without clients."""
    periods_s = sum(account.period_s for account in accounts)
    return sum(account.goodput_s for account in accounts) / periods_s if periods_s else None


def totals(phases: Mapping[str, float], accounts: Collection[ClientAccount]) -> dict[str, Any]:
    """A round in four numbers; `phases`: seconds by what the federation did."""
    return {
        "round_s": round(sum(phases.values()), 3),
        "goodput": goodput(accounts),
        "bytes_down": sum(account.bytes_down for account in accounts),
        "bytes_up": sum(account.bytes_up for account in accounts),
    }


@dataclass(frozen=True)
class RunAccount:
    """A run's time: `phases`, seconds by what the federation did, and one account per client."""

    rounds: int
    phases: dict[str, float]
    clients: dict[str, ClientAccount]

    @property
    def goodput(self) -> float | None:
        return goodput(self.clients.values())


class RunAccounting:
    """Adds up the events `round_time` of a run, as they are read."""

    def __init__(self) -> None:
        self._rounds, self._phases = 0, dict[str, float]()
        self._clients: dict[str, ClientAccount] = {}

    def read(self, event: Mapping[str, Any]) -> None:
        """`event` of any kind."""
        if event.get("event") != "round_time":
            return
        self._rounds += bool(event["clients"])
        for name, seconds in event["phases"].items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds
        for name, values in event["clients"].items():
            self._clients[name] = added(self._clients.get(name), _account(values))

    def account(self) -> RunAccount:
        return RunAccount(self._rounds, dict(self._phases), dict(self._clients))


def run_account(events: Iterable[Mapping[str, Any]]) -> RunAccount:
    """The sum of the events `round_time` among `events`, which are any of a run."""
    accounting = RunAccounting()
    for event in events:
        accounting.read(event)
    return accounting.account()


def _account(values: Mapping[str, Any]) -> ClientAccount:
    """What an event says of a client; a version that did not know a field counts as 0."""
    return ClientAccount(
        Spent(**{f.name: values.get(f.name, 0.0) for f in fields(Spent)}),
        values.get("period_s", 0.0),
        values.get("goodput_s", 0.0),
        values.get("bytes_down", 0),
        values.get("bytes_up", 0),
    )


def added(one: ClientAccount | None, other: ClientAccount) -> ClientAccount:
    """The account of two rounds of one client, or of all before (None: there is none) and another one."""
    if one is None:
        return other
    return ClientAccount(
        one.spent + other.spent,
        one.period_s + other.period_s,
        one.goodput_s + other.goodput_s,
        one.bytes_down + other.bytes_down,
        one.bytes_up + other.bytes_up,
    )
