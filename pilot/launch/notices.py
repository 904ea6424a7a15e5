"""`pilot node --watch`: the notices that this machine will be taken away, and what they leave time for.

A notice decides two things. *When* the node begins to leave: at once if the end is near, else when leaving
takes what is left (a job's walltime is known from its start). *What* it waits for: a reply that took longer
last time than there is time now is given up, so that the server hears at once that it will not come.
"""

import contextlib
import http.client
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from pilot.errors import PilotError
from pilot.launch.metadata import SERVICES, URL_VARIABLE, Notice, Source, iso_time
from pilot.site.notice import notice_path

SLURM = "slurm"
# Notices that come with less time than this are acted on at once: of AWS 120 s, of GCP and Azure 30 s.
AT_ONCE_S = 150.0
GOODBYE_S = 5.0  # of a machine's last seconds: for the SuperNode to take its leave, so that nobody waits for it
_RETRY_S = 5.0  # between questions to a service that does not answer
_FIRST_TRIES, _FIRST_PAUSE_S = 3, 1.0


def begins(notice: Notice, needed_s: float, now_s: float) -> bool:
    """Whether to leave now, if leaving may take `needed_s`."""
    if notice.warning_s is not None:
        return needed_s > notice.warning_s
    if notice.at_once or notice.ends_at_s is None:
        return True
    return notice.ends_at_s - now_s <= max(AT_ONCE_S, needed_s)


class Watch:
    """What `--watch` names, each asked as often as it wants to be; a context while they are."""

    def __init__(self, words: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
        """Raises PilotError for a word that names nothing, or a source that this machine does not have."""
        self._polls: list[_Poll] = []
        self._sources: list[Source] = []
        self._slurm: Slurm | None = None
        self._say = say
        for word in dict.fromkeys(words):
            if word in SERVICES:
                self._polls.append(_Poll(word, SERVICES[word](), say))
            elif word == SLURM:
                self._slurm = Slurm(os.environ, say)
                self._sources.append(self._slurm)
            elif "/" in word:
                self._sources.append(File(notice_path(word)))
            else:
                known = ", ".join([*SERVICES, SLURM])
                raise PilotError(
                    f'--watch "{word}" is none of {known}, and no path: write a file as ./{word}'
                )
        self._advised: set[str] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Raises PilotError if a service does not answer here."""
        for poll in self._polls:
            poll.first()
        before = None
        if (slurm := self._slurm) is not None:
            before = signal.signal(signal.SIGUSR1, lambda *_: slurm.signalled())
        for poll in self._polls:
            poll.start()
        try:
            yield
        finally:
            for poll in self._polls:
                poll.stopped.set()
            if before is not None:
                signal.signal(signal.SIGUSR1, before)

    def reason(self, needed_s: float) -> str:
        """Why this node is to leave now, if leaving may take `needed_s`; "" if it is not."""
        for notice in self._notices():
            if begins(notice, needed_s, time.monotonic()):
                return notice.reason
            if notice.warning_s is not None and notice.reason not in self._advised:
                self._advised.add(notice.reason)
                self._say(
                    f"{notice.reason}: staying, since the {notice.warning_s:g} s of a notice would do"
                )
        return ""

    def ends_at_s(self) -> float:
        """When this machine ends, on `time.monotonic`, as far as the latest notices tell; else infinity."""
        ends = [notice.ends_at_s for notice in self._notices() if notice.ends_at_s is not None]
        return min(ends, default=math.inf)

    def _notices(self) -> list[Notice]:
        found = [poll.notice for poll in self._polls] + [source.look() for source in self._sources]
        return [notice for notice in found if notice is not None]


class File:
    """A file whose appearance is the notice; it may hold the time of the end (Unix seconds, or ISO 8601)."""

    pause_s = 0.0

    def __init__(self, path: Path) -> None:
        self._path = path

    def look(self) -> Notice | None:
        try:
            with self._path.open("rb") as file:
                text = file.read(100).decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            if not os.path.lexists(self._path):
                return None
            text = ""  # it is there, whatever it says
        real_s = _number(text)
        if real_s is None and (when := iso_time(text)):
            real_s = when.timestamp()
        ends_at_s = None if real_s is None else _monotonic(real_s)
        return Notice(reason=f"notice {self._path}", ends_at_s=ends_at_s)


class Slurm:
    """The end of a job's time (SLURM_JOB_END_TIME), and SIGUSR1, as `sbatch --signal=B:USR1@SECONDS` sends."""

    pause_s = 0.0

    def __init__(self, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        if "SLURM_JOB_ID" not in environment:
            raise PilotError("--watch slurm: there is no SLURM_JOB_ID, so this is no Slurm job")
        end_s = _number(environment.get("SLURM_JOB_END_TIME", ""))
        if end_s is None:
            say("SLURM_JOB_END_TIME is not set: only SIGUSR1 will say that the job's time ends")
        self._ends_at_s = None if end_s is None else _monotonic(end_s)
        self._signalled = False

    def signalled(self) -> None:
        self._signalled = True

    def look(self) -> Notice | None:
        if self._signalled:
            return Notice(reason="SIGUSR1 from Slurm", ends_at_s=self._ends_at_s, at_once=True)
        if self._ends_at_s is None:
            return None
        return Notice(reason="the Slurm job's time ends", ends_at_s=self._ends_at_s)


class _Poll(threading.Thread):
    """Asks a service again and again; `notice` is its latest word, also while it does not answer."""

    def __init__(self, word: str, source: Source, say: Callable[[str], None]) -> None:
        super().__init__(name=f"watch {word}", daemon=True)
        self.notice: Notice | None = None
        self.stopped = threading.Event()
        self._word, self._source, self._say = word, source, say

    def first(self) -> None:
        """Ask for the first time. Raises PilotError if nobody answers."""
        for left in reversed(range(_FIRST_TRIES)):
            try:
                self.notice = self._source.look()
                return
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    raise PilotError(
                        f"--watch {self._word}: no metadata service answers here ({_said(error)}): is this"
                        f" another provider's machine, or a container that may not reach it? {URL_VARIABLE}"
                        " is its address"
                    ) from error
                time.sleep(_FIRST_PAUSE_S)

    def run(self) -> None:
        pause_s, failing = self._source.pause_s, False
        while not self.stopped.wait(pause_s):
            try:
                self.notice = self._source.look()
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not failing:
                    self._say(
                        f"the metadata service does not answer ({_said(error)}); asking again"
                    )
                failing, pause_s = True, _RETRY_S
                continue
            if failing:
                self._say("the metadata service answers again")
            failing, pause_s = False, self._source.pause_s


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _monotonic(real_s: float) -> float:
    return time.monotonic() + real_s - time.time()
