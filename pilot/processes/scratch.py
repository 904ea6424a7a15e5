"""Where sockets are made: directories for Unix sockets, and free TCP ports. Standard library only."""

import os
import socket
import tempfile
from pathlib import Path

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on macOS, the closing zero included
MAX_SOCKET_PATH_BYTES = 103


def scratch_parent(socket_path: str) -> Path:
    """The directory in which to make another one that holds a socket.

    That of `pilot run` (PILOT_SCRATCH_DIR), which is removed with it, else the system's; /tmp if
    `socket_path`, a path below it, would be too long for a socket there.
    """
    parent = Path(os.environ.get("PILOT_SCRATCH_DIR") or tempfile.gettempdir())
    fits = len(os.fsencode(parent / socket_path)) <= MAX_SOCKET_PATH_BYTES
    return parent if fits else Path("/tmp")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that is free just now; another process may take it before you do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
