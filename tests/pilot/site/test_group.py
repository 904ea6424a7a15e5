"""Worker groups as real processes: any number of ranks does the same, and no process outlives the group."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pilot.coordination.coordinator import ServerCoordinator
from pilot.site import handle as handle_module
from pilot.site.handle import WorkerError, WorkerHandle
from pilot.wire.messages import (
    HelloOrder,
    HelloReply,
    TrainOrder,
    TrainReply,
    from_header,
    to_header,
)

from ...waiting import LIMIT_S, family, gone, until
from ..worker_kit import (
    BATCH_ROWS,
    ENDLESS,
    ROOT,
    T,
    ask,
    first_weights,
    site_config,
    train_order,
)


class Group:
    """A group that works on one order, in the background, and everything a test may want to know."""

    def __init__(self, order: TrainOrder, weights: dict[str, torch.Tensor], processes: int) -> None:
        self._pool = ThreadPoolExecutor(1)
        self.worker = WorkerHandle(processes=processes, device="cpu")
        self.started = threading.Event()
        self.answer: Future[tuple[TrainReply, dict[str, torch.Tensor]]] = self._pool.submit(
            self._run, order, weights
        )
        assert self.started.wait(LIMIT_S)
        self.pid = self.worker._pid

    def _run(self, order: TrainOrder, weights: Any) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        with self.worker:
            self.started.set()
            return ask(self.worker, order, weights)

    def until_it_trains(self, leader: ServerCoordinator) -> None:
        def trains() -> bool:
            return any(h.heartbeat.tokens for h in leader.heartbeats(["c"]).values())

        until(lambda: self.answer.done() or trains())
        if self.answer.done():
            raise AssertionError(f"it ended before it trained: {self.reply()[0]}")

    def reply(self) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        try:
            return self.answer.result(LIMIT_S)
        finally:
            self._pool.shutdown()


# -- any number of processes does the same -------------------------------------------------------


def test_one_two_and_three_processes_take_the_same_steps_on_the_same_rows(site: Path) -> None:
    # cautious weight decay asks for the sign of an update: where that is zero but for rounding, a coin
    config = site_config(site, round_steps=2, weight_decay=0.0)
    weights = first_weights(config)
    segments = [[0, 0, 4, -1], [0, 1, 0, -1]]

    def trained_by(processes: int) -> tuple[TrainReply, dict[str, torch.Tensor]]:
        order = train_order(config, segments, processes=processes, eval_end_row=11)
        with WorkerHandle(processes=processes, device="cpu") as worker:
            return ask(worker, order, weights)

    with ThreadPoolExecutor(3) as pool:  # as three clients on one machine
        results = list(pool.map(trained_by, (1, 2, 3)))
    (reply, update), *others = results
    assert reply.tokens == 2 * BATCH_ROWS * T and reply.stopped_by == "steps done"
    assert all(bool(tensor.any()) for tensor in update.values())
    for other, other_update in others:
        assert other.consumed == reply.consumed and other.row_counts == reply.row_counts
        assert (other.tokens, other.eval_rows, other.eval_bytes) == (
            reply.tokens,
            11,
            reply.eval_bytes,
        )
        assert other.loss_nats == pytest.approx(reply.loss_nats, rel=1e-5)
        assert other.eval_nats == pytest.approx(reply.eval_nats, rel=1e-5)
        for name, tensor in update.items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(other_update[name], tensor, rtol=1e-3, atol=2e-3 * scale)


# -- ends ----------------------------------------------------------------------------------------


def test_end_of_the_round_in_redis_stops_all_processes_and_they_reply(
    site: Path, redis_url: str, leader: ServerCoordinator
) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url)
    group = Group(order, first_weights(config), processes=2)
    group.until_it_trains(leader)
    members = family(group.pid)
    leader.end_round("target-tokens")
    reply, update = group.reply()
    assert reply.stopped_by == "target-tokens" and reply.error == ""
    rows = sum(segment.rows or 0 for segment in reply.consumed)
    assert rows * T == reply.tokens > 0 and update
    assert len(members) >= 3 and gone(members)


def test_order_after_the_end_of_its_round_is_answered_at_once_without_training(
    site: Path, redis_url: str, leader: ServerCoordinator
) -> None:
    leader.end_round("min-duration")
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url, eval_end_row=12)
    with WorkerHandle(processes=2, device="cpu") as worker:
        reply, update = ask(worker, order, first_weights(config))
    assert (reply.stopped_by, reply.tokens, reply.eval_rows) == ("min-duration", 0, 0)
    assert update == {} and reply.fence == order.fence


@pytest.mark.parametrize("member", ["supervisor", "rank 0", "rank 1"])
def test_sigterm_drains_a_group_which_replies_with_what_it_trained(
    site: Path, redis_url: str, leader: ServerCoordinator, member: str
) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url)
    group = Group(order, first_weights(config), processes=2)
    group.until_it_trains(leader)
    family(group.pid)[["supervisor", "rank 0", "rank 1"].index(member)].terminate()
    reply, update = group.reply()
    assert reply.stopped_by == "SIGTERM" and reply.tokens > 0 and update


def test_sigterm_before_the_group_is_ready_is_answered_as_soon_as_it_is(site: Path) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, seconds_left=3600.0)
    group = Group(order, first_weights(config), processes=1)
    until(lambda: len(family(group.pid)) == 2)  # rank 0 exists; torch takes it seconds to import
    os.kill(group.pid, signal.SIGTERM)
    reply, _ = group.reply()
    assert reply.stopped_by == "SIGTERM"


def test_drain_right_after_the_start_is_not_the_death_of_the_group(site: Path) -> None:
    order = train_order(site_config(site, round_steps=0), ENDLESS, seconds_left=3600.0)
    with WorkerHandle(device="cpu") as worker:
        worker.drain()  # its interpreter has hardly begun to start
        reply, _ = ask(worker, order, first_weights(site_config(site)))
    assert reply.stopped_by == "SIGTERM"


# -- failures ------------------------------------------------------------------------------------


def test_paths_that_are_relative_mean_the_same_to_workers_as_to_us(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.parent)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", site.name)
    order = HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="")
    with WorkerHandle(device="cpu") as worker:
        reply = from_header(worker.ask(to_header(order))[0])
    assert isinstance(reply, HelloReply) and not reply.error
    assert reply.fingerprints["tokenizer"], "the tokenizer of our base directory was found"


def test_temporary_directory_with_a_long_path_has_room_for_a_group(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.delenv("PILOT_SCRATCH_DIR", raising=False)
    order = HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url="")
    with WorkerHandle(device="cpu") as worker:
        reply = from_header(worker.ask(to_header(order))[0])
    assert isinstance(reply, HelloReply) and not reply.error


def test_missing_dataset_is_the_answer_to_a_hello(site: Path) -> None:
    config = site_config(site, source="climbmix")
    order = HelloOrder(run="r", config=config.to_mapping(), redis_url="")
    with WorkerHandle(device="cpu") as worker:
        reply = from_header(worker.ask(to_header(order))[0])
    assert isinstance(reply, HelloReply) and "python -m nanochat.dataset -n" in reply.error


def test_mistake_of_a_user_in_mid_round_is_reported_in_its_own_words(site: Path) -> None:
    config = site_config(site, eval_rows=10_000)
    order = train_order(
        config, [[0, 0, 0, -1]], processes=2, eval_first_row=9_000, eval_end_row=9_999
    )
    with WorkerHandle(processes=2, device="cpu") as worker:
        with pytest.raises(
            WorkerError, match=r"^the validation shard 2 has only .* rows"
        ) as caught:
            ask(worker, order, first_weights(config))
        members = family(worker._pid) if worker._group.poll() is None else []
    assert "\n" not in str(caught.value) and gone(members)


def test_library_that_aborts_at_exit_does_not_hide_why_a_rank_failed(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what gloo does now and then, when its threads still wait for another rank
    aborts = "import atexit, os\nif 'PILOT_RANK' in os.environ: atexit.register(os.abort)\n"
    (tmp_path / "sitecustomize.py").write_text(aborts)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = site_config(site, eval_rows=10_000)
    order = train_order(config, [[0, 0, 0, -1]], eval_first_row=9_000, eval_end_row=9_999)
    with (
        WorkerHandle(device="cpu") as worker,
        pytest.raises(WorkerError, match=r"^the validation shard 2 has only .* rows"),
    ):
        ask(worker, order, first_weights(config))


def test_killed_process_ends_the_group_with_a_sentence(
    site: Path, redis_url: str, leader: ServerCoordinator
) -> None:
    config = site_config(site, round_steps=0)
    order = train_order(config, ENDLESS, processes=2, redis_url=redis_url)
    group = Group(order, first_weights(config), processes=2)
    group.until_it_trains(leader)
    members = family(group.pid)
    members[2].kill()  # rank 1
    with pytest.raises(WorkerError, match=r"^worker process 1 was killed by signal 9"):
        group.reply()
    until(lambda: gone(members))


def test_a_group_whose_threads_all_hang_is_killed_when_its_time_is_over(site: Path) -> None:
    with WorkerHandle(device="cpu", limit_s=12.0) as worker:
        # it imports torch: by then it has asked to be killed with its supervisor
        until(lambda: any(p.memory_info().rss > 60 << 20 for p in family(worker._pid)[1:]))
        members = family(worker._pid)
        members[1].suspend()
        with pytest.raises(WorkerError, match=r"^the worker hangs: it has not answered"):
            worker.ask(
                to_header(HelloOrder(run="r", config=site_config(site).to_mapping(), redis_url=""))
            )
        until(lambda: gone(members))


HOLDER = """
import sys, time
from pilot.site.handle import WorkerHandle
with WorkerHandle(processes=int(sys.argv[1]), device="cpu") as worker:
    print(worker._pid, worker._dir, flush=True)
    time.sleep(600)
"""


@pytest.mark.xdist_group("seconds")
@pytest.mark.parametrize(
    ("who", "signum"),
    [  # a ClientApp unwinds at Ctrl-C only; a SuperNode's end looks the same from here, whatever ends it
        ("ClientApp", signal.SIGKILL),
        ("ClientApp", signal.SIGTERM),
        ("ClientApp", signal.SIGINT),
        ("SuperNode", signal.SIGKILL),
        ("supervisor", signal.SIGKILL),
    ],
)
def test_group_ends_within_ten_seconds_of_the_death_of(
    who: str, signum: signal.Signals, tmp_path: Path
) -> None:
    supernode = subprocess.Popen(["sleep", "600"])
    # a ClientApp names its SuperNode as Flower's do, and lives on when that is killed
    command = [sys.executable, "-c", HOLDER, "2", "--parent-pid", str(supernode.pid)]
    environment = {**os.environ, "PILOT_SCRATCH_DIR": str(tmp_path)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True, env=environment)
    try:
        assert holder.stdout is not None
        pid, directory = holder.stdout.readline().split()
        assert Path(directory).parent == tmp_path
        until(lambda: len(family(int(pid))) >= 3)
        members = family(int(pid))
        dies = {"ClientApp": holder.pid, "SuperNode": supernode.pid, "supervisor": int(pid)}
        os.kill(dies[who], signum)
        if who == "SuperNode":
            supernode.wait()
        until(lambda: gone(members), limit_s=10.0)
        if who != "supervisor":
            until(lambda: not Path(directory).exists())
    finally:
        for process in (holder, supernode):
            process.kill()
            process.communicate()


def test_other_version_of_the_package_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handle_module, "code_hashes", lambda: {"pilot package": "of the run"})
    order = HelloOrder(run="r", config={}, redis_url="")
    with WorkerHandle(device="cpu") as worker:
        with pytest.raises(WorkerError, match="install the same version on all sites"):
            worker.ask(to_header(order))
        members = family(worker._pid)
    assert gone(members)


def test_group_that_cannot_start_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with WorkerHandle(device="cpu") as worker:
        with pytest.raises(WorkerError, match="ended before it listened"):
            worker.ask({"kind": "HelloOrder"})
        directory = worker._dir
    assert not directory.exists()


def test_site_whose_supernode_is_gone_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with WorkerHandle(device="cpu") as worker:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        with pytest.raises(WorkerError, match="SuperNode of this client is gone"):
            worker.ask(to_header(HelloOrder(run="r", config={}, redis_url="")))
        members = family(worker._pid)
    assert gone(members)
