"""`flwr` commands that are forks of one process: what they print, how they end, and that they do."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pilot.launch.connection import flower_environment, flower_program
from pilot.launch.flower_commands import Command, FlowerCommands

from ...waiting import gone, until

CONFIGURATION = '[superlink.far]\naddress = "127.0.0.1:1"\ninsecure = true\n'


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "config.toml").write_text(CONFIGURATION)
    return {**flower_environment(), "FLWR_HOME": str(tmp_path), "COLUMNS": "1000"}


@pytest.fixture
def commands(tmp_path: Path, environment: dict[str, str]) -> Iterator[FlowerCommands]:
    commands = FlowerCommands(tmp_path, environment)
    yield commands
    commands.close()
    assert not children()


def children() -> list[psutil.Process]:
    """The process that commands are forks of, if there is one."""
    alive = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return [
        p for p in alive if "flower_commands" in " ".join(p.cmdline())
    ]  # others are other tests'


def output(command: Command) -> str:
    assert command.stdout is not None
    with command.stdout as stream:
        text = stream.read()
    command.wait()
    return text


def test_a_fork_prints_what_the_command_prints(
    commands: FlowerCommands, tmp_path: Path, environment: dict[str, str]
) -> None:
    for words in (["config", "list"], ["ls", "far"], ["no-such-command"], ["--version"]):
        itself = subprocess.run(
            [flower_program("flwr"), *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        whole = output(commands.start(words, errors=True))
        if not itself.stderr or not itself.stdout:
            assert whole == itself.stdout + itself.stderr != "", words
        assert output(commands.start(words, errors=False)) == itself.stdout, words
    (template,) = children()
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in template.children())


def test_a_command_that_is_killed_is_gone_and_its_output_ends(commands: FlowerCommands) -> None:
    command = commands.start(["ls", "far"], errors=True)
    (template,) = children()
    (process,) = template.children()
    command.kill()
    output(command)
    assert gone([process])


def test_where_the_process_is_killed_a_command_is_one_of_its_own(
    commands: FlowerCommands, environment: dict[str, str]
) -> None:
    version = output(commands.start(["--version"], errors=True))
    assert re.match(r"Flower version: \d", version)
    (template,) = children()
    os.kill(template.pid, signal.SIGKILL)
    until(lambda: gone([template]))
    assert output(commands.start(["--version"], errors=True)) == version
    assert children() == []
