"""`python -m benchmarks.idle RUN_DIR …`: where a run's time went in which no client trained, longest first.

Reads `events.jsonl` of each run directory. The last line is JSON: seconds by cause with their number, median
and longest span, the longest spans one by one, and the share of the time from the first round's opening to the
last commit in which somebody trained.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanochat.common import run_command_line
from nanochat.errors import UserError
from pilot.run.events import EVENTS_FILE, read_events

_LONGEST = 10


def accounts(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The idle time of one run from its events, oldest first; empty before a first commit."""
    listed = list(events)
    opened = [event["time"] for event in listed if event["event"] == "round_opened"]
    committed = [event["time"] for event in listed if event["event"] == "round_committed"]
    if not opened or not committed:
        return {}
    began, ended = opened[0], committed[-1]
    spans = [
        {
            "cause": event["cause"],
            "seconds": round(min(event["seconds"], event["time"] - began), 3),
            "round": event["round"],
            "began_s": round(max(0.0, event["time"] - event["seconds"] - began), 1),
        }
        for event in listed
        if event["event"] == "idle" and began < event["time"] <= ended
    ]
    spans.sort(key=lambda span: -span["seconds"])
    causes: dict[str, list[float]] = {}
    for span in spans:
        causes.setdefault(span["cause"], []).append(span["seconds"])
    idle_s, whole_s = sum(span["seconds"] for span in spans), ended - began
    return {
        "seconds": round(whole_s, 1),
        "idle_seconds": round(idle_s, 1),
        "training_share": round(1 - idle_s / whole_s, 3) if whole_s else None,
        "by_cause": {
            cause: {
                "seconds": round(sum(lengths), 1),
                "spans": len(lengths),
                "median_s": round(statistics.median(lengths), 2),
                "longest_s": round(max(lengths), 1),
            }
            for cause, lengths in sorted(causes.items(), key=lambda item: -sum(item[1]))
        },
        "longest": spans[:_LONGEST],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.idle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="directory of a run")
    found = {}
    for directory in parser.parse_args().run_dir:
        account = accounts(read_events(directory / EVENTS_FILE))
        if not account:
            raise UserError(f"{directory} holds no run that has committed a round")
        found[str(directory)] = account
    print(json.dumps(found))


if __name__ == "__main__":
    run_command_line(main)
