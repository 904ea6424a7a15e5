"""Carries out a plan of faults on a federation, and records when each struck and when it was over."""

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from benchmarks.chaos.checker import Outage
from benchmarks.chaos.faults import DELAY_S, Fault
from benchmarks.chaos.processes import marked
from benchmarks.chaos.proxy import Line
from benchmarks.chaos.topology import Federation, Service, Site, has_role
from pilot.processes.ancestry import alive

_POLL_S = 0.1
_PATIENCE_S = 8.0  # for how long a fault waits for a target
_ORPHANS_S = 10.0  # within which the workers of a dead SuperNode must end
_GIVE_UP_S = 120.0  # a target that is not back by then counts as back: the checker sees the stall


@dataclass
class _Active:
    """A fault in progress: `over` says whether its target is back."""

    kind: str
    target: str
    began: float
    over: Callable[[], bool]


class Injector:
    """`run` works through the plan; `outages` are the faults that struck, `missed` those that could not.

    `violations` are orphans: workers that outlived their SuperNode by more than 10 s.
    """

    def __init__(self, federation: Federation, plan: list[Fault]) -> None:
        self._federation, self._plan = federation, sorted(plan, key=lambda fault: fault.at_s)
        self.outages: list[Outage] = []
        self.missed: list[Fault] = []
        self.violations: list[str] = []
        self._active: list[_Active] = []
        self._orphans: list[tuple[float, str, list[psutil.Process]]] = []

    def run(self, duration_s: float, stop: threading.Event) -> None:
        """Strike as planned until every fault is over, the run is finished, or `stop` is set."""
        began = time.monotonic()
        waiting = list(self._plan)
        while (waiting or self._active or self._orphans) and not stop.wait(_POLL_S):
            now_s = time.monotonic() - began
            if self._federation.error is not None or now_s > duration_s + 2 * _GIVE_UP_S:
                break
            if self._federation.server.finished:
                waiting.clear()
            while waiting and waiting[0].at_s <= now_s:
                fault = waiting[0]
                if not self._strike(fault):
                    if now_s - fault.at_s < _PATIENCE_S:
                        break
                    self.missed.append(fault)
                waiting.pop(0)
            self._settle()

    def _settle(self) -> None:
        for active in list(self._active):
            if active.over() or time.time() - active.began > _GIVE_UP_S:
                self._active.remove(active)
                outage = Outage(active.kind, active.target, active.began, time.time())
                self.outages.append(outage)
        for entry in list(self._orphans):
            due, site, workers = entry
            left = [worker for worker in workers if alive(worker)]
            if left and time.time() >= due:
                pids = [worker.pid for worker in left]
                text = f"processes: workers {pids} outlived the SuperNode of {site} by {_ORPHANS_S:.0f} s"
                self.violations.append(text)
            if not left or time.time() >= due:
                self._orphans.remove(entry)

    # -- faults ------------------------------------------------------------------------------------

    def _strike(self, fault: Fault) -> bool:
        """Carry out `fault`; False if it has no target now."""
        what, _, whom = fault.kind.partition("-")
        site = self._federation.sites.get(fault.target)
        match what:
            case "kill":
                over = self._kill(whom, site)
            case "drain":
                assert site is not None
                over = self._drain(site)
            case "outage":
                over = self._hold(self._federation.redis, fault.duration_s)
            case "freeze":
                over = self._freeze(whom, site, fault.duration_s)
            case "stall" | "cut" | "delay":
                over = self._disturb(what, whom, site, fault.duration_s)
            case "reply":
                assert site is not None
                over = self._spoil(whom, site)
            case "disk":
                over = self._fill_disk(fault.duration_s)
            case _:
                raise ValueError(f"no such fault: {fault.kind}")
        if over is None:
            return False
        self._active.append(_Active(fault.kind, fault.target, time.time(), over))
        return True

    def _targets(self, role: str, site: Site | None) -> list[psutil.Process]:
        federation = self._federation
        if role == "serverapp":
            return federation.server.processes()
        if role == "superlink":  # under `pilot superlink`, which starts it again
            return [one for one in marked(federation.superlink_mark) if has_role(one, role)]
        service = {"redis": federation.redis}.get(role)
        if service is not None:
            with contextlib.suppress(psutil.Error):
                return [psutil.Process(service.pid)] if service.alive else []
            return []
        assert site is not None
        return site.processes(role)

    def _kill(self, role: str, site: Site | None) -> Callable[[], bool] | None:
        targets = self._targets(role, site)
        if not targets:
            return None
        if role in ("supernode", "node"):
            assert site is not None
            self._orphans.append((time.time() + _ORPHANS_S, site.name, site.processes("worker")))
        struck = time.time()
        _signal(targets, signal.SIGKILL)
        return self._back(role, site, targets, struck)

    def _drain(self, site: Site) -> Callable[[], bool] | None:
        """A preemption: the site leaves in good order, and its supervisor restarts it."""
        targets = self._targets("node", site)
        if not targets:
            return None
        struck = time.time()
        _signal(targets, signal.SIGTERM)
        return self._back("node", site, targets, struck)

    def _back(
        self, role: str, site: Site | None, gone: list[psutil.Process], struck: float
    ) -> Callable[[], bool]:
        """A function that says whether the killed processes (`gone`) have been replaced."""
        federation = self._federation
        if role in ("worker", "clientapp"):
            return lambda: True  # the site is ready for the next message
        if role == "serverapp":
            return lambda: federation.server.started_at > struck
        service = {"redis": federation.redis}.get(role)
        if role == "superlink":  # the run is gone with it, and is submitted again
            return lambda: federation.server.started_at > struck
        if service is not None:
            return lambda: service.started_at > struck
        assert site is not None
        if role == "node":
            return lambda: site.node.started_at > struck
        pids = {process.pid for process in gone}  # `pilot node` restarts the SuperNode
        return lambda: any(process.pid not in pids for process in site.processes(role))

    @staticmethod
    def _hold(service: Service, duration_s: float) -> Callable[[], bool] | None:
        if not service.alive:
            return None
        service.held = True
        _signal([psutil.Process(service.pid)], signal.SIGKILL)
        until = time.monotonic() + duration_s

        def over() -> bool:
            if time.monotonic() >= until:
                service.held = False
            return not service.held and service.alive

        return over

    def _freeze(self, role: str, site: Site | None, duration_s: float) -> Callable[[], bool] | None:
        targets = self._targets(role, site)
        if not targets:
            return None
        _signal(targets, signal.SIGSTOP)
        return _after(duration_s, lambda: _signal(targets, signal.SIGCONT))

    def _disturb(
        self, what: str, whom: str, site: Site | None, duration_s: float
    ) -> Callable[[], bool]:
        line: Line
        if site is None:
            line = self._federation.server_redis_line
        else:
            line = site.superlink_line if whom == "superlink" else site.redis_line
        {"stall": line.stall, "cut": line.cut, "delay": lambda: line.delay(DELAY_S)}[what]()
        return _after(duration_s, line.up)

    @staticmethod
    def _spoil(word: str, site: Site) -> Callable[[], bool] | None:
        """Make the site's next update a bad one; over once that has been sent."""
        if site.reply_file.exists():
            return None
        site.reply_file.write_text(word, encoding="utf-8")
        return lambda: not site.reply_file.exists()

    def _fill_disk(self, duration_s: float) -> Callable[[], bool] | None:
        """No file of the server's process may grow beyond 4 KiB: its writes fail as on a full disk.

        A process may set this limit for others of the same user, so it takes neither root nor a file system;
        the error is EFBIG instead of ENOSPC. If the server gives up, its successor has no such limit.
        """
        targets = self._targets("serverapp", None)
        if not targets:
            return None
        struck = time.time()
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        for target in targets:
            _limit_files(target, (4096, resource.RLIM_INFINITY))
        until = time.monotonic() + duration_s

        def over() -> bool:
            if time.monotonic() < until:
                return False
            for target in targets:
                _limit_files(target, unlimited)
            return any(map(alive, targets)) or self._federation.server.started_at > struck

        return over


def _after(duration_s: float, undo: Callable[[], None]) -> Callable[[], bool]:
    until = time.monotonic() + duration_s

    def over() -> bool:
        if time.monotonic() < until:
            return False
        undo()
        return True

    return over


def _limit_files(process: psutil.Process, limits: tuple[int, int]) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        process.rlimit(psutil.RLIMIT_FSIZE, limits)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
