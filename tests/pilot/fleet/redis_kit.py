"""A real Redis with a fleet's users, on a free port."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pilot.fleet import redis_users
from pilot.processes import keeper
from pilot.processes.local_redis import find_server
from pilot.processes.scratch import free_port

from ...waiting import until


@dataclass(frozen=True)
class FleetRedis:
    port: int
    passwords: dict[str, str]
    admin: redis_users.Admin

    def url(self, user: str, password: str = "") -> str:
        return redis_users.url("127.0.0.1", self.port, user, password or self.passwords[user])


@contextmanager
def fleet_redis(directory: Path) -> Iterator[FleetRedis]:
    port, passwords = free_port(), redis_users.passwords(directory / "redis.json")
    redis_users.write_users(directory, passwords, {})
    configuration = redis_users.write_configuration(directory, port)
    admin = redis_users.Admin(directory, port, passwords)
    process = keeper.start([str(find_server()), str(configuration)], output=subprocess.DEVNULL)
    try:
        until(admin.answers, what="Redis")
        yield FleetRedis(port, passwords, admin)
    finally:
        keeper.stop(process)
