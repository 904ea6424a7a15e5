"""The signals that ask a process to end. Standard library only."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def end_signals_handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` answer SIGINT, SIGTERM and SIGHUP; a SIGHUP that nohup ignores stays ignored."""
    before = {
        signum: signal.signal(signum, handler)
        for signum in END_SIGNALS
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
