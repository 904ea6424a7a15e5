"""Which processes stand above a worker group: a ClientApp, its SuperExec, its SuperNode.

When a SuperNode is killed, its SuperExec and the ClientApp live on, busy with reaching it (docs/flower.md). A
group that must not outlive the SuperNode therefore watches all three, not only its own parent.
"""

import contextlib

import psutil

_PARENT_OPTION = "--parent-pid"  # by which Flower's programs name the process that they depend on


def ancestors(clientapp: int) -> list[psutil.Process] | None:
    """The ClientApp with that pid, its SuperExec and its SuperNode; None if one of them is gone.

    Just the process itself if it was started without `--parent-pid`, as in a simulation or a test.
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


def alive(process: psutil.Process | int) -> bool:
    """Whether a process (or the one with that pid) still runs: a zombie does not.

    A `psutil.Process` remembers when it was created, so a pid that was given to another process since does
    not count. A bare pid can't tell the two apart.
    """
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    return False
