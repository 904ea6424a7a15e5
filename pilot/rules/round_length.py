"""How long rounds should be: what a round costs beside training, against what is lost when a client dies in it.

Rounds of T seconds spend a share c / T on what each round costs (c), and a client that is lost takes half a
round's work with it: T r / 2 of its time, if it is lost r times a second. The sum is least at T = √(2 c / r),
as for checkpoints (J. W. Young, CACM 17, 1974). It is the length for the most tokens, and knows nothing of the
loss: longer rounds teach less per token (docs/quality.md).
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Fewer losses than this say next to nothing of how often they come; one more is assumed, as in Laplace's rule.
_ASSUMED_LOSSES = 0.5


@dataclass(frozen=True)
class RoundCosts:
    """What rounds have shown: `fixed_s` that one costs a client beside training (median), `losses` replies that
    never came or were not merged, in `client_s` seconds of all clients together."""

    fixed_s: float
    losses: int
    client_s: float

    @property
    def losses_per_s(self) -> float:
        """Of one client."""
        return (self.losses + _ASSUMED_LOSSES) / self.client_s


def round_costs(events: Iterable[Mapping[str, Any]]) -> RoundCosts | None:
    """From the events `round_time` and `reply_refused` of a run; None before a round has merged anything."""
    fixed_s, losses, client_s = list[float](), 0, 0.0
    for event in events:
        if event.get("event") == "reply_refused" and event.get("round") and event.get("client"):
            losses += 1
        elif event.get("event") == "round_time":
            for account in event["clients"].values():
                client_s += account["period_s"]
                if account["goodput_s"] > 0:
                    fixed_s.append(account["period_s"] - account["goodput_s"])
    if not fixed_s:
        return None
    return RoundCosts(statistics.median(fixed_s), losses, client_s)


def best_length_s(costs: RoundCosts, *, shortest_s: float, longest_s: float) -> float:
    """Seconds of a round with the most tokens that are merged, within the bounds."""
    length_s = math.sqrt(2 * costs.fixed_s / costs.losses_per_s)
    return min(longest_s, max(shortest_s, length_s))
