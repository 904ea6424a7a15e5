"""Real SuperLinks, SuperNodes and `pilot run`, as a person starts them; all gone at the end."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.micro import as_toml
from benchmarks.chaos.processes import (
    BIN,
    CONNECTION,
    MARK,
    ROOT,
    end_group,
    environment,
    listening,
    write_connection,
)
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port
from pilot.run.events import read_events

from ..waiting import until
from .keys import Keys

# What a whole run may take to start, or to end: a minute, or ten beside other people's tests.
RUN_S = 600.0


def pilot_run(connection: str, config: Path, *, env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [str(BIN / "pilot"), "run", connection, "--run-config", str(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def events(base: Path, run: str, kind: str) -> list[dict[str, Any]]:
    """What has happened in a run so far, of one kind."""
    with contextlib.suppress(FileNotFoundError):
        found = read_events(base / "runs" / run / "events.jsonl")
        return [event for event in found if event["event"] == kind]
    return []


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, output[-5000:]
    return output


class Deployment:
    """A SuperLink, its Redis and named SuperNodes on this machine, each on a free port.

    With `secure`, TLS on all ways, and only nodes whose key is registered are let in.
    """

    def __init__(self, directory: Path, base: Path, *, secure: bool = False) -> None:
        self.directory, self.base = directory, base
        self._keys = Keys(directory / "keys") if secure else None
        self.port = free_port()
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Deployment":
        redis = self._stack.enter_context(LocalRedis(port=free_port(), password="s3cret word"))
        flower_home = self.directory / "flwr"
        write_connection(flower_home, self.port, self._keys.ca if self._keys else None)
        self.env = environment(
            self.base, self.directory, FLWR_HOME=str(flower_home), PILOT_REDIS_URL=redis.url
        )
        command = ["flower-superlink", "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation"]
        command += self._keys.superlink_options() if self._keys else ["--insecure"]
        self._start(command, self.env, "superlink")
        until(lambda: listening(self.port), 60, "the SuperLink")
        return self

    def start_node(self, name: str) -> None:
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", f'name="{name}"']
        command += self._credentials(name) if self._keys else ["--insecure"]
        self.nodes[name] = self._start(command, self.env | {MARK: self.mark(name)}, name)

    def start_node_unless_there(self, name: str) -> None:
        """The node of an earlier run, if that has left one."""
        if name not in self.nodes or self.nodes[name].poll() is not None:
            self.start_node(name)

    def end(self, name: str) -> None:
        """End a node, if it is there, and all that it started."""
        if name in self.nodes:
            end_group(self.nodes[name])

    def start_pilot_node(self, name: str, **env: str) -> None:
        """The same by `pilot node`, which chooses its port; `env`: more variables for it."""
        command = ["pilot", "node", "--name", name, "--superlink", f"127.0.0.1:{self.port}"]
        command += self._credentials(name) if self._keys else ["--insecure"]
        self.nodes[name] = self._start(command, self.env | env | {MARK: self.mark(name)}, name)

    def _credentials(self, name: str) -> list[str]:
        """SuperNode's options for a new key of the site `name`, which the SuperLink then knows."""
        assert self._keys is not None
        key = self._keys.of_site(name)
        register = [BIN / "flwr", "supernode", "register", key.with_suffix(".pub"), CONNECTION]
        subprocess.run([*register, "--name", name], env=self.env, check=True, capture_output=True)
        options = ["--root-certificates", self._keys.ca, "--auth-supernode-private-key", key]
        return [str(option) for option in options]

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

    def __exit__(self, *_: object) -> None:
        self._stack.close()


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
