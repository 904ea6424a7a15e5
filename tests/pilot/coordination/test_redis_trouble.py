"""Whatever Redis does in mid-round, both halves go on, don't spin, and say so in one line each time."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from pilot.coordination import link as link_module
from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port
from pilot.site.stop import Progress, StopWatcher
from pilot.wire.messages import Fence

from ...waiting import until

HEARTBEAT_S = 0.1
FENCE = Fence("r", 1, 3, 9)


def port_of(server: LocalRedis) -> int:
    return int(server.url.rpartition(":")[2].partition("/")[0])


@contextmanager
def restarts_empty(server: LocalRedis) -> Iterator[None]:
    port = port_of(server)
    server.stop()
    yield
    server.__init__(port=port, password="correct horse")  # type: ignore[misc] # the fixture ends it
    server.start()


@contextmanager
def does_not_answer(server: LocalRedis) -> Iterator[None]:
    assert server._keeper is not None
    (process,) = psutil.Process(server._keeper.pid).children()
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextmanager
def refuses_the_password(server: LocalRedis) -> Iterator[None]:
    port = port_of(server)
    server.stop()
    with LocalRedis(port=port, password="changed meanwhile"):
        yield
    server.__init__(port=port, password="correct horse")  # type: ignore[misc] # the fixture ends it
    server.start()


@contextmanager
def is_full(server: LocalRedis) -> Iterator[None]:
    with redis.Redis.from_url(server.url) as operator:
        operator.config_set("maxmemory", "1")
        yield
        operator.config_set("maxmemory", "0")


def counted(log: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in log.records)


@pytest.mark.parametrize(
    "trouble", [restarts_empty, does_not_answer, refuses_the_password, is_full]
)
def test_training_goes_on_and_all_is_as_before_when_redis_is_back(
    trouble: Callable[[LocalRedis], AbstractContextManager[None]],
    tcp_redis: LocalRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(link_module, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(link_module, "PAUSE_S", 0.3)
    monkeypatch.setattr(link_module, "SETTLED_S", 0.3)
    caplog.set_level(logging.DEBUG)
    commands = 0
    execute = redis.Connection.send_command

    def count(self: redis.Connection, *args: object, **kwargs: object) -> None:
        nonlocal commands
        commands += 1
        return execute(self, *args, **kwargs)

    leader = ServerCoordinator(tcp_redis.url, "r", term=1, run_dir=tmp_path)
    leader.open_round(3)
    leader.acknowledge("d", FENCE)
    leader.stop_client("d", "maintenance")
    half = ClientCoordinator(tcp_redis.url, "r", client="c", term=1, round_number=3)
    other = ClientCoordinator(tcp_redis.url, "r", client="d", term=1, round_number=3)
    with (
        StopWatcher(half, Progress(), seconds_left=600, heartbeat_s=HEARTBEAT_S) as watcher,
        StopWatcher(None, Progress(), seconds_left=1.0, heartbeat_s=HEARTBEAT_S) as timed,
    ):
        until(lambda: leader.heartbeats(["c"]))
        with trouble(tcp_redis):
            until(lambda: (leader.tick(), counted(caplog, "unavailable while") == 2)[1])
            monkeypatch.setattr(redis.Connection, "send_command", count)
            began, ticks = time.monotonic(), 0
            while time.monotonic() - began < 1.5:
                leader.tick()
                assert all(heard.age_s == 0 for heard in leader.heartbeats(["c"]).values())
                ticks += 1
                time.sleep(0.05)
            assert commands <= 40 + 8 * ticks, "it spins"
            assert not watcher.should_stop(), "the round is still open"
            until(timed.should_stop)
            assert timed.reason == "deadline"
            assert counted(caplog, "unavailable while") == 2, "one line a side"
            assert counted(caplog, "is back") == 0

        def both_are_back() -> bool:
            leader.tick()
            leader.heartbeats(["c"])
            return counted(caplog, "is back") == 2

        until(both_are_back)
        assert other.told_to_leave() == "maintenance" and other.acknowledged(FENCE)
        until(lambda: leader.heartbeats(["c"]))
        assert not watcher.should_stop()
        leader.end_round("min-duration")
        until(watcher.should_stop)
        assert watcher.reason == "min-duration"
    assert counted(caplog, "unavailable while") == counted(caplog, "is back") == 2
    leader.finish(run_finished=True)
    other.close()
    assert "correct" not in caplog.text and "horse" not in caplog.text


def test_worker_that_starts_while_redis_is_away_trains_to_its_deadline(
    caplog: pytest.LogCaptureFixture,
) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}/0"
    half = ClientCoordinator(url, "r", client="c", term=1, round_number=1)
    with StopWatcher(half, Progress(), seconds_left=1.0, heartbeat_s=HEARTBEAT_S) as watcher:
        assert not watcher.should_stop()
        until(watcher.should_stop)
        assert watcher.reason == "deadline"
    assert counted(caplog, "unavailable while") == 1 and "hunter2" not in caplog.text


def test_nothing_is_tried_for_a_while_after_a_timeout(
    tcp_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "TIMEOUT_S", 0.2)
    link = link_module.RedisLink(tcp_redis.url, "r")
    asked = 0

    def ask() -> bool:
        nonlocal asked
        asked += 1
        return link.redis.set(link.key("x"), "1")

    with does_not_answer(tcp_redis):
        for _ in range(20):
            assert link.attempt("writing", ask) is None
    assert asked == 1, "the round loop would have waited 20 times"
    monkeypatch.setattr(link, "_try_again_at", time.monotonic())
    assert link.attempt("writing", ask) and not link.failing
    link.close()


def test_redis_that_is_not_the_runs_own_is_told_from_the_one_that_is(tmp_path: Path) -> None:
    with LocalRedis() as ours, LocalRedis() as another:
        leader = ServerCoordinator(ours.url, "r", term=1, run_dir=tmp_path)
        link_module.check_run(ours.url, "r")
        with pytest.raises(link_module.CoordinatorError, match="holds nothing of run r") as raised:
            link_module.check_run(another.url, "r")
        assert "set PILOT_REDIS_URL to the server's Redis" in str(raised.value)
        leader.finish()
        url = another.url
    with pytest.raises(link_module.CoordinatorError, match="cannot reach Redis"):
        link_module.check_run(url, "r")
