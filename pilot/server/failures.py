"""When a run ends too soon: it was stopped, or brought nothing but errors or refused updates for rounds."""

from pilot.errors import PilotError
from pilot.rules.admission import REFUSALS_IN_A_ROW
from pilot.rules.rounds import Clock
from pilot.server.open_round import OpenRound

MAX_FAILED_ROUNDS = 3  # with nothing but errors
MAX_REFUSED_ROUNDS = 2 * REFUSALS_IN_A_ROW  # a client that was left out for a while was tried again


class RunFailed(PilotError):
    """The run cannot continue; what it has is on disk, and the same command resumes it."""


class RunInterrupted(PilotError):
    """The run was stopped, by a signal or by the `wish` of an operator; the same command resumes it."""

    def __init__(self, wish: str = "") -> None:
        why = f" ({wish})" if wish else ""
        super().__init__(f"the run was stopped{why}; the same command resumes it")


class Failures:
    """Counts the rounds in a row in which no reply could be used.

    Clients that die are no failure, however many: others may come. Content that may not be merged is one only
    after its clients have been left out for a while and come back with more of it, and nobody else has
    given anything for `patience_s` seconds.
    """

    def __init__(self, clock: Clock, patience_s: float) -> None:
        self._clock, self._patience_s = clock, patience_s
        self._failed = self._refused = 0
        self._merged_at_s = clock.now_s()

    def note(self, closed: OpenRound) -> None:
        """A round is over. Raises RunFailed when there have been too many of its kind: nobody would see it."""
        if closed.accepted:
            self._failed = self._refused = 0
            self._merged_at_s = self._clock.now_s()
        elif closed.rejected:
            self._failed, self._refused = 0, self._refused + 1
        elif closed.failures:
            self._failed += 1
        else:
            self._failed = 0
        reasons = "; ".join(f"{name}: {why}" for name, why in closed.failures.items())
        if self._failed >= MAX_FAILED_ROUNDS:
            raise RunFailed(f"{self._failed} rounds in a row gave only errors: {reasons}")
        in_vain_s = self._clock.now_s() - self._merged_at_s
        if self._refused >= MAX_REFUSED_ROUNDS and in_vain_s >= self._patience_s:
            raise RunFailed(
                f"in {self._refused} rounds every update was refused: {reasons}. Lower lr or outer-lr, mend "
                "those clients, or relax the key that refuses their updates (admission, in docs/protocol.md)"
            )
