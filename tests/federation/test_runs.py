"""Whole runs over real Flower, real Redis and real workers, some of which are killed."""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, MARK, ROOT, environment, marked
from nanochat.checkpoint_manager import load_checkpoint
from pilot.config import RunConfig
from scripts import base_eval

from ..waiting import until
from .books import check_books
from .in_process import federate
from .processes import (
    RUN_S,
    events,
    finished,
    killed_at_end,
    pilot_run,
    write_config,
)

pytestmark = pytest.mark.timeout(1800)


def test_a_simulation_trains_in_rounds_that_redis_ends_and_leaves_a_model(
    builtin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = MICRO | {
        "run-name": "simulated",
        "total-tokens": 4 * 16384,  # a fast machine overshoots a round's target by half a second
        "target-tokens": 16384,
        "epochs": 3,
    }
    config = write_config(tmp_path, values)
    env = environment(builtin, tmp_path, **{MARK: str(tmp_path)})
    with killed_at_end(pilot_run("local-simulation", config, env=env)) as process:
        output = finished(process)

    # what operators know
    for line in (
        r"\[ROUND 2\]",
        r"Scaling weight decay from 0\.000000 to 0\.000000 for depth 1",
        r"Round 2 schedule: Step \d+\.\d/64, LRM 1\.000, Momentum 0\.\d+",
        r"Flower nodes: client_0 \(\d+\), client_1 \(\d+\)",
        r"configure_train: Training on all 2 Flower nodes",
        r"Shard progress: \d+\.\d% \(\d+/24 complete\)",
        r"Round monitor started for ROUND 2",
        r"Stop signal received \(END ROUND 1\) after batch \d+",
        r"Client 0: \d+ batches",
        r"round=3 val_bpb=\d\.\d{4}",
        r"client_[01]: .*loss=\d+\.\d+ shard=\d shard_progress=\d+\.\d%",
        r"Final model: .*final_model\.pt",
    ):
        assert re.search(line, output), f"{line} is not in:\n{output}"

    committed = events(builtin, "simulated", "round_committed")
    assert len(committed) >= 3
    ended = events(builtin, "simulated", "round_ended")
    assert {event["reason"] for event in ended} <= {"target-tokens", "run-tokens"}
    scored = events(builtin, "simulated", "validation")
    bpbs = [event["val_bpb"] for event in scored]
    assert all(event["complete"] for event in scored)
    assert bpbs == sorted(bpbs, reverse=True)

    check_books(builtin, "simulated")
    check_evaluation(builtin, bpbs[-1], monkeypatch, capsys)
    until(lambda: not marked(str(tmp_path)), what="the end of all processes")
    again = subprocess.run(
        [BIN / "pilot", "run", "local-simulation", "--run-config", config],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert again.returncode != 0
    assert "run simulated is finished" in again.stdout + again.stderr


def check_evaluation(
    base: Path, last_bpb: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`base_eval` on the path and on the run's name gives the last bpb that the run logged."""
    final = base / "runs" / "simulated" / "final_model.pt"
    for checkpoint in (str(final), "simulated"):
        monkeypatch.setattr(sys, "argv", ["base_eval", "--checkpoint", checkpoint])
        base_eval.main()
        said = capsys.readouterr().out
        found = re.search(r"val_bpb=(\d+\.\d+)", said)
        assert found, said
        assert float(found[1]) == pytest.approx(
            last_bpb, abs=2e-6 + 0.5 * 10 ** -len(found[1].split(".")[1])
        )


def test_a_killed_server_resumes_to_the_weights_of_one_that_was_not(
    builtin: Path, tmp_path: Path
) -> None:
    """Nothing of the killed one survives; the other is led in this process, by the same rules."""
    values = MICRO | {"round-steps": 3, "num-rounds": 3, "total-tokens": 10**6, "client-threads": 1}
    federate(RunConfig.from_mapping(values | {"run-name": "whole"}), "client_0", "client_1")

    config = write_config(tmp_path, values | {"run-name": "broken"})
    env = environment(builtin, tmp_path, **{MARK: str(tmp_path)})
    snapshots = builtin / "runs" / "broken" / "snapshots"
    with killed_at_end(pilot_run("local-simulation", config, env=env)) as process:
        until((snapshots / "round-000001").exists, RUN_S, "the first commit")
        suspend_server(str(tmp_path))  # or it is done before its keeper's grace is over
        (scratch,) = scratch_directories(str(tmp_path))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    until(lambda: not marked(str(tmp_path)), what="the end of all processes")
    until(lambda: not scratch.exists(), what="the end of the scratch directory")
    assert not (builtin / "runs" / "broken" / "final_model.pt").exists()
    with killed_at_end(pilot_run("local-simulation", config, env=env)) as process:
        output = finished(process)
    assert re.search(r"Resuming run broken after round [12]", output)

    models = [
        load_checkpoint(builtin / "base_checkpoints" / run, 3 * 3, "cpu")[
            0
        ]  # 3 rounds of 3 steps of both
        for run in ("whole", "broken")
    ]
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name]), name
    check_books(builtin, "broken")


def suspend_server(mark: str) -> None:
    (server,) = (
        process
        for process in marked(mark)
        if any(word.endswith("flwr-simulation") for word in process.cmdline())
    )
    server.suspend()


def scratch_directories(mark: str) -> set[Path]:
    """Of the marked processes, as `pilot run` names them to all that it starts."""
    found = set()
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            found.add(process.environ().get("PILOT_SCRATCH_DIR", ""))
    return {Path(directory) for directory in found if directory}
