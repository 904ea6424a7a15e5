"""Rehearsals: how long they take, how good the rule for the length of rounds is, and how near a replay comes.

    python -m benchmarks.rehearsal speed [--clients 6] [--days 7] [--repeat 3]
    python -m benchmarks.rehearsal lengths [--traces 20] [--hours 12]
    python -m benchmarks.rehearsal replay RUN_DIRECTORY …

`speed`: processor seconds of one core (a busy machine takes longer by the clock). `lengths`: on traces that are
drawn, tokens with rounds by `rules/round_length.py`, measured with rounds of ten minutes, against
the best of fixed lengths in hindsight. `replay`: what the events of a run predict of it.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nanochat.common import ArgumentParser, run_command_line
from pilot.rehearse.draw import weibull
from pilot.rehearse.machine import Machine
from pilot.rehearse.outcome import Outcome
from pilot.rehearse.points import Point, rehearse_all, rehearse_point
from pilot.rehearse.replay import of_run
from pilot.rehearse.scenario import Scenario, Site
from pilot.rules.round_length import best_length_s, round_costs
from pilot.run.events import EVENTS_FILE, read_events

FIXED_S = (300.0, 600.0, 1200.0, 2400.0, 4800.0)
MEASURED_WITH_S = 600.0
CONFIG = {
    "depth": 12,
    "num-shards": 1800,
    "epochs": 6,
    "total-tokens": 10**14,  # more than there is time for
    "min-clients": 1,
    "quorum": 1,
    "clients-timeout": 86400.0,
}


def main() -> None:
    parser = ArgumentParser(
        prog="benchmarks.rehearsal", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("speed")
    command.add_argument("--clients", type=int, default=6)
    command.add_argument("--days", type=float, default=7.0)
    command.add_argument("--repeat", type=int, default=3)
    command.set_defaults(function=speed)
    command = commands.add_parser("lengths")
    command.add_argument("--traces", type=int, default=20)
    command.add_argument("--hours", type=float, default=12.0)
    command.add_argument("--jobs", type=int, default=1)
    command.set_defaults(function=lengths)
    command = commands.add_parser("replay")
    command.add_argument("runs", nargs="+", type=Path)
    command.set_defaults(function=replay)
    arguments = parser.parse_args()
    print(json.dumps(arguments.function(arguments), indent=2))


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Machines that are up for twelve hours and away for two, rounds of ten minutes."""
    hours = 24 * arguments.days
    scenario = drawn(0, clients=arguments.clients, hours=hours, up_h=12.0, down_h=2.0)
    settings = length(600.0)
    cpu_s, wall_s = [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(arguments.repeat):
            began = time.process_time(), time.perf_counter()
            done = rehearse_point(Point(scenario, "", settings, {}, Path(directory)))
            cpu_s.append(time.process_time() - began[0])
            wall_s.append(time.perf_counter() - began[1])
    return {
        "clients": arguments.clients,
        "days": arguments.days,
        "rounds": done.rounds,
        "cpu_s": statistics.median(cpu_s),
        "wall_s": statistics.median(wall_s),
        "cpu_ms_per_round": 1000 * statistics.median(cpu_s) / done.rounds,
    }


def drawn(
    seed: int,
    *,
    clients: int,
    hours: float,
    up_h: float,
    down_h: float,
    shape: float = 1.0,
    notice_s: float = 0.0,
    upload_s: float = 10.0,
) -> Scenario:
    """Equal machines that come and go by themselves; a reply in fp32 travels for `upload_s`."""
    names = [f"c{i}" for i in range(clients)]
    trace = weibull(
        names, hours=hours, up_h=up_h, down_h=down_h, seed=seed, shape=shape, notice_s=notice_s
    )
    reply_bytes = 4 * 186e6  # depth 12
    sites = {
        name: Site(
            Machine(name=name, tokens_per_s=100_000.0, upload_bytes_s=reply_bytes / upload_s),
            trace=tuple(one for one in trace if one.client == name),
        )
        for name in names
    }
    return Scenario(f"drawn-{seed}", "", hours, sites, dict(CONFIG))


def length(seconds: float) -> dict[str, Any]:
    return {"round-min-duration": seconds, "round-max-duration": seconds}


def lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(arguments.traces):
            rng = random.Random(seed)
            facts: dict[str, Any] = {
                "clients": rng.choice([2, 3, 4, 6]),
                "up_h": rng.choice([0.5, 1.0, 2.0, 4.0, 8.0]),
                "down_h": rng.choice([0.25, 0.5, 1.0]),
                "shape": rng.choice([0.7, 1.0, 1.5]),
                "notice_s": rng.choice([0.0, 0.0, 120.0]),
                "upload_s": rng.choice([5.0, 20.0, 60.0]),
            }
            scenario = drawn(seed, hours=arguments.hours, **facts)
            points = [
                Point(scenario, "", length(seconds), {}, Path(directory) / f"{seconds}")
                for seconds in FIXED_S
            ]
            fixed = dict(zip(FIXED_S, rehearse_all(points, jobs=arguments.jobs), strict=True))
            found.append(facts | _regret(scenario, fixed, Path(directory)))
    return {
        "mean_regret": statistics.mean(one["regret"] for one in found),
        "worst_regret": max(one["regret"] for one in found),
        "mean_regret_of_600_s": statistics.mean(one["regret_of_600_s"] for one in found),
        "traces": found,
    }


def _regret(scenario: Scenario, fixed: dict[float, Outcome], directory: Path) -> dict[str, Any]:
    events = read_events(directory / f"{MEASURED_WITH_S}" / EVENTS_FILE)
    costs = round_costs(events)
    assert costs is not None
    chosen_s = best_length_s(costs, shortest_s=60.0, longest_s=14_400.0)
    chosen = rehearse_point(Point(scenario, "", length(chosen_s), {}, directory / "chosen"))
    best_s = max(fixed, key=lambda seconds: fixed[seconds].tokens)
    best = fixed[best_s].tokens
    return {
        "fixed_cost_s": costs.fixed_s,
        "losses": costs.losses,
        "chosen_s": chosen_s,
        "best_s": best_s,
        "regret": 1 - chosen.tokens / best,
        "regret_of_600_s": 1 - fixed[MEASURED_WITH_S].tokens / best,
        "tokens": {f"{seconds:g}": one.tokens for seconds, one in fixed.items()},
    }


def replay(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for run in arguments.runs:
        scenario = of_run(run)
        committed = [e for e in read_events(run / EVENTS_FILE) if e["event"] == "round_committed"]
        # until the run's last commit; more than that is its last evaluation
        first_s = next(iter(read_events(run / EVENTS_FILE)))["time"]
        end_s = committed[-1]["time"] - first_s
        real = {"tokens": committed[-1]["total_tokens"], "rounds": committed[-1]["round_number"]}
        with tempfile.TemporaryDirectory() as directory:
            more = {"total-tokens": 100 * real["tokens"]}
            done = rehearse_point(Point(scenario, "", {}, more, Path(directory), until_s=end_s))
        predicted = {"tokens": done.tokens, "rounds": done.rounds}
        errors = {key: predicted[key] / real[key] - 1 for key in real}
        found.append(
            {
                "run": run.name,
                "seconds": end_s,
                "real": real,
                "predicted": predicted,
                "error": errors,
            }
        )
    return found


if __name__ == "__main__":
    run_command_line(main)
