"""Real SuperLinks, SuperNodes and `pilot run`, as a person starts them; all gone at the end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil
from federation.micro import as_toml

from pilot.local_redis import LocalRedis

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MARK = "PILOT_TEST_SITE"  # in the environment of all that a site starts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(base: Path, home: Path, **more: str) -> dict[str, str]:
    """What a newcomer's shell has, and the directories of the test."""
    return {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(home),
        # the Rust toolchain is the machine's, whoever's home it is installed in
        "CARGO_HOME": os.environ.get("CARGO_HOME", str(Path.home() / ".cargo")),
        "RUSTUP_HOME": os.environ.get("RUSTUP_HOME", str(Path.home() / ".rustup")),
        "NANOCHAT_BASE_DIR": str(base),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.1)


def marked(value: str) -> list[psutil.Process]:
    """Living processes that have MARK=value in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == value:
                found.append(process)
    return found


def pilot_run(
    connection: str, config: Path, *overrides: str, env: dict[str, str]
) -> "subprocess.Popen[str]":
    command = [str(BIN / "pilot"), "run", connection, "--run-config", str(config), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


class Deployment:
    """A SuperLink, its Redis and named SuperNodes on this machine, each on a free port."""

    def __init__(self, directory: Path, base: Path) -> None:
        self.directory, self.base = directory, base
        self.port = free_port()
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Deployment":
        redis = self._stack.enter_context(LocalRedis(port=free_port(), password="s3cret word"))
        flower_home = self.directory / "flwr"
        flower_home.mkdir()
        connection = (
            f'[superlink.local-deployment]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        (flower_home / "config.toml").write_text(connection, encoding="utf-8")
        self.env = environment(
            self.base, self.directory, FLWR_HOME=str(flower_home), PILOT_REDIS_URL=redis.url
        )
        command = ["flower-superlink", "--insecure", "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        self._start(command, self.env, "superlink")
        wait_until(self._listening, 60, "the SuperLink")
        return self

    def _listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start_node(self, name: str) -> None:
        command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", f'name="{name}"']
        self.nodes[name] = self._start(command, self.env | {MARK: self.mark(name)}, name)

    def mark(self, name: str) -> str:
        return f"{self.directory}/{name}"

    def _start(
        self, command: list[str], env: dict[str, str], name: str
    ) -> "subprocess.Popen[bytes]":
        output = self._stack.enter_context((self.directory / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        self._stack.callback(end_group, process)
        return process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.kill()
    process.wait()


def write_config(directory: Path, values: dict[str, object]) -> Path:
    path = directory / "run.toml"
    path.write_text(as_toml(values), encoding="utf-8")
    return path


@contextlib.contextmanager
def killed_at_end(process: "subprocess.Popen[str]") -> Iterator["subprocess.Popen[str]"]:
    """Whatever the test does, the process does not outlive it (its keeper ends what it started)."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
