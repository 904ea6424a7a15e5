"""`pilot node`: a SuperNode that is restarted when it exits, and that leaves without losing its last reply.

Flower uploads a reply only after our function has returned, and loses the reply of a node that goes offline
just then (docs/flower.md). So on a signal or a preemption notice this process lets workers and server know that
the client leaves, waits until the server confirms that it has the reply on disk, and only then ends the
SuperNode. It waits no longer than `--leave-within`, nor than a notice leaves time (`notices.py`). Restarts are
patient: after a kill -9 Flower refuses an authenticated node for about 53 s.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from pilot.config import check_name
from pilot.coordination.coordinator import ClientCoordinator, ping, resolve_url
from pilot.coordination.stop_reasons import OF_NODE
from pilot.errors import PilotError
from pilot.launch import supernode, warm
from pilot.launch.connection import base_directory, flower_environment
from pilot.launch.notices import GOODBYE_S, Watch
from pilot.processes import keeper
from pilot.processes.ancestry import alive
from pilot.processes.scratch import free_port
from pilot.processes.signals import end_signals_handled_by
from pilot.processes.waiting import wait_until
from pilot.site import in_flight
from pilot.site.in_flight import InFlight
from pilot.site.notice import (
    LEAVE_NAME,
    NODE_VARIABLE,
    PREEMPT_VARIABLE,
    notice_files,
    notice_path,
    noticed,
)
from pilot.site.rows import ROWS_KEY, checked_rows

# Beyond the drain deadline, for the upload: this many times what the last one took, and at least this long.
UPLOAD_FACTOR, UPLOAD_MIN_S = 2.0, 60.0
BLIND_UPLOAD_S = 5.0  # without Redis we cannot learn when the SuperNode has sent the reply
ENDING_S = 10.0  # for the SuperNode to take its leave of the SuperLink
# A killed node with a key is refused for 36 to 60 s: with 10 s between attempts it is back 6 s after that on
# average, with 30 s it was 18 s.
FIRST_DELAY_S, LAST_DELAY_S, STEADY_S = 1.0, 10.0, 60.0
MAX_RESTARTS = 300  # of SuperNodes that lived for less than STEADY_S, in a row: about an hour
# Flower misses a node that has sent no heartbeat for this: it takes it off line and gives up its order. The
# SuperNode notices that at its next heartbeat and its ClientApp's end, which took 26 to 50 s; a new one, 6.
FROZEN_S = 60.0
LOST_S = 6.0  # for a SuperNode to give up an order whose ClientApp is gone (`supernode.py`)
_POLL_S = 0.2
_ORDER_POLL_S = 0.5
_STOP_EXPIRY_S = 3600.0
_USAGE, _NOT_STARTED = 2, 127  # exit codes of argparse and of the keeper


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What `pilot node -h` describes; `supernode` are flower-supernode's own options."""

    name: str
    supernode: Sequence[str] = ()
    preempt_file: str = ""
    leave_within_s: float | None = None
    watch: Sequence[str] = ()
    device_batch_size: int | None = None


def node_directory(name: str) -> Path:
    """`$NANOCHAT_BASE_DIR/nodes/<name>`: the files through which a node and its ClientApps communicate."""
    return base_directory() / "nodes" / name


def run_node(options: NodeOptions, *, say: Callable[[str], None]) -> int:
    """Run a SuperNode until a signal or a notice ends it; returns the exit code.

    Raises PilotError for a mistake in the options, or if a node with that name already runs here.
    """
    check_name(options.name, "--name")
    supernode_options(options.name, options.supernode, options.device_batch_size)
    watch = Watch(options.watch, say)
    directory = node_directory(options.name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise PilotError(
            f"`pilot node --name {options.name}` already runs on this machine: stop it, or choose"
            " another --name"
        ) from None
    signals: list[int] = []
    with lock, end_signals_handled_by(lambda signum, _frame: signals.append(signum)):
        with watch.running():
            return _Node(options, directory, signals, say, watch).run()


@dataclass
class _Node:
    options: NodeOptions
    directory: Path
    signals: list[int]  # that have come so far; the handler appends to it
    say: Callable[[str], None]
    watch: Watch = field(default_factory=Watch)
    _restarts: int = field(default=0, init=False)
    _lost_at_s: float | None = field(default=None, init=False)
    _awake_at_s: float = field(default_factory=lambda: _real_s(), init=False)

    def run(self) -> int:
        self._clear_last_leave()
        self._check_redis()
        supernode, reason = self._serve()
        if supernode is not None:
            try:
                self._leave(reason)
            finally:
                keeper.stop(supernode, timeout_s=ENDING_S + 2 * keeper.KILL_S)
        self._clear_last_leave()  # it has left, and may come back at any time
        return 0 if len(self.signals) < 2 else 128 + self.signals[1]

    # -- starting --------------------------------------------------------------------------------

    def _clear_last_leave(self) -> None:
        """Withdraw what a node with this name announced when it left."""
        (self.directory / LEAVE_NAME).unlink(missing_ok=True)
        order = in_flight.read(self.directory)
        if order is not None and (coordinator := order.coordinator()):
            with contextlib.closing(coordinator):
                coordinator.clear_stop(OF_NODE)
        (self.directory / in_flight.FILE_NAME).unlink(missing_ok=True)

    def _check_redis(self) -> None:
        try:
            if url := resolve_url(""):
                ping(url)
        except PilotError as error:
            self.say(f"continuing without reply acknowledgements for now: {error}")

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = {**flower_environment(), NODE_VARIABLE: str(self.directory)}
        programs = warm.install(self.directory / "programs")
        environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
        if self.options.preempt_file:
            environment[PREEMPT_VARIABLE] = str(notice_path(self.options.preempt_file))
        elif configured := environment.get(PREEMPT_VARIABLE):
            environment[PREEMPT_VARIABLE] = str(notice_path(configured))
        program = str(supernode.install(self.directory / "programs"))
        given = self.options
        options = supernode_options(given.name, given.supernode, given.device_batch_size)
        command = [sys.executable, program, *options]
        return keeper.start(command, env=environment, output=None, grace_s=ENDING_S)

    def _serve(self) -> "tuple[subprocess.Popen[bytes] | None, str]":
        """Keep a SuperNode running until it is to leave; (the running one if any, why it leaves)."""
        while not (reason := self._leave_reason()):
            self._awake_at_s = _real_s()
            supernode, began = self._start(), time.monotonic()
            while supernode.poll() is None:
                if reason := self._leave_reason():
                    return supernode, reason
                if why := self._clientapp_lost() or self._stood_still():
                    self.say(f"{why}; restarting the SuperNode")
                    keeper.stop(supernode, timeout_s=ENDING_S + 2 * keeper.KILL_S)
                    break
                time.sleep(_POLL_S)
            else:
                self._forget_order()
                self._wait_for_restart(supernode.returncode, time.monotonic() - began)
        return None, reason

    def _stood_still(self) -> str:
        """A clause if this node, or its whole machine, stood still long enough that Flower has missed it."""
        before_s, self._awake_at_s = self._awake_at_s, _real_s()
        still_s = self._awake_at_s - before_s
        if still_s < FROZEN_S:
            return ""
        self._forget_order()  # the server gave it up
        return f"this node stood still for {still_s:.0f} s"

    def _clientapp_lost(self) -> str:
        """A clause if the ClientApp died while working on an order, and the SuperNode does not see it.

        Flower's own would in about a minute, and takes no other order until then (docs/flower.md).
        """
        order = in_flight.read(self.directory)
        if order is None or order.state != in_flight.WORKING or alive(order.pid):
            self._lost_at_s = None
            return ""
        now_s = time.monotonic()
        self._lost_at_s = self._lost_at_s or now_s
        if now_s - self._lost_at_s < LOST_S:
            return ""
        self._lost_at_s = None
        self._forget_order()
        return "the ClientApp died while working on an order"

    def _forget_order(self) -> None:
        (self.directory / in_flight.FILE_NAME).unlink(missing_ok=True)

    def _wait_for_restart(self, code: int, lived_s: float) -> None:
        if code in (_USAGE, _NOT_STARTED):
            raise PilotError(f"flower-supernode exited with code {code}: check its options")
        self._restarts = 0 if lived_s >= STEADY_S else self._restarts + 1
        if self._restarts > MAX_RESTARTS:
            raise PilotError(
                f"flower-supernode exited {self._restarts} times in a row (code {code}): see its output above"
            )
        delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2.0 ** max(0, self._restarts - 1))
        self.say(
            f"SuperNode exited with code {code} after {lived_s:.0f} s; restarting in {delay_s:g} s"
        )
        wait_until(self._leave_reason, timeout_s=delay_s, poll_s=_POLL_S)

    def _leave_reason(self) -> str:
        """Why this node is to leave; "" if it is not."""
        if self.signals:
            return signal.Signals(self.signals[0]).name
        order = in_flight.read(self.directory)
        needed_s = leave_within_s(order) + GOODBYE_S if order else 0.0
        if reason := self.watch.reason(needed_s):
            return reason
        configured = order.preempt_file if order else ""
        if self.options.preempt_file:
            return noticed([notice_path(self.options.preempt_file)])
        return noticed(notice_files(configured))

    # -- leaving ---------------------------------------------------------------------------------

    def _leave(self, reason: str) -> None:
        """Let workers and server know, and wait until the last reply is safe or the time is over."""
        (self.directory / LEAVE_NAME).write_text(reason, encoding="utf-8")
        order = in_flight.read(self.directory)
        if order is None:
            self.say(f"{reason}: leaving; no order in progress")
            return
        limit_s = self.options.leave_within_s
        limit_s = leave_within_s(order) if limit_s is None else limit_s
        left_s = max(0.0, self._last_moment_s() - time.monotonic())
        if order.state == in_flight.WORKING and left_s < order.upload_s:
            took = f"our last reply took {order.upload_s:.0f} s"
            self.say(f"{reason}: {left_s:.0f} s are left, and {took}: leaving without this one")
            return
        limit_s = round(min(limit_s, left_s), 1)
        self.say(f"{reason}: waiting up to {limit_s:g} s for the server to confirm our last reply")
        until = time.monotonic() + limit_s
        done = ""
        while not done and order is not None:
            done, order = self._wait_for(order, reason, until)
        self.say(f"leaving: {done}")

    def _last_moment_s(self) -> float:
        """On `time.monotonic`: when the SuperNode must be ended, to end before its machine; or infinity."""
        return self.watch.ends_at_s() - GOODBYE_S

    def _wait_for(self, order: InFlight, reason: str, until: float) -> tuple[str, InFlight | None]:
        """Wait for one order; (why to leave now, None), or ("", the order that came after it)."""
        coordinator = order.coordinator()
        with contextlib.ExitStack() as stack:
            if coordinator is not None:
                stack.callback(coordinator.close)
            while True:
                done = self._why_done(order, coordinator, reason)
                over = time.monotonic() >= min(until, self._last_moment_s())
                if not done and (over or len(self.signals) > 1):
                    done = "no confirmation from the server"
                # read after Redis, whose keys may already be about the next order's round
                latest = in_flight.read(self.directory) or order
                if latest.fence != order.fence:
                    return "", latest
                if done:
                    return done, None
                order = latest  # the same order, perhaps in its next state
                self._pause(coordinator, until)

    def _why_done(self, order: InFlight, coordinator: ClientCoordinator | None, reason: str) -> str:
        """Why nothing is lost by ending now; "" if something might be."""
        if coordinator is not None:
            coordinator.stop(OF_NODE + reason, expiry_s=_STOP_EXPIRY_S)
            if coordinator.acknowledged(order.fence):
                return "the server has our last reply on disk"
            if over := coordinator.superseded():
                return f"the server no longer waits for our reply ({over})"
        if order.state == in_flight.DONE:
            return "no order in progress"
        gone = order.state == in_flight.WORKING and not alive(order.pid)
        # read after the look at the process: it may have said that it is done, and ended
        if gone and in_flight.read(self.directory) in (None, order):
            return "the ClientApp that worked on the order is gone"
        blind = coordinator is None or coordinator.failing
        waited_s = time.time() - _written_at(self.directory)
        if blind and not alive(order.pid) and waited_s >= BLIND_UPLOAD_S:
            return "reply handed to the SuperNode; Redis unreachable, assuming it was sent"
        return ""

    def _pause(self, coordinator: ClientCoordinator | None, until: float) -> None:
        pause_s = min(_ORDER_POLL_S, max(0.0, until - time.monotonic()))
        if coordinator is None:
            time.sleep(pause_s)
        else:
            coordinator.wait(pause_s)  # an acknowledgement wakes it


def leave_within_s(order: InFlight) -> float:
    """Seconds for the reply to reach the server's disk, unless `--leave-within` says otherwise."""
    return order.drain_deadline_s + max(UPLOAD_MIN_S, UPLOAD_FACTOR * order.upload_s)


def _real_s() -> float:
    """A clock that runs on while the machine sleeps, where the system has one."""
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boottime is None else time.clock_gettime(boottime)


def _written_at(directory: Path) -> float:
    try:
        return (directory / in_flight.FILE_NAME).stat().st_mtime
    except OSError:
        return 0.0


def supernode_options(name: str, options: Sequence[str], rows: int | None = None) -> list[str]:
    """`options` with the client's name, its rows per device unless None, and a free port for the SuperNode's
    own interface unless given.

    Raises PilotError if the options give another name or other rows, or a node configuration to which nothing
    can be added.
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
        raise PilotError(f"--node-config sets the name {named[1]}: use --name instead")
    if not named:
        configured = f'{configured} name="{name}"'.strip()
    configured = _with_rows(configured, rows)
    if not any(word.partition("=")[0] == "--port" for word in rest):
        rest += ["--port", str(free_port())]
    return [*rest, "--node-config", configured]


def _with_rows(configured: str, rows: int | None) -> str:
    """The node configuration with `rows` per device. Raises PilotError for no number of rows, or for two."""
    if rows is not None:
        checked_rows(rows, f"--{ROWS_KEY}")
    found = re.search(rf"(?:^|\s){ROWS_KEY}=(\S+)", configured)
    if found is None:
        return configured if rows is None else f"{configured} {ROWS_KEY}={rows}"
    word = found[1]
    there = checked_rows(int(word) if word.isdecimal() else word, f"{ROWS_KEY} in --node-config")
    if rows not in (None, there):
        raise PilotError(
            f"--{ROWS_KEY} is {rows}, and --node-config says {there}: give one of them"
        )
    return configured


def default_name() -> str:
    """This machine's name, with what a client's name may not contain replaced by "-"."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")[:100] or "site"


def speaker(command: str) -> Callable[[str], None]:
    """A function that prints a line of `pilot COMMAND` on standard error, as Flower's program does."""
    return lambda line: print(f"pilot {command}: {line}", file=sys.stderr, flush=True)
