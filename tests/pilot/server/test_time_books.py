"""What a round's orders and phases become: an event whose phases are all the time, a line, a table."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pilot.rules.accounts import run_account
from pilot.run.events import read_events
from pilot.run.state import RoundRecord, RunState
from pilot.server.idle import TRAINING, Cause, IdleTime
from pilot.server.report import Report
from pilot.server.tables import _PHASES, size, time_table
from pilot.server.telemetry import Telemetry
from pilot.server.time_books import TimeBooks

from ..grid_fixture import ManualClock
from .round_kit import Round


class _Server:
    """A round of three clients (orders sent at 0 s, 100 bytes each), and its books of time."""

    def __init__(self, directory: Path) -> None:
        self.round, self.clock, self.directory = Round(directory), ManualClock(0.0), directory
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        self.report = Report(telemetry)
        self.idle = IdleTime(self.report, self.clock, directory)
        self.books = TimeBooks(self.idle, self.report)

    def spend(self, cause: Cause | None, seconds: float) -> None:
        self.idle.because(cause, 3)
        self.clock.sleep(seconds)

    def answer(self, name: str, start_s: float | None = 1.0, **said: Any) -> None:
        answer = self.round.answer(name, self.round.reply(name, **said))
        settled = self.round.open.handle_answer(answer)
        assert settled is not None
        self.books.answered(settled, start_s, self.clock.now_s())

    def all_told(self) -> list[dict[str, Any]]:
        events = read_events(self.directory / "events.jsonl")
        return [event for event in events if event["event"] == "round_time"]

    def told(self) -> dict[str, Any]:
        return self.all_told()[-1]


SECONDS = {"total_s": 8.0, "ready_s": 0.5, "eval_s": 1.0, "train_s": 6.0, "pack_s": 1.0}


@pytest.fixture
def server(tmp_path: Path) -> _Server:
    return _Server(tmp_path)


def _a_round(server: _Server) -> dict[str, Any]:
    """Client a answers after 10 s, b is refused, c never answers; merge and snapshot end at 13 s."""
    for cause, seconds in ((Cause.START, 2.0), (Cause.EVALUATION, 1.0), (None, 5.0)):
        server.spend(cause, seconds)
    server.spend(Cause.REPLIES, 2.0)
    server.answer("a", **SECONDS)
    server.answer("b", tokens=7, **SECONDS)  # tokens that are not those of its rows
    server.spend(Cause.MERGE, 1.0)
    server.spend(Cause.SNAPSHOT, 2.0)
    server.books.close(server.round.open, merged=True)
    return server.told()


def test_phases_are_all_the_time_and_each_client_has_its_account(server: _Server) -> None:
    told = _a_round(server)
    assert told["phases"] == {
        "start": 2.0,
        "evaluation": 1.0,
        "training": 5.0,
        "replies": 2.0,
        "merge": 1.0,
        "snapshot": 2.0,
    }
    assert told["round_s"] == 13.0 == sum(told["phases"].values())
    a, b, c = (told["clients"][name] for name in "abc")
    assert a["training_s"] == 5.0 and a["period_s"] == 8.0 and a["goodput"] == 0.625
    assert a["sending_s"] == pytest.approx(10 - 1 - (8 - 0.5))
    assert (b["training_s"], b["goodput"]) == (0.0, 0.0), "what a refused reply says is not known"
    assert (c["start_s"], c["goodput"], c["bytes_up"]) == (0.0, 0.0, 0)
    assert a["bytes_up"] == told["bytes_up"] - b["bytes_up"] > 0
    assert told["goodput"] == pytest.approx(5 / 24)


def test_the_next_round_counts_from_the_end_of_this_ones_training(
    server: _Server, tmp_path: Path
) -> None:
    _a_round(server)
    other = tmp_path / "next"
    other.mkdir()
    server.round = Round(other)
    for cause, seconds in ((Cause.START, 1.0), (None, 6.0)):
        server.spend(cause, seconds)
    server.spend(Cause.REPLIES, 1.0)
    server.answer("a", **SECONDS)
    server.books.close(server.round.open, merged=True)
    told = server.told()
    assert told["phases"] == {"start": 1.0, "training": 6.0, "replies": 1.0}
    # training ended at 8 s, then at 13 + 1 + 6
    assert told["clients"]["a"]["period_s"] == 12.0


def test_a_merge_that_is_taken_back_was_no_goodput(server: _Server) -> None:
    server.spend(None, 8.0)
    server.answer("a", **SECONDS)
    server.spend(Cause.MERGE, 1.0)
    server.books.close(server.round.open, merged=False)
    assert server.told()["goodput"] == 0.0
    assert server.told()["clients"]["a"]["training_s"] == 5.0


def test_a_round_that_nobody_was_seen_training_in_ends_with_its_last_answer(
    server: _Server,
) -> None:
    server.spend(Cause.START, 12.0)
    server.answer("a", **SECONDS)
    server.spend(Cause.MERGE, 1.0)
    server.books.close(server.round.open, merged=True)
    assert server.told()["clients"]["a"]["period_s"] == 12.0


def test_an_evaluation_after_the_last_round_is_in_no_period(server: _Server) -> None:
    _a_round(server)
    before = run_account(server.all_told())
    sent = server.round.open.sent
    server.round.open.sent = {i: replace(order, lease=None) for i, order in sent.items()}
    server.spend(Cause.EVALUATION, 9.0)
    server.books.close(server.round.open, merged=False)
    assert server.told()["goodput"] is None and server.told()["round_s"] == 9.0
    after = run_account(server.all_told())
    assert after.goodput == pytest.approx(before.goodput, rel=1e-3)
    assert after.phases["evaluation"] == before.phases["evaluation"] + 9.0


def test_the_line_of_a_round_and_the_table_of_a_run_are_for_people(
    server: _Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pilot")
    _a_round(server)
    assert caplog.messages[-1].startswith(
        "[ROUND 3] 13.0 s: start 2.0, evaluation 1.0, training 5.0, replies 2.0, merge 1.0, "
        "snapshot 2.0; down 0 B, up "
    )
    assert caplog.messages[-1].endswith("; goodput 20.8%")
    state: RunState = server.round.state
    state.history = [RoundRecord(3, "all-replied", 1, 32, 13.0, 2.0)]
    caplog.clear()
    server.report.run_finished(state, final_model="f", checkpoint="c")
    lines = [line.split() for line in caplog.messages]
    assert ["training", "5.0", "38.5%"] in lines
    assert ["all", "13.0", "100.0%"] in lines
    assert ["all", "20.8%"] in lines
    (of_a,) = (line for line in lines if line[:1] == ["a"])
    assert of_a[1] == "62.5%" and of_a[6] == "5.0"


def test_a_run_without_a_round_has_no_table() -> None:
    assert time_table(run_account([])) == ""


def test_the_phases_that_a_round_shows_first_are_causes() -> None:
    assert set(_PHASES) <= {*Cause, TRAINING}


def test_sizes_have_the_unit_that_people_expect() -> None:
    assert [size(n) for n in (0, 999, 1_500, 745e6, 3e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "745.0 MB",
        "3.0 TB",
    ]
