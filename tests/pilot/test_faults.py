"""Fault points: all known by name, and nothing at all unless the environment asks for one."""

import errno
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pilot import faults
from pilot.faults import POINTS, VARIABLE, fault_point

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def unpassed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(faults, "_passed", Counter())


def test_every_point_in_the_code_is_listed_and_every_listed_one_is_in_the_code() -> None:
    text = "".join(path.read_text() for path in (ROOT / "pilot").rglob("*.py"))
    assert Counter(re.findall(r'fault_point\("([^"]+)"\)', text)) == Counter(POINTS)


def test_nothing_happens_unless_the_environment_names_the_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault_point("snapshot.rename")
    monkeypatch.setenv(VARIABLE, "snapshot.renamed=enospc")
    fault_point("snapshot.rename")


def test_disk_is_full_at_the_passing_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "spill.write:2=enospc")
    fault_point("spill.write")
    fault_point("spill.written")
    with pytest.raises(OSError, match="No space left") as caught:
        fault_point("spill.write")
    assert caught.value.errno == errno.ENOSPC
    fault_point("spill.write")


def test_process_kills_itself_with_the_signal_that_nobody_can_catch() -> None:
    code = "from pilot.faults import fault_point; fault_point('term.write'); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={VARIABLE: "term.write"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL and done.stdout == b""


@pytest.mark.parametrize("wanted", ["snapshot", "term.write:x", "term.write=melt", ""])
def test_misspelt_fault_is_an_error_that_lists_the_points(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setenv(VARIABLE, wanted)
    with pytest.raises(ValueError, match=r"points: run-dir\.created, term\.write"):
        fault_point("spill.write")
