"""Redis servers of a test's own, the leader of a run there, and the smallest site."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pilot.coordination.coordinator import ServerCoordinator
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port

from ..nanochat.data_kit import byte_tokenizer, texts, write_shard
from .worker_kit import VAL_SHARD


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


@pytest.fixture
def leader(redis_url: str, tmp_path: Path) -> ServerCoordinator:
    """The server's half of run `r`, whose first round is open."""
    server = ServerCoordinator(redis_url, "r", term=1, run_dir=tmp_path)
    server.open_round(1)
    return server


@pytest.fixture(scope="session")
def site_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with shards and a tokenizer, made once; rows are packed by who needs them."""
    base = tmp_path_factory.mktemp("site")
    for shard in range(VAL_SHARD + 1):
        write_shard(base / "shards", shard, texts(12 + 5 * shard, seed=shard, words=12))
    byte_tokenizer(base / "bytes", num_pairs=35)
    return base


@pytest.fixture
def site(site_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(site_dir))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return site_dir
