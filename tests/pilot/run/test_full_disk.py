"""A disk that is really full: what is written on it is whole or not there, and goes on once there is room."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.optim import MuonAdamW
from pilot.run.events import read_events
from pilot.run.quarantine import keep_refused
from pilot.run.snapshot import Snapshot, SnapshotError, latest_snapshot, write_snapshot
from pilot.server.telemetry import Telemetry
from pilot.site.inner_state import InnerState
from pilot.site.ranks import Ranks
from pilot.wire.messages import Fence, TrainReply

PAGE = 4096
LARGE = {"w": torch.ones(1 << 18)}  # 1 MB: more than the disk has
ALONE = Ranks(0, 1, torch.device("cpu"), None)


def fill(disk: Path, *, but_for: int = 0) -> Path:
    """A file that takes all the room, but for so many bytes (in whole pages)."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    filler.write_bytes(b"x" * (room.f_bavail * room.f_bsize - but_for))
    return filler


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("large", ["model", "outer", "state", "merged"])
def test_snapshot_that_does_not_fit_is_a_sentence_and_the_one_before_is_whole(
    small_disk: Path, large: str
) -> None:
    first = Snapshot(1, {"w": torch.zeros(3)}, {}, {"round": 1})
    write_snapshot(small_disk, first, keep=3)
    second = replace(first, round_number=2, state={"round": 2})
    too_much = {
        "model": LARGE,
        "outer": LARGE,
        "state": {"text": "x" * (1 << 20)},
        "merged": ["x" * 1024] * 1024,
    }
    with pytest.raises(
        SnapshotError, match=r"round-000002: .*No space left.*same command to resume"
    ):
        write_snapshot(small_disk, replace(second, **{large: too_much[large]}), keep=3)
    assert names(small_disk) == ["round-000001"], "the room of what was begun is free again"
    found = latest_snapshot(small_disk, report=pytest.fail)
    assert found is not None and found.round_number == 1
    write_snapshot(small_disk, second, keep=3)
    found = latest_snapshot(small_disk, report=pytest.fail)
    assert found is not None and found.state == {"round": 2}


def test_events_that_found_no_room_leave_no_torn_line_to_those_that_come_when_there_is(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"wandb_mode": "disabled", "wandb_project": "", "run_name": "r"}
    stream = Telemetry(small_disk, config_dict={}, **options)
    filler = fill(small_disk, but_for=2 * PAGE)
    with caplog.at_level(logging.WARNING, logger="pilot"):
        logging.getLogger("pilot").propagate = True
        for number in range(200):
            stream.event("before", number=number, text="x" * 100)
    assert [record.message for record in caplog.records] == [
        "events are not being recorded: [Errno 28] No space left on device"
    ]
    lines = (small_disk / "events.jsonl").read_bytes()
    assert lines.endswith(b"\n") and 0 < lines.count(b"\n") < 200
    filler.unlink()
    stream.event("after")
    events = list(read_events(small_disk / "events.jsonl"))
    assert [event.get("number") for event in events[:-1]] == list(range(len(events) - 1))
    assert events[-1]["event"] == "after"
    assert len(events) == lines.count(b"\n") + 1


def test_what_may_be_lost_costs_a_warning_and_no_room(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reply = TrainReply(fence=Fence("r", 1, 1, 1), client="c")
    matrix = torch.nn.Parameter(torch.zeros(512, 512))
    optimizer = MuonAdamW(
        [
            {
                "kind": "adamw",
                "params": [matrix],
                "lr": 0.1,
                "betas": (0.9, 0.95),
                "eps": 1e-8,
                "weight_decay": 0.0,
            }
        ]
    )
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    state = InnerState(small_disk / "inner", ALONE)
    for logger in ("pilot", "pilot.site"):
        logging.getLogger(logger).propagate = True
    with caplog.at_level(logging.WARNING, logger="pilot"):
        keep_refused(small_disk / "quarantine", reply, "c", LARGE, "why")
        state.keep(optimizer, reply.fence)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert all("No space left" in record.message for record in caplog.records)
    assert names(small_disk / "quarantine") == names(small_disk / "inner") == []
