"""Signals over HTTP, against stand-ins of the services whose API they speak."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from pilot.errors import ConfigError
from pilot.provision import remote
from pilot.provision.readings import SignalAway

from ...waiting import until
from .kit import Service, service


@pytest.fixture
def stand_in() -> Iterator[Service]:
    with service() as found:
        yield found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetches happen where they are asked for."""

    def run(work: Callable[[], None]) -> None:
        work()

    monkeypatch.setattr(remote.Polled.__init__, "__defaults__", (run,))


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def http(url: str, **values: Any) -> remote.Polled:
    options = remote.HttpOptions(kind="http", url=url, path="now.price", unit="EUR", **values)
    return remote.http_source(options, "[signals.x]")


def test_any_json_is_read_by_path_with_a_header_from_the_environment(
    stand_in: Service, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X_TOKEN", "s3cret")
    stand_in.serve("/p", {"now": {"price": "0.31", "at": "2026-01-01T00:00:00Z"}})
    source = http(f"{stand_in.url}/p?zone=DE", headers={"X-Key": "X_TOKEN"}, time_path="now.at")
    reading = source.read(at("2026-01-01T00:05:00Z"))
    assert (str(reading), reading.time_s) == ("0.31 EUR", at("2026-01-01T00:00:00Z"))
    assert stand_in.asked[0][0] == "/p?zone=DE" and stand_in.asked[0][1]["x-key"] == "s3cret"


def test_a_service_is_asked_once_an_interval_and_its_last_answer_ages(
    stand_in: Service, at_once: None
) -> None:
    stand_in.serve("/p", {"now": {"price": 1}})
    source = http(f"{stand_in.url}/p", every=60.0)
    assert [source.read(now_s).age_s(now_s) for now_s in (0.0, 30.0, 59.0)] == [0, 30, 59]
    assert len(stand_in.asked) == 1
    stand_in.serve("/p", {}, status=503)
    assert source.read(60.0).age_s(60.0) == 60 and len(stand_in.asked) == 2
    assert source.trouble.endswith("answers 503")
    stand_in.serve("/p", {"now": {"price": 2}})
    assert source.read(120.0).value == 2 and source.trouble == ""


def test_a_slow_service_does_not_hold_up_the_loop(stand_in: Service) -> None:
    stand_in.serve("/p", {"now": {"price": 7}})
    source = http(f"{stand_in.url}/p")
    found = []

    def answered() -> bool:
        with contextlib.suppress(SignalAway):
            found.append(source.read(0.0).value)
        return bool(found)

    until(answered)
    assert found == [7.0] and len(stand_in.asked) == 1


@pytest.mark.parametrize(
    ("body", "status", "headers", "why"),
    [
        ("nonsense", 200, {}, "does not answer with JSON"),
        ({"then": 1}, 200, {}, "the answer has nothing at now.price"),
        ({"now": {"price": None}}, 200, {}, "'None' is no number"),
        ({}, 401, {}, "refuses the token"),
        ({}, 302, {"Location": "http://127.0.0.1:9/"}, "answers 302"),
        ("[" * 100_000, 200, {}, "does not answer with JSON"),
        ("1" * (2 << 20), 200, {}, "sends too much"),
    ],
)
def test_what_a_service_does_wrong_is_a_clause_without_secrets(
    body: Any,
    status: int,
    headers: dict[str, str],
    why: str,
    stand_in: Service,
    at_once: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("X_TOKEN", "s3cret")
    stand_in.serve("/p", body, status, **headers)
    source = http(f"{stand_in.url}/p?key=s3cret", headers={"X-Key": "X_TOKEN"})
    with pytest.raises(SignalAway, match=why) as raised:
        source.read(0.0)
    assert "s3cret" not in str(raised.value)


def test_a_service_that_is_not_there_and_a_url_that_is_none(at_once: None) -> None:
    with pytest.raises(SignalAway, match=r"127.0.0.1:1 cannot be reached \(ConnectionError\)"):
        http("http://127.0.0.1:1/p").read(0.0)
    with pytest.raises(ConfigError, match=r"\[signals.x\]: url must begin with http"):
        http("ftp://x/p")
    with pytest.raises(ConfigError, match="url holds a password"):
        http("http://me:word@x/p")
    with pytest.raises(ConfigError, match="set X_TOKEN in the environment"):
        http("http://x/p", headers={"X-Key": "X_TOKEN"})


def test_electricity_maps(
    stand_in: Service, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELECTRICITY_MAPS_TOKEN", "t0ken")
    answer = {"zone": "DE", "carbonIntensity": 302, "datetime": "2026-01-01T12:00:00.000Z"}
    stand_in.serve("/v3/carbon-intensity/latest", answer | {"isEstimated": True})
    options = remote.ElectricityMapsOptions(kind="electricity-maps", url=stand_in.url, zone="DE")
    reading = remote.electricity_maps_source(options, "here").read(at("2026-01-01T13:10:00Z"))
    assert (str(reading), reading.time_s) == ("302 g/kWh", at("2026-01-01T12:00:00Z"))
    path, headers = stand_in.asked[0]
    assert path == "/v3/carbon-intensity/latest?zone=DE" and headers["auth-token"] == "t0ken"


def test_watttime_logs_in_and_turns_pounds_per_mwh_into_grams_per_kwh(
    stand_in: Service, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTTIME_USER", "me")
    monkeypatch.setenv("WATTTIME_PASSWORD", "word")
    now_s = at("2026-01-01T12:07:00Z")
    points = [
        {"point_time": "2026-01-01T12:00:00+00:00", "value": 900.0},
        {"point_time": "2026-01-01T12:05:00+00:00", "value": 1000.0},
        {"point_time": "2026-01-01T12:10:00+00:00", "value": 0.0},
    ]
    stand_in.serve("/login", {"token": "one"})
    stand_in.serve("/v3/forecast", {"data": points, "meta": {"units": "lbs_co2_per_mwh"}})
    options = remote.WattTimeOptions(kind="watttime", url=stand_in.url, region="CAISO_NORTH")
    source = remote.watttime_source(options, "here")
    reading = source.read(now_s)
    assert reading.value == pytest.approx(453.59237) and reading.unit == "g/kWh"
    assert reading.time_s == at("2026-01-01T12:05:00Z")
    assert stand_in.asked[0][1]["authorization"] == "Basic bWU6d29yZA=="
    assert stand_in.asked[1][1]["authorization"] == "Bearer one"
    assert "region=CAISO_NORTH&signal_type=co2_moer" in stand_in.asked[1][0]
    # the token is kept; one that is refused is fetched again, once
    source.read(now_s + 300)
    assert [path.partition("?")[0] for path, _ in stand_in.asked[2:]] == ["/v3/forecast"]
    stand_in.serve("/v3/forecast", {}, status=401)
    assert source.read(now_s + 600).age_s(now_s + 600) == 420.0
    assert [path.partition("?")[0] for path, _ in stand_in.asked[3:]] == [
        *("/v3/forecast", "/login", "/v3/forecast")
    ]
    assert "refuses the token" in source.trouble


def test_vessim_as_the_prototype_asks_it(stand_in: Service, at_once: None) -> None:
    state = {"microgrid": "client_0", "time": "2026-01-11T17:00:00+00:00", "p_delta": -200.0}
    stand_in.serve("/microgrids/client_0", state | {"grid_signals": {"mci": 41.5}})
    options = remote.VessimOptions(kind="vessim", url=stand_in.url, microgrid="client_0")
    reading = remote.vessim_source(options, "here").read(5.0)
    # the time of the state is the simulation's
    assert (str(reading), reading.time_s) == ("41.5 g/kWh", 5.0)
