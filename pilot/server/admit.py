"""From what a client sent to an update that may be merged, or the reason why it may not."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pilot.rules.admission import (
    movement_refusal,
    norm_refusal,
    refusal,
    token_refusal,
    update_norm,
)
from pilot.rules.aggregation import Spilled, votes_of
from pilot.rules.agreement import Votes, outliers, undecided
from pilot.rules.ledger import Lease
from pilot.run.state import RunState
from pilot.wire.codec import decode, form_of
from pilot.wire.messages import Part, TrainReply


def admit(
    state: RunState,
    lease: Lease,
    reply: TrainReply,
    parts: Sequence[Part],
    *,
    step_tokens: int,
) -> tuple[dict[str, Tensor], float]:
    """The update of a reply, and its norm, if it may be merged into `state`'s model.

    `step_tokens`: of each of its optimizer steps. Raises ValueError with the reason if it may not.
    """
    config = state.config
    for part in parts:
        if part.dtype != (wanted := form_of(config.wire_up, part.shape)):
            raise ValueError(f"{part.name} came as {part.dtype}, not {wanted}")
    update = decode(parts, shapes={name: t.shape for name, t in state.weights.items()})
    if reason := refusal(update, state.weights, tokens=reply.tokens):
        raise ValueError(reason)
    state.ledger.check(lease.lease_id, reply.consumed, reply.row_counts)
    leased = [segment.rows for segment in lease.segments]
    rows = sum(segment.rows or 0 for segment in reply.consumed)
    leased_rows = None if None in leased else sum(count or 0 for count in leased)
    if reason := token_refusal(
        reply.tokens, rows=rows, leased_rows=leased_rows, row_tokens=config.sequence_len
    ):
        raise ValueError(reason)
    norm = update_norm(update)
    if reason := _norm_refusal(state, norm, reply.tokens / step_tokens):
        raise ValueError(reason)
    return update, norm


def _norm_refusal(state: RunState, norm: float, steps: float) -> str | None:
    config, books = state.config, state.admission
    reason = norm_refusal(
        norm, books.norms, max_ratio=config.max_update_norm_ratio, longer=books.longer(steps)
    )
    if reason or state.movement is None or config.max_update_norm_ratio == 0:
        return reason
    whole = math.ceil(steps)
    return movement_refusal(norm, state.movement.limit(state.weights, steps=whole), steps=whole)


def compare(state: RunState, replies: Sequence[Spilled]) -> Votes:
    """The `replies` of a round beside one another and the outer momentum, now that all are there."""
    momentum = {n: t for n in state.weights if (t := state.outer.get(f"momentum.{n}")) is not None}
    return votes_of(replies, momentum=momentum)


def disagreeing(state: RunState, votes: Votes) -> tuple[dict[str, str], str]:
    """Client → why what it sent is not merged with that of the others.

    And a sentence if two clients disagree of which either may be wrong.
    """
    if not state.guard.improving:  # somebody may have turned the momentum round
        votes = replace(votes, heading=None)
    norms = state.config.max_update_norm_ratio > 0  # 0: nobody is refused for one
    out = outliers(votes, min_cosine=state.config.min_update_cosine, norms=norms)
    return out, undecided(votes, out)
