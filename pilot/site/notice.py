"""Files on a site's disk whose appearance means that the client must leave. Standard library only.

A script of a cloud provider announces the end of a spot instance in this way. `pilot node` writes such a file
into its own directory, which its SuperNode's ClientApps and workers know by an environment variable. That
works without Redis and, unlike a signal, cannot get lost between two processes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

PREEMPT_VARIABLE = "PILOT_PREEMPT_FILE"  # set per machine; wins over the run's `preempt-file`
NODE_VARIABLE = "PILOT_NODE_DIR"
LEAVE_NAME = "leave"


def notice_files(configured: str) -> list[Path]:
    """The files whose appearance means "leave"; `configured` is the run's `preempt-file`."""
    files = [os.environ.get(PREEMPT_VARIABLE) or configured]
    if node := os.environ.get(NODE_VARIABLE):
        files.append(str(Path(node) / LEAVE_NAME))
    return [notice_path(file) for file in files if file]


def notice_path(file: str) -> Path:
    """The absolute path that `file` means in this working directory; `~` is this user's home."""
    try:
        return Path(file).expanduser().absolute()
    except RuntimeError:  # the home of nobody: no such file
        return Path(file).absolute()


def noticed(files: Sequence[Path]) -> str:
    """The reason to leave, from the first of `files` that exists; "" if none does or can be checked."""
    for file in files:
        try:
            file.stat()
        except (OSError, ValueError):
            continue
        node = os.environ.get(NODE_VARIABLE)
        ends = node and file == notice_path(node) / LEAVE_NAME
        return "its node ends" if ends else f"preempt-file {file}"
    return ""
