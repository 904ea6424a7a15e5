"""Two worker groups at once on one GPU, three rounds with the outer step between; and depth 20's bytes."""

import math
import os
import threading
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.gpu_check import site_kit
from benchmarks.gpu_check.verdict import Setup, Verdict
from pilot import plan
from pilot.config import RunConfig
from pilot.rules.outer import outer_step
from pilot.site.handle import WorkerHandle
from pilot.wire.messages import Fence, TrainReply

_ROUNDS = 3
_ORDER_S = 200.0  # a first step that is compiled beside other checks must fit; steps end a round
_CLIENTS = ("site_0", "site_1")
Answer = tuple[TrainReply, dict[str, Tensor], float]


def check(setup: Setup, verdict: Verdict) -> None:
    _rounds(setup, verdict)
    verdict.that(not site_kit.ranks_below(os.getpid()), "a rank has outlived its group")


def _rounds(setup: Setup, verdict: Verdict) -> None:
    config = site_kit.config(setup, round_steps=setup.size(8, 2), inner_state="keep")
    weights = plan.initial_weights(config)
    state: dict[str, Tensor] = {}
    merged: dict[str, Fence] = {}
    bpb, starts = [], []
    for number in range(1, setup.size(_ROUNDS, 2) + 1):
        answers = _round(setup, config, number, weights, merged)
        for name, (reply, update, seconds) in answers.items():
            verdict.that(not reply.error, f"round {number} of {name}: {reply.error}")
            verdict.that(reply.tokens > 0, f"{name} has trained on nothing in round {number}")
            finite = all(bool(t.isfinite().all()) for t in update.values())
            verdict.that(finite, f"round {number} of {name} has values that are not finite")
            starts.append(seconds - reply.train_s)
            merged[name] = reply.fence
        norms = [_norm(update) for _, update, _ in answers.values()]
        if len(norms) == 2:
            verdict.at_most(f"norms_apart_round_{number}", abs(math.log(norms[0] / norms[1])), 0.5)
        updates = [update for _, update, _ in answers.values()]
        mean = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        weights, state = outer_step(config, weights, mean, state)  # type: ignore[arg-type]  # sum() of tensors
        nats = sum(reply.eval_nats or 0.0 for reply, _, _ in answers.values())
        size = sum(reply.eval_bytes for reply, _, _ in answers.values())
        bpb.append(nats / math.log(2) / size)
    verdict.note("bpb", bpb)
    verdict.that(bpb[-1] < bpb[0], f"bits per byte do not fall: {bpb}")
    verdict.note("fixed_s_first_round", max(starts[: len(_CLIENTS)]))
    verdict.h100_at_most("fixed_s_later_rounds", max(starts[len(_CLIENTS) :]), 25.0)


def _round(
    setup: Setup,
    config: RunConfig,
    number: int,
    weights: dict[str, Tensor],
    merged: dict[str, Fence],
) -> dict[str, Answer]:
    """Both clients at once, each with a new group."""
    answers: dict[str, Answer] = {}
    failures: list[BaseException] = []
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(WorkerHandle(processes=1, device=setup.device))
            for name in _CLIENTS
        }

        def work(name: str) -> None:
            more: dict[str, Any] = {"last_merged_fence": merged.get(name)}
            what = site_kit.order(config, name, number, seconds=_ORDER_S, **more)
            try:
                answers[name] = site_kit.ask(workers[name], what, weights)
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that can
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in _CLIENTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return answers


def _norm(update: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in update.values()))


def large(setup: Setup, verdict: Verdict) -> None:
    """One round of depth 20: 2.24 GB there and back, on one GPU."""
    config = site_kit.config(
        setup,
        run_name="gpu-check-large",
        depth=setup.size(20, 1),
        round_steps=2,
        device_batch_size=4,
        total_batch_size=setup.size(16 * 1024, 8 * 64),
        compile="off",
        inner_state="keep",
    )
    weights = {
        name: torch.zeros(tensor.shape)
        for name, tensor in plan.build_model(
            config, device=torch.device("meta"), compute_dtype=torch.float32
        )
        .state_dict()
        .items()
    }
    size = sum(tensor.nbytes for tensor in weights.values())
    with WorkerHandle(processes=1, device=setup.device) as worker:
        what = site_kit.order(config, "site_0", 1, seconds=_ORDER_S)
        reply, update, seconds = site_kit.ask(worker, what, weights)
    verdict.that(not reply.error, reply.error)
    verdict.that(update.keys() == weights.keys(), "the pseudo-gradient lacks tensors")
    verdict.note("large_gb", size / 1e9)
    verdict.note("large_seconds", seconds)
    verdict.note("large_in_worker_s", reply.total_s)
    verdict.note("large_train_s", reply.train_s)
    verdict.note("own_rss_gb", psutil.Process().memory_info().rss / 1e9)
