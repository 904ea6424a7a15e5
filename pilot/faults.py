"""Named places at which a test can end the server, or fill its disk: one at every persistent write.

`fault_point(name)` does nothing unless the environment variable PILOT_FAULT names it:

    PILOT_FAULT=snapshot.renamed             the process kills itself (SIGKILL) at the first passing
    PILOT_FAULT=snapshot.renamed:3           at the third
    PILOT_FAULT=snapshot.renamed:3=enospc    OSError(ENOSPC) is raised there instead

A point named after something stands before that is written, one named in the past tense after it. Nothing
is cleaned up on the way out: what a kill leaves behind is what the next start must cope with.
"""

import contextlib
import errno
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

VARIABLE = "PILOT_FAULT"

# Every point, in the order in which a run passes them; `tests/federation/test_crash.py` crashes at each.
POINTS = (
    "run-dir.created",  # the directory is there, and nothing in it
    "term.write",
    "term.written",  # a start that did nothing else
    "event.write",  # a line of events.jsonl; no book is kept there
    "spool.removed",  # a round opens: what the one before left is gone
    "spool.created",
    "spill.write",  # a reply, checked and not yet on disk
    "spill.written",
    "quarantine.write",  # a refused reply is kept
    "quarantine.tensors-written",
    "quarantine.written",
    "outer.write",  # the outer step: what it remembers
    "outer.written",
    "snapshot.create",
    "snapshot.model",
    "snapshot.outer",
    "snapshot.steps",
    "snapshot.merged",
    "snapshot.state",
    "snapshot.manifest",
    "snapshot.manifest-written",
    "snapshot.rename",  # whole, and not yet committed
    "snapshot.renamed",  # committed, and its name not yet durable
    "snapshot.durable",
    "prune.rename",  # an older snapshot is to go
    "prune.remove",
    "prune.removed",
    "spool.remove",  # after the commit
    "results.checkpoint",
    "results.final-model",
    "results.written",  # the run is finished on disk, and not yet reported
)


@dataclass(frozen=True)
class _Fault:
    point: str
    passing: int
    kind: str  # kill, enospc


_passed: Counter[str] = Counter()
_watcher: Callable[[str], None] | None = None


@contextlib.contextmanager
def watched(watcher: Callable[[str], None]) -> Iterator[None]:
    """`watcher` is called with the name of each point that is passed meanwhile, and may raise: a rehearsal
    ends its server there."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before


def fault_point(name: str) -> None:
    """Die or fail here if PILOT_FAULT says so. Raises ValueError if it says something unknown."""
    if _watcher is not None:
        _watcher(name)
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    fault = _parse(wanted)
    _passed[name] += 1
    if (name, _passed[name]) != (fault.point, fault.passing):
        return
    if fault.kind == "enospc":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault point {name})")
    os.kill(os.getpid(), signal.SIGKILL)


def _parse(text: str) -> _Fault:
    where, _, kind = text.partition("=")
    point, _, passing = where.partition(":")
    if point not in POINTS or kind not in ("", "kill", "enospc") or not (passing or "1").isdigit():
        raise ValueError(
            f"{VARIABLE}={text} must be POINT[:PASSING][=kill|=enospc]; points: {', '.join(POINTS)}"
        )
    return _Fault(point, int(passing or 1), kind or "kill")
