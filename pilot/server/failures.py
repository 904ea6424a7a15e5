"""When a run gets nowhere: rounds in a row that brought nothing but errors, or nothing but refused updates."""

from pilot.errors import PilotError
from pilot.rules.admission import REFUSALS_IN_A_ROW
from pilot.server.open_round import OpenRound

MAX_FAILED_ROUNDS = 3  # with nothing but errors
MAX_REFUSED_ROUNDS = 2 * REFUSALS_IN_A_ROW  # a client that was left out for a while was tried again


class RunFailed(PilotError):
    """The run cannot continue; what it has is on disk, and the same command resumes it."""


class Failures:
    """Counts the rounds in a row in which no reply could be used.

    Clients that die are no failure, however many: others may come. Content that may not be merged is one only
    after its clients have been left out for a while and come back with more of it, and nobody else has
    given anything.
    """

    def __init__(self) -> None:
        self._failed = self._refused = 0

    def note(self, closed: OpenRound) -> None:
        """A round is over. Raises RunFailed when there have been too many of its kind: nobody would see it."""
        if closed.accepted:
            self._failed = self._refused = 0
        elif closed.rejected:
            self._failed, self._refused = 0, self._refused + 1
        elif closed.failures:
            self._failed += 1
        else:
            self._failed = 0
        reasons = "; ".join(f"{name}: {why}" for name, why in closed.failures.items())
        if self._failed >= MAX_FAILED_ROUNDS:
            raise RunFailed(f"{self._failed} rounds in a row gave only errors: {reasons}")
        if self._refused >= MAX_REFUSED_ROUNDS:
            raise RunFailed(
                f"in {self._refused} rounds every update was refused: {reasons}. Lower lr or outer-lr, mend "
                "those clients, or relax the key that refuses their updates (admission, in docs/protocol.md)"
            )
