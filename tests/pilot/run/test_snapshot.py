"""Snapshots: whole or not at all, and the one before is there when the newest is torn."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat.files import remove_strays
from pilot.run import snapshot as module
from pilot.run.snapshot import (
    Snapshot,
    SnapshotError,
    latest_snapshot,
    write_snapshot,
)

NAN_PAYLOAD = torch.tensor([0x7FC00001, -1, 1, -(1 << 31)], dtype=torch.int32).view(torch.float32)
FILES = ["model.safetensors", "outer.safetensors", "merged.jsonl", "state.json", "manifest.json"]


def make(round_number: int) -> Snapshot:
    generator = torch.Generator().manual_seed(round_number)
    model = {
        "w": torch.randn(3, 4, generator=generator),
        "transposed": torch.randn(2, 5, generator=generator).t(),
        "nan": NAN_PAYLOAD.clone(),
        "scalar": torch.tensor(float(round_number)),
        "empty": torch.empty(0, 3),
    }
    outer = {"step": torch.tensor(3.0), "momentum.w": torch.randn(3, 4, generator=generator)}
    state = {"round": round_number, "text": "ä", "x": [1.5, None]}
    merged = [json.dumps({"round": n, "client": "ä\u2028\n"}) for n in range(round_number)]
    return Snapshot(round_number, model, outer, state, merged)


def same(one: Snapshot | None, other: Snapshot) -> bool:
    def bits(tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {k: (t.shape, t.dtype, t.contiguous().numpy().tobytes()) for k, t in tensors.items()}

    return one is not None and (
        one.round_number == other.round_number
        and bits(one.model) == bits(other.model)
        and bits(one.outer) == bits(other.outer)
        and one.state == other.state
        and list(one.merged) == list(other.merged)
    )


class Reports(list[str]):
    def __call__(self, sentence: str) -> None:
        self.append(sentence)


@pytest.fixture
def reports() -> Reports:
    return Reports()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_snapshot_comes_back_to_the_bit(tmp_path: Path, reports: Reports) -> None:
    directory = tmp_path / "runs" / "snapshots"
    path = write_snapshot(directory, make(7), keep=3)
    assert path == directory / "round-000007" and names(path) == sorted(FILES)
    assert same(latest_snapshot(directory, report=reports), make(7))
    assert reports == []


def test_state_without_tensors_comes_back(tmp_path: Path, reports: Reports) -> None:
    empty = Snapshot(1, {"w": torch.ones(1)}, {}, {})
    write_snapshot(tmp_path, empty, keep=1)
    assert same(latest_snapshot(tmp_path, report=reports), empty)


def test_nothing_there_is_no_snapshot(tmp_path: Path, reports: Reports) -> None:
    assert latest_snapshot(tmp_path / "missing", report=reports) is None
    assert latest_snapshot(tmp_path, report=reports) is None
    (tmp_path / ".round-000003.tmp").mkdir()  # a crash in mid-write
    assert latest_snapshot(tmp_path, report=reports) is None


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_newest_snapshots_are_kept(tmp_path: Path, reports: Reports, keep: int) -> None:
    for number in range(8, 13):
        write_snapshot(tmp_path, make(number), keep=keep)
    assert names(tmp_path) == [f"round-{number:06d}" for number in range(13 - keep, 13)]
    assert same(latest_snapshot(tmp_path, report=reports), make(12))


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_ours(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("damage", [tear, flip, empty, not_ours, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damaged_newest_snapshot_is_reported_and_the_one_before_is_used(
    tmp_path: Path, reports: Reports, name: str, damage: Any
) -> None:
    for number in (1, 2):
        write_snapshot(tmp_path, make(number), keep=3)
    damage(tmp_path / "round-000002" / name)
    assert same(latest_snapshot(tmp_path, report=reports), make(1))
    assert len(reports) == 1 and str(tmp_path / "round-000002") in reports[0]


def test_run_whose_snapshots_are_all_damaged_is_not_started_anew(
    tmp_path: Path, reports: Reports
) -> None:
    for number in (1, 2):
        write_snapshot(tmp_path, make(number), keep=3)
        shutil.rmtree(tmp_path / f"round-{number:06d}")
        (tmp_path / f"round-{number:06d}").mkdir()
    with pytest.raises(SnapshotError, match="can be read"):
        latest_snapshot(tmp_path, report=reports)
    assert len(reports) == 2


def test_damaged_snapshot_is_replaced_by_the_one_that_takes_its_round(
    tmp_path: Path, reports: Reports
) -> None:
    for number in (1, 2):
        write_snapshot(tmp_path, make(number), keep=3)
    tear(tmp_path / "round-000002" / "model.safetensors")
    write_snapshot(tmp_path, make(2), keep=3)
    assert same(latest_snapshot(tmp_path, report=reports), make(2)) and reports == []


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (module, "write_tensors"),
        (os, "pwrite"),
        (module, "atomic_write_json"),
        (module, "atomic_write_text"),
        (module, "sha256_file"),
        (module, "fsync_dir"),
        (os, "fsync"),
        (Path, "replace"),
        (Path, "mkdir"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_disk_that_fails_at_any_step_leaves_the_older_snapshot_intact(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch, target: Any, name: str
) -> None:
    write_snapshot(tmp_path, make(1), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(target, name, no_space)
        with pytest.raises(SnapshotError, match="No space left") as caught:
            write_snapshot(tmp_path, make(2), keep=1)
        assert "round-000002" in str(caught.value)
    assert same(latest_snapshot(tmp_path, report=reports), make(1)) and reports == []
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_crash_in_mid_write_leaves_no_snapshot_and_doesnt_stop_the_next(
    tmp_path: Path, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CrashError(BaseException):
        pass

    def crash(*_: object) -> None:
        raise CrashError

    write_snapshot(tmp_path, make(1), keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(CrashError):
            write_snapshot(tmp_path, make(2), keep=2)
    assert same(latest_snapshot(tmp_path, report=reports), make(1))
    write_snapshot(tmp_path, make(2), keep=2)
    assert names(tmp_path) == ["round-000001", "round-000002"]


def test_state_that_is_no_json_is_refused_before_anything_is_committed(
    tmp_path: Path, reports: Reports
) -> None:
    write_snapshot(tmp_path, make(1), keep=1)
    bad = Snapshot(2, {}, {}, {"loss": float("nan")})
    with pytest.raises(SnapshotError):
        write_snapshot(tmp_path, bad, keep=1)
    assert names(tmp_path) == ["round-000001"]


def test_every_nth_round_is_kept_for_good(tmp_path: Path) -> None:
    for number in range(1, 12):
        write_snapshot(tmp_path, make(number), keep=2, keep_every=4)
    assert names(tmp_path) == [f"round-{number:06d}" for number in (4, 8, 10, 11)]


def test_rounds_beyond_the_sixth_digit_are_still_in_order(tmp_path: Path, reports: Reports) -> None:
    for number in (999_999, 1_000_000):
        write_snapshot(tmp_path, make(number), keep=2)
    assert same(latest_snapshot(tmp_path, report=reports), make(1_000_000))


@pytest.mark.parametrize("keep", [1, 3])
def test_damaged_snapshot_of_a_later_round_goes_before_a_round_that_is_done_anew(
    tmp_path: Path, reports: Reports, keep: int
) -> None:
    for number in (1, 2, 3):
        write_snapshot(tmp_path, make(number), keep=3)
    hidden = {}  # as a disk that fails for a while would: whole again later
    for number in (2, 3):
        path = tmp_path / f"round-{number:06d}" / "state.json"
        hidden[path] = path.read_bytes()
        path.write_bytes(b"")
    assert same(latest_snapshot(tmp_path, report=reports), make(1))
    anew = replace(make(2), state={"done": "anew"})
    write_snapshot(tmp_path, anew, keep=keep)
    for path, data in hidden.items():
        if path.parent.exists() and path.parent.name == "round-000003":
            path.write_bytes(data)
    assert same(latest_snapshot(tmp_path, report=reports), anew)
    assert names(tmp_path) == ["round-000001", "round-000002"][-keep:]


def test_snapshot_that_would_shadow_the_new_one_and_cant_be_removed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reports: Reports
) -> None:
    for number in (1, 2):
        write_snapshot(tmp_path, make(number), keep=3)
    flip(tmp_path / "round-000002" / "state.json")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_remove", no_space)
        with pytest.raises(SnapshotError, match="cannot write snapshot"):
            write_snapshot(tmp_path, make(2), keep=3)
    assert same(latest_snapshot(tmp_path, report=reports), make(1))


def test_old_snapshot_that_cant_be_removed_costs_a_warning_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_snapshot(tmp_path, make(1), keep=1)
    monkeypatch.setattr(module, "_remove", no_space)
    monkeypatch.setattr(module.log, "propagate", True)
    write_snapshot(tmp_path, make(2), keep=1)
    assert "cannot remove the old snapshot" in caplog.text


def test_what_a_crash_left_half_written_is_removed_at_the_start(tmp_path: Path) -> None:
    write_snapshot(tmp_path, make(1), keep=1)
    (tmp_path / ".round-000002.tmp").mkdir()
    (tmp_path / ".round-000002.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".term.x1.tmp").write_bytes(b"1")
    assert remove_strays(tmp_path) == [".round-000002.tmp", ".term.x1.tmp"]
    assert names(tmp_path) == ["round-000001"]
    assert remove_strays(tmp_path / "missing") == []


def test_manifest_holds_the_hash_of_every_other_file(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, make(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest) == sorted(set(FILES) - {"manifest.json"})
