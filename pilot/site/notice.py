"""Notices on a site's disk that it is to leave: files whose appearance says so. Standard library only.

Spot instances are told of their end in this way, by a script of the provider. `pilot node` puts one into a
directory of its own, which its SuperNode's ClientApps and workers inherit by an environment variable:
that works without Redis and, unlike a signal, can't come between two processes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

PREEMPT_VARIABLE = "PILOT_PREEMPT_FILE"  # of a machine; wins over the run's `preempt-file`
NODE_VARIABLE = "PILOT_NODE_DIR"
LEAVE_NAME = "leave"


def notice_files(configured: str) -> list[Path]:
    """The files whose appearance means "leave" here; `configured` is the run's `preempt-file`."""
    files = [os.environ.get(PREEMPT_VARIABLE) or configured]
    if node := os.environ.get(NODE_VARIABLE):
        files.append(str(Path(node) / LEAVE_NAME))
    return [Path(file).expanduser() for file in files if file]


def noticed(files: Sequence[Path]) -> str:
    """Which of `files` has appeared, as a reason; "" if none has, or none can be looked at."""
    for file in files:
        try:
            file.stat()
        except (OSError, ValueError):
            continue
        node = os.environ.get(NODE_VARIABLE)
        ends = node and file == Path(node).expanduser() / LEAVE_NAME
        return "its node ends" if ends else f"preempt-file {file}"
    return ""
