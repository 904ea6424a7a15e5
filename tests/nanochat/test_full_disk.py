"""A disk that is full costs no step that was trained."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat import saving
from nanochat.checkpoint_manager import (
    find_last_step,
    load_any,
    optimizer_ranks,
    whole_steps,
)
from nanochat.resume import find_saved
from nanochat.run_directory import remove_step
from scripts import base_train

from .run_kit import Call, assert_one_sentence, directory_of, meta_of, run_arguments


def _run_on(disk: Path, base: Path, run: str, *, room: int) -> Path:
    """The directory of a run that lies on `disk`, which has `room` bytes left."""
    directory = directory_of(base, run)
    directory.parent.mkdir(exist_ok=True)
    directory.symlink_to(disk)
    there = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * (there.f_bavail * there.f_bsize - room))
    return directory


def test_a_disk_that_is_full_costs_no_step(
    base: Path, call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _run_on(
        small_disk, base, "full", room=900_000
    )  # room for two checkpoints and a model
    waited: list[list[int]] = []

    def make_room(_: float) -> None:
        waited.append([*whole_steps(directory), *optimizer_ranks(directory, 4)])
        remove_step(directory, 1)

    clock = SimpleNamespace(sleep=make_room, monotonic=time.monotonic)
    monkeypatch.setattr(saving, "time", clock)
    code, output, _ = call(base_train.main, *run_arguments(base, "full", "--save-every", "1"))
    assert code == 0
    assert "cannot write the checkpoint of step 3" in output and "training continues" in output
    assert "No space left on device" in output and "its weights alone are there" in output
    assert waited == [[1, 2, 4]]  # the weights of the last step were safe meanwhile
    assert whole_steps(directory) == [2, 4] and optimizer_ranks(directory, 4) == [0]
    assert not list(directory.glob(".*")) and not list(directory.glob("*_000003*"))
    assert meta_of(directory, 4)["val_bpb"] > 0


def test_a_disk_that_stays_full_takes_the_weights_at_least(
    base: Path, call: Call, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _run_on(small_disk, base, "stays", room=900_000)
    monkeypatch.setattr(saving, "ROOM_WAIT_S", 0.0)
    code, output, _ = call(base_train.main, *run_arguments(base, "stays", "--save-every", "1"))
    assert code == 0 and "no run can continue from them" in output
    assert find_last_step(directory) == 4 and optimizer_ranks(directory, 4) == []
    _, meta = load_any("stays", "cpu")
    assert meta["user_config"]["world_size"] == 0 and meta["val_bpb"] > 0
    saved = find_saved(directory, "latest")
    assert saved is not None and (saved.step, saved.ranks) == (2, 1)


def test_a_disk_without_room_for_a_checkpoint_is_told_before_the_first_step(
    base: Path, call: Call, small_disk: Path
) -> None:
    _run_on(small_disk, base, "small", room=100_000)
    code, output, error = call(base_train.main, *run_arguments(base, "small"))
    assert code == 2 and "step=" not in output
    assert_one_sentence(error, "make room there")
