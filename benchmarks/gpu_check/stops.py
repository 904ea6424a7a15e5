"""How fast a group ends: by Redis, its clock, SIGTERM, kill -9; and rows that the card has no room for."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.gpu_check import site_kit
from benchmarks.gpu_check.site_kit import ask, order, ranks_below
from benchmarks.gpu_check.verdict import Setup, Verdict
from pilot import plan
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.processes.local_redis import LocalRedis
from pilot.site.handle import WorkerError, WorkerHandle
from pilot.wire.messages import TrainOrder

_START_S = 60.0  # at most, until a group trains


@dataclass(frozen=True)
class _Scene:
    """What all of them need; each has a client and a round of its own."""

    setup: Setup
    config: RunConfig
    weights: dict[str, Tensor]
    redis_url: str
    link: ServerCoordinator
    verdict: Verdict

    def order(self, client: str, number: int, *, seconds: float = _START_S) -> TrainOrder:
        self.link.open_round(number)
        return order(self.config, client, number, seconds=seconds, redis_url=self.redis_url)

    def worker(self) -> WorkerHandle:
        return WorkerHandle(processes=1, device=self.setup.device)


def check(setup: Setup, verdict: Verdict) -> None:
    config = site_kit.config(setup, inner_state="reset", compile="off")
    weights = plan.initial_weights(config)
    with LocalRedis() as redis:
        link = ServerCoordinator(redis.url, config.run_name, term=1, run_dir=setup.directory)
        scene = _Scene(setup, config, weights, redis.url, link, verdict)
        _by_redis(scene)
        _by_clock(scene)
        _by_sigterm(scene)
        _by_kill(scene)
        link.finish()


def _by_redis(scene: _Scene) -> None:
    """The server ends the round: three queued micro-steps, then evaluation aside, the reply."""
    with scene.worker() as worker:
        what = scene.order("site_0", 1)
        strike = _When(scene.link, "site_0", lambda: scene.link.end_round("gpu_check"))
        with strike:
            reply, update, _ = ask(worker, what, scene.weights)
        answered = time.monotonic()
    scene.verdict.that(not reply.error and bool(update), f"Redis: {reply.error or 'no update'}")
    scene.verdict.h100_at_most("redis_to_reply_s", answered - strike.at, 3.0)


def _by_clock(scene: _Scene) -> None:
    seconds = scene.setup.size(12, 5)  # on a busy CPU over before the first step
    with scene.worker() as worker:
        what = scene.order("site_1", 2, seconds=seconds)
        reply, _, taken = ask(worker, what, scene.weights)
    wrong = reply.error or ("" if reply.tokens or scene.setup.tiny else "no tokens")
    scene.verdict.that(not wrong, f"by the clock: {wrong}")
    scene.verdict.h100_at_most("clock_late_s", taken - seconds, 8.0)
    if reply.train_s:
        scene.verdict.note("tokens_per_s", round(reply.tokens / reply.train_s))


def _by_sigterm(scene: _Scene) -> None:
    """It finishes its micro-step and replies."""
    with scene.worker() as worker:
        what = scene.order("site_2", 3)
        strike = _When(scene.link, "site_2", worker.drain)
        with strike:
            reply, update, _ = ask(worker, what, scene.weights)
        answered = time.monotonic()
    scene.verdict.that(not reply.error, f"SIGTERM: {reply.error}")
    scene.verdict.that(bool(update), "SIGTERM: what was trained is lost")
    scene.verdict.h100_at_most("sigterm_to_reply_s", answered - strike.at, 5.0)


def _by_kill(scene: _Scene) -> None:
    """The group is gone and the handle says why."""
    sentence = ""

    def kill() -> None:
        for rank in ranks_below(os.getpid()):
            rank.kill()

    with scene.worker() as worker:
        what = scene.order("site_3", 4)
        strike = _When(scene.link, "site_3", kill)
        with strike:
            try:
                ask(worker, what, scene.weights)
            except WorkerError as error:
                sentence = str(error)
        answered = time.monotonic()
    scene.verdict.that("signal 9" in sentence, f"kill -9: the handle says {sentence!r}")
    limit = 5.0 if not scene.setup.tiny else 20.0
    scene.verdict.at_most("kill_to_error_s", answered - strike.at, limit)
    scene.verdict.that(not ranks_below(os.getpid()), "a rank has outlived its group")


def memory(setup: Setup, verdict: Verdict) -> None:
    """More rows at once than the card has room for: it takes fewer, and the step is done."""
    rows = setup.size(1024, 8)
    config = site_kit.config(
        setup,
        run_name="gpu-check-memory",
        inner_state="reset",
        compile="off",
        device_batch_size=rows,
        total_batch_size=rows * setup.size(1024, 64),
        round_steps=1,
    )
    weights = plan.initial_weights(config)
    with WorkerHandle(processes=1, device=setup.device) as worker:
        what = order(config, "site_0", 1, seconds=_START_S)
        reply, _, seconds = ask(worker, what, weights)
    verdict.note("seconds", seconds)
    verdict.that(not reply.error, reply.error)
    wanted = config.total_batch_size
    verdict.that(reply.tokens == wanted, f"{reply.tokens} of {wanted} tokens were trained on")


class _When:
    """Calls `strike` once the client has taken a step; `at` says when, on the monotonic clock."""

    def __init__(self, link: ServerCoordinator, client: str, strike: Callable[[], object]) -> None:
        self.at = 0.0
        self._link, self._client, self._strike = link, client, strike
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < _START_S and not self._over.is_set():
            heard = self._link.heartbeats([self._client]).get(self._client)
            if heard is not None and heard.heartbeat.step >= 2:
                break
            time.sleep(0.02)
        self.at = time.monotonic()
        self._strike()
