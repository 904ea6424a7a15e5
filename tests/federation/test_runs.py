"""Whole runs over real Flower, real Redis and real workers, some of which are killed."""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, MARK, ROOT, environment, marked
from nanochat.checkpoint_manager import load_checkpoint
from pilot.config import RunConfig
from pilot.run.snapshot import latest_snapshot
from scripts import base_eval

from ..waiting import until
from .in_process import federate
from .processes import (
    RUN_S,
    Deployment,
    events,
    killed_at_end,
    pilot_run,
    write_config,
)

pytestmark = pytest.mark.timeout(1800)


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, output[-5000:]
    return output


def test_a_simulation_trains_in_rounds_that_redis_ends_and_leaves_a_model(
    builtin: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = MICRO | {
        "run-name": "simulated",
        "total-tokens": 6 * 16384,  # a fast machine overshoots a round's target by half a second
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
        r"Round 2 schedule: Step \d+\.\d/96, LRM 1\.000, Momentum 0\.\d+",
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


def check_books(base: Path, run: str) -> None:
    """Rows committed per shard are those of the accepted replies; none twice, none of validation."""
    trained: dict[tuple[int, int], list[int]] = {}
    for reply in events(base, run, "reply"):
        for epoch, shard, first, end in reply["consumed"]:
            trained.setdefault((epoch, shard), []).extend(range(first, end))
    snapshot = latest_snapshot(base / "runs" / run / "snapshots", report=print)
    assert snapshot is not None
    ledger = snapshot.state["ledger"]
    committed = {
        (epoch, shard): [row for first, end in intervals for row in range(first, end)]
        for epoch, shard, _, intervals in ledger["committed"]
    }
    assert {key: sorted(rows) for key, rows in trained.items()} == committed
    assert all(shard < MICRO["num-shards"] for _, shard in committed)  # validation is shard 8
    rows = sum(len(rows) for rows in committed.values())
    assert rows * MICRO["sequence-len"] == snapshot.state["tokens"]


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
    builtin: Path, tmp_path: Path, app: Path
) -> None:
    """Nothing of the killed one survives; the other is led in this process, by the same rules."""
    values = MICRO | {"round-steps": 3, "num-rounds": 3, "total-tokens": 10**6, "client-threads": 1}
    federate(RunConfig.from_mapping(values | {"run-name": "whole"}), "client_0", "client_1")

    config = write_config(tmp_path, values | {"run-name": "broken"})
    env = environment(builtin, tmp_path, **{MARK: str(tmp_path)})
    snapshots = builtin / "runs" / "broken" / "snapshots"
    with killed_at_end(pilot_run("local-simulation", config, env=env, app=app)) as process:
        until((snapshots / "round-000001").exists, RUN_S, "the first commit")
        (scratch,) = scratch_directories(str(tmp_path))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    until(lambda: not marked(str(tmp_path)), what="the end of all processes")
    until(lambda: not scratch.exists(), what="the end of the scratch directory")
    assert not (builtin / "runs" / "broken" / "final_model.pt").exists()
    with killed_at_end(pilot_run("local-simulation", config, env=env, app=app)) as process:
        output = finished(process)
    assert re.search(r"Resuming run broken after round [12]", output)

    models = [
        load_checkpoint(builtin / "base_checkpoints" / run, 3 * 2 * 3, "cpu")[0]
        for run in ("whole", "broken")
    ]
    for name, weight in models[0].items():
        assert torch.equal(weight, models[1][name]), name
    check_books(builtin, "broken")


def scratch_directories(mark: str) -> set[Path]:
    """Of the marked processes, as `pilot run` names them to all that it starts."""
    found = set()
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            found.add(process.environ().get("PILOT_SCRATCH_DIR", ""))
    return {Path(directory) for directory in found if directory}


def test_a_deployment_survives_the_death_of_a_site(
    builtin: Path, tmp_path: Path, app: Path
) -> None:
    values = MICRO | {
        "run-name": "deployed",
        "total-tokens": 4 * 32768,
        "target-tokens": 32768,
        "num-rounds": 3,
        "grace-max": 15.0,
        "epochs": 4,
    }
    config = write_config(tmp_path, values)
    with Deployment(tmp_path, builtin) as deployment:
        for name in ("site-a", "site-b"):
            deployment.start_node(name)
        # plain Flower, as users of the prototype know it; a mistyped value is named by the server
        run = [BIN / "flwr", "run", app, "local-deployment", "--stream", "--run-config", config]
        with killed_at_end(
            subprocess.Popen(
                run,
                cwd=ROOT,
                env=deployment.env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        ) as process:
            until(lambda: len(opened(builtin)) == 2, RUN_S, "the second round")
            site = deployment.mark("site-b")
            until(lambda: workers(site), RUN_S, "a worker of site-b")
            deployment.nodes["site-b"].send_signal(signal.SIGKILL)
            until(lambda: not workers(site), what="the end of site-b's workers")
            output = finished(process)
        listed = subprocess.run(
            [BIN / "flwr", "ls", "local-deployment", "--format", "json"],
            cwd=ROOT,
            env=deployment.env,
            capture_output=True,
            text=True,
            check=True,
        )
    assert "finished:completed" in listed.stdout
    assert "configure_train: Training on all 2 Flower nodes" in output
    assert "s3cret" not in output
    assert (builtin / "runs" / "deployed" / "final_model.pt").exists()
    clients = [event["clients"] for event in events(builtin, "deployed", "round_committed")]
    assert clients == [2, 1, 1]
    refused = events(builtin, "deployed", "reply_refused")
    assert "site-b" in {event["client"] for event in refused}
    check_books(builtin, "deployed")


def opened(base: Path) -> list[dict[str, Any]]:
    return events(base, "deployed", "round_opened")


def workers(site: str) -> list[int]:
    """Worker processes of a site."""
    found = []
    for process in marked(site):
        with contextlib.suppress(Exception):
            if any("pilot.site" in argument for argument in process.cmdline()):
                found.append(process.pid)
    return found
