"""One log of all processes on the console, and a file for each.

A file is rotated at 32 MB and two older ones are kept. Secrets that a process prints are cut out, on the
console and in the files. A console that takes nothing (a terminal that was stopped, a pipe to `less`) holds up
nobody: lines are left out there, with their number.
"""

import contextlib
import json
import logging
import os
import queue
import re
import threading
from collections.abc import Iterable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

from pilot.processes.output import plain

_FILE_BYTES, _OLDER_FILES = 32 << 20, 2
_WAITING_LINES = 10_000
_CLOSE_S = 2.0  # for a console to take what waits
_NAME_WIDTH = 12
_COLOURS = (36, 33, 32, 35, 34)  # of names on a terminal (ECMA-48)
# A SuperLink's line for each request that went well: several per second and node; they are in its file.
_ROUTINE = re.compile(r'"(?:GET|POST) /\S+ HTTP/[\d.]+" 200')


class Journal:
    """Takes lines from several threads. `as_json`: the console gets a JSON object a line."""

    def __init__(
        self,
        directory: Path,
        console: IO[str],
        *,
        as_json: bool = False,
        secrets: Iterable[str] = (),
    ) -> None:
        self._directory, self._console, self._as_json = directory, console, as_json
        self._secrets = {secret for secret in secrets if secret}
        self._files: dict[str, RotatingFileHandler] = {}
        self._lock = threading.Lock()
        self._waiting: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._left_out = 0
        self._writer = threading.Thread(target=self._write, name="console", daemon=True)
        self._writer.start()
        self._colours = not as_json and console.isatty() and "NO_COLOR" not in os.environ

    def hide(self, secret: str) -> None:
        """Let no later line show `secret`."""
        with self._lock:
            self._secrets.add(secret)

    def say(self, text: str) -> None:
        """A line of this program's own."""
        self.line("pilot", text)

    def line(self, name: str, text: str) -> None:
        """A line of the process that is called `name`."""
        # one line, whatever a stranger has sent that is logged
        text = "".join(c if c.isprintable() else " " for c in plain(text)).rstrip()
        if not text:
            return
        with self._lock:
            for secret in self._secrets:
                text = text.replace(secret, "***")
            self._file(name).emit(logging.makeLogRecord({"msg": text}))
            if not _ROUTINE.search(text):
                self._show(name, text)

    def last(self, name: str) -> str:
        """The last line that `name` has written, "" if none."""
        path = self._directory / f"{name}.log"
        with self._lock:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return lines[-1].partition(" | ")[2] if lines else ""

    def close(self) -> None:
        """Write what waits, and close the files. Nothing may be said afterwards."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=_CLOSE_S)
        self._writer.join(timeout=_CLOSE_S)
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
                print(line, file=self._console, flush=True)

    def _show(self, name: str, text: str) -> None:
        if self._as_json:
            shown = json.dumps({"from": name, "line": text}, ensure_ascii=False)
        else:
            label = f"{name:<{_NAME_WIDTH}}"
            if self._colours:
                colour = _COLOURS[sum(name.encode()) % len(_COLOURS)]
                label = f"\x1b[{colour}m{label}\x1b[0m"
            shown = f"{label} | {text}"
        try:
            if self._left_out:
                self._waiting.put_nowait(f"… {self._left_out} lines are in {self._directory} only")
                self._left_out = 0
            self._waiting.put_nowait(shown)
        except queue.Full:
            self._left_out += 1

    def _file(self, name: str) -> RotatingFileHandler:
        if name not in self._files:
            path = self._directory / f"{name}.log"
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            file = RotatingFileHandler(
                path,
                maxBytes=_FILE_BYTES,
                backupCount=_OLDER_FILES,
                encoding="utf-8",
                errors="replace",
            )
            file.setFormatter(logging.Formatter("%(asctime)s | %(message)s"))
            self._files[name] = file
        return self._files[name]
