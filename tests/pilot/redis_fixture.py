"""Redis servers for tests: real, private, gone with the test. Import the fixtures you need."""

import socket
from collections.abc import Iterator

import pytest

from pilot.processes.local_redis import LocalRedis


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def redis_url() -> Iterator[str]:
    """A server of this test's own, on a Unix socket."""
    with LocalRedis() as server:
        yield server.url


@pytest.fixture
def tcp_redis() -> Iterator[LocalRedis]:
    """A server of this test's own, on a TCP port with a password; `.stop()` it to lose it."""
    with LocalRedis(port=free_port(), password="correct horse") as server:
        yield server
