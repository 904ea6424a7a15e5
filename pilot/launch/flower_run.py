"""Submit a run to Flower, show its log, and know how it ended.

`flwr run --stream` exits with 0 when the run failed, and Flower reports "running" for a minute after the server
was killed (docs/flower.md). Flower is used through its command line only: its Python client is not a public
interface.
"""

import json
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pilot.errors import PilotError
from pilot.launch.flower_commands import Command, FlowerCommands
from pilot.processes.output import plain

COMMAND_TIMEOUT_S = 60.0  # `flwr ls` takes 3 s, most of it imports (`flower_commands.py`)
LOST_SUPERLINK_S = 120.0  # for how long we keep asking a SuperLink that does not answer
DEAD_SERVER_S = 5.0  # from the end of the server's process to the end of its log, if it ended well

_UNKNOWN_RUN = re.compile(r"run id\b.* not found", re.IGNORECASE)
# `server.failures.RunInterrupted`, with its wish
_STOPPED = re.compile(r"the run was stopped \(.*\); the same command resumes it")
_RUN_ID = re.compile(r"Successfully started run (\d+)")
# Flower's own lines that aren't the run's log, or are advice that doesn't fit a run of ours
_NOISE = (
    "default simulated SuperNodes changed from",
    "To change federation size, use the following command",
    "flwr federation simulation-config",
    "Starting logstream for run_id",
    "Using SuperLink:",
    "Manually terminating ClientAppActor",
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its `status` in `flwr ls`, and what Flower knows about the reason."""

    status: str
    details: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status == "finished:completed"

    @property
    def was_stopped(self) -> bool:
        """By `flwr stop`, or by `pilot stop`, after which the server fails with a sentence of its own."""
        return self.status == "finished:stopped" or bool(self.wish)

    @property
    def wish(self) -> str:
        """That sentence, if `pilot stop` has ended the run."""
        found = _STOPPED.search(self.details)
        return found.group() if found else ""

    @property
    def has_ended(self) -> bool:
        return self.status.startswith("finished")


class FlowerRun:
    """One run on a SuperLink: `submit()` it, then `follow()` it to its end."""

    def __init__(self, connection: str, app: Path, commands: FlowerCommands) -> None:
        self.run_id: str | None = None
        self._connection = connection
        self._app = app
        self._commands = commands
        self._process: Command | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._log_ended = False
        self._grace_s = DEAD_SERVER_S
        self._seen = 0  # lines of the run's log so far
        self._before: list[str] = []  # what flwr printed before the run had an id

    def submit(self, run_config: Path | None) -> None:
        """Build and send the app, and begin to read its log. Raises PilotError if Flower refuses it."""
        options = [] if run_config is None else ["--run-config", str(run_config)]
        self._read("run", str(self._app), self._connection, "--stream", *options)
        self.wait_for_id(timeout_s=math.inf)
        if self.run_id is None:
            raise PilotError(f"Flower refused the run: {_sentence(self._before)}")

    def wait_for_id(self, *, timeout_s: float) -> None:
        """Wait until the run has an id, or it is clear that it will get none."""
        deadline = time.monotonic() + timeout_s
        while self.run_id is None and not self._log_ended and time.monotonic() < deadline:
            line = self._next_line()
            if line:
                self._before.append(line)
                if found := _RUN_ID.search(line):
                    self.run_id = found.group(1)

    def follow(
        self,
        show: Callable[[str], None],
        failure: Callable[[], str | None] = lambda: None,
        *,
        ends_within_s: float | None = None,
    ) -> Outcome:
        """Show the run's log until the run has ended.

        `failure` says why the server is gone, or None: Flower alone would not notice for a minute. Flower
        has `ends_within_s` from then on to say that the run has ended well (default: DEAD_SERVER_S).
        """
        self._grace_s = DEAD_SERVER_S if ends_within_s is None else ends_within_s
        quiet_until = math.inf
        while True:
            for line in self._log_lines(failure):
                show(line)
            outcome = self._outcome_within(LOST_SUPERLINK_S, failure)
            if outcome.has_ended:
                return outcome
            if (reason := failure()) is not None:
                # after an ordinary end, too, the process is gone shortly before the status says so
                quiet_until = min(quiet_until, time.monotonic() + self._grace_s)
                if time.monotonic() >= quiet_until:
                    return Outcome("finished:failed", reason)
            else:
                self._read("log", str(self.run_id), self._connection, "--stream")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ask the SuperLink to stop the run. Whether it does is not checked."""
        if self.run_id is not None:
            self._command("stop", self.run_id, self._connection)

    def close(self) -> None:
        """Stop reading the log."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def outcome(self) -> Outcome | None:
        """The run's current status, or None if the SuperLink does not answer."""
        listing = self._command(
            "ls", self._connection, "--run-id", str(self.run_id), "--format", "json"
        )
        if _UNKNOWN_RUN.search(listing):  # its books are in its memory, and it was started again
            return Outcome("finished:failed", "the SuperLink does not know it any more")
        try:
            run = json.loads(listing)["runs"][0]
            details = str(run.get("status-details") or "")
            return Outcome(str(run["status"]), "" if details == "N/A" else details)
        except (ValueError, KeyError, IndexError, TypeError):
            return None

    def _outcome_within(self, timeout_s: float, failure: Callable[[], str | None]) -> Outcome:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            reason = failure()
            if reason is not None and not self._grace_s:
                return Outcome("finished:failed", reason)  # Flower can add nothing to that
            outcome = self.outcome()
            if outcome is not None:
                return outcome
            if reason is not None:
                return Outcome("finished:failed", reason)
            time.sleep(1)
        raise PilotError(
            f"the SuperLink of {self._connection} no longer answers; the run may continue there, see"
            f" `flwr log {self.run_id} {self._connection}`"
        )

    def _log_lines(self, failure: Callable[[], str | None]) -> Iterator[str]:
        """New lines of the log, until the stream ends or the server has been gone for a while."""
        count, dead_since = 0, math.inf
        while not self._log_ended:
            line = self._next_line()
            if line:
                # lines without content: Flower's own, and the empty one at the end
                if line.strip() == "INFO :" or any(noise in line for noise in _NOISE):
                    continue
                count += 1
                if count > self._seen:  # `flwr log` repeats the whole log
                    self._seen = count
                    yield line.rstrip("\n")
            elif failure() is not None:
                dead_since = min(dead_since, time.monotonic())
                if time.monotonic() - dead_since > self._grace_s:
                    self.close()

    def _next_line(self) -> str | None:
        """The next line of output; None if there is none yet, or none any more."""
        try:
            line = self._lines.get(timeout=0.5)
        except queue.Empty:
            return None
        self._log_ended = line is None
        return line

    def _read(self, *arguments: str) -> None:
        """Run a flwr command whose output goes line by line into the queue, None at its end."""
        self.close()
        self._log_ended = False
        process = self._process = self._commands.start(arguments, errors=True)
        lines = self._lines = queue.Queue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as output:
                for line in output:
                    lines.put(plain(line))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()

    def _command(self, *arguments: str) -> str:
        """The output of a short flwr command, as far as it came in time."""
        command = self._commands.start(arguments, errors=False)
        too_late = threading.Timer(COMMAND_TIMEOUT_S, command.kill)
        too_late.start()
        try:
            assert command.stdout is not None
            with command.stdout as output:
                return output.read()
        finally:
            too_late.cancel()
            command.wait()


def _sentence(lines: list[str]) -> str:
    """flwr's complaint without its boxes and progress lines."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]|\bError\b", " ", line) for line in lines)
    text = re.sub(r"Using SuperLink: \S+ \(\S+\)", " ", text)
    return " ".join(text.split())[-500:] or "no output"
