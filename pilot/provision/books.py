"""What each client took: energy, grams and money, by a power model or as measured, beside its merged
tokens."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from pilot.provision.board import Board
from pilot.provision.config import ClientConfig
from pilot.rules.energy import Footprint, Price, PricePer, Series, footprint

_LONGEST_GAP_S = 7 * 24 * 3600.0  # a clock that jumps by more has been set


@dataclass
class Account:
    """Of one client; `reported` is what events have said of it so far."""

    total: Footprint = field(default_factory=Footprint)
    tokens: int = 0
    reported: Footprint = field(default_factory=Footprint)
    reported_tokens: int = 0
    busy: bool = False

    def add(
        self, client: ClientConfig, board: Board, begin_s: float, end_s: float, *, busy: bool
    ) -> None:
        """The machine was on from `begin_s` to `end_s`, and computed if `busy`."""
        end_s = min(end_s, begin_s + _LONGEST_GAP_S)
        if end_s <= begin_s:
            return
        carbon = board.last(client.options.carbon)
        price = price_of(client, board)
        self.busy = busy
        self.total += footprint(
            begin_s,
            end_s,
            watts=watts(client, board, busy=busy),
            training=busy,
            carbon=None if carbon is None else Series.constant(carbon),
            price=price,
        )

    def unreported(self) -> dict[str, Any]:
        """The fields of the next event `energy`; empty if nothing has come since the last one."""
        tokens = self.tokens - self.reported_tokens
        now, before = asdict(self.total), asdict(self.reported)
        new = {name: now[name] - before[name] for name in now}
        if not tokens and not new["on_s"]:
            return {}
        self.reported, self.reported_tokens = self.total, self.tokens
        return {**new, "tokens": tokens}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Account":
        """Raises TypeError for what `to_json` did not write."""
        total, reported = (Footprint(**values[name]) for name in ("total", "reported"))
        return Account(total, values["tokens"], reported, values["reported_tokens"], values["busy"])


def watts(client: ClientConfig, board: Board, *, busy: bool) -> float:
    """Of machine and building: as measured where the client has a `power` signal, else by the model."""
    measured = board.last(client.options.power)
    if measured is not None:
        return client.power.pue * measured
    return client.power.watts(training=busy)


def price_of(client: ClientConfig, board: Board) -> Price | None:
    price = board.last(client.options.price)
    if price is None:
        return None
    return Price(Series.constant(price), cast(PricePer, client.options.price_per))


def hourly(client: ClientConfig, board: Board) -> tuple[float, float]:
    """(grams, money) of an hour in which the client trains, by its power model if it has one."""
    draws = client.power.watts(training=True) or watts(client, board, busy=True)
    carbon = board.last(client.options.carbon)
    series = None if carbon is None else Series.constant(carbon)
    price = price_of(client, board)
    hour = footprint(0.0, 3600.0, watts=draws, training=True, carbon=series, price=price)
    return hour.grams, hour.money


def unknown(client: ClientConfig) -> set[str]:
    """Which of its fields no signal of the client's configuration tells."""
    return {
        field
        for field, signal in (("grams", client.options.carbon), ("money", client.options.price))
        if not signal
    }


def totals(accounts: Mapping[str, Account]) -> tuple[Footprint, int]:
    """Of the run: what all clients took, and their tokens."""
    total, tokens = Footprint(), 0
    for account in accounts.values():
        total, tokens = total + account.total, tokens + account.tokens
    return total, tokens
