"""Runs as they go: what a page needs, from files that grow, with bounded work however many people look."""

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pilot.page.markup import Markup, element, join
from pilot.page.page import Content, content
from pilot.page.story import NoStory, StoryReader
from pilot.run.events import EVENTS_FILE, NewEvents
from pilot.run.facts import RunFacts, is_led, read_facts

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # what can name a run (pilot.config)
_MOST_BYTES = 4 << 20  # of events, read for one view
_TORN_BYTES = 1 << 16  # of a line that is being written: they are not waited for
_LEAST_WAIT_S = 1.0  # between two looks at a run
_SHARE = 0.05  # of a core, that making views may take
_LISTED = 30  # runs
_HELD = 8  # runs that are followed


@dataclass(frozen=True)
class View:
    """A page at one moment. `behind`: the share of the events that is yet to be read, 0..1; then no content."""

    version: str
    shown: Content | None = None
    behind: float = 0.0


class LiveRun:
    """Follows one run. A view is made at most once a second, seldom enough to take 5 % of a core."""

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock = directory, clock
        self._lock = threading.Lock()
        self._view: View | None = None
        self._not_before_s = float("-inf")
        self._generation = 0
        self._begin()

    def _begin(self) -> None:
        self._generation += 1
        self._failed: NoStory | None = None
        self._new = NewEvents(self._directory / EVENTS_FILE, most_bytes=_MOST_BYTES)
        self._reader = StoryReader(self._directory)
        self._facts, self._facts_of = RunFacts(), -1

    def view(self, above: Markup) -> View:
        """The run now, or as it was a moment ago; `above`: markup at the page's top. Raises NoStory."""
        with self._lock:
            began_s = self._clock()
            if self._view is not None and began_s < self._not_before_s:
                return self._view
            self._read()
            behind = 1 - self._new.offset / self._new.size if self._new.size else 0.0
            if self._new.size - self._new.offset > _TORN_BYTES:
                return View("", behind=behind)
            alive = is_led(self._directory)
            mark = hash((above, alive)) & 0xFFFFFFFF
            version = f"{self._generation}-{self._new.offset}-{mark:x}"
            if self._view is None or self._view.version != version:
                story = self._reader.story(self._facts_now(alive))
                self._view = View(version, content([story], above))
            spent_s = self._clock() - began_s
            self._not_before_s = self._clock() + max(_LEAST_WAIT_S, spent_s / _SHARE)
            return self._view

    def _read(self) -> None:
        files = self._new.files
        try:
            found = self._new.read()
        except OSError as error:
            raise NoStory(
                f"cannot read {self._directory / EVENTS_FILE}: {error.strerror}"
            ) from error
        if files and self._new.files != files:  # another file: another run of that name
            self._begin()
            found = self._new.read()
        try:
            for event in found if self._failed is None else ():
                self._reader.read(event)
        except NoStory as error:
            self._failed = error
        if self._failed is not None:
            raise self._failed

    def _facts_now(self, alive: bool) -> RunFacts:
        """Snapshots are looked at until one says the configuration, and again when a server has begun."""
        if not self._facts.config or self._facts_of != self._reader.starts:
            self._facts, self._facts_of = read_facts(self._directory), self._reader.starts
        facts = self._facts
        return RunFacts(
            facts.config,
            facts.versions,
            facts.fingerprints,
            facts.total_tokens,
            facts.parameters,
            alive,
        )


class Runs:
    """The runs of a directory, newest first, and those that were named by a path."""

    def __init__(self, directory: Path, named: Mapping[str, Path] | None = None) -> None:
        self._directory, self._named = directory, dict(named or {})
        self._live: OrderedDict[str, LiveRun] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of the newest runs, the one with the latest event first."""
        found = []
        paths = [] if not self._directory.is_dir() else list(self._directory.iterdir())
        for path in paths:
            try:
                if _NAME.fullmatch(path.name) and path.name not in self._named:
                    found.append(((path / EVENTS_FILE).stat().st_mtime, path.name))
            except OSError:
                continue  # not a run, or none any more
        newest = [name for _, name in sorted(found, reverse=True)]
        return [*self._named, *newest[:_LISTED]]

    def find(self, name: str) -> LiveRun | None:
        """The run `name`; None if there is none, or its name cannot be one."""
        directory = self._named.get(name)
        if directory is None:
            if not _NAME.fullmatch(name):
                return None
            directory = self._directory / name
        if not (directory / EVENTS_FILE).is_file():
            return None
        with self._lock:
            live = self._live.pop(name, None) or LiveRun(directory)
            self._live[name] = live
            while len(self._live) > _HELD:
                self._live.popitem(last=False)
            return live

    def links(self, shown: str) -> Markup:
        """The list of runs, for the top of the page of the run `shown`."""
        names = self.names()
        if len(names) < 2:
            return Markup("")
        items = (
            element(
                "li",
                element(
                    "a",
                    name,
                    href=f"/run/{quote(name)}",
                    aria_current="page" if name == shown else None,
                ),
            )
            for name in sorted(names, reverse=True)
        )
        return element("nav", element("ul", join(items)), aria_label="Runs", class_="runs")
