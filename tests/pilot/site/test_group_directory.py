"""Where a group is found: one ClientApp at a time, and nobody else's."""

from pathlib import Path

import psutil
import pytest

from pilot.site.group_directory import GroupDirectory, clear


def test_directory_admits_one_clientapp_at_a_time_and_is_not_removed_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(tmp_path))
    me = psutil.Process()
    directory = GroupDirectory.acquire(me, "a", 1)
    assert directory is not None and GroupDirectory.acquire(me, "a", 1) is None
    other = GroupDirectory.acquire(me, "b", 1)
    assert other is not None and other.directory != directory.directory
    clear(directory.directory)
    assert directory.directory.exists()
    directory.release()
    clear(directory.directory)
    assert not directory.directory.exists()
    again = GroupDirectory.acquire(me, "a", 1)
    assert again is not None and again.directory == directory.directory
    again.release()


def test_directory_that_others_may_enter_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SCRATCH_DIR", str(tmp_path))
    me = psutil.Process()
    directory = GroupDirectory.acquire(me, "a")
    assert directory is not None
    directory.release()
    directory.directory.chmod(0o755)
    assert GroupDirectory.acquire(me, "a") is None
