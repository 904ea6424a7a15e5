"""`pilot join`: a site of a head on another machine, until a signal ends it."""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pilot.config import check_name
from pilot.errors import PilotError
from pilot.fleet import redis_users
from pilot.fleet.enrol import JOIN_PORT, Membership, ca_path, enrol, key_path, token_hash
from pilot.fleet.environment import REDIS, write_environment
from pilot.fleet.journal import Journal
from pilot.fleet.places import Places
from pilot.fleet.presence import join_of, present
from pilot.fleet.supervisor import ServiceFailed, Supervisor
from pilot.fleet.tokens import NO_CA, Token
from pilot.fleet.up import address, node_service
from pilot.launch.connection import flower_environment, flower_program
from pilot.processes.signals import end_signals_handled_by

TOKEN_VARIABLE = "PILOT_JOIN_TOKEN"
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `pilot join -h` describes; `node` are options of `pilot node` and flower-supernode."""

    head: str
    name: str
    token: str = ""
    insecure: bool = False
    directory: Path | None = None
    as_json: bool = False
    node: Sequence[str] = ()


def run_join(options: JoinOptions, console: IO[str] = sys.stdout) -> int:
    """Join a head if need be, and run its site until a signal ends it; returns the exit code."""
    check_name(options.name, "--name")
    host, port = read_head_address(options.head)
    token = Token.read(options.token) if options.token else None
    places = Places.of(options.directory).make()
    signals: list[int] = []
    with (
        present(places.running, join_of(options.name)),
        contextlib.closing(Journal(places.logs, console, as_json=options.as_json)) as journal,
        end_signals_handled_by(lambda signum, _frame: signals.append(signum)),
    ):
        membership = _membership(options, places, host, port, token)
        journal.hide(membership.redis_password)
        if not membership.secure:
            journal.say("--insecure: all that this site sends and is sent is plain text")
        return _serve(options, places, membership, journal, signals)


def _membership(
    options: JoinOptions, places: Places, host: str, port: int, token: Token | None
) -> Membership:
    """What this site knows of its head: from before, or by a token that it has not used yet."""
    if token is not None and (token.fingerprint == NO_CA) != options.insecure:
        raise PilotError(
            "the token is of a head with --insecure: give --insecure here, too, if you want that"
            if token.fingerprint == NO_CA
            else "the token is of a head with TLS: leave --insecure out"
        )
    directory = places.joined(options.name)
    before = Membership.read(directory)
    if before is not None and (token is None or before.token_hash == token_hash(token)):
        if before.head != host:
            raise PilotError(
                f"{options.name} has joined {before.head}, not {host}: name that one, or give a token of {host}"
            )
        if before.secure == options.insecure:
            raise PilotError(
                f"{options.name} has joined its head {'with' if before.secure else 'without'} TLS: "
                f"{'leave --insecure out' if before.secure else 'give --insecure'}"
            )
        return before
    if token is None:
        raise PilotError(
            f"{options.name} has not joined a head yet: give a token, which `pilot token` on the head prints"
        )
    return enrol(directory, head=host, port=port, name=options.name, token=token)


def _serve(
    options: JoinOptions,
    places: Places,
    membership: Membership,
    journal: Journal,
    signals: list[int],
) -> int:
    directory = places.joined(options.name)
    ca = ca_path(directory) if membership.secure else None
    url = redis_users.url(
        membership.head,
        membership.redis_port,
        membership.redis_user,
        membership.redis_password,
        ca,
    )
    if not (places.running / "up.json").exists():  # the head's, on one machine with it
        write_environment(places.environment, {REDIS: url})
    command = [flower_program("pilot"), "node", "--name", options.name]
    command += ["--superlink", address(membership.head, membership.superlink_port)]
    if ca is None:
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(ca)]
        command += ["--auth-supernode-private-key", str(key_path(directory))]
    flower = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_HOME": str(places.flower_home),
        **flower_environment(),
    }
    flower.pop(TOKEN_VARIABLE, None)
    supervisor = Supervisor(journal)
    node = supervisor.start(
        node_service(options.name, [*command, *options.node], {**flower, REDIS: url})
    )
    try:
        while not signals and not node.left:
            supervisor.look()
            time.sleep(_POLL_S)
    except ServiceFailed as error:
        journal.say(f"error: {error}")
        return 1
    finally:
        supervisor.stop([node], at_once=lambda: len(signals) > 1)
        journal.say("all processes have ended")
    return 0


def read_head_address(text: str) -> tuple[str, int]:
    """(host, port) of HEAD[:PORT]. Raises PilotError."""
    host, port = text, str(JOIN_PORT)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PilotError(
            f'"{text}" is not a head: give its name or address, and :PORT if it is not 8001'
        )
    return host, int(port)


def read_token(given: str, stdin: IO[str] = sys.stdin) -> str:
    """The token: `given`, from standard input for "-", from the environment if it is empty."""
    return (
        stdin.readline() if given == "-" else given or os.environ.get(TOKEN_VARIABLE, "")
    ).strip()
