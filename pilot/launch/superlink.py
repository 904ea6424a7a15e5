"""A private SuperLink for one simulation, which ends with it.

Flower's managed `:local:` SuperLink is found by port only, keeps the environment of the process that started
it first, and never ends; its simulation starts one actor per CPU of the machine (docs/flower.md).
Here it gets a free port, the current environment, its own state in a scratch directory, and a keeper
(`processes/keeper.py`): nothing of it survives, however we end.
"""

import json
import math
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

import psutil

from pilot.errors import PilotError
from pilot.launch.connection import Connection, flower_environment, flower_program, write_toml
from pilot.processes import keeper
from pilot.processes.ancestry import alive
from pilot.processes.output import last_line
from pilot.processes.scratch import free_port

START_TIMEOUT_S = 90.0  # a SuperLink needs 3 s to start, on a loaded machine 15 s
START_ATTEMPTS = 3  # a free port may be taken before the SuperLink binds it
PROBE_TIMEOUT_S = 5.0
ENDING_S = 5.0  # for the ServerApp's own exit handlers, before everything is killed
# Ray's sockets lie about 70 characters below its directory, of 103 that a path may have
MAX_RAY_DIRECTORY_CHARACTERS = 32


class SuperLink:
    """The SuperLink of one simulation; a context manager."""

    def __init__(self, connection: Connection, app: Path) -> None:
        self.connection = connection
        self.scratch = _scratch_directory()
        self._app = app
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed in __exit__
        self._keeper: subprocess.Popen[bytes] | None = None
        self._server: psutil.Process | None = None
        self.env = self._environment()

    def __enter__(self) -> "SuperLink":
        try:
            for _ in range(START_ATTEMPTS):
                if self._start(free_port()):
                    return self
            raise PilotError(
                f"Flower's SuperLink did not start: {last_line(self._log, containing='error')}"
            )
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        if self._keeper is not None:
            keeper.stop(self._keeper)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self._log.close()

    def failure(self) -> str | None:
        """Why the run cannot continue, or None. Flower would report "running" for another minute."""
        assert self._keeper is not None
        if self._keeper.poll() is not None:
            return f"Flower's SuperLink ended: {last_line(self._log, containing='error')}"
        if self._server is None:
            self._server = _find_process(self._keeper.pid, "flwr-simulation")
        elif not alive(self._server):
            return "the server's process was killed"
        return None

    def _start(self, port: int) -> bool:
        """Start a SuperLink and wait until it answers on `port`; False if it ended or never did."""
        (self.scratch / "flwr").mkdir(exist_ok=True)
        table = {"superlink": {self.connection.name: self._table(port)}}
        write_toml(self.scratch / "flwr" / "config.toml", table)
        command = [flower_program("flower-superlink"), "--insecure", "--simulation", "--host"]
        command += ["127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
        self._keeper = keeper.start(
            command,
            cwd=self._app,
            env=self.env,
            output=self._log.fileno(),
            remove=self.scratch,
            grace_s=ENDING_S,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._keeper.poll() is None:
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=PROBE_TIMEOUT_S).close()
                return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        keeper.stop(self._keeper)
        self.scratch.mkdir(mode=0o700, exist_ok=True)  # the keeper has removed it
        return False

    def _table(self, port: int) -> dict[str, Any]:
        """The connection's table with our address, and no more actors than clients."""
        options = json.loads(json.dumps(self.connection.table.get("options", {})))
        options.setdefault("num-supernodes", self.connection.clients)
        backend = options.setdefault("backend", {})
        cpus = self.connection.resource("num-cpus", 1)
        backend.setdefault("client-resources", {}).setdefault("num-cpus", cpus)
        total = max(1, math.ceil(cpus * self.connection.clients))
        backend.setdefault("init-args", {}).setdefault("num-cpus", total)
        return {"address": f"127.0.0.1:{port}", "insecure": True, "options": options}

    def _environment(self) -> dict[str, str]:
        env = flower_environment()
        env["FLWR_HOME"] = str(self.scratch / "flwr")
        env["PILOT_SCRATCH_DIR"] = str(self.scratch)
        if len(str(self.scratch)) <= MAX_RAY_DIRECTORY_CHARACTERS:
            env["RAY_TMPDIR"] = str(self.scratch)
        for name, value in {
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",  # or Ray folds equal lines of several clients into one
        }.items():
            env.setdefault(name, value)
        # Ray's advice on a variable that is Flower's to set
        ignore = "ignore::FutureWarning:ray._private.worker"
        env["PYTHONWARNINGS"] = ",".join(filter(None, (env.get("PYTHONWARNINGS"), ignore)))
        for name in ("NO_PROXY", "no_proxy"):  # a proxy can't reach our 127.0.0.1
            env[name] = ",".join(filter(None, (env.get(name), "127.0.0.1,localhost")))
        return env


def _scratch_directory() -> Path:
    """A fresh private directory, short enough for the Unix sockets of Ray and Redis in it."""
    directory = tempfile.gettempdir()
    if len(directory) > MAX_RAY_DIRECTORY_CHARACTERS - len("/pilot-12345678"):
        directory = "/tmp"
    return Path(tempfile.mkdtemp(prefix="pilot-", dir=directory))


def _find_process(root: int, program: str) -> psutil.Process | None:
    """The first descendant of `root` that runs `program`."""
    try:
        for process in psutil.Process(root).children(recursive=True):
            try:
                if any(Path(word).name == program for word in process.cmdline()[:2]):
                    return process
            except psutil.Error:
                continue  # it has just ended
    except psutil.NoSuchProcess:
        pass
    return None
