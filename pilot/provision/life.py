"""A client's life as its provisioner leads it: off, starting, on, draining, stopping, and off again.

What has been decided is carried out here, step by step: each step is written down before it is done, so
that a provisioner that dies in between continues with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pilot.coordination.provisioner import ClientKeys, ProvisionerCoordinator, RunKeys
from pilot.provision.hooks import Condition, Hook, Look
from pilot.provision.policy import Memory

FIRST_RETRY_S, LAST_RETRY_S = 10.0, 600.0  # pauses before a start is tried again double
STOP_AGAIN_S = 30.0


class Phase(StrEnum):
    OFF = "off"
    STARTING = "starting"
    ON = "on"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass
class Record:
    """What is kept of a client. Times are seconds of the wall clock.

    `run`: whether it is to run, as decided at `decided_s` for `reason`; `why` the policy would leave it
    so now; `started`: its hook has done what starts it; `fence` and `beat`: its last heartbeat, and
    `heard`: one came after its start; `waited_s`: for how long none has come while a server led the run.
    """

    phase: Phase = Phase.OFF
    since_s: float = 0.0
    run: bool = False
    decided_s: float = 0.0
    reason: str = ""
    why: str = ""
    memory: Memory = field(default_factory=Memory)
    attempts: int = 0
    not_before_s: float = 0.0
    started: bool = False
    fence: tuple[int, int] = (0, 0)
    beat: str = ""
    heard: bool = False
    waited_s: float = 0.0
    hook: dict[str, Any] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether there may be a machine that draws power."""
        return self.phase != Phase.OFF


@dataclass(frozen=True)
class Patience:
    """Seconds for which a client may start, drain and stop."""

    start_within_s: float
    drain_within_s: float
    stop_within_s: float


@dataclass
class Life:
    """One client. `tell(client, action, why)` reports; `save()` writes all records."""

    name: str
    record: Record
    hook: Hook
    fleet: ProvisionerCoordinator
    patience: Patience
    tell: Callable[[str, str, str], None]
    save: Callable[[], None]

    def step(self, now_s: float, passed_s: float, run: RunKeys | None, present: bool) -> None:
        """`run`: what Redis says (None: it fails), `present`: the run's events have named the client just
        now."""
        keys = ClientKeys() if run is None else run.clients.get(self.name, ClientKeys())
        if run is not None and run.led:
            self.record.waited_s += passed_s
        self._listen(keys, present)
        match self.record.phase:
            case Phase.OFF:
                self._off(now_s, keys)
            case Phase.STARTING:
                self._starting(now_s)
            case Phase.ON:
                self._on(now_s)
            case Phase.DRAINING:
                self._draining(now_s, run, keys)
            case Phase.STOPPING:
                self._stopping(now_s)

    def _listen(self, keys: ClientKeys, present: bool) -> None:
        record = self.record
        if keys.beat and keys.beat != record.beat:
            record.beat, record.fence = keys.beat, keys.fence
            present = True
        if present and record.exists:
            record.heard, record.waited_s = True, 0.0

    # -- the phases ------------------------------------------------------------------------------

    def _off(self, now_s: float, keys: ClientKeys) -> None:
        if keys.drained_by_us:
            self.fleet.undrain(self.name)  # Redis was away when it stopped
        if not self.record.run or now_s < self.record.not_before_s:
            return
        self.fleet.undrain(self.name)
        self.record.attempts += 1
        self.record.started, self.record.heard, self.record.waited_s = False, False, 0.0
        self._enter(Phase.STARTING, now_s)
        self.hook.start()
        self._remember()

    def _starting(self, now_s: float) -> None:
        look = self.hook.look()
        if not self.record.started and look.condition in (Condition.RUNNING, Condition.UNKNOWN):
            self.record.started = True
            self.save()
        if look.condition in (Condition.FAILED, Condition.GONE):
            self._start_failed(now_s, look)
        elif not self.record.run:
            self._drain(now_s)
        elif self.record.heard:
            self.record.attempts = 0
            self._enter(Phase.ON, now_s)
            self.tell(self.name, "up", "it takes part")
        else:
            self._miss(now_s)

    def _on(self, now_s: float) -> None:
        look = self.hook.look()
        if look.condition == Condition.GONE:
            self._start_failed(now_s, look)
        elif not self.record.run:
            self._drain(now_s)
        elif look.condition == Condition.UNKNOWN:  # a machine may be gone without a word
            self._miss(now_s)

    def _draining(self, now_s: float, run: RunKeys | None, keys: ClientKeys) -> None:
        if self.record.run:
            if self.fleet.undrain(self.name):
                self._enter(Phase.STARTING, now_s)
                self.tell(self.name, "undrain", self.record.reason)
            return
        look = self.hook.look()
        waited_s = now_s - self.record.since_s
        if look.condition == Condition.GONE:
            self._ended(now_s, f"it left by itself ({look.why})")
        elif look.condition == Condition.PENDING:
            pass  # what is half started can't be stopped yet
        elif why := self._drained(run, keys, waited_s):
            self._enter(Phase.STOPPING, now_s)
            self.tell(self.name, "stop", why)
            self.hook.stop()
            self._remember()
        else:
            self.fleet.drain(self.name, self.record.reason, keys)

    def _stopping(self, now_s: float) -> None:
        look = self.hook.look()
        waited_s = now_s - self.record.since_s
        if look.condition == Condition.GONE:
            self._ended(now_s, "it has stopped")
        elif look.condition == Condition.FAILED and waited_s < STOP_AGAIN_S:
            pass
        elif look.condition == Condition.FAILED or waited_s >= self.patience.stop_within_s:
            self.hook.kill()
            why = look.why or f"it did not stop within {self.patience.stop_within_s:g} s"
            self.tell(self.name, "stop failed", f"{why}; trying again")
            self._enter(Phase.STOPPING, now_s)
            self.hook.stop()
            self._remember()
        elif look.condition in (Condition.RUNNING, Condition.UNKNOWN) and waited_s > 0:
            self.hook.stop()  # also where an earlier provisioner died before it did

    # -- what happens in them --------------------------------------------------------------------

    def _drain(self, now_s: float) -> None:
        self._enter(Phase.DRAINING, now_s)

    def _drained(self, run: RunKeys | None, keys: ClientKeys, waited_s: float) -> str:
        """Why nothing is lost by stopping it now, or why that is no longer waited for; "" otherwise."""
        if waited_s >= self.patience.drain_within_s:
            return f"it did not drain within {self.patience.drain_within_s:g} s"
        if run is None or keys.beat:  # its heartbeat ends when its reply has been sent
            return ""
        if not keys.stop:
            return ""  # the wish is not in Redis yet
        if self.record.fence == (0, 0):
            return "it was not at work"
        if keys.acknowledged >= self.record.fence:
            return "the server has its last reply"
        if run.current > self.record.fence or run.state in ("finished", "interrupted"):
            return "the server no longer waits for it"
        return ""

    def _miss(self, now_s: float) -> None:
        """Nothing was heard of it for too long: let it stop, and start again later."""
        if self.record.waited_s < self.patience.start_within_s:
            return
        why = f"it did not appear as a client within {self.patience.start_within_s:g} s"
        self._try_later(now_s)
        self.tell(self.name, "missing", f"{why}; tried again later")
        self._enter(Phase.STOPPING, now_s)
        self.hook.stop()
        self._remember()

    def _start_failed(self, now_s: float, look: Look) -> None:
        self._try_later(now_s)
        pause_s = self.record.not_before_s - now_s
        again = f"; tried again in {pause_s:.0f} s" if self.record.run else ""
        self._enter(Phase.OFF, now_s)
        self.tell(self.name, "failed", f"{look.why}{again}")

    def _try_later(self, now_s: float) -> None:
        doubled = FIRST_RETRY_S * 2.0 ** max(0, min(self.record.attempts, 20) - 1)
        self.record.not_before_s = now_s + min(LAST_RETRY_S, doubled)

    def _ended(self, now_s: float, why: str) -> None:
        self.record.started = False
        self.fleet.undrain(self.name)
        self._enter(Phase.OFF, now_s)
        self.tell(self.name, "down", why)

    def _enter(self, phase: Phase, now_s: float) -> None:
        self.record.phase, self.record.since_s = phase, now_s
        self._remember()

    def _remember(self) -> None:
        self.record.hook = self.hook.saved()
        self.save()
