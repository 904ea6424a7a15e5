"""The server is killed at every one of its persistent writes, resumed, and has then done what it would have
done: the same models, the same outer states, the same books, to the bit."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint_manager import find_last_step, load_checkpoint
from pilot.faults import POINTS
from pilot.processes.local_redis import LocalRedis
from pilot.run.snapshot import latest_snapshot

from .books import check_rows, rows_in
from .crash_server import FAILED, NAMES, REFUSED_ROUND
from .scripted import ROW_TOKENS

TESTS = Path(__file__).resolve().parents[1]
ROUNDS = 3
CONFIG = {"num_rounds": ROUNDS, "quarantine": True, "wandb_mode": "disabled", "snapshot_keep": 100}
# Points that stand before a write (or a removal): there the disk may say no, too.
WRITES = [
    point
    for point in POINTS
    if not re.search(r"(created|written|renamed|removed|durable|spool.remove)$", point)
]
# Points that a run passes only once.
ONCE = ("run-dir", "term", "quarantine", "prune", "results")
# Where a client's rest may be ahead of the model that the server comes back with.
FORM_POINTS = (
    "spill.write",
    "spill.written",
    "snapshot.steps",
    "snapshot.rename",
    "snapshot.renamed",
    "spool.remove",
)
# Where a full disk costs a warning, and the run goes on.
FORGIVEN = ("event", "quarantine", "prune")


class Servers:
    """Starts servers of runs, each in a process of its own, and keeps what they committed."""

    def __init__(self, base: Path, redis_url: str) -> None:
        self.base, self.redis_url = base, redis_url
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "federation.crash_server"],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self._zygote.stdout is not None
        return self._zygote.stdout.readline()

    def lead(
        self, run: str, *, fault: str = "", seed: int = 0, spoilt: int = 0, **config: Any
    ) -> tuple[int, str]:
        """(exit code, log) of one server of `run`; the merge of round `spoilt` makes the model much worse."""
        job = {"base": str(self.base), "redis": self.redis_url, "fault": fault, "seed": seed}
        job["spoilt"] = spoilt
        job["config"] = CONFIG | {"run_name": run} | config
        assert self._zygote.stdin is not None
        self._zygote.stdin.write(json.dumps(job) + "\n")
        self._zygote.stdin.flush()
        answer = json.loads(self._answer())
        return answer["status"], answer["log"]

    def directory(self, run: str) -> Path:
        return self.base / "runs" / run

    def close(self) -> None:
        assert self._zygote.stdin is not None and self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.wait(timeout=60)
        self._zygote.stdout.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    # in memory, if there is room: a killed process loses nothing that it has written, synced or not
    memory = Path("/dev/shm")
    in_memory = memory.is_dir() and shutil.disk_usage(memory).free > 50e6
    with (
        LocalRedis() as redis,
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir=memory if in_memory else None) as base,
    ):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{TESTS}:{TESTS.parent}")
        patch.setenv("FLWR_TELEMETRY_ENABLED", "0")
        started = Servers(Path(base), redis.url)
        try:
            yield started
        finally:
            started.close()


@pytest.fixture(scope="module")
def undisturbed(servers: Servers) -> dict[int, str]:
    """Round → digest of what an uninterrupted server committed, all rounds kept."""
    assert servers.lead("undisturbed")[0] == 0
    committed = digests(servers.directory("undisturbed"))
    assert sorted(committed) == list(range(1, ROUNDS + 1))
    return committed


def digests(run_dir: Path) -> dict[int, str]:
    """Round → digest of every snapshot there; each must be whole."""
    found = {}
    for path in sorted((run_dir / "snapshots").glob("round-*")):
        digest = hashlib.sha256()
        steps = sorted(step.name for step in path.glob("step-*"))
        for name in ("model.safetensors", "outer.safetensors", *steps):
            digest.update(name.encode() + (path / name).read_bytes())
        state = json.loads((path / "state.json").read_text())
        digest.update(json.dumps(comparable(state), sort_keys=True).encode())
        lines = [json.loads(line) for line in (path / "merged.jsonl").read_text().splitlines()]
        digest.update(json.dumps([line | {"term": 0} for line in lines]).encode())
        assert json.loads((path / "manifest.json").read_text()), "a snapshot by that name is whole"
        found[state["round"]] = digest.hexdigest()
    return found


def snapshots(servers: Servers, run: str) -> list[Path]:
    return sorted((servers.directory(run) / "snapshots").glob("round-*"))


def comparable(state: dict[str, Any]) -> dict[str, Any]:
    """state.json without what may differ: which start of the server it was, how long things took, W&B's id, the
    run's name and how many snapshots it keeps."""
    kept = {k: v for k, v in state.items() if k not in ("term", "wandb_id", "run", "config")}
    kept["merged"] = [
        one | {"fence": one["fence"] | {"term": 0, "run": ""}} for one in state["merged"]
    ]
    kept["last_merged"] = {name: fence[1:] for name, fence in state["last_merged"].items()}
    kept["history"] = [record | {"duration_s": 0} for record in state["history"]]
    return kept


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    loaded = torch.load(run_dir / "final_model.pt", weights_only=True)
    return dict(loaded["model"])


def finish(
    servers: Servers,
    run: str,
    undisturbed: dict[int, str],
    like: str = "undisturbed",
    **config: Any,
) -> None:
    """Resume `run` with the same command; all that it ever committed is what it should be: what `like` has."""
    run_dir = servers.directory(run)
    committed = digests(run_dir)
    complete = (run_dir / "final_model.pt").exists()  # it died when all was written
    status, log = servers.lead(run, seed=7, **config)
    assert (status == FAILED and "is finished" in log) if complete else status == 0, log
    for number, digest in digests(run_dir).items():
        assert committed.setdefault(number, digest) == digest, f"round {number} was done twice"
    if "snapshot_keep" in config:  # the first rounds may be gone
        committed = undisturbed | committed
    assert committed == undisturbed and ROUNDS in digests(run_dir)
    wanted = final_weights(servers.directory(like))
    torch.testing.assert_close(final_weights(run_dir), wanted, rtol=0, atol=0)
    assert not list(run_dir.rglob(".*.tmp")), "nothing half-written is left"
    assert not (run_dir / "spool").exists()
    shutil.rmtree(run_dir)


def test_replies_arrive_in_either_order_and_it_makes_no_difference(
    servers: Servers, undisturbed: dict[int, str]
) -> None:
    first = set()
    for seed in range(1, 3):
        run = f"order-{seed}"
        assert servers.lead(run, seed=seed)[0] == 0
        events = (servers.directory(run) / "events.jsonl").read_text().splitlines()
        replies = [e for e in map(json.loads, events) if e["event"] == "reply"]
        first |= {next(e["client"] for e in replies if e["round"] == n) for n in (1, ROUNDS)}
        assert digests(servers.directory(run)) == undisturbed
    assert first == set(NAMES)


@pytest.mark.parametrize("point", POINTS)
def test_server_killed_at_a_write_resumes_to_the_same_bits(
    servers: Servers, undisturbed: dict[int, str], point: str
) -> None:
    config = {"snapshot_keep": 2} if point.startswith("prune") else {}
    for passing in (1,) if point.startswith(ONCE) else (1, 2):
        run = f"kill-{point}-{passing}"
        status, log = servers.lead(run, fault=f"{point}:{passing}", seed=passing, **config)
        assert status == -signal.SIGKILL, log
        finish(servers, run, undisturbed, **config)


@pytest.mark.parametrize(
    ("up", "down"),
    [("bfloat16", "int8"), ("int8", "sparse"), ("int4", "int4"), ("sparse", "full")],
)
def test_server_killed_at_a_write_resumes_to_the_same_bits_whatever_travels(
    servers: Servers, up: str, down: str
) -> None:
    like, config = f"form-{up}-{down}", {"wire_up": up, "wire_down": down, "mirror_history": 2}
    assert servers.lead(like, **config)[0] == 0
    undisturbed = digests(servers.directory(like))
    steps = [len(list(path.glob("step-*"))) for path in snapshots(servers, like)]
    assert steps == ([0, 0, 0] if down == "full" else [1, 2, 0]), "the last step is sent to nobody"
    for point in FORM_POINTS:
        for passing in (1, 2):
            run = f"{like}-{point}-{passing}"
            status, log = servers.lead(run, fault=f"{point}:{passing}", seed=passing, **config)
            assert status == -signal.SIGKILL, log
            finish(servers, run, undisturbed, like, **config)


@pytest.mark.parametrize("point", WRITES)
def test_full_disk_ends_the_server_with_a_sentence_and_it_resumes_to_the_same_bits(
    servers: Servers, undisturbed: dict[int, str], point: str
) -> None:
    run = f"full-{point}"
    passing = 2 if point.startswith(("snapshot", "spill", "outer")) else 1
    status, log = servers.lead(run, fault=f"{point}:{passing}=enospc")
    if point.startswith(FORGIVEN):
        assert status == 0, log
        return
    assert status == FAILED and "No space left on device" in log.splitlines()[-1], log
    finish(servers, run, undisturbed)


def test_model_of_the_last_round_is_a_checkpoint_before_it_is_scored(servers: Servers) -> None:
    status, log = servers.lead("unscored", fault="results.checkpoint:2")  # the second one is scored
    assert status == -signal.SIGKILL, log
    checkpoint = servers.base / "base_checkpoints" / "unscored"
    weights, _, meta = load_checkpoint(checkpoint, find_last_step(checkpoint), "cpu")
    snapshot = latest_snapshot(servers.directory("unscored") / "snapshots", report=print)
    assert snapshot is not None and meta["val_bpb"] is None
    torch.testing.assert_close(dict(weights), snapshot.model, rtol=0, atol=0)
    assert not (servers.directory("unscored") / "final_model.pt").exists()


def test_merged_replies_prove_that_every_row_was_merged_once(
    servers: Servers, undisturbed: dict[int, str]
) -> None:
    snapshot = latest_snapshot(servers.directory("undisturbed") / "snapshots", report=print)
    assert snapshot is not None
    replies = [json.loads(line) for line in snapshot.merged]
    fences = [(one["round"], one["term"], one["lease"]) for one in replies]
    assert len(set(fences)) == len(fences) == 2 * ROUNDS - 1
    assert [one["round"] for one in replies].count(REFUSED_ROUND) == 1
    state = snapshot.state
    check_rows(replies, rows_in(state), tokens=state["tokens"], row_tokens=ROW_TOKENS)


def test_a_merge_is_taken_back_to_the_model_that_clients_held(servers: Servers) -> None:
    """With its residual, which clients never had; killed there or not."""
    config = SPOILT | {"wire_up": "int4", "wire_down": "int4"}
    found = []
    for run, fault in (("mirrors-back", ""), ("mirrors-back-killed", "snapshot.renamed:3")):
        status, log = servers.lead(run, spoilt=2, fault=fault, **config)
        if fault:
            assert status == -signal.SIGKILL, log
            status, log = servers.lead(run, spoilt=2, **config)
        assert status == 0, log
        found.append(digests(servers.directory(run)))
        first, back = (snapshots(servers, run)[number] for number in (0, 2))
        for name in ("model.safetensors", "outer.safetensors"):
            assert (first / name).read_bytes() == (back / name).read_bytes()
    assert found[0] == found[1] and len(found[0]) == 4


# -- a merge is taken back ---------------------------------------------------------------------------

SPOILT = {"num_rounds": 4}
# Of the second round, which takes the merge of the first one back: point → its passing there
BACK = {
    "quarantine.tensors-written": 2,
    "quarantine.written": 3,
    "snapshot.model": 2,
    "snapshot.state": 2,
    "snapshot.rename": 2,
    "snapshot.renamed": 2,
    "snapshot.durable": 2,
    "prune.rename": 1,
    "prune.removed": 1,
    "spool.remove": 2,
}


@pytest.fixture(scope="module")
def spoilt(servers: Servers) -> dict[int, str]:
    """As `undisturbed`, of a run whose first merge spoils the model."""
    assert servers.lead("spoilt", spoilt=1, **SPOILT)[0] == 0
    run_dir = servers.directory("spoilt")
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "merge_taken_back"]
    assert (told["round"], told["taken_back"], told["clients"]) == (2, [1, 1], list(NAMES))
    return digests(run_dir)


@pytest.mark.parametrize("point", BACK)
def test_server_killed_while_it_takes_a_merge_back_resumes_to_the_same_bits(
    servers: Servers, spoilt: dict[int, str], point: str
) -> None:
    config = SPOILT | ({"snapshot_keep": 1} if point.startswith("prune") else {})
    run = f"back-{point}"
    status, log = servers.lead(run, spoilt=1, fault=f"{point}:{BACK[point]}", **config)
    assert status == -signal.SIGKILL, log
    status, log = servers.lead(run, spoilt=1, **config)
    assert status == 0, log
    found = digests(servers.directory(run))
    assert found == {number: spoilt[number] for number in found} and max(found) == max(spoilt)
    wanted = final_weights(servers.directory("spoilt"))
    torch.testing.assert_close(final_weights(servers.directory(run)), wanted, rtol=0, atol=0)
    shutil.rmtree(servers.directory(run))
