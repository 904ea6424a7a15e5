"""`pilot node`: a SuperNode that comes back by itself, and leaves without losing its last reply.

Flower uploads a reply only after our function has returned, and loses the reply of a node that went
offline just then (docs/flower.md). So on a signal or a preemption notice this process tells workers and
server that the site leaves, waits until the server says that it has the reply in hand on its disk, and
only then ends the SuperNode. It never waits longer than it was told to. A SuperNode that ends by
itself is started again: after a kill -9 Flower refuses an authenticated node for about 53 s.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from pilot.coordination.coordinator import ClientCoordinator, ping, resolve_url
from pilot.errors import PilotError
from pilot.launch.connection import flower_environment, flower_program
from pilot.processes import keeper
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.site.notice import LEAVE_NAME, NODE_VARIABLE, PREEMPT_VARIABLE, notice_files, noticed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Beyond the drain deadline, for the upload: 1 GB took 76 s there and back on loopback (docs/flower.md).
UPLOAD_S = 60.0
BLIND_UPLOAD_S = 5.0  # without Redis nobody tells when the SuperNode has sent what it was given
ENDING_S = 10.0  # for the SuperNode to say goodbye to the SuperLink
# A node with a key that was killed is refused for 36 to 60 s: with 10 s between attempts it is back 6 s
# after that on average, with 30 s it was 18 s.
FIRST_DELAY_S, LAST_DELAY_S, STEADY_S = 1.0, 10.0, 60.0
MAX_RESTARTS = 300  # in a row that were not steady: about an hour
_POLL_S = 0.2
_LOOK_S = 0.5
_STOP_EXPIRY_S = 3600.0
_STOPPED_BY = "pilot node"  # how the reason in our `stop:` key begins
_USAGE, _NOT_STARTED = 2, 127  # exit codes: argparse's, the keeper's


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """`name` of the site; `supernode`: flower-supernode's own options; "" and None: see `pilot node -h`."""

    name: str
    supernode: Sequence[str] = ()
    preempt_file: str = ""
    leave_within_s: float | None = None


def node_directory(name: str) -> Path:
    """`$NANOCHAT_BASE_DIR/nodes/<name>`: what a node and its ClientApps tell one another."""
    base = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    return Path(base).expanduser().absolute() / "nodes" / name


def run_node(options: NodeOptions, *, say: Callable[[str], None]) -> int:
    """Run a SuperNode until a signal or a notice ends it; returns the exit code.

    Raises PilotError for a mistake in the options, or when a node of that name runs here already.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", options.name):
        raise PilotError(
            f'--name "{options.name}" may hold letters, digits, ".", "_" and "-" only, '
            "and starts with a letter or digit"
        )
    directory = node_directory(options.name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PilotError(
            f"a node {options.name} runs on this machine already: stop it, or choose another --name"
        ) from None
    with lock, _signals() as signals:
        return _Node(options, directory, signals, say).run()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that have come so far; nothing is interrupted by them."""
    came: list[int] = []
    before = {
        signum: signal.signal(signum, lambda number, _frame: came.append(number))
        for signum in SIGNALS
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN  # nohup
    }
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass
class _Node:
    options: NodeOptions
    directory: Path
    signals: list[int]
    say: Callable[[str], None]
    _restarts: int = field(default=0, init=False)

    def run(self) -> int:
        self._forget_the_last_time()
        self._check_redis()
        supernode, reason = self._serve()
        if supernode is not None:
            try:
                self._leave(reason)
            finally:
                keeper.stop(supernode, timeout_s=ENDING_S + 2 * keeper.KILL_S)
        self._forget_the_last_time()  # it is gone: it may come back at any time
        return 0 if len(self.signals) < 2 else 128 + self.signals[1]

    # -- starting --------------------------------------------------------------------------------

    def _forget_the_last_time(self) -> None:
        """Take back what a node of this name said when it left."""
        (self.directory / LEAVE_NAME).unlink(missing_ok=True)
        order = in_flight.read(self.directory)
        if order is not None and (coordinator := order.coordinator()):
            with contextlib.closing(coordinator):
                coordinator.clear_stop(_STOPPED_BY)
        (self.directory / in_flight.FILE_NAME).unlink(missing_ok=True)

    def _check_redis(self) -> None:
        try:
            if url := resolve_url(""):
                ping(url)
        except PilotError as error:
            self.say(f"going on without acknowledged replies for now: {error}")

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {**flower_environment(), NODE_VARIABLE: str(self.directory)}
        if self.options.preempt_file:
            environment[PREEMPT_VARIABLE] = str(
                Path(self.options.preempt_file).expanduser().absolute()
            )
        command = supernode_command(self.options.name, self.options.supernode)
        return keeper.start(command, env=environment, output=None, grace_s=ENDING_S)

    def _serve(self) -> "tuple[subprocess.Popen[bytes] | None, str]":
        """Keep a SuperNode running until it is to leave; (the one that runs, why it leaves)."""
        while not (reason := self._told()):
            supernode, began = self._start(), time.monotonic()
            while supernode.poll() is None:
                if reason := self._told():
                    return supernode, reason
                if self._clientapp_lost():
                    self.say("the ClientApp died with an order in hand: the SuperNode starts anew")
                    keeper.stop(supernode, timeout_s=ENDING_S + 2 * keeper.KILL_S)
                    break
                time.sleep(_POLL_S)
            else:
                self._wait_for_restart(supernode.returncode, time.monotonic() - began)
        return None, reason

    def _clientapp_lost(self) -> bool:
        """Whether the ClientApp died with an order in hand: the SuperNode would notice in about a minute,
        and takes no other order before (docs/flower.md)."""
        order = in_flight.read(self.directory)
        if order is None or order.state != in_flight.WORKING or _alive(order.pid):
            return False
        (self.directory / in_flight.FILE_NAME).unlink(missing_ok=True)
        return True

    def _wait_for_restart(self, code: int, lived_s: float) -> None:
        if code in (_USAGE, _NOT_STARTED):
            raise PilotError(f"flower-supernode ended with code {code}: correct its options")
        self._restarts = 0 if lived_s >= STEADY_S else self._restarts + 1
        if self._restarts > MAX_RESTARTS:
            raise PilotError(
                f"flower-supernode ended {self._restarts} times in a row (code {code}): see what it says"
            )
        delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, self._restarts - 1))
        self.say(
            f"the SuperNode ended after {lived_s:.0f} s with code {code}; again in {delay_s:g} s"
        )
        until = time.monotonic() + delay_s
        while time.monotonic() < until and not self._told():
            time.sleep(_POLL_S)

    def _told(self) -> str:
        """Why this node is to leave; "" if it isn't."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        order = in_flight.read(self.directory)
        configured = order.preempt_file if order else ""
        if self.options.preempt_file:
            return noticed([Path(self.options.preempt_file).expanduser()])
        return noticed(notice_files(configured))

    # -- leaving ---------------------------------------------------------------------------------

    def _leave(self, reason: str) -> None:
        """Tell workers and server, and wait until the reply in hand is safe, or its time is over."""
        (self.directory / LEAVE_NAME).write_text(reason, encoding="utf-8")
        order = in_flight.read(self.directory)
        if order is None:
            self.say(f"{reason}: leaving; nothing is in hand")
            return
        limit_s = self.options.leave_within_s
        limit_s = order.drain_deadline_s + UPLOAD_S if limit_s is None else limit_s
        self.say(
            f"{reason}: leaving once the server has the reply in hand, in {limit_s:g} s at most"
        )
        until = time.monotonic() + limit_s
        safe = ""
        while not safe and order is not None:
            safe, order = self._wait_for(order, reason, until)
        self.say(f"leaving: {safe}")

    def _wait_for(self, order: InFlight, reason: str, until: float) -> tuple[str, InFlight | None]:
        """Wait for one order; (why to go now, None), or ("", the order that came after it)."""
        coordinator = order.coordinator()
        with contextlib.ExitStack() as stack:
            if coordinator is not None:
                stack.callback(coordinator.close)
            while True:
                safe = self._safe(order, coordinator, reason)
                if not safe and (len(self.signals) > 1 or time.monotonic() >= until):
                    safe = "nobody says that the server has the reply in hand"
                # read after the look at Redis: what was said there may be of the next order's round
                now = in_flight.read(self.directory) or order
                if now.fence != order.fence:
                    return "", now
                if safe:
                    return safe, None
                order = now  # its file is written as it goes on
                self._pause(coordinator, until)

    def _safe(self, order: InFlight, coordinator: ClientCoordinator | None, reason: str) -> str:
        """Why nothing is lost by ending now; "" if something may be."""
        if coordinator is not None:
            coordinator.stop(f"{_STOPPED_BY}: {reason}", expiry_s=_STOP_EXPIRY_S)
            if coordinator.acknowledged(order.fence):
                return "the server has the reply in hand"
            if over := coordinator.superseded():
                return f"the server waits for no reply any more ({over})"
        if order.state == in_flight.DONE:
            return "nothing is in hand"
        if order.state == in_flight.WORKING and not _alive(order.pid):
            return "the ClientApp that had an order in hand is gone"
        blind = coordinator is None or coordinator.failing
        waited_s = time.time() - _written_at(self.directory)
        if blind and not _alive(order.pid) and waited_s >= BLIND_UPLOAD_S:
            return "the SuperNode has had the reply for a while, and no Redis says more"
        return ""

    def _pause(self, coordinator: ClientCoordinator | None, until: float) -> None:
        pause_s = min(_LOOK_S, max(0.0, until - time.monotonic()))
        if coordinator is None:
            time.sleep(pause_s)
        else:
            coordinator.wait(pause_s)  # an acknowledgement wakes it


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _written_at(directory: Path) -> float:
    try:
        return (directory / in_flight.FILE_NAME).stat().st_mtime
    except OSError:
        return 0.0


def supernode_command(name: str, options: Sequence[str]) -> list[str]:
    """flower-supernode with `options`, the site's name, and a free port unless one is given.

    Raises PilotError if the options name another name, or hold a node configuration that can't be added to.
    """
    rest, configured = [], ""
    words = iter(options)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--node-config":
            configured = value if equals else next(words, "")
        else:
            rest.append(word)
    if configured.endswith(".toml"):
        raise PilotError("pilot node takes --node-config as key=value pairs, not as a file")
    named = re.search(r"(?:^|\s)name=(\"[^\"]*\"|'[^']*'|\S+)", configured)
    if named and named[1].strip("\"'") != name:
        raise PilotError(f"--node-config names the site {named[1]}: say --name instead")
    if not named:
        configured = f'{configured} name="{name}"'.strip()
    if not any(word.partition("=")[0] == "--port" for word in rest):
        rest += ["--port", str(_free_port())]
    return [flower_program("flower-supernode"), *rest, "--node-config", configured]


def _free_port() -> int:
    """A port for the SuperNode's own interface, which is on the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def default_name() -> str:
    """This machine's name, as far as a site's name may hold it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:100] or "site"


def speaker(name: str) -> Callable[[str], None]:
    """Lines of this node on standard error, beside those of its SuperNode."""
    return lambda line: print(f"pilot node {name}: {line}", file=sys.stderr, flush=True)
