"""A deployed run whose server is gone is resumed; a mistake is not repeated."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pilot.errors import PilotError
from pilot.launch.flower_run import Outcome
from pilot.launch.keep import MAX_FAILURES, keep_running

COMPLETED = Outcome("finished:completed")
KILLED = Outcome("finished:failed", "its process was killed")
ROUND, COMMIT = "[ROUND 1]", "round=1 val_bpb=2.1876"


class Run:
    """What `FlowerRun` is to its keeper."""

    def __init__(self) -> None:
        self.stopped, self.closed = threading.Event(), False

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed = True


class Attempts:
    """Each attempt: the lines that it shows, then how it ends (or what it raises)."""

    def __init__(self, *attempts: tuple[list[str], Outcome | PilotError]) -> None:
        self._attempts = list(attempts)
        self.runs: list[Run] = []
        self.shown: list[str] = []
        self.pauses: list[float] = []

    def submit(self) -> Any:
        self.runs.append(Run())
        return self.runs[-1]

    def follow(self, run: Any, show: Callable[[str], None]) -> Outcome:
        lines, end = self._attempts.pop(0)
        for line in lines:
            show(line)
        if isinstance(end, PilotError):
            raise end
        return end

    def keep(self) -> Outcome:
        return keep_running(
            self.submit, self.follow, self.shown.append, run_name="r", sleep=self.pauses.append
        )


def test_a_run_whose_server_is_gone_is_resumed_at_once_and_flower_told_that_it_ended() -> None:
    attempts = Attempts(([ROUND, COMMIT], KILLED), ([ROUND, COMMIT], COMPLETED))
    assert attempts.keep() == COMPLETED
    assert attempts.pauses == [0.0]
    first, second = attempts.runs
    assert first.stopped.wait(30) and not second.stopped.is_set()
    assert all(run.closed for run in attempts.runs)
    said = "The run ended (its process was killed): resuming run r in 0 s"
    assert attempts.shown == [ROUND, COMMIT, said, ROUND, COMMIT]


def test_what_fails_before_the_first_round_is_a_mistake() -> None:
    wrong = Outcome("finished:failed", "no tokenizer")
    assert Attempts(([], wrong)).keep() == wrong
    with pytest.raises(PilotError, match="Flower refused"):
        Attempts(([], PilotError("Flower refused the run"))).keep()


def test_a_run_that_somebody_stops_stays_stopped() -> None:
    stopped = Outcome("finished:stopped")
    assert Attempts(([ROUND, COMMIT], stopped)).keep() == stopped


def test_an_unreachable_superlink_is_asked_again_after_growing_pauses() -> None:
    away = ([], PilotError("no SuperLink answers"))
    attempts = Attempts(([ROUND, COMMIT], KILLED), away, away, ([ROUND], COMPLETED))
    assert attempts.keep() == COMPLETED
    assert attempts.pauses == [0.0, 2.0, 6.0]


def test_failures_without_a_round_between_them_end_it_and_a_round_forgives_them() -> None:
    failing = [([ROUND], KILLED)] * MAX_FAILURES
    attempts = Attempts(*failing, ([ROUND, COMMIT], KILLED), *failing)
    assert attempts.keep() == KILLED
    assert len(attempts.pauses) == 2 * MAX_FAILURES
    assert max(attempts.pauses) == 60.0


def test_a_server_that_died_after_it_had_written_its_results_has_completed_the_run() -> None:
    done = Outcome("finished:failed", "run r is finished: choose another run-name")
    attempts = Attempts(([ROUND, COMMIT], KILLED), ([], done))
    assert attempts.keep() == COMPLETED


def test_a_run_that_an_operator_has_stopped_stays_stopped() -> None:
    details = "the run was stopped (by bob on here); the same command resumes it"
    ended = Outcome("finished:failed", details)
    attempts = Attempts(([ROUND, COMMIT], ended), ([ROUND, COMMIT], COMPLETED))
    assert attempts.keep() == ended and ended.was_stopped
    assert len(attempts.runs) == 1, "nobody resumes it"
    assert not KILLED.was_stopped
