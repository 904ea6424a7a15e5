"""`pilot rehearse`: a run in minutes, before anybody rents a machine."""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pilot.errors import PilotError
from pilot.overrides import load_run_config

if TYPE_CHECKING:
    from pilot.rehearse.outcome import Outcome
    from pilot.rehearse.points import Point
    from pilot.rehearse.scenario import Scenario

SCENARIOS = Path(__file__).parents[2] / "configs" / "rehearsals"
_LAST_EVENTS = 10  # that `--until` shows
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_rehearse(commands: Any) -> None:
    command = commands.add_parser(
        "rehearse",
        help="rehearse a run on a virtual clock: tokens, waste, energy, emissions and money by setting",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Lead a run with simulated clients on a virtual clock: the server's own round loop, rules and\n"
            "books, days of a federation in seconds. What happens to the clients comes from a scenario, a\n"
            "trace, or the events of a run. The same seed gives the same events, byte for byte. Settings\n"
            "(--sweep) and a scenario's policies are compared in one table; each point leaves its events in\n"
            "a directory that `pilot report` draws. A rehearsal counts tokens, and knows nothing of the loss."
        ),
        epilog=(
            "examples:\n"
            "  pilot rehearse --scenario three-regions\n"
            "  pilot rehearse --scenario three-regions --sweep 'round-max-duration=600,1800 quorum=1,2'\n"
            "  pilot rehearse --trace night.csv --tokens-per-s 50000 --run-config configs/d12.toml\n"
            "  pilot rehearse --from-run d20 --run-config 'round-min-duration=600'\n"
            "  pilot rehearse --scenario three-regions --policy always-on --until 36h"
        ),
    )
    _add_what(command)
    command.add_argument(
        "--run-config",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|'KEY=VALUE …'",
        help="TOML files and key=value strings, merged over the scenario's or the run's; later ones win",
    )
    command.add_argument(
        "--sweep",
        default="",
        metavar="'KEY=V,V KEY=V,V'",
        help="rehearse every combination of these settings, and compare them",
    )
    command.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME",
        help="rehearse only this policy of the scenario; may be repeated (default: all)",
    )
    command.add_argument(
        "--hours", type=float, help="how long to rehearse (default: the scenario's)"
    )
    command.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    command.add_argument(
        "--until",
        default="",
        metavar="EVENT|TIME",
        help="stop after this many events (4000) or at a time (36h, 90m, 5400s), and show where the run is",
    )
    command.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="points to rehearse at a time (default: one per core)",
    )
    command.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where each point leaves its events (default: rehearsals/NAME in the base directory)",
    )
    command.set_defaults(function=rehearse)


def _add_what(command: Any) -> None:
    command.add_argument(
        "--scenario",
        metavar="NAME|FILE",
        help="a file of configs/rehearsals, or another one: sites, windows, prices, policies",
    )
    command.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV of time,client,event,seconds (up, down, notice, freeze, cut, slow, lie): what happens; with "
        "--scenario, in place of what happens there",
    )
    command.add_argument(
        "--from-run",
        metavar="RUN",
        help="what happened in this run (a name, or a directory with events.jsonl): who was there when, and "
        "how fast",
    )
    command.add_argument(
        "--tokens-per-s",
        type=float,
        default=50_000.0,
        help="of each client of a trace without a scenario (default: 50000)",
    )


def rehearse(arguments: argparse.Namespace) -> int:
    """`pilot rehearse`; raises PilotError for a scenario, trace or setting that can't be rehearsed."""
    from pilot.rehearse.outcome import UNKNOWN, length_advice, recommendation, table
    from pilot.rehearse.points import rehearse_all

    points = _points(arguments, _scenario(arguments))
    for point in points:
        _ = point.config  # a mistake is found before anything starts
    outcomes: list[Outcome] = []
    for found in rehearse_all(points, jobs=arguments.jobs):
        outcomes.append(found)
        if len(points) > 1 and not arguments.json:
            print(f"{len(outcomes)}/{len(points)} {found.label}", file=sys.stderr)
    if arguments.json:
        print(json.dumps([one.to_json() for one in outcomes], indent=2))
    elif arguments.until:
        _show_end(outcomes[0])
    else:
        if points[0].scenario.about:
            print(points[0].scenario.about)
        print(table(outcomes))
        for one in outcomes:
            if one.failure:
                print(f"{one.label}: {one.failure}")
        print(recommendation(outcomes))
        for advice in filter(None, map(length_advice, outcomes)):
            print(advice)
        print(UNKNOWN)
        print(f"Pages: pilot report {_many(outcomes)}")
    return 1 if all(one.failure for one in outcomes) else 0


def _many(outcomes: Sequence["Outcome"]) -> str:
    directories = [one.directory for one in outcomes]
    return directories[0] if len(directories) == 1 else f"{Path(directories[0]).parent}/*"


def _scenario(arguments: argparse.Namespace) -> "Scenario":
    from pilot.rehearse.scenario import of_trace, read_scenario
    from pilot.rehearse.trace import read_trace

    if arguments.from_run:
        if arguments.scenario or arguments.trace:
            raise PilotError("--from-run is a trace of its own: leave out --scenario and --trace")
        from pilot.commands.report import run_directory
        from pilot.rehearse.replay import of_run

        scenario = of_run(run_directory(arguments.from_run))
    elif arguments.scenario:
        path = _scenario_file(arguments.scenario)
        scenario = read_scenario(path, seed=arguments.seed)
        if arguments.trace:
            scenario = scenario.with_trace(read_trace(arguments.trace))
    elif arguments.trace:
        if not 0 < arguments.tokens_per_s < float("inf"):
            raise PilotError("--tokens-per-s must be above 0")
        trace = read_trace(arguments.trace)
        scenario = of_trace(arguments.trace.stem, trace, tokens_per_s=arguments.tokens_per_s)
    else:
        raise PilotError("name what to rehearse: --scenario, --trace or --from-run")
    if arguments.hours is not None:
        if not 0 < arguments.hours <= 24 * 366:
            raise PilotError("--hours must be above 0, and at most a year")
        scenario = replace(scenario, hours=arguments.hours)
    return scenario


def _scenario_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".toml":
        return path
    path = SCENARIOS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in SCENARIOS.glob("*.toml")))
        raise PilotError(f"there is no scenario {name}: {known} are, or name a .toml file")
    return path


def _points(arguments: argparse.Namespace, scenario: "Scenario") -> list["Point"]:
    from nanochat.common import get_base_dir
    from pilot.rehearse.points import Point, grid

    policies = arguments.policy or list(scenario.policies)
    if unknown := [name for name in policies if name not in scenario.policies]:
        known = ", ".join(name for name in scenario.policies if name) or "none"
        raise PilotError(f"there is no policy {unknown[0]}: {known} are")
    output = arguments.output or get_base_dir() / "rehearsals" / scenario.name
    common = load_run_config(arguments.run_config)
    until_s, until_event = _until(arguments.until)
    points = [
        Point(scenario, policy, settings, common, Path(), arguments.seed, until_s, until_event)
        for policy in policies
        for settings in grid(arguments.sweep)
    ]
    if arguments.until and len(points) > 1:
        raise PilotError("--until stops one run: name one --policy, and no --sweep")
    if arguments.jobs < 1:
        raise PilotError("--jobs must be at least 1")
    return [replace(point, directory=output / _file_name(point)) for point in points]


def _file_name(point: "Point") -> str:
    words = [point.policy, *(f"{key}={value}" for key, value in point.settings.items())]
    name = "_".join(word for word in words if word) or "as-configured"
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", name)


def _until(text: str) -> tuple[float, int]:
    """(seconds, events), each 0 if it is the other's or nothing is asked for."""
    if not text:
        return 0.0, 0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None or (not match[2] and "." in match[1]) or float(match[1]) == 0:
        raise PilotError(f"--until {text} is neither a number of events nor a time such as 36h")
    if not match[2]:
        return 0.0, int(match[1])
    return float(match[1]) * _UNITS[match[2]], 0


def _show_end(found: "Outcome") -> None:
    """Where a run is that was stopped: its last events, and its books."""
    from pilot.rehearse.world import BEGAN
    from pilot.run.events import EVENTS_FILE, read_events

    events = list(read_events(Path(found.directory) / EVENTS_FILE))
    for number, event in list(enumerate(events, start=1))[-_LAST_EVENTS:]:
        more = {k: v for k, v in event.items() if k not in ("time", "event", "message")}
        print(f"{number:>8} {event['time'] - BEGAN:>10.2f} s  {event['event']:<16} {more}")
    print(
        f"stopped after {len(events)} events, at {3600 * found.hours:.2f} s: {found.rounds} rounds and "
        f"{found.tokens} tokens are committed, {found.wasted_tokens} were trained and are not"
    )
