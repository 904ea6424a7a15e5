"""What people ask of a run through Redis: that it ends, that a client gets no work for a while.

Read once a second. While Redis fails, a client that was drained stays drained: otherwise it would be sent an
order that it does not take.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pilot.coordination.coordinator import ServerCoordinator
from pilot.coordination.stop_reasons import DRAINED
from pilot.rules.rounds import EndReason
from pilot.server.report import Report
from pilot.server.roster import Client


@dataclass
class Wishes:
    """`stop`: why the run is to end once its open round is merged ("": it is not). `leaving`: clients that
    get no new work, and why."""

    coordinator: ServerCoordinator
    report: Report
    stop: str = ""
    leaving: dict[str, str] = field(default_factory=dict)
    _drained: dict[str, str] = field(default_factory=dict)

    def read(self, there: Sequence[Client], round_number: int) -> None:
        """Look at the keys; `there` are the clients that are. A wish is reported when it comes and goes."""
        clients = [client.name for client in there]
        self.leaving = self.coordinator.draining(clients)
        if self.coordinator.failing:
            self.leaving = {
                n: why for n, why in self._drained.items() if n in clients
            } | self.leaving
        drained = {n: why for n, why in self.leaving.items() if why.startswith(DRAINED)}
        for name in sorted(drained.keys() - self._drained.keys()):
            self.report.client_drained(round_number, name, drained[name].removeprefix(DRAINED))
        for name in sorted((self._drained.keys() - drained.keys()) & set(clients)):
            self.report.client_undrained(round_number, name)
            del self._drained[name]
        self._drained |= drained
        if not self.stop and (why := self.coordinator.stop_wish()):
            self.stop = why
            self.report.run_stopping(round_number, why)

    @property
    def end(self) -> bool:
        """Whether the run is to end."""
        return self.stop != ""

    def end_reason(self, interrupted: bool) -> EndReason | None:
        """Why the open round must end whatever its rules say; `interrupted`: by a signal. None: it need not."""
        if interrupted:
            return EndReason.INTERRUPTED
        return EndReason.STOPPED if self.end else None

    @property
    def drained(self) -> list[str]:
        """Clients that are there and that an operator has drained."""
        return sorted(name for name, why in self.leaving.items() if why.startswith(DRAINED))
