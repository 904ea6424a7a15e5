"""A federation of real processes on this machine, each of which is restarted when it has died.

    Redis ── line ── ServerApp (on the SuperLink)
      └───── line ── workers of a site
    SuperLink (under `pilot superlink`) ── line ── SuperNode of a site (under `pilot node`)

A *line* is a port of the proxy (`proxy.py`). The supervisor is a thread that does what systemd would do for
Redis, SuperLink, SuperNodes and `pilot run`, which itself resumes a run whose server is gone.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.processes import (
    BIN,
    MARK,
    ROOT,
    copy_app,
    end_group,
    environment,
    listening,
    marked,
    marked_below,
    write_connection,
)
from benchmarks.chaos.proxy import Line, Network, Wire
from pilot.processes.local_redis import find_server
from pilot.processes.scratch import free_port

SUPERVISE_S = 0.25
RESTART_S = 1.0  # between two starts of the same service
HOOKS = Path(__file__).parent / "hooks"


class Service:
    """A process that is to be kept running. While `held` is true, it stays down."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path
    ) -> None:
        self.name, self.held = name, False
        self._command, self._env, self._log = list(command), dict(env), log
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0  # wall clock, of the last start

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def supervise(self) -> None:
        if not self.alive and not self.held and time.time() - self.started_at >= RESTART_S:
            self.start()

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started_at = time.time()

    def close(self) -> None:
        if self._process is not None:
            end_group(self._process)


@dataclass(frozen=True)
class Site:
    """One site: its `pilot node`, its lines, and the file that spoils its next reply."""

    name: str
    mark: str
    node: Service
    superlink_line: Line
    redis_line: Line
    reply_file: Path

    def processes(self, role: str) -> list[psutil.Process]:
        """Its running processes with a role: worker (a rank), clientapp, supernode, or node."""
        return [process for process in marked(self.mark) if has_role(process, role)]


def has_role(process: psutil.Process, role: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError, IndexError):
        if role == "worker":
            return "PILOT_RANK" in process.environ()
        if role == "node":
            return [Path(process.cmdline()[1]).name, *process.cmdline()[2:3]] == ["pilot", "node"]
        return any(Path(word).name == PROGRAMS[role] for word in process.cmdline()[:2])
    return False


PROGRAMS = {
    "clientapp": "flwr-clientapp",
    "supernode": "flower-supernode",
    "serverapp": "flwr-serverapp",
    "superlink": "flower-superlink",
}


class Server:
    """The run, which `pilot run` resumes whenever its server is gone; itself it is kept running, too."""

    def __init__(
        self,
        mark: str,
        port: int,
        app: Path,
        config: Path,
        run_dir: Path,
        env: Mapping[str, str],
        log: Path,
    ) -> None:
        self._mark, self._port = mark, port
        self.run_dir = run_dir
        command = [str(BIN / "pilot"), "run", "local-deployment", "--app", str(app)]
        command += ["--run-config", str(config)]
        self._command = Service("run", command, env, log)
        self.started_at = (
            0.0  # wall clock, when the last server's process was seen for the first time
        )
        self._pid = 0

    def processes(self) -> list[psutil.Process]:
        """The running ServerApp processes."""
        return [process for process in marked(self._mark) if has_role(process, "serverapp")]

    @property
    def finished(self) -> bool:
        return (self.run_dir / "final_model.pt").exists()

    @property
    def over(self) -> bool:
        """Whether the run has its results, and all that led it has ended."""
        return self.finished and not self._command.alive and not self.processes()

    def supervise(self) -> None:
        pids = [process.pid for process in self.processes()]
        if pids and self._pid not in pids:
            self._pid, self.started_at = pids[-1], time.time()
        if not self.finished and listening(self._port):
            self._command.supervise()

    def close(self) -> None:
        self._command.close()


class Federation:
    """All processes of one run. `directory` gets logs and Flower's files, `base` the data and the run.

    Workers have one thread each, so that a machine with two cores can run three sites. `proxied` False: lines
    are the ports themselves. `site_bytes_per_s`: each way, on the wire of a site, which its lines share (0:
    no limit). What has died is seen every `supervise_s` seconds: a look at all processes.
    """

    def __init__(
        self,
        directory: Path,
        base: Path,
        config: Mapping[str, Any],
        sites: Sequence[str],
        *,
        proxied: bool = True,
        site_bytes_per_s: float = 0.0,
        supervise_s: float = SUPERVISE_S,
    ) -> None:
        self.directory, self.config = directory, dict(config)
        self._proxied, self._supervise_s = proxied, supervise_s
        self._site_bytes_per_s = site_bytes_per_s
        self.run_dir = base / "runs" / str(config["run-name"])
        self._base, self._site_names = base, list(sites)
        self._stack = contextlib.ExitStack()
        self._stop = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self.error: BaseException | None = None

    def __enter__(self) -> "Federation":
        self.directory.mkdir(parents=True, exist_ok=True)
        # for the workers' sockets: the path of a Unix socket has at most 107 bytes
        self._scratch = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        )
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        self._supervisor.start()
        return self

    def _build(self) -> None:
        network = self._stack.enter_context(Network(passes=not self._proxied))
        redis_port, self.port = free_port(), free_port()
        write_connection(self.directory / "flwr", self.port)
        self.redis = self._redis(redis_port)
        self.server_redis_line = network.line(redis_port)
        env = self.environment = self._env("superlink", self.server_redis_line)
        command = [str(BIN / "pilot"), "superlink", "--insecure", "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        self.superlink = self._service("superlink", command, env)
        self.sites = {name: self._site(name, network, redis_port) for name in self._site_names}
        config = self.directory / "run.toml"
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in self.config.items()]
        config.write_text("".join(lines), encoding="utf-8")
        log = self.directory / "submissions.log"
        mark = self.superlink_mark = self._mark("superlink")
        app = copy_app(self.directory / "app")
        self.server = Server(mark, self.port, app, config, self.run_dir, env, log)
        self._stack.callback(self.server.close)
        self.services = [self.redis, self.superlink, *(site.node for site in self.sites.values())]

    def _env(self, name: str, redis_line: Line) -> dict[str, str]:
        return environment(
            self._base,
            self.directory,
            FLWR_HOME=str(self.directory / "flwr"),
            PILOT_REDIS_URL=f"redis://127.0.0.1:{redis_line.port}/0",
            PILOT_SCRATCH_DIR=str(self._scratch),
            NANOCHAT_DTYPE="float32",
            PYTHONUNBUFFERED="1",
            **{MARK: self._mark(name)},
        )

    def _mark(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def _redis(self, port: int) -> Service:
        """A Redis without persistence: it always returns empty."""
        configuration = self.directory / "redis.conf"
        lines = [
            'save ""',
            "appendonly no",
            "bind 127.0.0.1",
            f"port {port}",
            f"dir {self.directory}",
        ]
        configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        env = {"PATH": os.environ["PATH"], MARK: self._mark("redis")}
        return self._service("redis", [str(find_server()), str(configuration)], env)

    def _site(self, name: str, network: Network, redis_port: int) -> Site:
        wire = Wire(self._site_bytes_per_s) if self._site_bytes_per_s else None
        superlink_line, redis_line = network.line(self.port, wire), network.line(redis_port, wire)
        reply_file = self.directory / f"{name}.reply"
        env = self._env(name, redis_line)
        env |= {"PYTHONPATH": str(HOOKS), "PILOT_CHAOS_REPLY": str(reply_file)}
        command = [str(BIN / "pilot"), "node", "--name", name, "--insecure"]
        command += ["--superlink", f"127.0.0.1:{superlink_line.port}", "--port", str(free_port())]
        node = self._service(name, command, env)
        return Site(name, self._mark(name), node, superlink_line, redis_line, reply_file)

    def _service(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Service:
        service = Service(name, command, env, self.directory / f"{name}.log")
        self._stack.callback(service.close)
        return service

    def _supervise(self) -> None:
        try:
            while not self._stop.wait(self._supervise_s):
                for service in self.services:
                    service.supervise()
                self.server.supervise()
        except BaseException as error:  # raised again in `wait`
            self.error = error
            raise

    def wait(self, timeout_s: float, stop: threading.Event) -> bool:
        """Whether the run finished before `timeout_s` had passed and before `stop` was set.

        Raises what the supervisor has raised.
        """
        deadline = time.monotonic() + timeout_s
        while not self.server.over:
            if self.error is not None:
                raise self.error
            if time.monotonic() >= deadline or stop.wait(self._supervise_s):
                return False
        return True

    def leave(self, timeout_s: float = 15.0) -> list[str]:
        """End all services as their owners would, with SIGTERM.

        Returns the command lines of processes that still run `timeout_s` later, and kills those.
        """
        self._stop.set()
        self._supervisor.join()
        for service in reversed(self.services):
            if service.alive:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(service.pid).terminate()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for service in self.services:
                _ = service.alive  # reaps it
            if not marked_below(f"{self.directory}/"):
                return []
            time.sleep(0.2)
        left = []
        for process in marked_below(f"{self.directory}/"):
            with contextlib.suppress(psutil.Error):
                left.append(" ".join(process.cmdline())[:200])
                process.kill()
        return left

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._supervisor.join()
        self._stack.close()
        for process in marked_below(f"{self.directory}/"):
            with contextlib.suppress(psutil.Error):
                process.kill()
