"""Who should run now: thresholds with hysteresis per client, then limits over all of them. Pure.

Times are seconds of the wall clock, since what is decided outlives the process that decided it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pilot.provision.readings import Reading
from pilot.rules.thresholds import Thresholds


class Wish(StrEnum):
    """What a client's own signal asks for."""

    START = "start"
    KEEP = "keep"
    DRAIN = "drain"


@dataclass(frozen=True)
class Memory:
    """Since when the signal has been good, or bad, without a break."""

    good_since_s: float | None = None
    bad_since_s: float | None = None

    def after(self, value: float, thresholds: Thresholds, now_s: float) -> "Memory":
        good, bad = thresholds.good(value), thresholds.bad(value)
        return Memory(
            (now_s if self.good_since_s is None else self.good_since_s) if good else None,
            (now_s if self.bad_since_s is None else self.bad_since_s) if bad else None,
        )


@dataclass(frozen=True)
class Own:
    """What a client's own signal asks for, and why; `rank` orders those that want the same."""

    wish: Wish
    why: str
    rank: float = math.inf


def by_signal(
    reading: Reading,
    memory: Memory,
    thresholds: Thresholds,
    *,
    running: bool,
    until_s: float | None,
    now_s: float,
) -> Own:
    """`memory` knows this reading already. `until_s`: when the signal will end the window; None: nobody
    knows."""
    rank = thresholds.rank(reading.value)
    better, worse = ("above", "below") if thresholds.rising else ("below", "above")
    if memory.bad_since_s is not None and running:
        waited_s = now_s - memory.bad_since_s
        why = f"{reading}, {worse} {thresholds.drain:g}"
        if waited_s < thresholds.hold_s:
            return Own(Wish.KEEP, f"{why} for {waited_s:.0f} of {thresholds.hold_s:g} s", rank)
        return Own(Wish.DRAIN, f"{why} for {waited_s:.0f} s", rank)
    if memory.good_since_s is not None and not running:
        waited_s = now_s - memory.good_since_s
        why = f"{reading}, {better} {thresholds.start:g}"
        if waited_s < thresholds.hold_s:
            return Own(Wish.KEEP, f"{why} for {waited_s:.0f} of {thresholds.hold_s:g} s", rank)
        if until_s is not None and until_s - now_s < thresholds.min_window_s:
            short = f"its window ends in {until_s - now_s:.0f} s, min-window is {thresholds.min_window_s:g}"
            return Own(Wish.KEEP, f"{why}, but {short}", rank)
        return Own(Wish.START, f"{why} for {waited_s:.0f} s", rank)
    return Own(Wish.KEEP, str(reading), rank)


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A client as the policy sees it. `running`: it is to run, as was decided last, since `since_s`;
    `held`: why an operator keeps it away ("" if nobody does); the rates are those of a client that
    trains."""

    name: str
    own: Own
    running: bool
    since_s: float = 0.0
    min_on_s: float = 0.0
    held: str = ""
    grams_per_hour: float = 0.0
    money_per_hour: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Over all clients; None: no limit."""

    max_clients: int | None = None
    min_clients: int = 0
    money_per_hour: float | None = None
    grams_per_hour: float | None = None
    money: float | None = None
    grams: float | None = None


@dataclass(frozen=True)
class Decision:
    """Whether a client is to run from now on, and why."""

    run: bool
    why: str


def decide(
    facts: Sequence[Fact], limits: Limits, *, grams: float, money: float, now_s: float
) -> dict[str, Decision]:
    """`grams` and `money`: what the run took so far.

    A budget is never exceeded for the sake of `min-clients`, and a client that runs never gives way to
    one that would be better: changing places costs both a window.
    """
    if over := _used_up(limits, grams, money):
        return {fact.name: Decision(False, over) for fact in facts}
    by_rank = sorted(facts, key=lambda fact: fact.own.rank)
    found = {fact.name: _by_itself(fact, now_s) for fact in facts}
    _keep_min(by_rank, found, limits)
    _shed(by_rank, found, limits, now_s)
    for fact in by_rank:
        wants = fact.own.wish == Wish.START or _count(found) < limits.min_clients
        if found[fact.name].run or fact.running or fact.held or not wants:
            continue
        why = fact.own.why
        if fact.own.wish != Wish.START:
            why = f"min-clients is {limits.min_clients} ({why})"
        refusal = _no_room(fact, by_rank, found, limits)
        found[fact.name] = Decision(not refusal, f"{why}; {refusal}" if refusal else why)
    return found


def _used_up(limits: Limits, grams: float, money: float) -> str:
    """Why the run's budget is used up; "" if it is not."""
    for name, limit, used in (("grams", limits.grams, grams), ("money", limits.money, money)):
        if limit is not None and used >= limit:
            return f"the run's budget of {limit:g} {name} is used up"
    return ""


def _by_itself(fact: Fact, now_s: float) -> Decision:
    """What its own signal says of a client that runs; one that does not is not started here."""
    own = fact.own
    if not fact.running:
        return Decision(False, f"held: {fact.held}" if fact.held else own.why)
    if own.wish != Wish.DRAIN:
        return Decision(True, own.why)
    left_s = fact.min_on_s - (now_s - fact.since_s)
    if left_s > 0:
        return Decision(True, f"{own.why}; min-on lasts {left_s:.0f} s more")
    return Decision(False, own.why)


def _count(found: Mapping[str, Decision]) -> int:
    return sum(decision.run for decision in found.values())


def _keep_min(by_rank: Sequence[Fact], found: dict[str, Decision], limits: Limits) -> None:
    """Of those that would leave, keep the best while fewer than `min_clients` run."""
    for fact in by_rank:
        if fact.running and not found[fact.name].run and _count(found) < limits.min_clients:
            why = f"min-clients is {limits.min_clients} ({fact.own.why})"
            found[fact.name] = Decision(True, why)


def _shed(
    by_rank: Sequence[Fact], found: dict[str, Decision], limits: Limits, now_s: float
) -> None:
    """Let the worst go while there are too many, or an hour of them costs too much."""
    for fact in reversed(by_rank):
        if not (why := _too_much(by_rank, found, limits)):
            return
        if found[fact.name].run and now_s - fact.since_s >= fact.min_on_s:
            found[fact.name] = Decision(False, why)


def _too_much(facts: Sequence[Fact], found: Mapping[str, Decision], limits: Limits) -> str:
    """Which limit those that are to run exceed; "" if none."""
    running = [fact for fact in facts if found[fact.name].run]
    if limits.max_clients is not None and len(running) > limits.max_clients:
        return f"max-clients is {limits.max_clients}"
    grams = sum(fact.grams_per_hour for fact in running)
    money = sum(fact.money_per_hour for fact in running)
    if limits.grams_per_hour is not None and grams > limits.grams_per_hour:
        return (
            f"all together {grams:.4g} grams an hour, grams-per-hour is {limits.grams_per_hour:g}"
        )
    if limits.money_per_hour is not None and money > limits.money_per_hour:
        return (
            f"all together {money:.4g} money an hour, money-per-hour is {limits.money_per_hour:g}"
        )
    return ""


def _no_room(
    fact: Fact, facts: Sequence[Fact], found: Mapping[str, Decision], limits: Limits
) -> str:
    """Which limit it would exceed if it ran, too; "" if none."""
    return _too_much(facts, {**found, fact.name: Decision(True, "")}, limits)
