"""`flower-supernode` that looks for its next order at once, not three seconds later.

A SuperNode asks the SuperLink for a message, and if there is none it sleeps 3 s (hard-coded; docs/flower.md).
The next round's order comes about a second after the last reply, so nearly every round waits for that sleep.
Here the sleeps are short for a while after each message, and Flower's own while nothing happens.
"""

import contextlib
import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pilot.launch.warm import write_program

PROGRAM = "flower-supernode"
_IDLE_S, _REPLY_S = 3.0, 0.5  # Flower's sleeps: while there is no message, and no reply to one
_EAGER_S, _EAGER_FOR_S = 0.5, 20.0
_REPLY_EAGER_S = 0.2


class Pace:
    """Stands in for `time.sleep` in Flower's loop."""

    def __init__(self) -> None:
        self._eager_until_s = time.monotonic() + _EAGER_FOR_S

    def sleep(self, seconds: float) -> None:
        now_s = time.monotonic()
        if seconds == _REPLY_S:  # there is a message
            seconds, self._eager_until_s = _REPLY_EAGER_S, now_s + _EAGER_FOR_S
        elif seconds == _IDLE_S and now_s < self._eager_until_s:
            seconds = _EAGER_S
        time.sleep(seconds)


def install(directory: Path) -> Path:
    """Write the program into `directory`: a file of Flower's name, which `ps` shows."""
    return write_program(directory / PROGRAM, f"from {__name__} import main\n\nmain()\n")


def main() -> None:
    """Be `flower-supernode`, with its own command line."""
    sys.argv[0] = PROGRAM
    with contextlib.suppress(ImportError):  # another Flower
        loop = importlib.import_module("flwr.supernode.start_client_internal")
        vars(loop)["time"] = SimpleNamespace(**{**vars(time), "sleep": Pace().sleep})
    from flwr.supernode.cli import flower_supernode

    flower_supernode()
