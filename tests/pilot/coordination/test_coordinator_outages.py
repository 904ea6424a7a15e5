"""Redis that loses everything, is away, full, or refuses the login: logged once, and nothing stops for it."""

import logging
import threading
import time
from pathlib import Path

import pytest
import redis

from pilot.coordination import link as link_module
from pilot.coordination.coordinator import ClientCoordinator, CoordinatorError, ping, resolve_url
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port
from pilot.site.stop import Progress, StopWatcher
from pilot.wire.messages import Fence, Heartbeat

from ...waiting import until
from ..coordinator_kit import client, keys, server
from ..grid_fixture import ManualClock

# -- outages -------------------------------------------------------------------------------------


def counted(log: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in log.records)


def test_everything_is_written_again_after_redis_lost_it(redis_url: str, tmp_path: Path) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(3)
    with redis.Redis.from_url(redis_url) as raw:
        raw.flushdb()  # of a server that this test alone uses
    with client(redis_url, round_number=2) as half:
        assert half.round_over() is None
        leader.tick()
        assert half.round_over() == "a later round"
    assert set(keys(redis_url)) == {"pilot:r:server", "pilot:r:round", "pilot:r:run"}


def test_stops_and_acknowledgements_of_the_server_come_back_too(
    redis_url: str, tmp_path: Path
) -> None:
    leader = server(redis_url, tmp_path)
    leader.open_round(3)
    fence = Fence("r", 1, 3, 9)
    leader.stop_client("c", "maintenance")
    leader.stop_client("d", "maintenance")
    leader.clear_client_stop("d")
    leader.acknowledge("c", fence)
    with redis.Redis.from_url(redis_url) as raw:
        raw.flushdb()
    leader.tick()
    with client(redis_url) as half, client(redis_url, name="d") as other:
        assert half.told_to_leave() == "maintenance" and half.acknowledged(fence)
        assert other.told_to_leave() is None


def test_outage_stops_nothing_and_is_logged_once_when_it_starts_and_ends(
    tcp_redis: LocalRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url, port = tcp_redis.url, int(tcp_redis.url.rpartition(":")[2].partition("/")[0])
    leader = server(url, tmp_path)
    leader.open_round(1)
    with client(url) as half:
        half.wait(0.01)
        tcp_redis.stop()
        for _ in range(3):
            leader.tick()
            assert leader.heartbeats(["c"]) == {}
            assert half.round_over() is None
            half.send_heartbeat(Heartbeat(tokens=1), expiry_s=60)
            half.wait(0.01)
        leader.end_round("min-duration")
        assert counted(caplog, "unavailable while") == 2, "one line a side"
        assert counted(caplog, "is back") == 0
        with LocalRedis(port=port, password="correct horse"):
            leader.tick()
            assert half.round_over() == "min-duration", (
                "the end whose signal was lost is in the key"
            )
            half.send_heartbeat(Heartbeat(tokens=1), expiry_s=60)
            half.wait(0.01)
            half.wait(0.01)
            assert list(leader.heartbeats(["c"])) == ["c"]
            assert counted(caplog, "is back") == 2
            assert counted(caplog, "unavailable while") == 2
            leader.finish()
    assert "correct" not in caplog.text and "horse" not in caplog.text


def test_watcher_doesnt_spin_while_redis_is_away_and_hears_the_end_after_it(
    tcp_redis: LocalRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, port = tcp_redis.url, int(tcp_redis.url.rpartition(":")[2].partition("/")[0])
    leader = server(url, tmp_path)
    leader.open_round(1)
    half = ClientCoordinator(url, "r", client="c", term=1, round_number=1)
    looks = 0
    look = half.round_over

    def count() -> str | None:
        nonlocal looks
        looks += 1
        return look()

    half.round_over = count  # type: ignore[method-assign]
    heartbeat_s = 0.1
    with StopWatcher(half, Progress(), seconds_left=600, heartbeat_s=heartbeat_s) as watcher:
        until(lambda: leader.heartbeats(["c"]))
        tcp_redis.stop()
        until(lambda: counted(caplog, "unavailable while"))
        began, looks = time.monotonic(), 0
        until(lambda: looks >= 5)
        assert looks <= 3 + 2 * (time.monotonic() - began) / heartbeat_s, "it spins"
        assert not watcher.should_stop()
        with LocalRedis(port=port, password="correct horse"):
            leader.end_round("min-duration")
            until(watcher.should_stop)
            assert watcher.reason == "min-duration"
            until(lambda: leader.heartbeats(["c"]))
            assert counted(caplog, "unavailable while") == counted(caplog, "is back") == 1
            leader.finish()


def test_client_that_never_reaches_redis_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://:hunter2@127.0.0.1:{free_port()}"
    with client(url) as half:
        assert half.round_over() is None
        half.send_heartbeat(Heartbeat(tokens=1), expiry_s=1)
        half.wait(0.0)
    assert counted(caplog, "unavailable while") == 1 and "hunter2" not in caplog.text


# -- addresses -----------------------------------------------------------------------------------


def test_redis_that_is_not_there_is_one_sentence_without_credentials(tmp_path: Path) -> None:
    for url in (f"redis://bob:hunter2@127.0.0.1:{free_port()}/0", f"unix://{tmp_path}/no.sock"):
        for start in (lambda u=url: ping(u), lambda u=url: server(u, tmp_path)):
            with pytest.raises(CoordinatorError, match="PILOT_REDIS_URL") as caught:
                start()
            assert "hunter2" not in str(caught.value) and "bob" not in str(caught.value)


def test_redis_that_comes_back_is_waited_for() -> None:
    port = free_port()
    local = LocalRedis(port=port)
    comes = threading.Timer(0.5, local.start)
    comes.start()
    try:
        ping(f"redis://127.0.0.1:{port}/0", within_s=30.0)
    finally:
        comes.join()
        local.stop()


def test_wrong_password_is_one_sentence_without_it(tcp_redis: LocalRedis, tmp_path: Path) -> None:
    port = tcp_redis.url.rpartition(":")[2]
    for url in (f"redis://127.0.0.1:{port}", f"redis://:hunter2@127.0.0.1:{port}"):
        with pytest.raises(CoordinatorError, match="refuses the login") as caught:
            server(url, tmp_path)
        assert "hunter2" not in str(caught.value)


def test_environment_wins_over_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_url("") == "" and resolve_url("redis://a") == "redis://a"
    monkeypatch.setenv("PILOT_REDIS_URL", "unix:///x.sock")
    assert resolve_url("redis://a") == "unix:///x.sock" == resolve_url("")
    monkeypatch.setenv("PILOT_REDIS_URL", "bob:hunter2@h")
    with pytest.raises(ValueError, match="PILOT_REDIS_URL") as caught:
        resolve_url("redis://a")
    assert "hunter2" not in str(caught.value)


def test_redis_that_refuses_writes_only_is_one_line_not_one_a_beat(
    tcp_redis: LocalRedis, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "SETTLED_S", 0.0)
    with client(tcp_redis.url) as half, redis.Redis.from_url(tcp_redis.url) as operator:
        operator.config_set("maxmemory", "1")  # full: each write is refused, reading works
        for _ in range(3):
            half.send_heartbeat(Heartbeat(tokens=1), expiry_s=60)
            assert half.round_over() is None
        assert counted(caplog, "unavailable while") == 1
        assert counted(caplog, "is back") == 0
        operator.config_set("maxmemory", "0")
        half.send_heartbeat(Heartbeat(tokens=1), expiry_s=60)
        assert counted(caplog, "is back") == 1


def test_redis_at_the_limit_of_its_memory_does_not_flap_in_the_log_and_is_named_with_its_cure(
    tcp_redis: LocalRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    link = link_module.RedisLink(tcp_redis.url, "r", clock)
    with redis.Redis.from_url(tcp_redis.url) as operator:
        for limit in ("1", "0", "1", "0", "1", "0"):  # as keys expire and others come
            operator.config_set("maxmemory", limit)
            wrote = link.attempt("writing", lambda: link.redis.set("x", "1"))
            assert bool(wrote) == (limit == "0")
            link.attempt("reading", lambda: link.redis.get("x"))
            clock.at_s += 5.0
        assert counted(caplog, "unavailable while writing") == counted(caplog, "unavailable") == 1
        assert counted(caplog, "It is full: raise its maxmemory") == 1
        assert counted(caplog, "is back") == 0
        clock.at_s += 5.0
        link.attempt("writing", lambda: link.redis.set("x", "1"))
        assert counted(caplog, "is back for writing after 25.0 s") == 1
        operator.config_set("maxmemory", "1")
        with pytest.raises(CoordinatorError, match="It is full: raise its maxmemory"):
            server(tcp_redis.url, tmp_path)
    link.close()


def test_reading_and_writing_that_are_refused_are_two_outages_and_away_is_one(
    tcp_redis: LocalRedis, caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()
    link = link_module.RedisLink(tcp_redis.url, "r", clock)
    kinds = ("reading", "writing")

    def both(error: Exception | None) -> None:
        for kind in kinds:
            link.attempt(kind, lambda: _raise(error))
        clock.at_s += 1.0

    for _ in range(3):
        both(redis.ConnectionError("away"))
    assert counted(caplog, "unavailable") == 1 and link.failing
    both(None)
    assert counted(caplog, "is back after 3.0 s") == 1 and not link.failing
    for _ in range(3):
        both(redis.ResponseError("no permission"))
    assert [counted(caplog, f"unavailable while {kind} (no permission)") for kind in kinds] == [
        1,
        1,
    ]
    for _ in range(12):
        both(None)
    assert [counted(caplog, f"is back for {kind} after 3.0 s") for kind in kinds] == [1, 1]
    link.close()


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
