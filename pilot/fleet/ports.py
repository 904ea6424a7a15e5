"""Which ports a fleet uses: those asked for, those it had before, the usual ones, or any that are free."""

import contextlib
import errno
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pilot.errors import PilotError
from pilot.fleet.secret_file import write_secret
from pilot.processes.scratch import free_port


@dataclass(frozen=True)
class Wanted:
    """A port to choose: what it is for, by which option it is set, and the usual one (0: any)."""

    what: str
    option: str
    usual: int
    asked: int | None = None
    host: str = "127.0.0.1"


class Ports:
    """Chooses ports and remembers them in a file, by what they are for."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._known: dict[str, int] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads(path.read_bytes())
            self._known = {what: port for what, port in found.items() if isinstance(port, int)}

    def choose(self, wanted: Wanted, *, keep: bool = False) -> int:
        """A port that is free just now; `keep`: others know the one it was before, so it must be that one.

        Raises PilotError if a port that was asked for, or must be kept, is taken.
        """
        before = self._known.get(wanted.what)
        must = wanted.asked or (before if keep else None)
        if must is not None:
            if not is_free(wanted.host, must):
                known = "" if wanted.asked else ", which the sites know,"
                raise PilotError(
                    f"port {must}{known} for {wanted.what} is taken on this machine: end what listens "
                    f"there, or choose another with {wanted.option}"
                )
            port = must
        else:
            port = self._free(wanted, before)
        self._known[wanted.what] = port
        write_secret(self._path, json.dumps(self._known, indent=1))
        return port

    def _free(self, wanted: Wanted, before: int | None) -> int:
        for port in (before, wanted.usual):
            if port and is_free(wanted.host, port):
                return port
        port = free_port()
        if wanted.usual:
            self._say(
                f"port {wanted.usual} is taken on this machine: {wanted.what} has {port} "
                f"({wanted.option} chooses)"
            )
        return port


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. Raises PilotError if `host` is no address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise PilotError(f"port {port} is the system's: choose one above 1023") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise PilotError(
                f'--host "{host}" is no address of this machine ({error.strerror or error})'
            ) from error
    return True
