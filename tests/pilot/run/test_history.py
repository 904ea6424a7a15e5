"""The last steps of a model: written once, shared by snapshots, and never worth more than a whole model."""

from pathlib import Path

import pytest
import torch

from pilot.run.history import Step
from pilot.run.snapshot import Snapshot, latest_snapshot, write_snapshot
from pilot.wire.messages import Part

DIGESTS = [f"{number:064x}"[::-1] for number in range(9)]
PARTS = [Part("a", "int4", (64, 80), memoryview(b"abc")), Part("b", "float32", (0,), b"")]


def snapshot(number: int, steps: list[Step]) -> Snapshot:
    state = {"steps": [[step.before, step.after] for step in steps]}
    return Snapshot(number, {"w": torch.ones(1)}, {}, state, steps=steps)


def commit(directory: Path, number: int, steps: list[Step], keep: int = 2) -> Path:
    path = write_snapshot(directory, snapshot(number, steps), keep=keep)
    for step in steps:
        step.moved(path, keep_parts=step is steps[-1])
    return path


def plain(step: Step) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    return [(part.name, part.dtype, part.shape, bytes(part.data)) for part in step.load()]


def test_a_step_is_written_once_and_outlives_the_snapshots_that_shared_it(tmp_path: Path) -> None:
    steps: list[Step] = []
    for number in range(1, 6):
        steps = [*steps, Step(DIGESTS[number - 1], DIGESTS[number], PARTS)][-3:]
        path = commit(tmp_path, number, steps)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["round-000004", "round-000005"]
    assert [step.parts is None for step in steps] == [True, True, False]
    shared = steps[0].path
    assert (
        shared is not None
        and shared.parent == path
        and shared.stat().st_ino in {p.stat().st_ino for p in (tmp_path / "round-000004").iterdir()}
    )
    found = latest_snapshot(tmp_path, report=pytest.fail)
    assert found is not None
    assert [(step.before, step.after) for step in found.steps] == [
        (DIGESTS[number - 1], DIGESTS[number]) for number in (3, 4, 5)
    ]
    wanted = [(p.name, p.dtype, p.shape, bytes(p.data)) for p in PARTS]
    assert all(plain(step) == wanted for step in (*steps, *found.steps))


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_damaged_step_costs_those_before_it_and_never_the_snapshot(
    tmp_path: Path, damaged: int, caplog: pytest.LogCaptureFixture
) -> None:
    steps = [Step(DIGESTS[n], DIGESTS[n + 1], PARTS) for n in range(3)]
    path = commit(tmp_path, 1, steps)
    file = path / steps[damaged].file_name
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    found = latest_snapshot(tmp_path, report=pytest.fail)
    assert found is not None and "cannot be used" in caplog.text
    assert [step.before for step in found.steps] == DIGESTS[damaged + 1 : 3]
    file.unlink()
    found = latest_snapshot(tmp_path, report=pytest.fail)
    assert found is not None and len(found.steps) == 2 - damaged
    if damaged < 2:  # whose parts are not in memory any more
        with pytest.raises((OSError, ValueError)):
            steps[damaged].load()


def test_a_step_whose_file_is_gone_costs_itself_and_not_the_next_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = [Step(DIGESTS[0], DIGESTS[1], PARTS), Step(DIGESTS[1], DIGESTS[2], PARTS)]
    path = commit(tmp_path, 1, steps)
    for step in steps:
        (path / step.file_name).unlink()
    steps = [*steps, Step(DIGESTS[2], DIGESTS[3], PARTS)]
    commit(tmp_path, 2, steps)
    assert caplog.text.count("is gone") == 1, "the other one is in memory"
    found = latest_snapshot(tmp_path, report=pytest.fail)
    assert found is not None and [step.before for step in found.steps] == DIGESTS[1:3]


def test_disk_without_links_has_a_copy_in_each_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", no_links)
    steps = [Step(DIGESTS[0], DIGESTS[1], PARTS), Step(DIGESTS[1], DIGESTS[2], PARTS)]
    for number in (1, 2):
        commit(tmp_path, number, steps)
    found = latest_snapshot(tmp_path, report=pytest.fail)
    assert found is not None and len(found.steps) == 2
    wanted = [(p.name, p.dtype, p.shape, bytes(p.data)) for p in PARTS]
    assert all(plain(step) == wanted for step in found.steps)
