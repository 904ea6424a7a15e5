"""Redis servers for tests: real, private, gone with the test. Import the fixtures you need."""

from collections.abc import Iterator

import pytest

from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port


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
