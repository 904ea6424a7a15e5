"""What the server of a run publishes (`server/public.py`), read as what anybody may have written."""

from collections.abc import Mapping
from typing import Any

from pilot.coordination.operator import Live
from pilot.wire.messages import plain

STALE_S = 30.0  # what the server last published says nothing of now

_NUMBER = (int, float)
# What the server publishes (`server/public.py`)
_FIELDS: dict[str, Any] = {
    "phase": str,
    "clients": dict,
    "fingerprints": dict,
    "refusals": list,
    "shards": list,
}
_FIELDS |= dict.fromkeys(
    ("round", "round_tokens", "tokens", "total_tokens", "rounds", "num_rounds"), int
)
_FIELDS |= dict.fromkeys(("elapsed_s", "left_s", "tokens_per_s", "round_s", "goodput"), _NUMBER)
_FIELDS |= {"train_loss": _NUMBER, "val_bpb": _NUMBER, "heartbeat_s": _NUMBER, "refused": int}
_CLIENT: dict[str, Any] = {
    "state": str,
    "why": str,
    "host": str,
    "device": str,
    "devices": int,
    "refused": int,
}
_CLIENT |= {"tokens_per_s": _NUMBER, "goodput": _NUMBER, "bytes_down": int, "bytes_up": int}
_REFUSAL = {"client": str, "round": int, "reason": str}


def published(live: Live | None) -> Mapping[str, Any]:
    """What the server has published, while it is of now."""
    if live is None or live.state != "running" or live.progress_age_s > STALE_S:
        return {}
    said = _typed(live.progress, _FIELDS)
    clients = said.get("clients", {})
    said["clients"] = {
        n: _typed(one, _CLIENT) for n, one in clients.items() if isinstance(one, dict)
    }
    said["refusals"] = [
        _typed(one, _REFUSAL) for one in said.get("refusals", []) if isinstance(one, dict)
    ]
    return said if "phase" in said else {}


def _typed(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are of their kind: anybody with the password may have written them."""
    return {
        name: plain(value) if isinstance(value, str) else value
        for name, value in values.items()
        if isinstance(value, kinds.get(name, ())) and not isinstance(value, bool)
    }
