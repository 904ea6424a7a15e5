"""`pilot up`: Redis, SuperLink and SuperNodes on this machine, until a signal ends them in order.

With `head`, sites on other machines take part as well: over TLS, with keys (`certificates.py`, `members.py`),
and after they have joined (`door.py`).
"""

import contextlib
import functools
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from pilot.config import check_name
from pilot.errors import PilotError
from pilot.fleet import redis_users
from pilot.fleet.certificates import Authority, check_address, found_addresses, site_key
from pilot.fleet.devices import shares
from pilot.fleet.door import Door, Doors, server_context
from pilot.fleet.environment import write_connection, write_environment
from pilot.fleet.head import Head, join_line, write_head
from pilot.fleet.journal import Journal
from pilot.fleet.members import Members
from pilot.fleet.places import Places
from pilot.fleet.ports import Ports, Wanted
from pilot.fleet.presence import UP, present
from pilot.fleet.secret_file import private_directory
from pilot.fleet.supervisor import Kept, Service, ServiceFailed, Supervisor
from pilot.launch import owner_only
from pilot.launch.connection import flower_environment, flower_program
from pilot.launch.kept_superlink import STARTING_AGAIN
from pilot.launch.node import node_directory
from pilot.processes.local_redis import find_server
from pilot.processes.signals import end_signals_handled_by

SUPERLINK_PORT, REDIS_PORT, JOIN_PORT = 8000, 6379, 8001
START_S = 120.0  # a SuperLink imports torch before it listens: 8 s, on a loaded machine a minute
NODE_GRACE_S = 3600.0  # a node ends by itself, after --leave-within at the latest
_SUPERLINK_GRACE_S, _REDIS_GRACE_S = 10.0, 5.0
_POLL_S = 0.1
_USAGE = 2
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
_REACHED_AT = {EVERYWHERE: LOOPBACK, "::": "::1"}  # from this machine itself


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What `pilot up -h` describes."""

    clients: int | None = None
    gpus_per_client: int | None = None
    cpu: bool = False
    name: str = "client"
    directory: Path | None = None
    port: int | None = None
    redis_port: int | None = None
    head: bool = False
    host: str = EVERYWHERE
    addresses: tuple[str, ...] = ()
    join_port: int | None = None
    insecure: bool = False
    as_json: bool = False


def run_up(options: UpOptions, console: IO[str] = sys.stdout) -> int:
    """Run a fleet until a signal ends it; returns the exit code. Raises PilotError for mistakes."""
    _check(options)
    clients = 0 if options.head and options.clients is None else options.clients
    devices = shares(clients, options.gpus_per_client, cpu=options.cpu) if clients != 0 else []
    for number in range(1, len(devices) + 1):
        _check_free(f"{options.name}-{number}")
    places = Places.of(options.directory).make()
    signals: list[int] = []
    with (
        present(places.running, UP),
        contextlib.closing(Journal(places.logs, console, as_json=options.as_json)) as journal,
        end_signals_handled_by(lambda signum, _frame: signals.append(signum)),
    ):
        fleet = _Fleet(options, places, journal, devices, signals, console)
        try:
            fleet.run()
        except (ServiceFailed, OSError) as error:
            journal.say(f"error: {error}")
            return 1
        finally:
            fleet.end()
            journal.say("all processes have ended")
    return 0


@dataclass
class _Fleet:
    options: UpOptions
    places: Places
    journal: Journal
    devices: list[dict[str, str]]
    signals: list[int]
    console: IO[str]
    _nodes: list[Kept] = field(default_factory=list)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _members: Members | None = None

    def __post_init__(self) -> None:
        self._supervisor = Supervisor(self.journal)
        self._secure = self.options.head and not self.options.insecure
        self._passwords = redis_users.passwords(private_directory(self.places.keys) / "redis.json")
        for password in self._passwords.values():
            self.journal.hide(password)
        self._choose_ports()
        self._authority = Authority(private_directory(self.places.head)) if self._secure else None

    def _choose_ports(self) -> None:
        options, ports = self.options, Ports(self.places.ports, self.journal.say)
        self._host = host = options.host if options.head else LOOPBACK
        self._local = _REACHED_AT.get(host, host)
        self._names = [f"{options.name}-{i + 1}" for i in range(len(self.devices))]

        def choose(what: str, option: str, usual: int, asked: int | None) -> int:
            return ports.choose(Wanted(what, option, usual, asked, host), keep=options.head)

        self._port = choose("SuperLink", "--port", SUPERLINK_PORT, options.port)
        self._redis_outside = choose("Redis", "--redis-port", REDIS_PORT, options.redis_port)
        self._redis_inside = self._redis_outside
        if options.head:
            self._join_port = choose("pilot join", "--join-port", JOIN_PORT, options.join_port)
            self._redis_inside = ports.choose(Wanted("Redis inside", "", 0))

    # -- starting --------------------------------------------------------------------------------

    def run(self) -> None:
        """Start all, and keep it until a signal. Raises ServiceFailed for what does not start."""
        if self.options.head and self.options.insecure:
            self.journal.say(
                "--insecure: all that sites send and are sent is plain text, and anybody who reaches the ports "
                "may take part"
            )
        admin = self._start_redis()
        self._start_superlink()
        if not self.signals:
            ca = self._authority.certificate_path if self._authority else None
            write_connection(self.places, self._local, self._port, ca)
            write_environment(self.places.environment, self._variables())
            if self.options.head:
                self._open(admin)
            self._nodes += [self._start_node(name, i) for i, name in enumerate(self._names)]
            self._welcome()
        while not self.signals:
            self._supervisor.look()
            time.sleep(_POLL_S)

    def _start_redis(self) -> redis_users.Admin:
        directory = private_directory(self.places.fleet / "redis")
        admin = redis_users.Admin(directory, self._redis_inside, self._passwords)
        redis_users.write_users(directory, self._passwords, {})
        configuration = redis_users.write_configuration(directory, self._redis_inside)
        command = [str(find_server()), str(configuration)]
        service = Service(
            name="redis", command=command, env=flower_environment(), grace_s=_REDIS_GRACE_S
        )
        self._start(service, admin.answers)
        return admin

    def _start_superlink(self) -> Kept:
        command = [flower_program("pilot"), "superlink", "--port", str(self._port)]
        command += ["--host", self._host]
        command += ["--owner-only", owner_only.COMMANDS if self.options.head else owner_only.ALL]
        command += ["--disable-runtime-dependency-installation", *self._superlink_security()]
        service = Service(
            name="superlink",
            command=command,
            env=self._environment(),
            grace_s=_SUPERLINK_GRACE_S,
            heard=self._superlink_said,
        )
        return self._start(service, self._superlink_answers)

    def _superlink_answers(self) -> bool:
        return _answers(self._local, self._port)

    def _superlink_security(self) -> list[str]:
        if self._authority is None:
            return ["--insecure"]
        certificate, key = self._certificate()
        files = ["--ssl-ca-certfile", self._authority.certificate_path]
        files += ["--ssl-certfile", certificate, "--ssl-keyfile", key]
        return [*map(str, files), "--enable-supernode-auth"]

    def _certificate(self) -> tuple[Path, Path]:
        assert self._authority is not None
        names = [*self.options.addresses, self._local, *self._found_addresses]
        return self._authority.server(names)

    @functools.cached_property
    def _found_addresses(self) -> list[str]:
        return found_addresses()  # which may wait for a name server

    def _superlink_said(self, line: str) -> None:
        if STARTING_AGAIN in line and self._members is not None:
            self._members.forget()

    def _start_node(self, name: str, i: int) -> Kept:
        command = [flower_program("pilot"), "node", "--name", name]
        command += ["--superlink", address(self._local, self._port)]
        if self._authority is None:
            command += ["--insecure"]
        else:
            command += ["--root-certificates", str(self._authority.certificate_path)]
            command += ["--auth-supernode-private-key", str(self._key_of(name))]
        return self._supervisor.start(
            node_service(name, command, {**self._environment(), **self.devices[i]})
        )

    def _key_of(self, name: str) -> Path:
        """The key of a client on this machine."""
        return private_directory(self.places.joined(name)) / "node.key"

    def _start(self, service: Service, ready: Callable[[], bool]) -> Kept:
        """Start a service and wait until it is ready, or a signal comes."""
        once = replace(service, mistakes=frozenset(range(256)))
        kept = self._supervisor.start(once)
        deadline = time.monotonic() + START_S
        while not self.signals and not ready():
            self._supervisor.look()
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{service.name} did not answer within {START_S:.0f} s")
            time.sleep(_POLL_S)
        kept.service = service
        return kept

    def _environment(self) -> dict[str, str]:
        telemetry = {"FLWR_TELEMETRY_ENABLED": "0"}
        return {**telemetry, **flower_environment(), **self._variables()}

    def _variables(self) -> dict[str, str]:
        password = self._passwords[redis_users.SERVER]
        url = redis_users.url(LOOPBACK, self._redis_inside, redis_users.SERVER, password)
        return {"FLWR_HOME": str(self.places.flower_home), "PILOT_REDIS_URL": url}

    # -- sites of other machines -----------------------------------------------------------------

    def _open(self, admin: redis_users.Admin) -> None:
        options, directory = self.options, private_directory(self.places.head)
        address = (options.addresses or tuple(self._found_addresses) or (socket.gethostname(),))[0]
        head = Head(address, self._join_port, self._port, self._redis_outside, self._secure)
        write_head(directory, head)
        tls = server_context(*self._certificate()) if self._authority else None
        self._members = Members(
            directory,
            admin,
            self.journal.say,
            env=self._environment() if self._secure else None,
            answers=self._superlink_answers,
        )
        for name in self._names:
            self._members.admit_own(name, site_key(self._key_of(name)))
        doors = Doors(options.host, self._redis_outside, self._redis_inside, self._join_port)
        authority = self._authority.pem if self._authority else b""
        answer = head.answers(directory, authority, self._members, self.journal.say)
        self._members.follow()
        self._stack.callback(self._members.close)
        self._stack.enter_context(Door(doors, tls, answer))

    def _welcome(self) -> None:
        say, environment = self.journal.say, self.places.environment
        say(
            f"SuperLink at port {self._port}, Redis at {self._redis_outside}; clients here: {len(self._names)}"
        )
        say("in another terminal: pilot run local-deployment --run-config FILE")
        say(f"before plain `flwr` commands: set -a; . {environment}; set +a")
        if not self.options.head:
            return
        if self.console.isatty():  # a secret: not in a file, nor in a service manager's log
            line = join_line(self.places.head)
            print(
                f"\nto join a site, once, within a day:\n\n    {line}\n",
                file=self.console,
                flush=True,
            )
        else:
            say("`pilot token` prints the line that joins a site")

    # -- ending ----------------------------------------------------------------------------------

    def end(self) -> None:
        """Nodes first, with their replies; then sites' doors, SuperLink and Redis."""
        hurry = len(self.signals)
        if any(kept.running for kept in self._nodes):
            self.journal.say("waiting for the clients to leave (once more: at once)")
        self._supervisor.stop(self._nodes, at_once=lambda: len(self.signals) > max(1, hurry))
        self._stack.close()
        self._supervisor.stop_all()


def node_service(name: str, command: Sequence[str], env: Mapping[str, str]) -> Service:
    """A `pilot node`, which leaves for good with exit code 0: a notice asked it to, or we did."""
    return Service(
        name=name,
        command=command,
        env=env,
        grace_s=NODE_GRACE_S,
        final=frozenset({0}),
        mistakes=frozenset({_USAGE}),
    )


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1.0).close()
    except OSError:
        return False
    return True


def _check(options: UpOptions) -> None:
    check_name(options.name, "--name")
    for address in options.addresses:
        check_address(address)
    if not options.head:
        for given, option in ((options.addresses, "--address"), (options.join_port, "--join-port")):
            if given:
                raise PilotError(f"{option} is for other machines: give --head as well")
        if options.insecure:
            raise PilotError("--insecure is for --head: without it nothing leaves this machine")


def _check_free(name: str) -> None:
    """Raise PilotError if a `pilot node` of that name runs on this machine."""
    from filelock import FileLock, Timeout

    directory = node_directory(name)
    if not directory.is_dir():
        return
    try:
        with FileLock(directory / "lock").acquire(timeout=0):
            pass
    except Timeout:
        raise PilotError(
            f"a client {name} runs on this machine already: choose another --name"
        ) from None
