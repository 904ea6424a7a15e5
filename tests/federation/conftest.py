"""A Redis for the tests of a file, and servers of scripted sites on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos.processes import copy_app
from pilot.processes.local_redis import LocalRedis

from .scripted import ScriptedSite, Server, scripted_config


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with LocalRedis() as server:
        yield server.url


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_app(tmp_path_factory.mktemp("app") / "pilot")


@pytest.fixture
def server(redis_url: str, tmp_path: Path) -> Any:
    """Makes servers of one run; its name is the test's own, since the tests share a Redis."""

    def make(sites: list[ScriptedSite], **values: Any) -> Server:
        name = values.pop("run_name", tmp_path.name)
        config = scripted_config(**{"run_name": name, **values})
        return Server(config, sites, tmp_path / name, redis_url)

    return make
