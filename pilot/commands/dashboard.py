"""`pilot dashboard [RUN]`: the page of `pilot report`, live, on this machine or for those who have a token."""

import argparse
import ipaddress
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from pilot.commands.report import run_directory
from pilot.errors import PilotError
from pilot.run.events import EVENTS_FILE

TOKEN_VARIABLE = "PILOT_DASHBOARD_TOKEN"
_LEAST_TOKEN = 16  # characters
_PORT = 8600


def add_dashboard(commands: Any) -> None:
    command = commands.add_parser(
        "dashboard",
        help="show the page of a run while it goes, in a browser",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Serve the page of `pilot report`, kept up to date, from the directories of runs alone: also\n"
            "while no server leads the run. It changes nothing. On this machine it needs no token; on any\n"
            f"other address it makes one, or takes that of {TOKEN_VARIABLE}. Ctrl-C ends it."
        ),
        epilog=(
            "examples:\n  pilot dashboard\n  pilot dashboard d20 --port 8601\n"
            "  ssh -L 8600:localhost:8600 server      and open http://localhost:8600 here"
        ),
    )
    command.add_argument(
        "run", nargs="?", metavar="RUN", help="a run's name, or its directory (default: the newest)"
    )
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    command.add_argument(
        "--port", type=int, default=_PORT, help="port; 0: a free one (default: %(default)s)"
    )
    command.add_argument("--certificate", type=Path, metavar="FILE", help="PEM, for https")
    command.add_argument("--key", type=Path, metavar="FILE", help="the certificate's private key")
    command.set_defaults(function=dashboard)


def dashboard(arguments: argparse.Namespace) -> int:
    """`pilot dashboard`; raises PilotError for what cannot be shown or served."""
    import uvicorn

    from nanochat.common import get_base_dir  # here: as in `pilot report`
    from pilot.page.dashboard import dashboard as application
    from pilot.page.live import Runs
    from pilot.page.script import vega_script

    named, first = {}, ""
    if arguments.run:
        directory = run_directory(arguments.run)
        if not (directory / EVENTS_FILE).is_file():
            raise PilotError(f"there is no run in {directory}: name a run, or its directory")
        first = directory.name
        if directory.parent != get_base_dir() / "runs":
            named = {first: directory}
    secure = _secure(arguments.certificate, arguments.key)
    listener = _listen(arguments.host, arguments.port)
    with listener:
        token = None if _is_local(listener) else _token()
        app = application(
            Runs(get_base_dir() / "runs", named),
            vega_script(),
            token=token,
            secure=secure,
            first=first,
        )
        _say(listener, token, secure=secure, host=arguments.host)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # the token is in the first address
            lifespan="off",
            server_header=False,
            ssl_certfile=arguments.certificate,
            ssl_keyfile=arguments.key,
            timeout_graceful_shutdown=3,
        )
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _secure(certificate: Path | None, key: Path | None) -> bool:
    if (certificate is None) != (key is None):
        raise PilotError("--certificate and --key belong together")
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise PilotError(f"{path} is not there")
    return certificate is not None


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise PilotError(f"--port {port} is no port: choose one up to 65535, or 0 for a free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise PilotError(f"cannot listen on {host}:{port}: {why}") from error


def _is_local(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def _token() -> str:
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token and len(token) < _LEAST_TOKEN:
        raise PilotError(f"{TOKEN_VARIABLE} has fewer than {_LEAST_TOKEN} characters")
    return token or secrets.token_urlsafe(32)


def _say(listener: socket.socket, token: str | None, *, secure: bool, host: str) -> None:
    """Where it is. A token is shown where only a person reads it, never in a file of output."""
    port = listener.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    address = f"http{'s' * secure}://{shown}:{port}/"
    if token is None:
        print(f"pilot dashboard: {address}", flush=True)
        return
    if sys.stdout.isatty():
        print(f"pilot dashboard: {address}?token={token}", flush=True)
    elif os.environ.get(TOKEN_VARIABLE):
        print(f"pilot dashboard: {address}?token=… ({TOKEN_VARIABLE})", flush=True)
    else:
        raise PilotError(
            f"output is not a terminal, so the token cannot be shown: set {TOKEN_VARIABLE} to one"
        )
    if not secure:
        print(
            "Without --certificate and --key, who reads this network reads the token: on networks that are not "
            "yours, use them or an SSH tunnel.",
            file=sys.stderr,
        )
