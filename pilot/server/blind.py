"""Clients that cannot use the run's Redis: they never hear that a round ends, so they are asked for less.

Such a client trains until the seconds in its order are over. If that were the whole round, everybody would
wait for it in the grace, or its work would come too late. So it gets a part of what a round is expected to
last, and no order where that is too short for it; nobody else is slower for its sake.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pilot.config import RunConfig
from pilot.rules.rounds import blind_seconds, fixed_cost_s
from pilot.run.state import RunState
from pilot.server.open_round import OpenRound
from pilot.server.report import Report
from pilot.server.roster import Client


@dataclass(frozen=True)
class BlindClients:
    """Which of them can be asked, and for how long."""

    config: RunConfig
    state: RunState
    report: Report
    _told: set[str] = field(default_factory=set)  # of whom it was said that they get no order

    def seconds(self, elapsed_s: float = 0.0) -> float | None:
        """What an order may give one, `elapsed_s` after the round opened; None while that is not known."""
        return blind_seconds(self.config, self.state.last_lengths_s, elapsed_s)

    def askable(
        self, clients: Sequence[Client], open_round: OpenRound | None = None, now_s: float = 0.0
    ) -> list[Client]:
        """`clients` without those whose work in the next round, or the open one, would come too late.

        They get one notice. Where all are blind, with those at work, none disturbs anybody: all are asked.
        """
        at_work = [order.client for order in open_round.pending] if open_round else []
        if all(client.blind for client in (*clients, *at_work)):
            return list(clients)
        left_s = self.seconds(now_s - open_round.opened_at_s if open_round else 0.0)
        can = [c for c in clients if not c.blind or (left_s or 0.0) > fixed_cost_s(c.fixed_cost_s)]
        if open_round is None:
            self._tell([client for client in clients if client not in can], left_s)
        return can

    def _tell(self, left_out: Sequence[Client], seconds: float | None) -> None:
        for client in left_out:
            if client.name not in self._told:
                self.report.client_left_out(
                    self.state.round_number + 1,
                    client.name,
                    client.hello.warning or "it knows of no Redis",
                    seconds=seconds,
                    needs_s=fixed_cost_s(client.fixed_cost_s),
                )
        self._told.clear()
        self._told.update(client.name for client in left_out)
