"""Hooks with real processes: what they start outlives them, is found again, and ends with all it began."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pilot.processes.ancestry import alive
from pilot.provision.hooks import (
    MARK,
    CommandHook,
    Commands,
    Condition,
    Place,
    SubprocessHook,
)

from ...waiting import until

# Answers SIGTERM by writing a line, and ends at the second one.
PATIENT = """
import signal, sys, time
asked = []
def ends(*_):
    asked.append(1)
    print("asked", len(asked), flush=True)
    if len(asked) > 1:
        sys.exit(0)
signal.signal(signal.SIGTERM, ends)
print("began", flush=True)
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    yield Place(tmp_path, "r", "a")
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(tmp_path)):
                process.kill()
        except psutil.Error:
            pass


def running(place: Place) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == place.mark("client") and alive(process):
                found.append(process.pid)
        except psutil.Error:
            pass
    return found


def test_a_process_is_started_once_and_found_again_by_the_next_provisioner(place: Place) -> None:
    command = [sys.executable, "-c", PATIENT]
    first = SubprocessHook(place, command, {}, {})
    assert first.look().condition == Condition.GONE
    first.start()
    first.start()
    until(lambda: "began" in place.log().read_text())
    (pid,) = running(place)
    saved = json.loads(json.dumps(first.saved()))
    assert saved["pid"] == pid and saved["asked"] is False
    # by its saved pid; by its mark, if the provisioner died before it could save that; never another's
    for state in (saved, {}, {"pid": os.getpid(), "created": 0.0}):
        again = SubprocessHook(place, command, {}, state)
        assert again.look().condition == Condition.RUNNING
        again.start()
        assert running(place) == [pid]
    # a second signal would end a `pilot node` without waiting: there is only one, whoever sends it
    first.stop()
    first.stop()
    until(lambda: "asked 1" in place.log().read_text())
    SubprocessHook(place, command, {}, first.saved()).stop()
    assert first.look().condition == Condition.RUNNING
    assert "asked 2" not in place.log().read_text()
    first.kill()
    until(lambda: first.look().condition == Condition.GONE)
    assert first.look().why.startswith(f"its process ended with code -{int(signal.SIGKILL)}")
    assert place.log().stat().st_mode & 0o077 == 0


def test_a_program_that_is_not_there_is_a_clause(place: Place) -> None:
    hook = SubprocessHook(place, ["no-such-program"], {}, {})
    hook.start()
    assert hook.look().condition == Condition.GONE
    assert hook.look().why.startswith("cannot start no-such-program")
    commands = CommandHook(place, Commands(["no-such-program"], ["true"]), started=False)
    commands.start()
    assert commands.look().why == "cannot run no-such-program: No such file or directory"


def commands(place: Place, start: str, stop: str = "true", **values: object) -> CommandHook:
    said = Commands(["sh", "-c", start], ["sh", "-c", stop], **values)  # type: ignore[arg-type]
    return CommandHook(place, said, started=False)


def settled(hook: CommandHook) -> Condition:
    until(lambda: hook.look().condition != Condition.PENDING)
    return hook.look().condition


def test_commands_know_which_client_they_are_about_and_say_what_came_of_them(place: Place) -> None:
    says = 'echo "start $PILOT_CLIENT of $PILOT_RUN, $ZONE {client}"'
    hook = commands(place, says, "exit 3", environment={"ZONE": "z"})
    assert hook.look().condition == Condition.GONE
    hook.start()
    assert settled(hook) == Condition.UNKNOWN, "nothing says whether it runs"
    assert place.log().read_text() == "start a of r, z a\n"
    hook.stop()
    assert settled(hook) == Condition.FAILED
    assert "its stop command ended with code 3" in hook.look().why
    good = commands(place, "true")
    good.stop()
    assert settled(good) == Condition.GONE


def test_a_status_command_decides_and_asks_again(place: Place, tmp_path: Path) -> None:
    now = [0.0]
    said = Commands(["true"], ["true"], ["test", "-e", str(tmp_path / "there")])
    hook = CommandHook(place, said, started=True, now_s=lambda: now[0])
    until(lambda: hook.look().condition == Condition.GONE)
    (tmp_path / "there").touch()
    assert hook.look().condition == Condition.GONE, "it is asked every 30 s"
    now[0] = 31.0
    until(lambda: hook.look().condition == Condition.RUNNING)


def test_a_command_that_hangs_is_ended_with_all_that_it_began(place: Place) -> None:
    now = [0.0]
    said = Commands(["sh", "-c", "sleep 600 & sleep 600"], ["true"], start_within_s=60.0)
    hook = CommandHook(place, said, started=False, now_s=lambda: now[0])
    hook.start()
    process = place.find("start")
    assert process is not None
    until(lambda: len(process.children()) == 2 or process.name() == "sleep")
    family = [process, *process.children(recursive=True)]
    # a provisioner that begins now waits for it, and starts nothing beside it
    other = CommandHook(place, said, started=False, now_s=lambda: now[0])
    assert other.look().condition == Condition.PENDING
    other.start()
    assert other.look().condition == Condition.PENDING and place.find("start") == process
    now[0] = 61.0
    assert hook.look().condition == Condition.FAILED
    assert "did not end in time" in hook.look().why
    until(lambda: not any(map(alive, family)))
    assert other.look().condition == Condition.FAILED
