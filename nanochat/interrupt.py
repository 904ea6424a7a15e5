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

from nanochat.agreement import Agreement
from nanochat.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(UserError):
    """An evaluation was given up, because the run was asked to stop."""

    def __init__(self) -> None:
        super().__init__("the run was asked to stop")


class StopRequest:
    """Whether this run was asked to stop, as all its ranks agree."""

    def __init__(self, agreement: Agreement) -> None:
        self.asked = False  # this process, by now
        self._agreement = agreement

    def agreed(self) -> bool:
        """True once any rank was asked; all ranks call it together and get the same answer."""
        return self._agreement.any(self.asked)

    def check(self) -> None:
        """Raise Interrupted once this process was asked: for work that may be given up at any point."""
        if self.asked:
            raise Interrupted

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # a full disk or a closed pipe
            print(
                f"{name}: finishing and saving this step; press again to quit now", file=sys.stderr
            )


@contextlib.contextmanager
def stop_on_signals(agreement: Agreement) -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs; only a main thread can."""
    request = StopRequest(agreement)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._on_signal) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
