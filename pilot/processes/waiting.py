"""Waiting for what nothing announces. Standard library only."""

import time
from collections.abc import Callable


def wait_until(holds: Callable[[], object], *, timeout_s: float, poll_s: float = 0.02) -> bool:
    """Check `holds` every `poll_s` until it is true; False if `timeout_s` passed before that."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True
