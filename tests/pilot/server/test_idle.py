"""Where the time goes in which no client trains."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.idle import accounts
from pilot.run.events import read_events
from pilot.server.idle import Cause, IdleTime, gathering
from pilot.server.report import Report
from pilot.server.telemetry import Telemetry

from ..grid_fixture import ManualClock


class _Server:
    def __init__(self, directory: Path) -> None:
        self.directory, self.clock = directory, ManualClock(100.0)
        telemetry = Telemetry(
            directory, config_dict={}, wandb_mode="disabled", wandb_project="", run_name="r"
        )
        self.idle = IdleTime(Report(telemetry), self.clock, directory)

    def spans(self) -> list[tuple[str, float, int | None]]:
        events = read_events(self.directory / "events.jsonl")
        return [(e["cause"], e["seconds"], e["round"]) for e in events if e["event"] == "idle"]


def test_each_span_is_told_once_with_its_cause_and_training_is_none(tmp_path: Path) -> None:
    server = _Server(tmp_path)
    for cause in (Cause.NO_CLIENT, Cause.NO_CLIENT, Cause.START, None, None, Cause.REPLIES):
        server.idle.because(cause, 7)
        server.clock.sleep(2.0)
    server.idle.because(Cause.MERGE, 8)
    assert server.spans() == [("no-client", 4.0, 7), ("start", 2.0, 7), ("replies", 2.0, 8)]
    server.clock.sleep(0.5)
    server.idle.stop(on_purpose=False)
    assert server.spans()[-1] == ("merge", 0.5, None)


def test_a_server_that_died_is_missed_and_one_that_was_stopped_is_not(tmp_path: Path) -> None:
    first = _Server(tmp_path)
    assert first.spans() == []
    first.idle.stop(on_purpose=False)
    died = time.time() - 30.0
    os.utime(tmp_path / "server-alive", (died, died))
    second = _Server(tmp_path)
    ((cause, seconds, _),) = second.spans()
    assert cause == "server-away" and seconds == pytest.approx(30.0, abs=5.0)
    second.idle.stop(on_purpose=True)
    assert len(_Server(tmp_path).spans()) == 1


def test_the_file_is_touched_while_the_server_lives_and_not_at_each_tick(tmp_path: Path) -> None:
    server = _Server(tmp_path)
    alive = tmp_path / "server-alive"
    for pause_s, touched in ((0.4, False), (0.4, False), (0.4, True), (0.4, False)):
        os.utime(alive, (1.0, 1.0))
        server.clock.sleep(pause_s)
        server.idle.because(None)
        assert (alive.stat().st_mtime > 1.0) == touched


def test_what_a_round_waits_for_before_it_opens() -> None:
    assert gathering(2, 1, asked=True) is Cause.HELLO
    assert gathering(0, 1, asked=False) is Cause.NO_CLIENT
    assert gathering(1, 1, asked=False) is Cause.MISSING_CLIENT


def test_the_accounts_add_up_and_leave_out_what_is_outside_of_the_run() -> None:
    def idle(at: float, cause: str, seconds: float) -> dict[str, object]:
        return {"time": at, "event": "idle", "cause": cause, "seconds": seconds, "round": 1}

    events = [
        idle(9.0, "no-client", 9.0),
        {"time": 10.0, "event": "round_opened"},
        idle(12.0, "start", 5.0),  # it began before the round opened
        idle(40.0, "replies", 4.0),
        idle(41.0, "merge", 1.0),
        idle(50.0, "start", 3.0),
        {"time": 60.0, "event": "round_committed"},
        idle(70.0, "evaluation", 10.0),
    ]
    found = accounts(events)
    assert found["seconds"] == 50.0 and found["idle_seconds"] == 10.0
    assert found["training_share"] == 0.8
    assert list(found["by_cause"]) == ["start", "replies", "merge"]
    assert found["by_cause"]["start"] == {
        "seconds": 5.0,
        "spans": 2,
        "median_s": 2.5,
        "longest_s": 3.0,
    }
    assert [span["seconds"] for span in found["longest"]] == [4.0, 3.0, 2.0, 1.0]
    assert accounts(events[:4]) == {}
