"""What all processes of a run decide alike: whether one of them failed, or was asked to stop.

A failure of one rank alone would leave the others waiting in their next collective, and with it
goes what they have trained. So whatever one rank may fail in by itself is done `together`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nanochat.errors import UserError

T = TypeVar("T")


class PeerFailed(UserError):
    """Another rank failed in what all of them did."""

    def __init__(self) -> None:
        super().__init__("another process of this run failed: its own line says why")


class Agreement:
    """Answers that are the same on all ranks of the process group; without one, this process's own."""

    def __init__(self) -> None:
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            # gloo on GPUs too: asking must not wait for the device
            self._group = dist.new_group(backend="gloo")

    def any(self, mine: bool) -> bool:
        """Whether it is true on any rank; all ranks call it together."""
        if self._group is None:
            return mine
        flag = torch.tensor(int(mine))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def together(self, action: Callable[[], T]) -> T:
        """The result of `action`, which must hold no collective, on each rank.

        When it raises on any rank, this raises on all: there the same, elsewhere PeerFailed.
        """
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - whatever it is, the others must hear of it
            error = caught
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerFailed
        return result
