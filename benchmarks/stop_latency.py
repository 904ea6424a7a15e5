"""How long a stop takes from the server to the worker's decision, while the worker trains micro-steps.

python -m benchmarks.stop_latency                            # 20 stops of configs/tiny.toml's model
python -m benchmarks.stop_latency --trials 40 --batch-rows 64 --by client

The server's half (`ServerCoordinator.end_round`, or `stop_client` with `--by client`) runs in this process,
a worker's `Round` in another one, with a Redis of their own between them. Both read the machine's one
monotonic clock. The worker decides before each micro-step: so each trial's latency is compared with the
longest micro-step that ran in it (a step's last one has the optimizer's step in it), and what is over is
waiting for Redis, for the watcher's thread, or for the machine. Goal: at most 100 ms over, in every
trial. One line of JSON.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from argparse import SUPPRESS, Namespace
from pathlib import Path
from typing import Any

from nanochat.common import ArgumentParser, run_command_line
from pilot.config import RunConfig
from pilot.coordination.coordinator import ServerCoordinator
from pilot.errors import PilotError
from pilot.processes.local_redis import LocalRedis

ROOT = Path(__file__).resolve().parents[1]
RUN, CLIENT = "stop-latency", "bench"
GOAL_OVER_S = 0.1
START_TIMEOUT_S = 300.0  # the first trial makes the built-in corpus and its tokenizer


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.stop_latency", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of a micro-step")
    parser.add_argument(
        "--by", choices=("round", "client"), default="round", help="what is stopped"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", metavar="URL", help=SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _work(arguments)
    else:
        print(json.dumps(_measure(arguments)))


def _config(arguments: Namespace) -> RunConfig:
    values = tomllib.loads((ROOT / "configs" / "tiny.toml").read_text(encoding="utf-8"))
    own = {"run-name": RUN, "device-batch-size": arguments.batch_rows, "inner-state": "reset"}
    own |= {"total-batch-size": 64 * values["sequence-len"], "round-max-duration": 3600.0}
    return RunConfig.from_mapping(values | own)


# -- the server ----------------------------------------------------------------------------------


def _measure(arguments: Namespace) -> dict[str, Any]:
    pauses = random.Random(arguments.seed)
    latencies, over, steps = [], [], []
    with tempfile.TemporaryDirectory() as directory, LocalRedis() as local:
        coordinator = ServerCoordinator(local.url, RUN, term=1, run_dir=Path(directory))
        command = [sys.executable, "-m", "benchmarks.stop_latency", "--child", local.url]
        command += ["--trials", str(arguments.trials), "--batch-rows", str(arguments.batch_rows)]
        coordinator.open_round(1)
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None and child.stdout is not None
            try:
                for trial in range(1, arguments.trials + 1):
                    coordinator.open_round(trial)
                    print(trial, file=child.stdin, flush=True)
                    _wait_until_it_trains(coordinator, child)
                    time.sleep(pauses.uniform(0.0, 0.5))
                    began = time.monotonic()
                    if arguments.by == "round":
                        coordinator.end_round("benchmark")
                    else:
                        coordinator.stop_client(CLIENT, "benchmark")
                    looks = json.loads(child.stdout.readline())
                    coordinator.clear_client_stop(CLIENT)
                    pairs = itertools.pairwise(looks)
                    longest = max(end - start for start, end in pairs if end >= began)
                    latencies.append(looks[-1] - began)
                    over.append(latencies[-1] - longest)
                    steps.append(longest)
            finally:
                child.kill()
        coordinator.finish()
    return {
        "trials": arguments.trials,
        "by": arguments.by,
        "micro_step_median_s": round(statistics.median(steps), 4),
        "latency_median_s": round(statistics.median(latencies), 4),
        "latency_worst_s": round(max(latencies), 4),
        "over_one_micro_step_median_s": round(statistics.median(over), 4),
        "over_one_micro_step_worst_s": round(max(over), 4),
        "goal_over_s": GOAL_OVER_S,
        "met": max(over) <= GOAL_OVER_S,
    }


def _wait_until_it_trains(coordinator: ServerCoordinator, child: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any(h.heartbeat.step for h in coordinator.heartbeats([CLIENT]).values()):
        if child.poll() is not None or time.monotonic() > deadline:
            raise PilotError("the worker did not begin to train: see what it says above")
        time.sleep(0.05)


# -- the worker ----------------------------------------------------------------------------------


def _work(arguments: Namespace) -> None:
    """For each round number on standard input: train until stopped, and say when each micro-step ran."""
    import numpy as np
    import torch

    from nanochat.rows.stream import RowStream
    from pilot import plan
    from pilot.segment import Segment
    from pilot.site.ranks import Ranks
    from pilot.site.round import Round
    from pilot.site.stop import StopWatcher
    from pilot.wire.messages import Fence, TrainOrder

    class TimedRound(Round):
        """Notes when it looked whether to stop: before each micro-step and after reading rows."""

        looks: list[float]

        def _agree(self, stop: StopWatcher) -> bool:
            stopping = super()._agree(stop)
            self.looks.append(time.monotonic())
            return stopping

        def _read(self, stream: RowStream[Segment], stop: StopWatcher) -> np.ndarray | None:
            rows = super()._read(stream, stop)
            self.looks.append(time.monotonic())
            return rows

    config = _config(arguments)
    weights = plan.initial_weights(config)
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    for line in sys.stdin:
        order = TrainOrder(
            fence=Fence(RUN, 1, int(line), 1),
            client=CLIENT,
            config=config.to_mapping(),
            redis_url=arguments.child,
            processes=1,
            segments=[Segment(epoch, n, 0, None) for epoch in range(1000) for n in range(8)],
            lease_is_tail=False,
            seconds_left=3600.0,
            committed_tokens=0,
            total_tokens=config.total_tokens,
            share=1.0,
            step_rows=config.batch_rows,
            eval_first_row=0,
            eval_end_row=0,
        )
        training = TimedRound(order, ranks, time.monotonic())
        training.looks = []
        training.run(weights)
        print(json.dumps(training.looks[-100:]), flush=True)  # the last one was the decision


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "disabled")
    run_command_line(main)
