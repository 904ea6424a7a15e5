"""Ctrl-C that lets a step end: the first one asks, the second one insists.

SIGTERM asks too: it is what torchrun passes on, and what schedulers send before they kill. torchrun
itself kills 30 s after it passed one on: `torchrun --shutdown-timeout SECONDS` for longer steps.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether this run was asked to stop, as all its ranks agree."""

    def __init__(self) -> None:
        self._asked = False
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            # gloo on GPUs too: asking must not wait for the device
            self._group = dist.new_group(backend="gloo")

    def agreed(self) -> bool:
        """True once any rank was asked; all ranks call it together and get the same answer."""
        if self._group is None:
            return self._asked
        asked = torch.tensor(int(self._asked))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        name = signal.Signals(number).name
        print(f"{name}: finishing and saving this step; press again to quit now", file=sys.stderr)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; only a main thread can."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._on_signal) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
