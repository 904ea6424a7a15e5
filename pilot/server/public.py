"""What the server lets operators see of itself: one small key in Redis, written once a second.

Everything else that `pilot status` shows it has from heartbeats and events; this is what only the server knows
of the moment: what is waited for, how long the round still is, what it thinks of each client.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pilot.config import RunConfig
from pilot.rules.accounts import goodput
from pilot.rules.admission import Cooling
from pilot.rules.rounds import RoundRules, remaining_s
from pilot.run.state import RunState
from pilot.server.monitor import RoundMonitor
from pilot.server.roster import Client, Roster
from pilot.server.time_books import TimeBooks
from pilot.server.wishes import Wishes
from pilot.wire.messages import plain

# The bounds of the key: 2 KB for three clients, 60 KB for a hundred with long names
MAX_CLIENTS, MAX_CHARS = 100, 120
_EVERY_S = 1.0
_LAST_ROUNDS = 5  # of which rates are taken


@dataclass
class Public:
    """Reads the parts of a round loop; changes none but the wishes."""

    config: RunConfig
    state: RunState
    roster: Roster
    cooling: Cooling
    wishes: Wishes
    times: TimeBooks
    _at_s: float = float("-inf")  # of the last exchange

    def exchange(self, monitor: RoundMonitor | None, now_s: float) -> None:
        """Once a second: write the keys of the run, read what is wished of it, and publish how it is."""
        if now_s - self._at_s < _EVERY_S:
            return
        self._at_s, coordinator = now_s, self.wishes.coordinator
        coordinator.tick()
        self.wishes.read(self.roster.accepted(), self.state.round_number)
        coordinator.publish(self.facts(monitor, now_s))

    def facts(self, monitor: RoundMonitor | None, now_s: float) -> dict[str, Any]:
        """The value of the key; its fields are in docs/protocol.md. `monitor`: of the open round, if one is."""
        state, history = self.state, [one for one in self.state.history if one.clients]
        share, complete, shards = state.ledger.progress()
        clients = self.roster.accepted()
        last = state.history[-1] if state.history else None
        return {
            "phase": self.times.idle.now,
            "round": monitor.open_round.number if monitor else state.round_number,
            **self._round(monitor, now_s),
            "tokens": state.tokens,
            "total_tokens": state.total_tokens,
            "rounds": state.round_number,
            "num_rounds": self.config.num_rounds,
            **_pace(history[-_LAST_ROUNDS:]),
            "shards": [round(share, 4), complete, shards],
            "goodput": goodput(self.times.so_far.values()),
            "train_loss": last.train_loss if last else None,
            "val_bpb": next((r.val_bpb for r in reversed(history) if r.val_bpb is not None), None),
            "heartbeat_s": self.config.heartbeat,
            "fingerprints": dict(list(self.roster.fingerprints.items())[:MAX_CLIENTS]),
            "refused": self.wishes.report.refused.total(),
            "refusals": [
                {"client": _short(client), "round": number, "reason": _short(reason)}
                for client, number, reason in self.wishes.report.refusals
            ],
            "clients": self._clients(clients[:MAX_CLIENTS], monitor),
            "more_clients": max(0, len(clients) - MAX_CLIENTS),
        }

    def _round(self, monitor: RoundMonitor | None, now_s: float) -> dict[str, Any]:
        if monitor is None:
            return {"elapsed_s": None, "left_s": None, "round_tokens": 0}
        left = self.state.total_tokens - self.state.tokens
        rules, view = RoundRules.of(self.config, run_tokens_left=left), monitor.view(now_s)
        over = monitor.ended_at_s is not None
        return {
            "elapsed_s": round(view.elapsed_s, 1),
            "left_s": 0.0 if over else round(remaining_s(rules, view), 1),
            "round_tokens": view.tokens,
        }

    def _clients(self, clients: list[Client], monitor: RoundMonitor | None) -> dict[str, Any]:
        pending = monitor.open_round.pending if monitor else []
        owing, drained = {order.client.name for order in pending}, set(self.wishes.drained)
        return {
            client.name: self._client(client, *self._state(client.name, monitor, owing, drained))
            for client in clients
        }

    def _client(self, client: Client, state: str, why: str) -> Mapping[str, Any]:
        account = self.times.so_far.get(client.name)
        return {
            "state": state,
            "why": _short(why),
            "host": _short(client.hello.host),
            "devices": client.hello.devices,
            "device": _short(client.hello.device_name),
            "tokens_per_s": client.tokens_per_s,
            "redis": not client.blind,
            "refused": self.wishes.report.refused[client.name],
            "bytes_down": account.bytes_down if account else 0,
            "bytes_up": account.bytes_up if account else 0,
            "goodput": account.goodput if account else None,
        }

    def _state(
        self, name: str, monitor: RoundMonitor | None, owing: set[str], drained: set[str]
    ) -> tuple[str, str]:
        """What a client does or is kept from, in a word, and why if that needs one."""
        leaving = self.wishes.leaving.get(name, "")
        if monitor and name in owing:
            last = monitor.heard.get(name)
            state = last.heartbeat.state if last else "starting"
            return ("silent" if name in monitor.silent else state), leaving
        if leaving:
            return ("drained" if name in drained else "leaving"), leaving
        if not self.cooling.ready(name):
            return "cooling", "its last replies were refused"
        if name in self.state.guard.aside:
            return "aside", "until it is known who spoilt a merge"
        return "waiting", ""


def _pace(history: list[Any]) -> dict[str, float | None]:
    """Committed tokens per second, and seconds of a round, of the last rounds."""
    seconds = sum(record.duration_s for record in history)
    return {
        "tokens_per_s": sum(record.tokens for record in history) / seconds if seconds else None,
        "round_s": statistics.median(record.duration_s for record in history) if history else None,
    }


def _short(text: str) -> str:
    return plain(text, MAX_CHARS)
