"""What becomes of the replies of a round, gathered from its pieces."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pilot.rules.aggregation import Merged, Spilled
from pilot.tensor_file import pieces


def aggregate(replies: Sequence[Spilled], **options: Any) -> dict[str, Tensor] | None:
    """All of `Merged`; None if there are no replies."""
    return gathered(Merged(replies, **options)) if replies else None


def gathered(merged: Merged, *, values: int = 1 << 18) -> dict[str, Tensor]:
    """Its tensors, of pieces of about `values` values."""
    return {
        name: torch.cat(
            [
                merged.rows(name, first, end).reshape(-1)
                for first, end in pieces(shape, values=values)
            ]
        ).view(shape)
        for name, shape in merged.shapes.items()
    }
