"""The run's lock: renewed while the server is busy, and how an observer knows that it is gone."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from pilot.coordination import coordinator as module
from pilot.coordination import lock
from pilot.coordination.coordinator import CoordinatorError
from pilot.coordination.lock import ServerWatch

from ...waiting import until
from ..coordinator_kit import server

LEADER = """
import sys, time
from pathlib import Path
from pilot.coordination.coordinator import ServerCoordinator
leader = ServerCoordinator(sys.argv[1], "r", term=1, run_dir=Path(sys.argv[2]))
leader.open_round(1)
print("leads", flush=True)
while True:
    leader.tick()
    time.sleep(0.05)
"""


@pytest.fixture
def watch(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerWatch]:
    monkeypatch.setattr(lock, "_LOOK_S", 0.0)
    watch = ServerWatch(redis_url, "r")
    watch.begin()
    yield watch
    watch.close()


def test_a_lock_is_renewed_while_its_server_is_busy(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SERVER_EXPIRY_S", 1.0)
    monkeypatch.setattr(lock, "RENEW_S", 0.05)
    busy = server(redis_url, tmp_path / "1")
    with busy.lock_renewed():
        time.sleep(1.5)  # writes a snapshot
        with pytest.raises(CoordinatorError, match="already led"):
            server(redis_url, tmp_path / "2")
    busy.finish()
    heir = server(redis_url, tmp_path / "2")
    heir.finish()


def test_a_renewal_leaves_anothers_lock_alone(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.01)
    first = server(redis_url, tmp_path / "1")
    with first.lock_renewed(), redis.Redis.from_url(redis_url, decode_responses=True) as raw:
        raw.set("pilot:r:server", "somebody else", px=400)
        until(lambda: raw.get("pilot:r:server") is None)


def test_a_server_that_ends_in_good_order_is_not_missed(
    redis_url: str, tmp_path: Path, watch: ServerWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ABSENT_S", 0.0)
    assert watch.failure() is None  # it is yet to come
    leader = server(redis_url, tmp_path)
    leader.open_round(1)
    assert watch.failure() is None
    leader.finish(run_finished=True)
    assert watch.failure() is None


def test_a_killed_process_of_this_machine_is_known_at_once_and_its_heir_lives(
    redis_url: str, tmp_path: Path, watch: ServerWatch
) -> None:
    command = [sys.executable, "-c", LEADER, redis_url, str(tmp_path)]
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"leads\n"
            assert watch.failure() is None
            process.kill()
        assert watch.failure() == "its process was killed"
        watch.begin()
        assert watch.failure() is None


def test_a_killed_process_of_this_machine_is_known_although_redis_has_lost_everything(
    redis_url: str, tmp_path: Path, watch: ServerWatch
) -> None:
    command = [sys.executable, "-c", LEADER, redis_url, str(tmp_path)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        redis.Redis.from_url(redis_url) as raw,
    ):
        assert process.stdout is not None and process.stdout.readline() == b"leads\n"
        assert watch.failure() is None
        process.kill()
        process.wait()
        raw.flushdb()
    assert watch.failure() == "its process was killed"


def test_the_lock_of_a_server_elsewhere_must_expire(
    redis_url: str, tmp_path: Path, watch: ServerWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ABSENT_S", 0.1)
    with redis.Redis.from_url(redis_url, decode_responses=True) as raw:
        elsewhere = json.dumps({"host": "elsewhere", "pid": 1, "run_dir": str(tmp_path)})
        raw.hset("pilot:r:run", "state", "running")
        raw.set("pilot:r:server", elsewhere, px=300)
        assert watch.failure() is None
        until(lambda: watch.failure() == "its lock in Redis has expired")


def test_without_redis_nothing_is_known(watch: ServerWatch, redis_url: str, tmp_path: Path) -> None:
    unreachable = ServerWatch("redis://127.0.0.1:1/0", "r")
    unreachable.begin()
    assert unreachable.failure() is None
    unreachable.close()
