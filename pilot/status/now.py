"""How one run is: a pure function of its events, of what Redis says, and of the time.

Either source alone is enough. What neither says is None, and `unknown` has a sentence for what is missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pilot.coordination.operator import Live
from pilot.page.measures import Measures
from pilot.run.facts import RunFacts
from pilot.status.clients import client_statuses
from pilot.status.past import Event, Past
from pilot.status.published import published
from pilot.status.value import Refused, Status

_LAST_ROUNDS, _LAST_REFUSALS = 5, 5
_LOST_S = 60.0  # without an event, and nothing that says that a server lives


def status(
    run: str,
    events: Sequence[Event],
    facts: RunFacts,
    live: Live | None,
    *,
    now_s: float,
    unknown: Sequence[str] = (),
) -> Status:
    """How the run is at the Unix time `now_s`.

    `events` oldest first, none if they are not here; `live` None if Redis was not asked or does not answer;
    `unknown`: why the one or the other is missing, a sentence each.
    """
    past, said = Past.of(events), published(live)
    live = live if live is not None and live.known else None
    state, why = _state(past, facts, live, now_s)
    running = state in ("running", "stopping")
    opened = past.last("round_opened", "round_committed") if past else {}
    number = said.get("round") or (live.round_number if live else 0) or _round_of(opened)
    tokens, left_s = _tokens(past, said), said.get("left_s")
    rate = _rate(past) or said.get("tokens_per_s")
    total = said.get("total_tokens") or facts.total_tokens
    account = past.measures if past else None
    return Status(
        run,
        state,
        why,
        term=(live.term if live else 0) or (past.last("run_started").get("term") if past else None),
        round_number=number,
        num_rounds=said.get("num_rounds") or facts.config.get("num-rounds") or None,
        phase=_phase(past, said, running=running),
        round_s=_aged(said.get("elapsed_s"), live) if running else None,
        round_left_s=max(0.0, _aged(left_s, live, -1) or 0.0) if running and left_s else left_s,
        eta_s=_eta_s(past, said, facts, tokens, total, rate) if running else None,
        tokens=tokens,
        total_tokens=total,
        round_tokens=said.get("round_tokens"),
        tokens_per_s=rate,
        train_loss=said.get("train_loss") or _last_point(past, "train_loss"),
        val_bpb=said.get("val_bpb") or _last_point(past, "bpb"),
        shards=_shards(account, facts, said),
        goodput=account.goodput if account else said.get("goodput"),
        bytes_down=_sum(past, said, "bytes_down"),
        bytes_up=_sum(past, said, "bytes_up"),
        refused=len(past.lanes.refusals) if past else said.get("refused"),
        last_event_s=max(0.0, now_s - past.events[-1]["time"]) if past else None,
        clients=client_statuses(past, live, said, facts, running=running),
        refusals=_refusals(past, said, now_s),
        unknown=[] if state in ("finished", "stopped") else [*unknown, *_gaps(live, said, running)],
    )


def _aged(seconds: float | None, live: Live | None, sign: int = 1) -> float | None:
    """A time that the server published a moment ago, as it is now."""
    if not isinstance(seconds, int | float):
        return None
    return seconds + sign * (live.progress_age_s if live else 0.0)


def _state(past: Past | None, facts: RunFacts, live: Live | None, now_s: float) -> tuple[str, str]:
    if (past and past.measures.finished) or (live and live.state == "finished"):
        return "finished", ""
    if live and live.leader:
        return ("stopping", live.stop) if live.stop else ("running", "")
    stopping = past.last("run_stopping", "run_started") if past else {}
    wish = str(stopping.get("reason", "")) if stopping.get("event") == "run_stopping" else ""
    if live and live.state == "interrupted":
        return "stopped", wish
    if live and live.state == "running":
        return "lost", "its server's lock in Redis has expired"
    if facts.alive:
        return ("stopping", wish) if wish else ("running", "")
    if wish:
        return "stopped", wish
    if past and now_s - past.events[-1]["time"] > _LOST_S:
        return "lost", "no server has touched its directory for a while"
    return "unknown", ""


def _phase(past: Past | None, said: Mapping[str, Any], *, running: bool) -> str:
    if not running or said:
        return str(said.get("phase", "")) if running else ""
    last = past.last("round_opened", "round_ended", "round_committed") if past else {}
    words = {"round_opened": "open", "round_ended": "replies", "round_committed": "between rounds"}
    return words.get(str(last.get("event")), "")


def _round_of(event: Event) -> int | None:
    number = event.get("round", event.get("round_number"))
    return number if isinstance(number, int) else None


def _tokens(past: Past | None, said: Mapping[str, Any]) -> int | None:
    if "tokens" in said:
        return int(said["tokens"])
    if past is None:
        return None
    event = past.last("round_committed", "run_started")
    return int(event.get("total_tokens", event.get("tokens", 0)))


def _rate(past: Past | None) -> float | None:
    """Tokens that the model gains in a second of the last rounds, whatever else the seconds went into."""
    points = [p for p in past.measures.points if p.round_number] if past else []
    points = points[-_LAST_ROUNDS - 1 :]
    if len(points) < 2:
        return None
    seconds, tokens = points[-1].at_s - points[0].at_s, points[-1].tokens - points[0].tokens
    return tokens / seconds if seconds > 0 and tokens > 0 else None


def _eta_s(
    past: Past | None,
    said: Mapping[str, Any],
    facts: RunFacts,
    tokens: int | None,
    total: int | None,
    rate: float | None,
) -> float | None:
    """Seconds until the run has its tokens or its rounds, whichever is first, as fast as in the last rounds."""
    found = []
    if total and rate and tokens is not None:
        found.append(max(0.0, total - tokens - (said.get("round_tokens") or 0)) / rate)
    rounds = said.get("num_rounds") or facts.config.get("num-rounds") or 0
    commits = past.lanes.commits[-_LAST_ROUNDS - 1 :] if past else []
    done = said.get("rounds", commits[-1][0] if commits else 0)
    each_s = said.get("round_s")
    if len(commits) > 1:
        each_s = (commits[-1][1] - commits[0][1]) / (len(commits) - 1)
    if rounds and each_s is not None:
        left_s = (rounds - done) * each_s - (said.get("elapsed_s") or 0.0)
        found.append(max(0.0, left_s))
    return min(found) if found else None


def _last_point(past: Past | None, name: str) -> float | None:
    values = [getattr(point, name) for point in past.measures.points] if past else []
    return next((value for value in reversed(values) if value is not None), None)


def _shards(
    account: Measures | None, facts: RunFacts, said: Mapping[str, Any]
) -> tuple[float, int, int] | None:
    found = said.get("shards")
    if isinstance(found, list) and len(found) == 3:
        return float(found[0]), int(found[1]), int(found[2])
    number, epochs = facts.config.get("num-shards"), facts.config.get("epochs", 1)
    if account is None or not number or not account.shard_rows:
        return None
    complete = sum(
        rows >= account.shard_rows.get(s, rows + 1) for (_, s), rows in account.shards.items()
    )
    mean = sum(account.shard_rows.values()) / len(account.shard_rows)
    share = sum(account.shards.values()) / (mean * number * epochs) if mean else 0.0
    return round(min(1.0, share), 4), complete, number * epochs


def _sum(past: Past | None, said: Mapping[str, Any], name: str) -> int | None:
    if past:
        values = [getattr(one, name) for one in past.measures.clients]
    else:
        values = [one.get(name) for one in said.get("clients", {}).values()]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _refusals(past: Past | None, said: Mapping[str, Any], now_s: float) -> list[Refused]:
    """The last ones, newest last."""
    if past:
        return [
            Refused(one.client, one.round_number, one.reason, now_s - past.lanes.began - one.at_s)
            for one in past.lanes.refusals[-_LAST_REFUSALS:]
        ]
    return [
        Refused(str(one.get("client", "")), one.get("round"), str(one.get("reason", "")))
        for one in said.get("refusals", [])
    ]


def _gaps(live: Live | None, said: Mapping[str, Any], running: bool) -> list[str]:
    if not running or live is None or said:
        return []
    if live.progress and live.state == "running":
        return [
            f"the server published nothing for {live.progress_age_s:.0f} s: it writes a snapshot, or hangs"
        ]
    return [
        "the server publishes nothing of the round: it is of an older version, or just starting"
    ]
