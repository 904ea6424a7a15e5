"""Which processes stand above a worker group: a ClientApp, its SuperExec, its SuperNode.

When a SuperNode is killed, its SuperExec and the ClientApp live on, busy with reaching it (docs/flower.md). A
group that must not outlive the SuperNode therefore watches all three, not only its own parent.

In a simulation one process, an actor of Ray, runs the ClientApp for one message after the other.
"""

import contextlib

import psutil

_PARENT_OPTION = "--parent-pid"  # by which Flower's programs name the process that they depend on
_ACTOR_TITLE = "ray::"  # with which Ray's processes show up instead of their command


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


def owner_of(processes: list[psutil.Process]) -> psutil.Process | None:
    """Of a ClientApp's `ancestors`, the process that has further messages for the same group, if there is one.

    That is the SuperNode, or the actor of a simulation. Raises psutil.Error if the process is gone.
    """
    if len(processes) > 1:
        return processes[-1]
    (alone,) = processes
    return alone if alone.cmdline()[:1] and alone.cmdline()[0].startswith(_ACTOR_TITLE) else None


def alive(process: psutil.Process | int) -> bool:
    """Whether a process (or the one with that pid) still runs: a zombie does not.

    A `psutil.Process` remembers when it was created, so a pid that was given to another process since does
    not count. A bare pid can't tell the two apart.
    """
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(process) if isinstance(process, int) else process
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    return False
