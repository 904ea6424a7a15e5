"""What the metadata services of AWS, Google Cloud and Azure say about the end of this machine.

Plain HTTP to a link-local address, by the standard library: it takes no proxy from the environment and follows
no redirect, since neither may see such a request. An answer is at most 64 KB, each request has a time-out.
`PILOT_METADATA_URL` is another address of the service (tests; a service behind a forwarder).

Sources, by the titles of the providers' pages: AWS "Spot Instance interruption notices", "EC2 instance
rebalance recommendations", "Use the Instance Metadata Service"; Google "Spot VMs", "Query VM metadata"; Azure
"Scheduled Events for Linux VMs".
"""

import http.client
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol
from urllib.parse import urlsplit

URL_VARIABLE = "PILOT_METADATA_URL"
LINK_LOCAL = "http://169.254.169.254"
REQUEST_S = 5.0
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Notice:
    """This machine will be taken away.

    `ends_at_s`: when, on `time.monotonic`; None: nobody says. `at_once`: leave now, however long that is.
    `warning_s`: None, or this is a recommendation, and the notice itself comes that long before the end.
    """

    reason: str
    ends_at_s: float | None = None
    at_once: bool = False
    warning_s: float | None = None


class Source(Protocol):
    """Something that can be asked whether this machine ends."""

    pause_s: float  # between two questions

    def look(self) -> Notice | None:
        """The notice as of now. Raises OSError, HTTPException or ValueError if there is no usable answer."""


class NoAnswer(OSError):
    """The service answered something else than what its documentation says."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    text: str

    def seconds_until(self, when: datetime) -> float:
        """By the service's own clock if it tells it (`Date`), so that this machine's may be wrong."""
        now = datetime.now(UTC)
        if date := self.headers.get("date"):
            now = _http_date(date) or now
        return (when - now).total_seconds()


def ask(
    url: str, path: str, headers: Mapping[str, str], *, method: str = "GET", timeout_s: float
) -> Answer:
    """One request to the service at `url`. `timeout_s` is for connecting, and for each piece of the answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request(method, path, headers=dict(headers))
        response = connection.getresponse()
        text = response.read(_MAX_BYTES).decode("utf-8", "replace").strip()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, text)
    finally:
        connection.close()


def service_url(default: str = LINK_LOCAL) -> str:
    return os.environ.get(URL_VARIABLE) or default


@dataclass
class Aws:
    """Spot interruptions (two minutes ahead) and rebalance recommendations, through IMDSv2."""

    url: str = field(default_factory=service_url)
    pause_s: float = 5.0  # as AWS recommends
    clock: Callable[[], float] = time.monotonic
    _token: str = field(default="", init=False, repr=False)
    _renew_at_s: float = field(default=0.0, init=False)

    TOKEN_S, WARNING_S = 21600, 120.0

    def look(self) -> Notice | None:
        if answer := self._get("/latest/meta-data/spot/instance-action"):
            values = _json(answer.text)
            action, when = values.get("action", "interruption"), iso_time(values.get("time"))
            left_s = self.WARNING_S if when is None else answer.seconds_until(when)
            return Notice(reason=f"AWS spot {action}", ends_at_s=self.clock() + left_s)
        if self._get("/latest/meta-data/events/recommendations/rebalance"):
            return Notice(reason="AWS recommends to rebalance", warning_s=self.WARNING_S)
        return None

    def _get(self, path: str) -> Answer | None:
        """None: there is no such item, which is how "no notice" is said."""
        fresh = not self._token or self.clock() >= self._renew_at_s
        if fresh:
            self._renew()
        answer = self._ask(path)
        if answer.status == 401 and not fresh:
            self._renew()
            answer = self._ask(path)
        if answer.status == 404:
            return None
        return _ok(answer, path)

    def _ask(self, path: str) -> Answer:
        headers = {"X-aws-ec2-metadata-token": self._token}
        return ask(self.url, path, headers, timeout_s=REQUEST_S)

    def _renew(self) -> None:
        path, headers = "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": self.TOKEN_S}
        spoken = {name: str(value) for name, value in headers.items()}
        answer = _ok(ask(self.url, path, spoken, method="PUT", timeout_s=REQUEST_S), path)
        self._token, self._renew_at_s = answer.text, self.clock() + self.TOKEN_S / 2


@dataclass
class Gcp:
    """`instance/preempted`, which becomes TRUE about 30 s before the end; each question waits for a change."""

    url: str = field(default_factory=lambda: service_url("http://metadata.google.internal"))
    pause_s: float = 1.0
    wait_s: int = 60
    clock: Callable[[], float] = time.monotonic
    _etag: str = field(default="", init=False)

    WARNING_S = 30.0

    def look(self) -> Notice | None:
        path, timeout_s = "/computeMetadata/v1/instance/preempted", REQUEST_S
        query = ""
        if self._etag:
            query = f"?wait_for_change=true&timeout_sec={self.wait_s}&last_etag={self._etag}"
            timeout_s += self.wait_s
        answer = ask(self.url, path + query, {"Metadata-Flavor": "Google"}, timeout_s=timeout_s)
        _ok(answer, path)
        if answer.headers.get("metadata-flavor") != "Google":
            raise NoAnswer("the answer is not Google's metadata server's")
        self._etag = _word(answer.headers.get("etag", ""))
        if answer.text.upper() != "TRUE":
            return None
        return Notice(reason="GCP preemption", ends_at_s=self.clock() + self.WARNING_S)


@dataclass
class Azure:
    """Scheduled events that end this machine: Preempt (30 s ahead), Terminate, Reboot, Redeploy."""

    url: str = field(default_factory=service_url)
    pause_s: float = 1.0  # as Azure recommends
    clock: Callable[[], float] = time.monotonic
    _name: str = field(default="", init=False)

    ENDS = frozenset({"Preempt", "Terminate", "Reboot", "Redeploy"})  # a Freeze lasts seconds
    WARNING_S = 30.0
    FIRST_S = 130.0  # the first question of a machine switches the service on: up to two minutes

    def look(self) -> Notice | None:
        first = not self._name
        if first:  # events are those of the whole scale set or availability set
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = _ok(self._ask(path, REQUEST_S), path).text
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        answer = _ok(self._ask(path, self.FIRST_S if first else REQUEST_S), path)
        events = _json(answer.text).get("Events")
        if not isinstance(events, list):
            raise NoAnswer("the answer names no events")
        notices = [found for event in events if (found := self._notice(event, answer))]
        return min(notices, key=lambda notice: notice.ends_at_s or 0.0, default=None)

    def _ask(self, path: str, timeout_s: float) -> Answer:
        return ask(self.url, path, {"Metadata": "true"}, timeout_s=timeout_s)

    def _notice(self, event: Any, answer: Answer) -> Notice | None:
        if not isinstance(event, dict) or event.get("EventType") not in self.ENDS:
            return None
        resources = event.get("Resources")
        names = [str(name).lower() for name in resources] if isinstance(resources, list) else []
        if self._name.lower() not in names:
            return None
        started = event.get("EventStatus") == "Started"
        if started and event["EventType"] not in ("Preempt", "Terminate"):
            return None  # of a machine that runs: this is what it came back from
        when = _http_date(str(event.get("NotBefore") or ""))
        left_s = self.WARNING_S if when is None else answer.seconds_until(when)
        return Notice(
            reason=f"Azure {event['EventType'].lower()}",
            ends_at_s=self.clock() + (0.0 if started else left_s),
        )


SERVICES: Mapping[str, Callable[[], Source]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


def _ok(answer: Answer, path: str) -> Answer:
    if answer.status != 200:
        raise NoAnswer(f"{path.partition('?')[0]} answered with status {answer.status}")
    return answer


def _json(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def iso_time(text: Any) -> datetime | None:
    """The time that an ISO 8601 text means (UTC if it names no zone); None if it is none."""
    try:
        when = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _http_date(text: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _word(text: str) -> str:
    """An ETag that can stand in a URL; "" if it can't."""
    return text if text.isalnum() else ""
