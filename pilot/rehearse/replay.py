"""What happened in a run, from its events: a scenario that can be rehearsed with another configuration.

Events tell what the server saw: who was asked and who answered, how fast, and what was lost and why. What a
machine did meanwhile is inferred: a client whose node was replaced died some seconds before, one that gave no
reply in time was frozen until it is next seen. So a replay resembles its run, and is not the same run.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pilot.config import RunConfig
from pilot.errors import ConfigError
from pilot.rehearse.machine import SCORING, Machine
from pilot.rehearse.scenario import Scenario, ScenarioError, Site
from pilot.rehearse.trace import SERVER, Happening
from pilot.rehearse.world import DELIVERED_S, MISSED_S, RETURNED_S
from pilot.run.events import EVENTS_FILE, read_events
from pilot.run.facts import read_facts
from pilot.run.sizes import sizes

_BOOT_S, _HELLO_S = 1.0, 1.0
_MIN_DOWN_S = (
    4.0  # of a node that was killed and restarted: `pilot node` waits a second, Python starts
)
_NO_LINE = 1e15  # bytes a second, of what is in `start_s` already
_REPLACED = "a newer node has taken its name"
_GONE = ("its node is gone", "its node restarted", "Node Unavailable")
_CRASHED = ("Flower error", "was killed by signal", "worker process")
_LATE = ("no reply within", "its client is silent")
_UNBEGUN = "had not begun when the round ended"
_WITHOUT_REDIS = "its client cannot use Redis"
_AT_ONCE_S = 0.05
_REJOINS_S = _BOOT_S + _HELLO_S + DELIVERED_S  # from its start to its first order

Event = Mapping[str, Any]


@dataclass
class _Client:
    """What events say of one client, in seconds since the run's first one."""

    seen_s: list[float] = field(default_factory=list)  # when it was given an order, or answered
    asked_s: float = 0.0
    speeds: list[tuple[float, float]] = field(default_factory=list)  # (order sent, tokens/s)
    starts_s: list[float] = field(default_factory=list)
    uploads_s: list[float] = field(default_factory=list)
    scoring: list[float] = field(default_factory=list)  # times as fast as training
    missed_s: list[float] = field(default_factory=list)  # rounds that opened without it
    silent_s: float | None = None  # since when nothing was heard, in this round
    lost: list[tuple[float, float, str]] = field(default_factory=list)  # (from, when seen, why)


def of_run(directory: Path) -> Scenario:
    """Raises ScenarioError if there is no run whose events say enough."""
    events = [e for e in read_events(directory / EVENTS_FILE) if _is_timed(e)]
    facts = read_facts(directory)
    if not events or not facts.config:
        raise ScenarioError(
            f"{directory} is no run that can be rehearsed: it needs {EVENTS_FILE} and a snapshot"
        )
    try:
        config = RunConfig.from_mapping(_known(facts.config))
        clients, counts = _read(events, config.sequence_len)
        reply_bytes = sizes(config, rows=1).reply
        sites = {
            name: _site(name, client, reply_bytes)
            for name, client in sorted(clients.items())
            if client.speeds
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ScenarioError(
            f"{directory / EVENTS_FILE} holds an event that no version of pilot writes "
            f"({type(error).__name__}: {error})"
        ) from error
    if not sites:
        raise ScenarioError(f"nobody has trained in {directory}: there is nothing to learn from it")
    run_config = {**_known(facts.config), "run-name": "rehearsal", "wandb-mode": "disabled"}
    run_config["total-tokens"] = facts.total_tokens or config.total_tokens
    return Scenario(
        directory.name,
        f"As in {directory.name}: {len(sites)} clients, as fast and as often away as they were.",
        (events[-1]["time"] - events[0]["time"]) / 3600,
        sites,
        run_config,
        shard_rows=round(statistics.median(counts.values())) if counts else 25_000,
        trace=tuple(_of_server(events)),
        restart_s=0.0,
    )


def _is_timed(event: Event) -> bool:
    return isinstance(event.get("event"), str) and type(event.get("time")) in (int, float)


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a snapshot that this version has."""
    known = RunConfig().to_mapping()
    kept = {key: value for key, value in config.items() if key in known}
    try:
        RunConfig.from_mapping(kept)
    except ConfigError as error:
        raise ScenarioError(f"its configuration can't be read: {error}") from error
    return kept


def _read(events: Sequence[Event], row_tokens: int) -> tuple[dict[str, _Client], dict[int, int]]:
    """(client → what is known of it, shard → its rows)."""
    began_s = events[0]["time"]
    clients: dict[str, _Client] = defaultdict(_Client)
    counts: dict[int, int] = {}
    last_s = 0.0
    for event in events:
        at_s, last_s = event["time"] - began_s, event["time"] - began_s
        match event["event"]:
            case "round_opened":
                for name in event["clients"]:
                    _asked(clients[name], at_s)
                for name in clients.keys() - set(event["clients"]):
                    clients[name].missed_s.append(at_s)
            case "client_joined":
                _asked(clients[event["client"]], at_s)
            case "client_silent":
                client = clients[event["client"]]
                client.silent_s = client.silent_s or at_s
            case "client_back":
                client = clients[event["client"]]
                if client.silent_s is not None:
                    client.lost.append((client.silent_s, at_s, "silent"))
                client.silent_s = None
            case "reply":
                _replied(clients[event["client"]], event, at_s, row_tokens)
                counts |= {shard: rows for shard, rows in event.get("row_counts", []) if rows}
            case "reply_refused" if event.get("client") and "round" in event:
                _lost(clients[event["client"]], event["reason"], at_s)
            case "round_time":
                for name, account in event["clients"].items():
                    _timed(clients[name], account)
    for client in clients.values():
        client.seen_s.append(last_s)
    return dict(clients), counts


def _asked(client: _Client, at_s: float) -> None:
    client.seen_s.append(at_s)
    client.asked_s, client.silent_s = at_s, None


def _replied(client: _Client, event: Event, at_s: float, row_tokens: int) -> None:
    client.seen_s.append(at_s)
    if event["tokens"] and event["train_s"] > 0:
        speed = event["tokens"] / event["train_s"]
        client.speeds.append((client.asked_s, speed))
        rows = sum(end - first for first, end, *_ in event.get("scores", []))
        if rows and event.get("eval_s", 0.0) > 0:
            client.scoring.append(rows * row_tokens / event["eval_s"] / speed)


def _lost(client: _Client, reason: str, at_s: float) -> None:
    client.lost.append((client.silent_s or client.asked_s, at_s, reason))
    if not reason.startswith(_LATE) and not any(gone in reason for gone in _GONE):
        client.seen_s.append(at_s)


def _timed(client: _Client, account: Mapping[str, float]) -> None:
    if account.get("training_s", 0.0) > 0 and account.get("start_s", 0.0) > 0:
        client.starts_s.append(account["start_s"] + account["load_s"])
        client.uploads_s.append(account["sending_s"] + account["encoding_s"])


def _site(name: str, client: _Client, reply_bytes: int) -> Site:
    start_s = statistics.median(client.starts_s) if client.starts_s else 2.0
    upload_s = statistics.median(client.uploads_s) if client.uploads_s else 1.0
    machine = Machine(
        name=name,
        tokens_per_s=statistics.median(speed for _, speed in client.speeds),
        jitter=0.0,
        boot_s=_BOOT_S,
        start_s=max(0.0, start_s - DELIVERED_S),
        download_bytes_s=_NO_LINE,
        upload_bytes_s=reply_bytes / max(0.05, upload_s - RETURNED_S),
        scoring=statistics.median(client.scoring) if client.scoring else SCORING,
    )
    first_s = max(0.0, client.seen_s[0] - _REJOINS_S)
    trace = [Happening(first_s, name, "up")]
    # in force when the order arrives
    trace += [Happening(asked_s, name, "speed", speed) for asked_s, speed in client.speeds]
    for since_s, at_s, why in client.lost:
        trace += _of_loss(name, client, since_s, at_s, why)
    trace += _of_absence(name, client)
    return Site(machine, trace=tuple(sorted(trace)))


def _of_absence(name: str, client: _Client) -> Iterable[Happening]:
    """Rounds that opened without a client of which nothing was lost: it had gone."""
    seen_s, until_s = sorted(client.seen_s), 0.0
    for missed_s in client.missed_s:
        since_s = max((one for one in seen_s if one <= missed_s), default=0.0)
        again_s = min((one for one in seen_s if one > missed_s), default=missed_s)
        lost = any(since_s <= at_s <= missed_s for _, at_s, _ in client.lost)
        if lost or missed_s < until_s:
            continue
        until_s = again_s
        yield Happening(since_s + _AT_ONCE_S, name, "notice")
        yield Happening(max(since_s + 2 * _AT_ONCE_S, again_s - _REJOINS_S), name, "up")


def _of_loss(
    name: str, client: _Client, since_s: float, at_s: float, why: str
) -> Iterable[Happening]:
    again_s = next((seen_s for seen_s in client.seen_s if seen_s > at_s), client.seen_s[-1])
    if why == _REPLACED:
        down_s = max(since_s, at_s - _MIN_DOWN_S)
        yield Happening(down_s, name, "down")
        yield Happening(max(down_s, at_s - _REJOINS_S), name, "up")
    elif any(gone in why for gone in _GONE):
        yield Happening(max(since_s, at_s - MISSED_S), name, "down")
        yield Happening(max(at_s, again_s - _REJOINS_S), name, "up")
    elif any(word in why for word in _CRASHED):
        yield Happening(max(since_s, at_s - RETURNED_S), name, "crash")
    elif why == "silent":
        yield Happening(since_s, name, "freeze", at_s - since_s)
    elif _UNBEGUN in why:
        return
    elif why.startswith(_WITHOUT_REDIS):
        yield Happening(since_s, name, "cut", again_s - since_s)
    elif why.startswith(_LATE):
        yield Happening(since_s, name, "freeze", max(_AT_ONCE_S, again_s - since_s - DELIVERED_S))
    else:  # what it sent could not be merged
        yield Happening(max(since_s, at_s - _AT_ONCE_S), name, "lie")


def _of_server(events: Sequence[Event]) -> Iterable[Happening]:
    """When servers died, and for how long there was none."""
    began_s, last_s = events[0]["time"], 0.0
    for event in events:
        at_s = event["time"] - began_s
        if event["event"] == "run_started" and at_s > 0:
            yield Happening(
                last_s + _AT_ONCE_S, SERVER, "kill", max(0.0, at_s - last_s - _AT_ONCE_S)
            )
        last_s = at_s
