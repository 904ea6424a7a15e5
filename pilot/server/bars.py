"""How far and how fast clients are: bars as lines of text, and speeds."""

from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

from pilot.wire.messages import TrainReply


def bar(
    name: str, done: int, end: str, tokens: int, elapsed_s: float, tokens_per_s: float | None
) -> str:
    """A client's bar at `done` of `tokens`, after `elapsed_s` seconds; `tokens_per_s` is its training rate,
    None: what follows from the two."""
    return tqdm.format_meter(
        min(done, tokens),
        tokens,
        elapsed_s,
        prefix=name,
        unit="tok",
        unit_scale=True,
        rate=tokens_per_s,
        postfix=end,
        ncols=120,
    )


def bar_end(loss: float | None, shard: int, row: int, rows: int, mfu: float | None = None) -> str:
    """What stands behind the bar: loss, place in the shard, and MFU where it is known."""
    share = 100 * row / rows if rows else 0.0
    loss_text = "-" if loss is None else f"{loss:.4f}"
    used = "" if mfu is None else f" mfu={100 * mfu:.1f}%"
    return f"loss={loss_text} shard={shard} shard_progress={share:.1f}%{used}"


@dataclass(frozen=True)
class Speed:
    """How fast a client trained in a round, by what it says itself; `mfu` None: nobody knows."""

    tokens_per_s: float
    mfu: float | None


def speeds(replies: Iterable[tuple[str, TrainReply]]) -> dict[str, Speed]:
    """Client → its speed over all its `replies` of a round, of those that say one."""
    by_client: dict[str, list[TrainReply]] = {}
    for name, reply in replies:
        if reply.tokens and reply.train_s:
            by_client.setdefault(name, []).append(reply)
    found = {}
    for name, own in by_client.items():
        train_s = sum(reply.train_s for reply in own)
        used = [reply.mfu * reply.train_s for reply in own if reply.mfu is not None]
        mfu = sum(used) / train_s if len(used) == len(own) else None
        found[name] = Speed(sum(reply.tokens for reply in own) / train_s, mfu)
    return found
