"""From what a client sent to an update that may be merged, or the reason why it may not."""

from collections.abc import Sequence

from torch import Tensor

from pilot.rules.admission import norm_refusal, refusal, token_refusal, update_norm
from pilot.rules.ledger import Lease
from pilot.run.state import RunState
from pilot.wire.codec import decode
from pilot.wire.messages import Part, TrainReply


def admit(
    state: RunState, lease: Lease, reply: TrainReply, parts: Sequence[Part]
) -> tuple[dict[str, Tensor], float]:
    """The update of a reply, and its norm, if it may be merged into `state`'s model.

    Raises ValueError with the reason if it may not.
    """
    config = state.config
    if strange := {part.dtype for part in parts} - {config.wire_dtype}:
        raise ValueError(f"its tensors came as {strange.pop()}, not {config.wire_dtype}")
    update = decode(parts)
    if reason := refusal(update, state.weights, tokens=reply.tokens):
        raise ValueError(reason)
    state.ledger.check(lease.lease_id, reply.consumed, reply.row_counts)
    leased = [segment.rows for segment in lease.segments]
    rows = sum(segment.rows or 0 for segment in reply.consumed)
    leased_rows = None if None in leased else sum(count or 0 for count in leased)
    norm, earlier = update_norm(update), state.admission.norms
    reason = token_refusal(
        reply.tokens, rows=rows, leased_rows=leased_rows, row_tokens=config.sequence_len
    ) or norm_refusal(norm, earlier, max_ratio=config.max_update_norm_ratio)
    if reason:
        raise ValueError(reason)
    return update, norm
