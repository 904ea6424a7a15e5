"""What a rehearsal came to, in the numbers by which an operator chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilot.config import Scalar
from pilot.rehearse.run import Rehearsal
from pilot.rehearse.scenario import Site
from pilot.rules.accounts import run_account
from pilot.rules.energy import Footprint, footprint_of_work
from pilot.rules.round_length import RoundCosts, best_length_s, round_costs
from pilot.run.events import EVENTS_FILE, read_events

_HOUR_S = 3600.0
_SHORTEST_S, _LONGEST_S = 60.0, 14_400.0  # of a round that is advised


@dataclass(frozen=True)
class Outcome:
    """One point of a comparison: a policy and `settings`, those of the run configuration that vary.

    `goodput`: the share of the time of clients that took part in which they took steps that were merged.
    `participation`: the mean share of the sites whose work a round merged. `target_h`: when the run had the
    tokens that it wants (None: not within `hours`). `failure`: why the run failed; "" if it did not.
    """

    policy: str
    settings: dict[str, Scalar]
    seed: int
    hours: float
    tokens: int
    wasted_tokens: int
    rounds: int
    empty_rounds: int
    terms: int
    goodput: float | None
    participation: float
    target_h: float | None
    footprint: Footprint
    clients: dict[str, Footprint]
    costs: RoundCosts | None = None
    failure: str = ""
    directory: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / (self.hours * _HOUR_S) if self.hours else 0.0

    @property
    def wasted_share(self) -> float:
        trained = self.tokens + self.wasted_tokens
        return self.wasted_tokens / trained if trained else 0.0

    @property
    def best_length_s(self) -> float | None:
        """Of a round, by what these rounds have shown; None if none has merged anything."""
        if self.costs is None:
            return None
        return best_length_s(self.costs, shortest_s=_SHORTEST_S, longest_s=_LONGEST_S)

    @property
    def label(self) -> str:
        settings = " ".join(f"{key}={value}" for key, value in self.settings.items())
        return ", ".join(part for part in (self.policy, settings) if part) or "as configured"

    def to_json(self) -> dict[str, Any]:
        per_million = self.footprint.grams_per_million_tokens(self.tokens)
        more = {
            "tokens_per_s": self.tokens_per_s,
            "wasted_share": self.wasted_share,
            "grams_per_million_tokens": per_million,
            "best_length_s": self.best_length_s,
        }
        return asdict(self) | more


def outcome(
    done: Rehearsal,
    sites: Sequence[Site],
    run_dir: Path,
    *,
    policy: str,
    settings: Mapping[str, Scalar],
    seed: int,
) -> Outcome:
    """Of a rehearsal whose events are in `run_dir`."""
    state, history = done.state, done.state.history
    clients = {
        site.machine.name: footprint_of_work(
            done.world.clients[site.machine.name].on,
            done.world.clients[site.machine.name].busy,
            site.power,
            carbon=site.carbon,
            price=site.price,
        )
        for site in sites
    }
    present = [record.clients / len(sites) for record in history]
    events = list(read_events(run_dir / EVENTS_FILE))
    hours = done.seconds / _HOUR_S
    return Outcome(
        policy,
        dict(settings),
        seed,
        hours,
        state.tokens,
        done.wasted_tokens,
        state.round_number,
        sum(record.clients == 0 for record in history),
        done.terms,
        run_account(events).goodput,
        sum(present) / len(present) if present else 0.0,
        hours if state.tokens >= state.total_tokens else None,
        sum(clients.values(), Footprint()),
        clients,
        round_costs(events),
        done.failure,
        str(run_dir),
    )


UNKNOWN = (
    "What a rehearsal does not know: the loss. It counts tokens, and longer rounds, more clients and other "
    "batches teach more or less per token (docs/quality.md)."
)


def recommendation(outcomes: Sequence[Outcome]) -> str:
    """One sentence: which point an operator should take, and what that costs against the others."""
    sound = [one for one in outcomes if not one.failure and one.tokens > 0]
    if not sound:
        return "None of these can be recommended: no run got anywhere."
    if len(sound) == 1:
        return f"Only {sound[0].label} trained anything." if len(outcomes) > 1 else _alone(sound[0])
    fastest = min(sound, key=_slowness)
    words = [f"Take {fastest.label}"]
    if all(one.target_h is not None for one in sound):
        slowest = max(sound, key=_slowness)
        words.append(
            f"it has its tokens after {fastest.target_h:.1f} h, {slowest.label} after "
            f"{slowest.target_h:.1f} h"
        )
    elif fastest.target_h is not None:
        words.append(
            f"it has its tokens after {fastest.target_h:.1f} h; not all others have them at all"
        )
    else:
        slowest = max(sound, key=_slowness)
        gain = fastest.tokens_per_s / slowest.tokens_per_s - 1
        words.append(f"it trains {100 * gain:.1f} % more tokens per second than {slowest.label}")
    sentence = ": ".join(words)
    cleanest = min(sound, key=_grams)
    if cleanest is not fastest and _grams(cleanest) < 0.95 * _grams(fastest):
        less = 1 - _grams(cleanest) / _grams(fastest)
        sentence += (
            f"; if emissions count more, {cleanest.label}: {100 * less:.0f} % less CO2 per token, at "
            f"{100 * cleanest.tokens_per_s / fastest.tokens_per_s:.0f} % of the speed"
        )
    return sentence + "."


def length_advice(one: Outcome) -> str:
    """A sentence on how long rounds should be; "" if nothing is known of it."""
    if one.costs is None or one.best_length_s is None:
        return ""
    lost_h = 1 / one.costs.losses_per_s / _HOUR_S
    return (
        f"Under {one.label} a round costs {one.costs.fixed_s:.0f} s beside training, and a client's work is "
        f"lost once in {lost_h:.1f} h: rounds of {one.best_length_s:.0f} s would lose least."
    )


def _alone(one: Outcome) -> str:
    if one.target_h is not None:
        return f"It has its tokens after {one.target_h:.1f} h."
    return f"It does not have its tokens within {one.hours:.0f} h."


def _slowness(one: Outcome) -> float:
    """Hours to the target; without it, as many as its speed promises at least, after all that have it."""
    return one.target_h if one.target_h is not None else 1e9 / max(one.tokens_per_s, 1e-9) + 1e6


def _grams(one: Outcome) -> float:
    return one.footprint.grams / one.tokens


def table(outcomes: Sequence[Outcome]) -> str:
    """The comparison for a terminal: a line a point."""
    head = [
        "",
        "hours",
        "target",
        "Mtokens",
        "tok/s",
        "wasted",
        "rounds",
        "goodput",
        "clients",
        "kWh",
        "kg CO2",
        "g/Mtok",
        "money",
    ]
    lines = [head, *(_line(one) for one in outcomes)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    )


def _line(one: Outcome) -> list[str]:
    cost = one.footprint
    grams = cost.grams_per_million_tokens(one.tokens)
    return [
        one.label + (" (failed)" if one.failure else ""),
        f"{one.hours:.1f}",
        "-" if one.target_h is None else f"{one.target_h:.1f} h",
        f"{one.tokens / 1e6:,.1f}",
        f"{one.tokens_per_s:,.0f}",
        f"{100 * one.wasted_share:.1f} %",
        str(one.rounds),
        "-" if one.goodput is None else f"{100 * one.goodput:.0f} %",
        f"{100 * one.participation:.0f} %",
        f"{cost.kwh:,.1f}",
        f"{cost.grams / 1000:,.1f}",
        "-" if grams is None else f"{grams:,.2f}",
        f"{cost.money:,.2f}",
    ]
