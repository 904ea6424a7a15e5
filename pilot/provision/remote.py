"""Signals that another machine serves as JSON over HTTP: any such service, Electricity Maps, WattTime,
Vessim.

They are asked in a thread of their own, no more often than `every`, since a service may take long or be
away; the last reading holds until it is too old. Tokens come from the environment only, are sent to the
configured address only (no redirects), and never shown.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from pilot.errors import ConfigError
from pilot.provision.readings import (
    LB_PER_MWH,
    Reading,
    SignalAway,
    at_path,
    number,
    wall_s,
)
from pilot.provision.signals import SignalOptions
from pilot.provision.tables import TABLE, key

NO_ANSWER_YET = "no answer so far"
_TIMEOUT_S = 10.0
_MOST_BYTES = 1 << 20
_LOGIN_LASTS_S = 25 * 60.0  # WattTime's tokens end after 30 minutes
_UNAUTHORIZED = 401


@dataclass(frozen=True, kw_only=True)
class RemoteOptions(SignalOptions):
    url: str = key("")
    every: float = key(60.0, low=1)


@dataclass(frozen=True, kw_only=True)
class HttpOptions(RemoteOptions):
    """Any JSON: `path` leads to the value, `time-path` to its time; `headers`: name → environment
    variable."""

    url: str
    path: str
    time_path: str = key("")
    headers: dict[str, str] = TABLE


@dataclass(frozen=True, kw_only=True)
class VessimOptions(RemoteOptions):
    """A microgrid of a running Vessim simulation (`vessim.Api`), and one of its grid signals."""

    url: str = key("http://127.0.0.1:8700")
    microgrid: str
    signal: str = key("mci")
    unit: str = key("g/kWh")
    every: float = key(5.0, low=1)


@dataclass(frozen=True, kw_only=True)
class ElectricityMapsOptions(RemoteOptions):
    """Carbon intensity of the electricity used in a zone."""

    url: str = key("https://api.electricitymaps.com")
    zone: str
    token: str = key("ELECTRICITY_MAPS_TOKEN")
    unit: str = key("g/kWh", choices=("g/kWh",))
    max_age: float = key(3 * 3600.0, above=0)  # its values are hourly, and come late
    every: float = key(300.0, low=1)


@dataclass(frozen=True, kw_only=True)
class WattTimeOptions(RemoteOptions):
    """Marginal carbon intensity of a region; pounds per MWh become g/kWh."""

    url: str = key("https://api.watttime.org")
    region: str
    signal: str = key("co2_moer")
    user: str = key("WATTTIME_USER")
    password: str = key("WATTTIME_PASSWORD")
    unit: str = key("g/kWh", choices=("g/kWh",))
    every: float = key(300.0, low=1)


Fetch = Callable[[float], Reading]


def in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="signal", daemon=True).start()


class Polled:
    """A source whose `fetch` may block: asked every so often, beside the loop that reads it."""

    def __init__(
        self, fetch: Fetch, every_s: float, spawn: Callable[[Callable[[], None]], None] = in_thread
    ) -> None:
        self._fetch, self._every_s, self._spawn = fetch, every_s, spawn
        self._lock = threading.Lock()
        self._busy, self._next_s = False, float("-inf")
        self._last: Reading | None = None
        self._why = NO_ANSWER_YET

    def read(self, now_s: float) -> Reading:
        """The last reading, however old (its age says so). Raises SignalAway before there is one."""
        with self._lock:
            due = not self._busy and now_s >= self._next_s
            if due:
                self._busy, self._next_s = True, now_s + self._every_s
        if due:
            self._spawn(lambda: self._ask(now_s))
        with self._lock:
            if self._last is None:
                raise SignalAway(self._why)
            return self._last

    @property
    def trouble(self) -> str:
        """Why the last attempt failed; "" if it did not."""
        with self._lock:
            return self._why

    def _ask(self, now_s: float) -> None:
        found, why = None, ""
        try:
            found = self._fetch(now_s)
        except SignalAway as error:
            why = str(error)
        with self._lock:
            self._busy, self._why = False, why
            self._last = found or self._last

    def holds_until_s(self, now_s: float, low: float, high: float) -> float | None:
        return None


def http_source(options: HttpOptions, where: str) -> Polled:
    check_url(options.url, where)
    names = {header: secret(variable, where) for header, variable in options.headers.items()}

    def fetch(now_s: float) -> Reading:
        document = get_json(options.url, headers=names)
        time_s = wall_s(at_path(document, options.time_path)) if options.time_path else now_s
        value = number(at_path(document, options.path))
        return Reading(value * options.scale, options.unit, time_s)

    return Polled(fetch, options.every)


def vessim_source(options: VessimOptions, where: str) -> Polled:
    """The state's own time is the simulation's, so a reading is as old as the answer."""
    check_url(options.url, where)

    def fetch(now_s: float) -> Reading:
        url = f"{options.url.rstrip('/')}/microgrids/{options.microgrid}"
        value = number(at_path(get_json(url), f"grid_signals.{options.signal}"))
        return Reading(value * options.scale, options.unit, now_s)

    return Polled(fetch, options.every)


def electricity_maps_source(options: ElectricityMapsOptions, where: str) -> Polled:
    check_url(options.url, where)
    headers = {"auth-token": secret(options.token, where)}

    def fetch(_now_s: float) -> Reading:
        url = f"{options.url.rstrip('/')}/v3/carbon-intensity/latest"
        document = get_json(url, headers=headers, params={"zone": options.zone})
        value, time_s = (
            number(at_path(document, "carbonIntensity")),
            wall_s(at_path(document, "datetime")),
        )
        return Reading(value * options.scale, options.unit, time_s)

    return Polled(fetch, options.every)


class WattTime:
    """Logs in when it has no token, or the one that it has is old or refused."""

    def __init__(self, options: WattTimeOptions, where: str) -> None:
        check_url(options.url, where)
        self._options, self._url = options, options.url.rstrip("/")
        self._login = (secret(options.user, where), secret(options.password, where))
        self._token, self._token_s = "", float("-inf")

    def fetch(self, now_s: float) -> Reading:
        document = self._ask(now_s)
        points = at_path(document, "data")
        if not isinstance(points, list) or not points:
            raise SignalAway("WattTime's answer has no data")
        # a forecast begins with the present; what already holds is the latest of what is not ahead
        times = [wall_s(at_path(point, "point_time")) for point in points]
        place = max((i for i, at_s in enumerate(times) if at_s <= now_s), default=0)
        value = number(at_path(points[place], "value"))
        units = str(at_path(document, "meta.units")).lower()
        if units.startswith("lb"):
            value *= LB_PER_MWH
        time_s = min(times[place], now_s)
        return Reading(value * self._options.scale, self._options.unit, time_s)

    def _ask(self, now_s: float) -> Any:
        params = {
            "region": self._options.region,
            "signal_type": self._options.signal,
            "horizon_hours": "1",
        }
        for attempt in (1, 2):
            if not self._token or now_s - self._token_s > _LOGIN_LASTS_S:
                answer = get_json(f"{self._url}/login", auth=self._login)
                self._token, self._token_s = str(at_path(answer, "token")), now_s
            try:
                headers = {"Authorization": f"Bearer {self._token}"}
                return get_json(f"{self._url}/v3/forecast", headers=headers, params=params)
            except Refused:
                self._token = ""
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")


def watttime_source(options: WattTimeOptions, where: str) -> Polled:
    return Polled(WattTime(options, where).fetch, options.every)


class Refused(SignalAway):
    """The service wants another token."""


def get_json(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
    auth: tuple[str, str] | None = None,
) -> Any:
    """What `url` answers. Raises SignalAway; its message shows the host, and nothing that could be a
    secret."""
    host = urlsplit(url).netloc.rpartition("@")[2]
    until_s = time.monotonic() + 2 * _TIMEOUT_S
    try:
        with requests.get(
            url,
            headers=dict(headers or {}),
            params=params,
            auth=auth,
            timeout=_TIMEOUT_S,
            allow_redirects=False,
            stream=True,
        ) as answer:
            if answer.status_code == _UNAUTHORIZED:
                raise Refused(f"{host} refuses the token (401)")
            if answer.status_code != requests.codes.ok:
                raise SignalAway(f"{host} answers {answer.status_code}")
            body = b""
            for chunk in answer.iter_content(65536):
                body += chunk
                if len(body) > _MOST_BYTES or time.monotonic() > until_s:
                    raise SignalAway(f"{host} sends too much, or too slowly")
        return json.loads(body)
    except requests.RequestException as error:
        raise SignalAway(f"{host} cannot be reached ({type(error).__name__})") from None
    except (ValueError, RecursionError):
        raise SignalAway(f"{host} does not answer with JSON") from None


def check_url(url: str, where: str) -> None:
    """Raises ConfigError, without showing credentials."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{where}: url must begin with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{where}: url holds a password: put it in the environment, and name that in headers"
        )


def secret(variable: str, where: str) -> str:
    """The content of an environment variable. Raises ConfigError if it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"{where}: set {variable} in the environment")
    return value
