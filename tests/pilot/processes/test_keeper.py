"""A keeper leaves nothing of its command behind, and reports its exit code."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from pilot.processes import keeper

from ...waiting import gone, until

# a child and a grandchild in sessions of their own, the child gone already: what Ray leaves behind
ORPHANS = """
python3 -c 'import subprocess as s; s.Popen(["sleep", "600"], start_new_session=True)'
sleep 600 & echo started > {mark}
trap "" TERM; wait
"""


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_its_exit_code_is_the_commands(command: str, code: int) -> None:
    assert keeper.start(["sh", "-c", command]).wait(timeout=30) == code


def test_a_command_that_is_not_there_gives_127() -> None:
    assert keeper.start(["/nonexistent/program"]).wait(timeout=30) == 127


@pytest.mark.parametrize("end", ["stop", "sigterm"])
def test_orphans_in_sessions_of_their_own_end_too(end: str, tmp_path: Path) -> None:
    mark, removed = tmp_path / "mark", tmp_path / "removed"
    removed.mkdir()
    command = ["sh", "-c", ORPHANS.format(mark=mark)]
    process = keeper.start(command, remove=removed, grace_s=0.2)
    until(mark.exists)
    family = psutil.Process(process.pid).children(recursive=True)
    assert sum("sleep" in p.name() for p in family) == 2
    if end == "stop":
        keeper.stop(process)
    else:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert gone(family)
    assert not removed.exists()


def test_what_the_command_left_behind_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"setsid sleep 600 & echo $! > {pid_file}"
    assert keeper.start(["sh", "-c", script]).wait(timeout=30) == 0
    pid = int(pid_file.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_may_end_in_its_own_way_within_the_grace(tmp_path: Path) -> None:
    mark, ended = tmp_path / "mark", tmp_path / "ended"
    script = f"trap 'echo bye > {ended}; exit 5' TERM; echo > {mark}; while :; do sleep 0.05; done"
    process = keeper.start(["sh", "-c", script], grace_s=20)
    until(mark.exists)
    assert keeper.stop(process) == 5
    assert ended.read_text() == "bye\n"


def test_the_command_gets_no_input_from_its_keeper() -> None:
    process = keeper.start(["cat"], output=subprocess.PIPE)
    assert process.wait(timeout=30) == 0
