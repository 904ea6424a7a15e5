"""Where directories with a socket in them are made. Standard library only."""

import os
import tempfile
from pathlib import Path

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on macOS, the closing zero included
MAX_SOCKET_PATH_BYTES = 103


def scratch_parent(socket: str) -> Path:
    """`pilot run`'s scratch directory, which goes with it, or else the system's; /tmp where `socket`, a path
    below it, would be too long for a socket."""
    parent = Path(os.environ.get("PILOT_SCRATCH_DIR") or tempfile.gettempdir())
    fits = len(os.fsencode(parent / socket)) <= MAX_SOCKET_PATH_BYTES
    return parent if fits else Path("/tmp")
