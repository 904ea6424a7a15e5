"""What dies is started again after a pause that grows; what is ended leaves nothing."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pilot.fleet import supervisor as module
from pilot.fleet.journal import Journal
from pilot.fleet.supervisor import Kept, Service, ServiceFailed, Supervisor

from ...waiting import gone, until

# It says how often it was started, and does what it is asked to at SIGTERM.
PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path
def end(*_):
    print("ending", flush=True)
    if sys.argv[2] == "deaf" and not Path(sys.argv[1] + ".again").exists():
        Path(sys.argv[1] + ".again").touch()
        return
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
starts = Path(sys.argv[1])
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("start", len(starts.read_text()), os.getpid(), flush=True)
if sys.argv[2].isdigit():
    sys.exit(int(sys.argv[2]))
while True:
    time.sleep(0.02)
"""


@pytest.fixture
def console() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def kept(
    tmp_path: Path, console: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Supervisor]:
    monkeypatch.setattr(module, "FIRST_DELAY_S", 0.05)
    journal = Journal(tmp_path, console)
    supervisor = Supervisor(journal)
    yield supervisor
    supervisor.stop_all()
    journal.close()


def service(directory: Path, name: str, does: str = "stay", **values: object) -> Service:
    command = [sys.executable, "-c", PROGRAM, str(directory / f"{name}.starts"), does]
    options = {"final": frozenset({0}), "mistakes": frozenset({2}), "grace_s": 0.2} | values
    return Service(name=name, command=command, env=dict(os.environ), **options)  # type: ignore[arg-type]


def processes(kept: Kept) -> list[psutil.Process]:
    assert kept.process is not None
    return psutil.Process(kept.process.pid).children(recursive=True)


def test_a_process_that_is_killed_is_started_again_and_its_children_are_gone(
    kept: Supervisor, tmp_path: Path, console: io.StringIO
) -> None:
    one = kept.start(service(tmp_path, "a"))
    until(lambda: "start 1" in console.getvalue() and len(processes(one)) == 2)
    first = processes(one)
    first[0].kill()
    until(lambda: gone(first))

    def again() -> bool:
        kept.look()
        return "start 2" in console.getvalue()

    until(again)
    until(lambda: "a ended with exit code 137" in console.getvalue())
    assert "starting it again in 0.05 s" in console.getvalue()


def test_pauses_grow_until_a_process_stays(
    kept: Supervisor, tmp_path: Path, console: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_DELAY_S", 0.1)
    kept.start(service(tmp_path, "a", "3"))

    def thrice() -> bool:
        kept.look()
        return console.getvalue().count("ended with exit code 3") == 3

    until(thrice)
    pauses = [
        line.rpartition(" in ")[2] for line in console.getvalue().splitlines() if "again" in line
    ]
    assert pauses == ["0.05 s", "0.1 s", "0.1 s"]


def test_one_that_has_left_stays_away_and_a_mistake_is_an_error(
    kept: Supervisor, tmp_path: Path, console: io.StringIO
) -> None:
    gone_for_good, wrong = kept.start(service(tmp_path, "a", "0")), service(tmp_path, "b", "2")

    def left() -> bool:
        kept.look()
        return gone_for_good.left

    until(left)
    kept.look()
    assert not gone_for_good.running
    until(lambda: "a has left" in console.getvalue())
    kept.start(wrong)
    with pytest.raises(ServiceFailed, match="b ended with exit code 2: start 1"):
        until(lambda: kept.look())  # type: ignore[func-returns-value]


def test_ending_waits_for_all_of_it_and_a_second_wish_hurries(
    kept: Supervisor, tmp_path: Path, console: io.StringIO
) -> None:
    patient = kept.start(service(tmp_path, "a", grace_s=600.0))
    deaf = kept.start(service(tmp_path, "b", "deaf", grace_s=600.0))
    until(lambda: console.getvalue().count("start 1") == 2)
    until(lambda: len(processes(patient)) == len(processes(deaf)) == 2)
    below = [*processes(patient), *processes(deaf)]
    children = [
        process for process in below if process.cmdline()[-1] == "import time; time.sleep(600)"
    ]
    assert len(children) == 2
    for child in children:
        child.kill()  # else the keeper waits for them
    kept.stop([patient, deaf], at_once=lambda: (tmp_path / "b.starts.again").exists())
    assert gone(below) and not patient.running and not deaf.running
    until(lambda: console.getvalue().count("ending") == 3, what="a second SIGTERM to b")
