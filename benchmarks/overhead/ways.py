"""One run of a real federation, and what its rounds cost: seconds by phase, bytes, resident memory."""

import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.topology import Federation
from benchmarks.overhead.memory import MemoryWatch
from nanochat.errors import UserError
from pilot.run.events import EVENTS_FILE, read_events

TRAINING = "training"
_SUPERVISE_S = 2.0


@dataclass(frozen=True)
class Limits:
    """How long a run, or one round of an app that only echoes, may take in all."""

    run_s: float
    stop: threading.Event


def federation(
    directory: Path,
    base: Path,
    config: Mapping[str, Any],
    sites: Sequence[str],
    *,
    site_bytes_per_s: float = 0.0,
) -> Federation:
    """Real processes; a proxy only where the wires of sites have a limit."""
    return Federation(
        directory,
        base,
        config,
        sites,
        proxied=site_bytes_per_s > 0,
        site_bytes_per_s=site_bytes_per_s,
        supervise_s=_SUPERVISE_S,
    )


def measured(running: Federation, limits: Limits) -> dict[str, Any]:
    """Wait for the run of a federation, and account for it. Raises UserError if it does not finish."""
    with MemoryWatch(running.directory) as memory:
        finished = running.wait(limits.run_s, limits.stop)
    if not finished:
        raise UserError(
            f"the run in {running.run_dir} did not finish within {limits.run_s:.0f} s: see "
            f"{running.directory}"
        )
    found = account(read_events(running.run_dir / EVENTS_FILE))
    return found | {"peak_rss_bytes": dict(sorted(memory.peaks.items()))}


def account(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rounds that trained, one by one, and what one of them cost: the median of those after the first.

    `fixed_s` of a round is all its time in which nobody trained; the phases of a round add up to its `round_s`.
    """
    rounds = [
        {
            "round": event["round"],
            "round_s": event["round_s"],
            "fixed_s": round(event["round_s"] - event["phases"].get(TRAINING, 0.0), 3),
            "goodput": event["goodput"],
            "bytes_down": event["bytes_down"],
            "bytes_up": event["bytes_up"],
            "phases": event["phases"],
            "clients": event["clients"],
        }
        for event in events
        if event["event"] == "round_time" and event["goodput"] is not None
    ]
    if not rounds:
        raise UserError("no round of the run has trained: see its log")
    later = rounds[1:] or rounds
    names = sorted({name for one in later for name in one["phases"]})
    usual: dict[str, Any] = {
        key: round(statistics.median(one[key] for one in later), 3)
        for key in ("round_s", "fixed_s")
    }
    usual["goodput"] = round(statistics.median(one["goodput"] for one in later), 4)
    for key in ("bytes_down", "bytes_up"):
        per_client = [one[key] / len(one["clients"]) for one in later]
        usual[f"{key}_per_client"] = round(statistics.median(per_client))
    usual["phases"] = {
        name: round(statistics.median(one["phases"].get(name, 0.0) for one in later), 3)
        for name in names
    }
    return usual | {"rounds": rounds}
