"""Real Flower on one machine: SuperLink, two SuperNodes and `pilot run`, whose server is killed once."""

import contextlib
import os
import signal
import site
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.processes import (
    BIN,
    CONNECTION,
    ROOT,
    end_group,
    environment,
    listening,
    write_connection,
)
from benchmarks.gpu_check import site_kit
from benchmarks.gpu_check.verdict import Setup, Verdict
from pilot.processes.local_redis import LocalRedis
from pilot.processes.scratch import free_port
from pilot.processes.waiting import wait_until
from pilot.run.events import read_events

_ROUNDS, _WAIT_S = 3, 100.0
_TINY_WAIT_S = 600.0  # on a CPU that is busy with other tests
_GONE_S = 10.0  # a process that has used a GPU takes a moment to end
_NODES = ("site-a", "site-b")


def check(setup: Setup, verdict: Verdict) -> None:
    """The same command resumes the run after its server was killed in round 2."""
    home, logs = setup.directory / "federation", setup.directory / "logs"
    home.mkdir()
    logs.mkdir(exist_ok=True)
    config = site_kit.config(
        setup,
        run_name="gpu-check-federation",
        round_steps=setup.size(20, 4),
        num_rounds=_ROUNDS,
        total_tokens=10**9,
        round_min_duration=0.0,
        round_max_duration=60.0,
        compile="off",  # `groups` compiles
        grace_max=60.0,
        clients_timeout=100.0,
    )
    file = home / "run.toml"
    file.write_text(_toml(config.to_mapping()), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        env = _deployment(stack, setup, home)
        began = time.monotonic()
        first = _run(env, file, logs / "federation-first.log")
        stack.callback(end_group, first)
        events = setup.directory / "base" / "runs" / config.run_name / "events.jsonl"
        limit = _TINY_WAIT_S if setup.tiny else _WAIT_S
        _wait(
            lambda: bool(_events(events, "round_committed")),
            first,
            logs / "federation-first.log",
            limit,
        )
        verdict.note("first_round_s", time.monotonic() - began)
        _kill_server(home)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(30)
        end_group(first)
        second = _run(env, file, logs / "federation-second.log")
        stack.callback(end_group, second)
        try:
            code: int | str = second.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"nothing in {limit:.0f} s"
        said = (logs / "federation-second.log").read_text(encoding="utf-8", errors="replace")
        verdict.that(code == 0, f"pilot run ended with {code}: {said[-800:]}")
        verdict.note("seconds", time.monotonic() - began)
    committed = _events(events, "round_committed")
    verdict.note("rounds", len(committed))
    verdict.that(len(committed) == _ROUNDS, f"{len(committed)} rounds were committed")
    verdict.that(not _events(events, "client_silent"), "a client fell silent")
    verdict.note("bpb", [event["val_bpb"] for event in _events(events, "validation")])
    wait_until(lambda: not _left(home), timeout_s=_GONE_S)
    left = _left(home)
    verdict.that(not left, f"{len(left)} processes have outlived the run")


def _left(home: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _is_of(process, home)]


def _is_of(process: psutil.Process, home: Path) -> bool:
    """Whether it was started in this federation, and is no zombie."""
    try:
        return process.environ().get("HOME") == str(home)
    except psutil.Error:
        return False


def _toml(values: dict[str, Any]) -> str:
    def written(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if isinstance(value, str) else str(value)

    text = "".join(f"{key} = {written(value)}\n" for key, value in values.items())
    assert tomllib.loads(text) == values
    return text


def _deployment(stack: contextlib.ExitStack, setup: Setup, home: Path) -> dict[str, str]:
    redis = stack.enter_context(LocalRedis(port=free_port(), password="gpu check"))
    port, flower_home = free_port(), home / "flwr"
    write_connection(flower_home, port)
    base = setup.directory / "base"
    own = environment(base, home, FLWR_HOME=str(flower_home), PILOT_REDIS_URL=redis.url)
    # packages that pip has put into the user's own directory are found by HOME, which is another one here
    own["PYTHONUSERBASE"] = site.getuserbase()
    env = os.environ | own
    link = ["flower-superlink", "--insecure", "--port", str(port)]
    link += ["--disable-runtime-dependency-installation"]
    log = home.parent / "logs" / "federation-superlink.log"
    _start(stack, link, env, log)
    until = time.monotonic() + _WAIT_S
    while not listening(port):
        assert time.monotonic() < until, log.read_text(encoding="utf-8")[-500:]
        time.sleep(0.1)
    for name in _NODES:
        node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
        node += ["--port", str(free_port()), "--node-config", f'name="{name}"']
        _start(stack, node, env, home.parent / "logs" / f"federation-{name}.log")
    return env


def _start(stack: contextlib.ExitStack, command: list[str], env: dict[str, str], log: Path) -> None:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [_program(command[0]), *command[1:]],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    stack.callback(end_group, process)


def _program(name: str) -> str:
    """Beside this Python, or wherever the packages were installed to."""
    beside = BIN / name
    return str(beside) if beside.exists() else name


def _run(env: dict[str, str], file: Path, log: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", "import sys; from pilot.cli import main; sys.exit(main())"]
    command += ["run", CONNECTION, "--run-config", str(file)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )


def _events(path: Path, kind: str) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        return [event for event in read_events(path) if event["event"] == kind]
    return []


def _wait(
    condition: Callable[[], bool],
    process: "subprocess.Popen[bytes]",
    log: Path,
    limit_s: float,
) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            said = log.read_text(encoding="utf-8", errors="replace")
            raise AssertionError(f"no round was committed: {said[-800:]}")
        time.sleep(0.1)


def _kill_server(home: Path) -> None:
    """The ServerApp's process: the one of this federation whose command line names the app."""
    for process in _left(home):
        with contextlib.suppress(psutil.Error):
            if any("flwr-serverapp" in word for word in process.cmdline()):
                os.kill(process.pid, signal.SIGKILL)
