"""The clients of a run: what its server says of each, its heartbeat, and its past."""

from collections.abc import Mapping
from typing import Any

from pilot.coordination.heartbeats import heartbeat_expiry_s
from pilot.coordination.operator import Beat, Live
from pilot.page.timeline import State
from pilot.run.facts import RunFacts
from pilot.status.past import Event, Past
from pilot.status.value import ClientStatus

# Events of a client after which it is silent, or is not
_OF_SILENCE = ("client_silent", "client_back", "reply", "reply_refused", "client_joined")


def client_statuses(
    past: Past | None,
    live: Live | None,
    said: Mapping[str, Any],
    facts: RunFacts,
    *,
    running: bool,
) -> list[ClientStatus]:
    names = dict.fromkeys(past.lanes.clients if past else [])
    names |= dict.fromkeys(said.get("clients", {}))
    beats = live.beats if live and running else {}
    names |= dict.fromkeys([*beats, *(live.leaving if live else {})])
    interval = float(said.get("heartbeat_s") or facts.config.get("heartbeat") or 1.0)
    return [_client(name, past, live, said, beats.get(name), interval, running) for name in names]


def _client(
    name: str,
    past: Past | None,
    live: Live | None,
    said: Mapping[str, Any],
    beat: Beat | None,
    interval: float,
    running: bool,
) -> ClientStatus:
    known = said.get("clients", {}).get(name, {})
    met = _met(past, name)
    summary = next((c for c in past.measures.clients if c.client == name), None) if past else None
    pace = (
        next((p for p in reversed(past.measures.paces) if p.client == name), None) if past else None
    )
    if beat and live and (beat.term, beat.round_number) != (live.term, live.round_number):
        beat = None
    heart = beat.heartbeat if beat else None
    state, why = known.get("state", ""), known.get("why", "")
    leaving = live.leaving.get(name, "") if live else ""
    if not state:
        state = heart.state if heart else _state_of(past, name, leaving, running=running)
    age_s = heartbeat_expiry_s(interval) - beat.left_s if beat else None
    started = heart is not None and heart.step > 0
    rate = heart.tokens_per_s if heart and started else (pace.tokens_per_s if pace else None)
    return ClientStatus(
        name,
        state,
        why or leaving,
        host=str(known.get("host") or met.get("host") or ""),
        device=str(known.get("device") or met.get("device_name") or ""),
        devices=known.get("devices") or met.get("devices"),
        tokens_per_s=rate or known.get("tokens_per_s"),
        mfu=(heart.mfu if heart and heart.mfu else None) or (pace.mfu if pace else None),
        loss=heart.loss if heart and started else (pace.loss if pace else None),
        step=heart.step if heart else None,
        shard=heart.shard if heart and heart.shard >= 0 else None,
        shard_share=heart.shard_row / heart.shard_rows if heart and heart.shard_rows else None,
        heartbeat_s=age_s if age_s is not None and age_s >= 0 else (0.0 if beat else None),
        merged_rounds=summary.merged if summary else None,
        refused=summary.refused if summary else known.get("refused"),
        goodput=summary.goodput if summary else known.get("goodput"),
        bytes_down=summary.bytes_down if summary else known.get("bytes_down"),
        bytes_up=summary.bytes_up if summary else known.get("bytes_up"),
    )


def _met(past: Past | None, name: str) -> Event:
    """What the client said of itself when it came last."""
    events = reversed(past.events) if past else []
    return next(
        (e for e in events if e.get("event") == "client_accepted" and e.get("client") == name), {}
    )


def _state_of(past: Past | None, name: str, leaving: str, *, running: bool) -> str:
    """By its events alone: what it was asked is known, what it does is not."""
    if leaving:
        return "drained" if leaving.startswith("drained") else "leaving"
    own = [one for one in past.lanes.intervals if one.client == name] if past else []
    if not running or not own or past is None:
        return ""
    if _silent(past, name):
        return str(State.SILENT)
    last = max(own, key=lambda one: one.end_s)
    if last.end_s < past.lanes.end_s:
        return "waiting"
    if last.state in (State.SILENT, State.KILLED, State.DRAINED, State.LEFT_OUT):
        return str(last.state)
    return "asked" if last.state is State.STARTING else "waiting"


def _silent(past: Past, name: str) -> bool:
    """Whether the last that was said of a client, since it was asked, is that it is silent."""
    for event in reversed(past.events):
        kind = event.get("event")
        if kind == "round_opened" and name in event.get("clients", []):
            return False
        if event.get("client") == name and kind in _OF_SILENCE:
            return kind == "client_silent"
    return False
