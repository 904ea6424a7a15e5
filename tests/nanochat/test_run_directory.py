"""A directory of checkpoints belongs to one run."""

from pathlib import Path

import pytest

from nanochat.errors import UserError
from nanochat.run_directory import check_room, own, prune, remove_step, set_aside, steps_after


def _write(directory: Path, *names: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text(name)


def _step(step: int, ranks: int = 1) -> list[str]:
    shards = [f"optim_{step:06d}_rank{rank}.pt" for rank in range(ranks)]
    return [f"meta_{step:06d}.json", f"model_{step:06d}.pt", *shards]


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_two_owners_at_once_are_one_too_many(tmp_path: Path) -> None:
    with own(tmp_path / "runs" / "mine"), own(tmp_path / "runs" / "other"):
        with pytest.raises(UserError, match=r"another process trains into .*mine") as error:
            with own(tmp_path / "runs" / "mine"):
                pass
        assert "\n" not in str(error.value)
    with own(tmp_path / "runs" / "mine"):
        assert not (tmp_path / "runs" / "mine").exists()  # the first save makes it


def test_what_killed_saves_left_is_removed_by_the_owner(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    whole = [*_step(2), "model_000003.pt", "notes.txt"]  # a model without meta may be somebody's
    _write(directory, *whole, ".model_000004.pt.ab12.tmp", "optim_000004_rank0.pt")
    _write(directory, "optim_000004_rank1.pt")
    with own(directory) as removed:
        assert removed == [
            ".model_000004.pt.ab12.tmp",
            "optim_000004_rank0.pt",
            "optim_000004_rank1.pt",
        ]
    assert _names(directory) == sorted(whole)


def test_later_steps_are_moved_aside_each_time_to_a_place_of_their_own(tmp_path: Path) -> None:
    _write(tmp_path, *_step(2), *_step(4, ranks=3), "notes.txt")
    assert steps_after(tmp_path, 2) == [4] and set_aside(tmp_path, after=4) is None
    assert set_aside(tmp_path, after=2) == tmp_path / "replaced-1"
    assert _names(tmp_path / "replaced-1") == sorted(_step(4, ranks=3))
    assert set_aside(tmp_path, after=-1) == tmp_path / "replaced-2"
    assert _names(tmp_path) == ["notes.txt", "replaced-1", "replaced-2"]
    assert _names(tmp_path / "replaced-2") == sorted(_step(2))
    assert set_aside(tmp_path / "missing", after=-1) is None


def test_the_newest_steps_are_kept(tmp_path: Path) -> None:
    steps = (1, 20, 300, 1_000_000)
    for step in steps:
        _write(tmp_path, *_step(step, ranks=2))
    prune(tmp_path, keep=0)
    assert steps_after(tmp_path, 0) == list(steps)
    prune(tmp_path, keep=2)
    assert _names(tmp_path) == sorted([*_step(300, ranks=2), *_step(1_000_000, ranks=2)])
    remove_step(tmp_path, 300)
    remove_step(tmp_path, 300)
    assert steps_after(tmp_path, -1) == [1_000_000]


def test_a_disk_without_room_for_a_checkpoint_is_told(tmp_path: Path) -> None:
    check_room(tmp_path / "not there yet", 1000)
    with pytest.raises(UserError, match=r"takes 1,000,000,000\.00 GB .* make room there"):
        check_room(tmp_path, 10**18)
