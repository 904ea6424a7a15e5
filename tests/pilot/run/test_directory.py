"""A run's directory: one live server, no finished run twice, terms that only grow."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import filelock
import pytest

from pilot.run.directory import RunDirError, next_term, open_run_dir
from pilot.run_name import generated_name

ROOT = Path(__file__).resolve().parents[3]
OTHER_SERVER = """
import sys, time
from pilot.run.directory import open_run_dir
with open_run_dir("r") as directory:
    print(directory, flush=True)
    time.sleep(600)
"""


def test_directory_stands_under_the_base_directory(base_dir: Path) -> None:
    with open_run_dir("r") as directory:
        assert directory == base_dir / "runs" / "r" and directory.is_dir()


def test_second_server_is_refused_until_the_first_is_gone_even_by_kill(base_dir: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_SERVER], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == str(base_dir / "runs" / "r")
        with pytest.raises(RunDirError, match=r"another server .* run r"):
            with open_run_dir("r"):
                pass
        with open_run_dir("another"):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    for _ in range(100):  # the kernel lets go of a dead process's lock
        try:
            with open_run_dir("r"):
                return
        except RunDirError:
            time.sleep(0.05)
    raise AssertionError("the lock of a dead server stays")


def test_a_server_waits_a_moment_for_the_one_before() -> None:
    with contextlib.ExitStack() as before:
        before.enter_context(open_run_dir("r"))
        leaves = threading.Timer(0.3, before.close)
        leaves.start()
        with open_run_dir("r", within_s=30.0):
            leaves.join()


def test_two_servers_in_one_process_are_two_servers() -> None:
    with open_run_dir("r"), pytest.raises(RunDirError, match="another server"):
        with open_run_dir("r"):
            pass


def test_what_a_crash_left_half_written_is_gone_at_the_next_start(base_dir: Path) -> None:
    run = base_dir / "runs" / "r"
    (run / "snapshots" / ".round-000002.tmp").mkdir(parents=True)
    (run / ".term.ab.tmp").write_text("1")
    (run / "snapshots" / "round-000001").mkdir()
    with open_run_dir("r") as directory:
        left = sorted(path.name for path in directory.rglob("*"))
    assert left == ["lock", "round-000001", "snapshots"]


def test_disk_that_takes_no_term_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert next_term(tmp_path) == 1
    monkeypatch.setenv("PILOT_FAULT", "term.write=enospc")
    monkeypatch.setattr("pilot.faults._passed", Counter())
    with pytest.raises(RunDirError, match=r"cannot write .*term: No space left"):
        next_term(tmp_path)
    monkeypatch.delenv("PILOT_FAULT")
    assert next_term(tmp_path) == 2


def test_finished_run_is_refused_and_its_lock_free_again(base_dir: Path) -> None:
    with open_run_dir("r") as directory:
        (directory / "final_model.pt").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(RunDirError, match=r"run r is finished .*final_model.pt.*run-name"):
            with open_run_dir("r"):
                pass


def test_other_lock_that_times_out_is_not_taken_for_another_server() -> None:
    with pytest.raises(filelock.Timeout), open_run_dir("r"):
        raise filelock.Timeout("some other file")


def test_terms_only_grow(tmp_path: Path) -> None:
    assert [next_term(tmp_path) for _ in range(3)] == [1, 2, 3]
    (tmp_path / "term").write_text("41\n")
    assert next_term(tmp_path) == 42


@pytest.mark.parametrize("content", ["", "x"])
def test_term_that_is_no_number_is_not_guessed(tmp_path: Path, content: str) -> None:
    (tmp_path / "term").write_text(content)
    with pytest.raises(RunDirError, match="does not hold a number"):
        next_term(tmp_path)


def test_generated_names_are_valid_and_different() -> None:
    from pilot.config import RunConfig

    names = {generated_name() for _ in range(20)}
    assert len(names) > 15
    for name in names:
        RunConfig.from_mapping({"run-name": name})
