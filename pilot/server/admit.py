"""From what a client sent to an update that may be merged, or the reason why it may not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pilot.faults import fault_point
from pilot.rules.admission import (
    Norm,
    movement_refusal,
    norm_refusal,
    refusal,
    token_refusal,
)
from pilot.rules.aggregation import Spilled, votes_of
from pilot.rules.agreement import Votes, outliers, undecided
from pilot.rules.ledger import Lease
from pilot.run.snapshot import SnapshotError
from pilot.run.state import RunState
from pilot.tensor_file import TensorWriter
from pilot.wire.codec import decoded, form_of
from pilot.wire.messages import Part, TrainReply


def admit(
    state: RunState,
    lease: Lease,
    reply: TrainReply,
    parts: Sequence[Part],
    path: Path,
    *,
    step_tokens: int,
) -> float:
    """Write the update of a reply to `path` if it may be merged into `state`'s model; its norm.

    It is decoded, looked at and written a piece at a time, so that it is never in memory whole. `step_tokens`:
    of each of its optimizer steps. Raises ValueError with the reason if it may not be merged; there is no file
    then. Raises SnapshotError where the disk refuses.
    """
    config = state.config
    for part in parts:
        if part.dtype != (wanted := form_of(config.wire_up, part.shape)):
            raise ValueError(f"{part.name} came as {part.dtype}, not {wanted}")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    if reason := refusal({part.name: part.shape for part in parts}, shapes, tokens=reply.tokens):
        raise ValueError(reason)
    state.ledger.check(lease.lease_id, reply.consumed, reply.row_counts)
    leased = [segment.rows for segment in lease.segments]
    rows = sum(segment.rows or 0 for segment in reply.consumed)
    leased_rows = None if None in leased else sum(count or 0 for count in leased)
    if reason := token_refusal(
        reply.tokens, rows=rows, leased_rows=leased_rows, row_tokens=config.sequence_len
    ):
        raise ValueError(reason)
    try:
        norm = _write(path, decoded(parts, shapes=shapes), shapes)
        if reason := _norm_refusal(
            state, norm, reply.tokens / step_tokens, min(1.0, step_tokens / config.total_batch_size)
        ):
            raise ValueError(reason)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return norm


def _write(
    path: Path, update: Iterable[tuple[str, int, Tensor]], shapes: Mapping[str, Sequence[int]]
) -> float:
    """Write the rows of an update to `path`; its norm. Raises ValueError for one that is not finite."""
    norm = Norm()
    try:
        fault_point("spill.write")
        writer = TensorWriter(path, shapes, hashed=False)
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error}") from error
    for name, first, rows in update:
        if reason := norm.add(name, rows):
            raise ValueError(reason)
        try:
            writer.write(name, rows, first)
        except OSError as error:
            raise SnapshotError(f"cannot write {path}: {error}") from error
    writer.close()
    fault_point("spill.written")
    return norm.value


def _norm_refusal(state: RunState, norm: float, steps: float, share: float) -> str | None:
    """Why an update is too long for its `steps`; `share` of the batch is what each of them took."""
    config, books = state.config, state.admission
    reason = norm_refusal(
        norm, books.norms, max_ratio=config.max_update_norm_ratio, longer=books.longer(steps)
    )
    if reason or state.movement is None or config.max_update_norm_ratio == 0:
        return reason
    whole = math.ceil(steps)
    limit = state.movement.limit(state.weights, steps=whole, share=share)
    return movement_refusal(norm, limit, steps=whole)


def compare(state: RunState, replies: Sequence[Spilled]) -> Votes:
    """The `replies` of a round beside one another and the outer momentum, now that all are there."""
    return votes_of(replies, momentum=state.outer)


def disagreeing(state: RunState, votes: Votes) -> tuple[dict[str, str], str]:
    """Client → why what it sent is not merged with that of the others.

    And a sentence if two clients disagree of which either may be wrong.
    """
    if not state.guard.improving:  # somebody may have turned the momentum round
        votes = replace(votes, heading=None)
    norms = state.config.max_update_norm_ratio > 0  # 0: nobody is refused for one
    out = outliers(votes, min_cosine=state.config.min_update_cosine, norms=norms)
    return out, undecided(votes, out)
