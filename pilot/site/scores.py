"""What a client's evaluation says in its reply."""

import math
from collections.abc import Sequence
from typing import Any

from pilot.segment import Score
from pilot.wire.messages import TrainOrder

_RUINED_NATS = 1e12


def sums(order: TrainOrder, scores: Sequence[Score]) -> dict[str, Any]:
    """The evaluation's part of the reply to `order`: all `scores`, and the sums over its own slice."""
    first, end = order.eval_first_row, order.eval_end_row
    own = [s for s in scores if first <= s.first_row and s.end_row <= end]
    return {
        "scores": list(scores),
        "eval_nats": math.fsum(score.nats for score in own),
        "eval_bytes": sum(score.num_bytes for score in own),
        "eval_rows": sum(score.end_row - score.first_row for score in own),
    }


def finite(nats: float) -> float:
    """A sum that every header takes: that of a model out of all bounds is still a very bad one."""
    return nats if math.isfinite(nats) else _RUINED_NATS
