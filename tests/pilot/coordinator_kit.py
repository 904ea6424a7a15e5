"""Both halves of a coordinator."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from pilot.coordination.coordinator import ClientCoordinator, ServerCoordinator


def server(url: str, run_dir: Path, *, run: str = "r", term: int = 1) -> ServerCoordinator:
    return ServerCoordinator(url, run, term=term, run_dir=run_dir)


@contextmanager
def client(
    url: str, *, run: str = "r", name: str = "c", term: int = 1, round_number: int = 1
) -> Iterator[ClientCoordinator]:
    half = ClientCoordinator(url, run, client=name, term=term, round_number=round_number)
    try:
        yield half
    finally:
        half.close()


def keys(url: str) -> dict[str, object]:
    with redis.Redis.from_url(url, decode_responses=True) as raw:
        return {key: raw.type(key) for key in raw.scan_iter()}
