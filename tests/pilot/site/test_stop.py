"""All stop sources, one decision: each of them stops, and the first one says why."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator
from pilot.site.notice import notice_files, noticed
from pilot.site.stop import Progress, StopWatcher
from pilot.wire.messages import Heartbeat, StopReason

from ...waiting import LIMIT_S, until

ROOT = Path(__file__).resolve().parents[3]


def alone(seconds_left: float = 600.0) -> StopWatcher:
    return StopWatcher(None, Progress(), seconds_left=seconds_left, heartbeat_s=0.05)


def watched(url: str, progress: Progress | None = None, **values: Any) -> StopWatcher:
    half = ClientCoordinator(url, "r", client="c", term=1, round_number=1)
    options = {"seconds_left": 600.0, "heartbeat_s": 0.05} | values
    return StopWatcher(half, progress or Progress(), **options)


def test_nothing_stops_a_worker_without_a_reason() -> None:
    with alone() as stop:
        assert not stop.should_stop() and stop.reason == ""


@pytest.mark.parametrize("seconds_left", [0.0, -5.0])
def test_time_that_is_up_stops_at_once_without_redis(seconds_left: float) -> None:
    with alone(seconds_left) as stop:
        assert stop.should_stop() and stop.reason == "deadline"


def test_deadline_comes_without_redis() -> None:
    with alone(0.2) as stop:
        assert not stop.should_stop()
        until(stop.should_stop)
        assert stop.reason == "deadline"


def test_first_reason_counts() -> None:
    with alone() as stop:
        stop.stop("lease used up")
        stop.stop("SIGTERM")
        assert stop.should_stop() and stop.reason == "lease used up"
    with alone(0.0) as late:
        late.stop("SIGTERM")
        assert late.should_stop() and late.reason == "deadline", "it had passed before"


def test_one_of_many_threads_is_first() -> None:
    with alone() as stop:
        threads = [threading.Thread(target=stop.stop, args=[str(i)]) for i in range(20)]
        for thread in threads:
            thread.start()
        first = stop.reason
        for thread in threads:
            thread.join()
        assert stop.reason in {str(i) for i in range(20)} and first in ("", stop.reason)


def test_worker_that_starts_after_the_end_stops_at_once(
    redis_url: str, leader: ServerCoordinator
) -> None:
    leader.end_round("min-duration")
    with watched(redis_url) as stop:
        assert stop.should_stop() and stop.reason == "min-duration"


@pytest.mark.parametrize("heartbeat_s", [0.05, 3600.0])
def test_end_of_the_round_stops_whatever_the_heartbeat(
    redis_url: str, leader: ServerCoordinator, heartbeat_s: float
) -> None:
    with watched(redis_url, heartbeat_s=heartbeat_s) as stop:
        assert not stop.should_stop()
        until(lambda: leader.heartbeats(["c"]))
        leader.end_round("target-tokens")
        until(stop.should_stop)
        assert stop.reason == "target-tokens"


def test_end_is_found_without_its_signal(
    redis_url: str, leader: ServerCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader._link.redis, "publish", lambda *_: 0)
    with watched(redis_url, heartbeat_s=3600.0) as stop:
        until(lambda: leader.heartbeats(["c"]))
        leader.end_round("min-duration")
        until(stop.should_stop)


def test_later_round_stops_a_worker_that_was_forgotten(
    redis_url: str, leader: ServerCoordinator
) -> None:
    with watched(redis_url) as stop:
        leader.open_round(2)
        until(stop.should_stop)
        assert stop.reason == "a later round"


def test_progress_is_what_the_server_sees_until_the_end_and_after_it(
    redis_url: str, leader: ServerCoordinator
) -> None:
    progress = Progress()
    with watched(redis_url, progress) as stop:
        until(lambda: leader.heartbeats(["c"]))
        progress.update(state="training", tokens=77)
        until(lambda: leader.heartbeats(["c"])["c"].heartbeat.tokens == 77)
        stop.stop("SIGTERM")
        progress.update(state="sending")
        until(lambda: leader.heartbeats(["c"])["c"].heartbeat.state == "sending")
    assert not [t for t in threading.enumerate() if t.name == "pilot-stop"]


def test_a_state_that_is_told_is_seen_at_once_however_far_the_next_heartbeat(
    redis_url: str, leader: ServerCoordinator
) -> None:
    with watched(redis_url, heartbeat_s=3600.0) as stop:
        until(lambda: leader.heartbeats(["c"]))
        stop.enter("sending")
        assert leader.heartbeats(["c"])["c"].heartbeat.state == "sending"


# -- leaving -------------------------------------------------------------------------------------


def test_site_leaves_by_its_stop_key_and_the_round_goes_on_for_others(
    redis_url: str, leader: ServerCoordinator
) -> None:
    with watched(redis_url, heartbeat_s=3600.0) as stop:
        assert not stop.should_stop() and stop.leaving == ""
        leader.stop_client("d", "another's")
        leader.stop_client("c", "maintenance")
        until(stop.should_stop)
        assert stop.reason == stop.leaving == "maintenance"
    with watched(redis_url) as again:
        assert again.should_stop() and again.leaving == "maintenance", "it is looked at first"
    leader.clear_client_stop("c")
    with watched(redis_url) as back:
        assert not back.should_stop()


def test_site_leaves_by_a_notice_with_and_without_redis_and_the_server_is_told(
    redis_url: str, leader: ServerCoordinator, tmp_path: Path
) -> None:
    notice = tmp_path / "notice"
    with watched(redis_url, notices=[tmp_path / "never", notice]) as stop:
        with StopWatcher(
            None, Progress(), seconds_left=600, heartbeat_s=1, notices=[notice]
        ) as other:
            assert not stop.should_stop() and not other.should_stop()
            notice.touch()
            until(lambda: stop.should_stop() and other.should_stop())
            assert stop.leaving == other.leaving == other.reason == f"preempt-file {notice}"
        until(lambda: leader.draining(["c"]) == {"c": f"leaving: preempt-file {notice}"})
    with watched(redis_url, notices=[notice]) as again:
        assert again.should_stop()
    notice.unlink()
    with watched(redis_url, notices=[notice]) as back:
        assert not back.should_stop(), "what it announced itself doesn't hold it back"


def test_machines_variable_wins_over_the_runs_key_and_its_nodes_directory_counts_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert notice_files("") == [] and notice_files("/x") == [Path("/x")]
    monkeypatch.setenv("PILOT_PREEMPT_FILE", str(tmp_path / "preempt"))
    monkeypatch.setenv("PILOT_NODE_DIR", str(tmp_path))
    files = notice_files("/x")
    assert files == [tmp_path / "preempt", tmp_path / "leave"] and noticed(files) == ""
    (tmp_path / "leave").touch()
    assert noticed(files) == "its node ends"
    (tmp_path / "preempt").touch()
    assert noticed(files) == f"preempt-file {tmp_path / 'preempt'}"
    assert noticed([Path("/dev/null/x"), Path("/x" * 5000), Path("nul\0")]) == ""


def test_a_relative_notice_file_is_one_file_from_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    files = notice_files("gone")
    assert files == [tmp_path / "gone"]
    monkeypatch.chdir("/")
    assert noticed(files) == "" and notice_files("~nobody-has-this-name/x")[0].is_absolute()
    (tmp_path / "gone").touch()
    assert noticed(files) == f"preempt-file {tmp_path / 'gone'}"


def test_leaving_is_known_after_another_reason_to_stop(tmp_path: Path) -> None:
    with alone() as stop:
        stop.stop("min-duration")
        assert stop.leaving == ""
        stop.drain("SIGTERM")
        assert (stop.reason, stop.leaving) == ("min-duration", "SIGTERM")


def test_drain_that_takes_too_long_is_told_once_its_deadline_is_over(tmp_path: Path) -> None:
    told: list[str] = []
    progress = Progress(Heartbeat(state="packing"))
    options = {"seconds_left": 600.0, "heartbeat_s": 0.05, "overdue": told.append}
    with StopWatcher(None, progress, drain_deadline_s=0.0, **options) as stop:
        stop.stop("min-duration")
        time.sleep(0.6)
        assert told == [], "the end of a round is no reason to leave"
        stop.drain("SIGTERM")
        until(lambda: told)
    assert "SIGTERM" in told[0] and "drain-deadline" in told[0] and "packing" in told[0]
    told.clear()
    with StopWatcher(None, progress, drain_deadline_s=600.0, **options) as stop:
        stop.drain("SIGTERM")
        time.sleep(0.6)
    assert told == []


def test_a_worker_that_shows_no_sign_of_stopping_hangs(tmp_path: Path) -> None:
    told: list[str] = []
    progress = Progress(Heartbeat(state="training", step=1))
    options = {"seconds_left": 600.0, "heartbeat_s": 0.05, "overdue": told.append, "stuck_s": 1.2}
    with StopWatcher(None, progress, **options) as stop:
        stop.stop(StopReason.LEASE_USED_UP)  # it saves what it has, however long that takes
        time.sleep(2.0)
        assert told == []
    with StopWatcher(None, Progress(Heartbeat(state="training")), **options) as stop:
        stop.stop("target-tokens")  # it compiles
        time.sleep(2.0)
        assert told == []
    with StopWatcher(None, progress, **options) as stop:
        time.sleep(2.0)
        assert told == [], "there is no reason to stop"
        stop.stop("target-tokens")
        for _ in range(5):  # slow, and not stuck
            time.sleep(0.6)
            progress.step_done(rows=1, tokens=8)
        assert told == []
        until(lambda: told)
    assert told[0].startswith("the worker hangs while training: it should have stopped")
    assert "target-tokens" in told[0]


def test_rank_that_is_told_by_another_watches_nothing(tmp_path: Path) -> None:
    (tmp_path / "notice").touch()
    options = {"seconds_left": 600.0, "heartbeat_s": 0.05, "notices": [tmp_path / "notice"]}
    with StopWatcher(None, Progress(), watches=False, **options) as stop:
        assert not stop.should_stop()
        assert not [t for t in threading.enumerate() if t.name == "pilot-stop"]


DRAINING = """
import signal, time
from pilot.site.stop import Progress, StopWatcher
with StopWatcher(None, Progress(), seconds_left=600, heartbeat_s=1) as stop:
    signal.signal(signal.SIGTERM, lambda *_: stop.drain("SIGTERM"))
    print("ready", flush=True)
    while not stop.should_stop():
        time.sleep(0.01)
print("drained:", stop.reason, flush=True)
"""


def test_sigterm_drains_a_process() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", DRAINING], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        os.kill(worker.pid, signal.SIGTERM)
        assert worker.communicate(timeout=LIMIT_S)[0] == "drained: SIGTERM\n"
        assert worker.returncode == 0
    finally:
        worker.kill()
        worker.wait()
