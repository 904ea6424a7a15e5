"""Alerts: what somebody should know at once, posted as JSON to a webhook.

They are posted by a thread, with time-outs, and never delay a round. The webhook's address is a secret, as
having it is enough to post: no log line, event or snapshot holds more of it than the host.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from pilot.config import check_alert_url
from pilot.server.sinks import Background

logger = logging.getLogger("pilot")

URL_VARIABLE = "PILOT_ALERT_URL"
MOST_WAITING = 100
_AGAIN_S = 600.0  # the same alert of the same client
_TIMEOUT_S = (5.0, 10.0)  # to connect, and between two bytes of the answer
_TRIES, _PAUSE_S = 2, 3.0
_FINISH_S = 10.0
_MOST_SAID = 10_000  # alerts that are remembered
_SNAPSHOTS_TO_COME = 2  # for which the disk must have room
_LEAST_FREE = 0.02  # of the disk


def alert_url(configured: str) -> str:
    """The webhook of the environment, else the configured one; "" for none. Raises ConfigError."""
    url = os.environ.get(URL_VARIABLE, "")
    if url:
        check_alert_url(url, URL_VARIABLE)
    return url or configured


Post = Callable[[str, Mapping[str, Any]], None]  # raises requests.RequestException


def post(url: str, body: Mapping[str, Any]) -> None:
    """POST `body`; the answer's text is not read, and a redirection not followed."""
    with requests.post(
        url, json=body, timeout=_TIMEOUT_S, allow_redirects=False, stream=True
    ) as answer:
        if not 200 <= answer.status_code < 300:
            raise requests.RequestException(f"it answers {answer.status_code}")


class Alerts:
    """Follows the events of a run, as they are written."""

    def __init__(self, url: str, run_name: str, run_dir: Path, *, send: Post = post) -> None:
        self._url, self._run, self._run_dir, self._send = url, run_name, run_dir, send
        self._host = urlsplit(url).hostname or "?"
        self._said: dict[tuple[str, str], float] = {}
        self._works = True
        self._ending = threading.Event()
        self._finished = False
        self._background = Background("alerts", self._do, most=MOST_WAITING)

    def event(self, record: Mapping[str, Any]) -> None:
        """Post an alert if `record` is worth one."""
        kind, client = record["event"], str(record.get("client") or "")
        number = record.get("round_number", record.get("round"))
        if kind == "client_silent":
            self._alert("client-silent", record, f"Client {client} is silent", client=client)
        elif kind == "merge_taken_back":
            text = f"Round {number} took back a merge that made the model much worse"
            self._alert("merge-taken-back", record, text)
        elif kind == "round_committed":
            if not record.get("clients"):
                self._alert("nothing-merged", record, f"Round {number} merged nothing")
            elif record.get("train_loss") is None:
                self._alert(
                    "not-finite", record, f"The training loss of round {number} is not finite"
                )
            self._background.put({"look": "disk", "time": record["time"]})
        elif kind == "reply_refused" and "not finite" in str(record.get("reason")):
            text = f"A reply of client {client} is not finite: {record['reason']}"
            self._alert("not-finite", record, text, client=client)
        elif kind == "reply" and record.get("tokens") and record.get("loss_nats") is None:
            self._alert(
                "not-finite", record, f"The loss of client {client} is not finite", client=client
            )
        elif kind == "run_finished":
            self._finished = True
            self._alert(
                "run-finished", record, f"The run is finished, after {record['rounds']} rounds"
            )

    def close(self, *, exit_code: int, now: float) -> None:
        """Post what waits, for some seconds at most; `now` in seconds since 1970."""
        if exit_code and not self._finished:
            record = {"time": now}
            self._alert("run-ended", record, "The server ended before the run was finished")
        self._ending.set()  # no pause any more before it tries again
        if not self._background.close(_FINISH_S):
            logger.warning("alerts: some did not reach %s in time", self._host)

    def _alert(self, kind: str, record: Mapping[str, Any], text: str, *, client: str = "") -> None:
        if body := self._body(kind, record, text, client):
            self._background.put(body)

    def _body(
        self, kind: str, record: Mapping[str, Any], text: str, client: str = ""
    ) -> dict[str, Any] | None:
        """What to post; None where the same was posted not long ago."""
        at = float(record["time"])
        last = self._said.get((kind, client))
        if last is not None and 0 <= at - last < _AGAIN_S:
            return None
        if len(self._said) > _MOST_SAID:
            self._said.clear()
        self._said[kind, client] = at
        number = record.get("round_number", record.get("round"))
        body = {"alert": kind, "run": self._run, "text": f"{self._run}: {text}", "time": at}
        body |= {"round": number} if number is not None else {}
        return body | ({"client": client} if client else {})

    def _do(self, item: Mapping[str, Any]) -> None:
        """In the thread: post one alert, or look at the disk whether there is one to post."""
        if "look" in item:
            text = disk_nearly_full(self._run_dir)
            body = self._body("disk-nearly-full", item, text) if text else None
            if body is None:
                return
            item = body
        for left in reversed(range(_TRIES)):
            try:
                self._send(self._url, item)
            except (requests.RequestException, OSError, ValueError) as error:
                if not left:
                    self._unreachable(error)
                    return
                self._ending.wait(_PAUSE_S)
            else:
                self._works = True
                return

    def _unreachable(self, error: Exception) -> None:
        """Once until it works again. The error's own text may hold the address."""
        if self._works:
            why = str(error) if str(error).startswith("it answers ") else type(error).__name__
            logger.warning("alerts do not reach %s (%s); this is said once", self._host, why)
        self._works = False


def disk_nearly_full(run_dir: Path, usage: Callable[[Path], Any] = shutil.disk_usage) -> str:
    """A sentence if the run's disk has little room left, else ""."""
    try:
        disk = usage(run_dir)
        needed = _SNAPSHOTS_TO_COME * _newest_bytes(run_dir / "snapshots")
    except OSError:
        return ""
    if disk.free >= max(needed, _LEAST_FREE * disk.total):
        return ""
    return (
        f"The disk of the run's directory has {disk.free / 1e9:.1f} of {disk.total / 1e9:.1f} GB left; "
        f"a snapshot takes {needed / _SNAPSHOTS_TO_COME / 1e9:.1f} GB"
    )


def _newest_bytes(snapshots: Path) -> int:
    if not snapshots.is_dir():
        return 0
    found = sorted(path for path in snapshots.iterdir() if path.name.startswith("round-"))
    return sum(path.stat().st_size for path in found[-1].rglob("*")) if found else 0
