"""Whom a worker group works for: a ClientApp, and above it the processes that Flower's `--parent-pid` names.

When a SuperNode is killed, its SuperExec and the ClientApp live on, busy with reaching it (docs/flower.md): a
group that must not outlive them looks at all of them.
"""

import contextlib

import psutil

_PARENT_OPTION = "--parent-pid"


def employers(clientapp: int) -> list[psutil.Process] | None:
    """The ClientApp of that pid, its SuperExec, and its SuperNode; None if one of them is gone.

    A ClientApp that lives for more than one message (a simulation's, a test) has nobody above it.
    """
    found = []
    try:
        process = psutil.Process(clientapp)
        while True:
            found.append(process)
            words = process.cmdline()
            if _PARENT_OPTION not in words[:-1]:
                return found
            process = psutil.Process(int(words[words.index(_PARENT_OPTION) + 1]))
    except psutil.Error:
        return None


def alive(process: psutil.Process) -> bool:
    """Whether it runs still: its pid may be another's by now, and a zombie works for nobody."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
