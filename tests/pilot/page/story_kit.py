"""Events and runs for the tests of the page.

`runs/` holds three real ones, made by `benchmarks.chaos`: processes were killed, drained, frozen and cut off
while three clients trained. Only the paths of their directories are changed.
"""

import json
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "runs"
SPOT, SHORT = RUNS / "spot", RUNS / "short"
BOOKS = RUNS / "books"  # of a version that keeps the books of time and bytes
BEGAN = 1_700_000_000.0


def event(at_s: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"time": BEGAN + at_s, "event": kind, **fields}


def reply(at_s: float, client: str, number: int, **fields: Any) -> dict[str, Any]:
    usual = {"stopped_by": "target-tokens", "tokens": 100, "train_s": 4.0, "total_s": 6.0}
    usual |= {"eval_rows": 8, "loss_nats": 200.0, "mfu": None}
    return event(at_s, "reply", client=client, round=number, **(usual | fields))


def refusal(at_s: float, client: str, number: int, reason: str) -> dict[str, Any]:
    return event(at_s, "reply_refused", client=client, round=number, reason=reason)


def committed(at_s: float, number: int, tokens: int, **merged: list[list[int]]) -> dict[str, Any]:
    """`merged`: client → its rows as [epoch, shard, first row, end row]."""
    replies = [{"client": client, "consumed": rows} for client, rows in merged.items()]
    facts = {"round_number": number, "total_tokens": tokens, "train_loss": 2.0, "merged": replies}
    return event(at_s, "round_committed", **facts)


def write_run(directory: Path, events: list[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True)
    lines = "".join(json.dumps(one) + "\n" for one in events)
    (directory / "events.jsonl").write_text(lines, encoding="utf-8")
    return directory
