"""Signals of this machine: calendars in their time zone, traces compressed and repeated, files, GPUs' power."""

import json
import math
import os
import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from pilot.errors import ConfigError
from pilot.provision.readings import SignalAway, at_path
from pilot.provision.signals import (
    CalendarOptions,
    FileOptions,
    Nvml,
    NvmlOptions,
    Trace,
    TraceOptions,
    WatchedFile,
    calendar_source,
)


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def calendar(*windows: str, zone: str = "UTC") -> Any:
    return calendar_source(CalendarOptions(kind="calendar", windows=windows, timezone=zone), "here")


@pytest.mark.parametrize(
    ("window", "zone", "time", "is_open"),
    [
        ("22:00-06:00", "UTC", "2026-11-27T21:59:59Z", False),
        ("22:00-06:00", "UTC", "2026-11-27T22:00:00Z", True),
        ("22:00-06:00", "UTC", "2026-11-28T05:59:59Z", True),
        ("22:00-06:00", "UTC", "2026-11-28T06:00:00Z", False),
        # a night belongs to the day on which it begins: Friday's ends on Saturday, Sunday's is none
        ("Mon-Fri 22:00-06:00", "UTC", "2026-11-28T05:00:00Z", True),
        ("Mon-Fri 22:00-06:00", "UTC", "2026-11-30T05:00:00Z", False),
        ("Sat,Sun 00:00-24:00", "UTC", "2026-11-29T23:59:59Z", True),
        ("Sat,Sun 00:00-24:00", "UTC", "2026-11-30T00:00:00Z", False),
        ("Fri-Mon 12:00-13:00", "UTC", "2026-11-29T12:30:00Z", True),
        ("Fri-Mon 12:00-13:00", "UTC", "2026-12-02T12:30:00Z", False),
        # months, and a time zone with summer time
        ("Apr-Sep 11:00-15:30", "Europe/Berlin", "2026-07-01T09:00:00Z", True),
        ("Apr-Sep 11:00-15:30", "Europe/Berlin", "2026-07-01T13:30:00Z", False),
        ("Apr-Sep 11:00-15:30", "Europe/Berlin", "2026-01-01T10:30:00Z", False),
        ("11:00-15:30", "Europe/Berlin", "2026-01-01T09:30:00Z", False),
        ("11:00-15:30", "America/Los_Angeles", "2026-01-01T19:00:00Z", True),
        # the night of 29 March 2026 has seven hours there, that of 25 October nine
        ("Sat 22:00-06:00", "Europe/Berlin", "2026-03-29T03:59:00Z", True),
        ("Sat 22:00-06:00", "Europe/Berlin", "2026-03-29T04:00:00Z", False),
        ("Sat 22:00-06:00", "Europe/Berlin", "2026-10-25T04:59:00Z", True),
    ],
)
def test_a_calendar_is_open_by_local_time(window: str, zone: str, time: str, is_open: bool) -> None:
    reading = calendar(window, zone=zone).read(at(time))
    assert (reading.value, reading.unit) == (float(is_open), "open")
    assert reading.age_s(at(time)) == 0


def test_a_calendar_knows_when_its_window_ends() -> None:
    source = calendar("Mon-Fri 22:00-24:00", "00:00-02:00")
    friday = at("2026-11-27T23:00:00Z")
    assert source.holds_until_s(friday, 1.0, math.inf) == at("2026-11-28T02:00:00Z")
    closed = at("2026-11-28T12:00:00Z")
    assert source.holds_until_s(closed, -math.inf, 0.0) == at("2026-11-29T00:00:00Z")
    assert calendar("00:00-24:00").holds_until_s(friday, 1.0, math.inf) > friday + 6 * 86400


@pytest.mark.parametrize(
    "window", ["", "22:00", "25:00-26:00", "Mon-Foo 1:00-2:00", "1:00-1:00", "1:75-2:00"]
)
def test_no_window_is_a_sentence(window: str) -> None:
    with pytest.raises(ConfigError, match=f'here: "{window}" is no window: write days'):
        calendar(window)
    with pytest.raises(ConfigError, match='there is no time zone "Mars/Base"'):
        calendar("1:00-2:00", zone="Mars/Base")


def trace(path: Path, text: str, *, began_s: float = 1000.0, **values: Any) -> Trace:
    path.write_text(text)
    options = TraceOptions(kind="trace", file=str(path), unit="g/kWh", **values)
    return Trace(options, began_s, "here")


def values_at(source: Trace, *times: float) -> list[float | None]:
    found: list[float | None] = []
    for time_s in times:
        try:
            found.append(source.read(time_s).value)
        except SignalAway:
            found.append(None)
    return found


def test_a_trace_is_a_step_function_compressed_from_the_first_start_on(tmp_path: Path) -> None:
    text = "time,value\n0,300\n3600,50\n7200,400\n"
    source = trace(tmp_path / "t.csv", text, speed=60.0)
    assert values_at(source, 999, 1000, 1059.9, 1060, 1119.9, 1120, 5000) == [
        *(None, 300, 300, 50, 50, 400, 400)
    ]
    # its last value is as old as the end of the trace
    assert source.read(1110).age_s(1110) == 0 and source.read(1300).age_s(1300) == 180
    assert source.holds_until_s(1070, -math.inf, 100.0) == 1120
    assert source.holds_until_s(1130, -math.inf, 500.0) is None
    scaled = trace(tmp_path / "t.csv", text, scale=0.001)
    assert values_at(scaled, 1000) == [0.3]


def test_a_trace_with_dates_is_what_it_says_or_begins_where_it_is_told_to(tmp_path: Path) -> None:
    text = "point_time,CAISO,SPP\n2026-01-11 17:00:00+00:00,1,10\n2026-01-11 17:05:00+00:00,2,20\n"
    begin_s = at("2026-01-11T17:00:00Z")
    dated = trace(tmp_path / "t.csv", text, column="SPP")
    assert values_at(dated, begin_s - 1, begin_s, begin_s + 300) == [None, 10, 20]
    moved = trace(tmp_path / "t.csv", text, column="CAISO", start="2026-01-11T17:04:00Z")
    assert values_at(moved, 1000, 1059, 1060) == [1, 1, 2]
    repeated = trace(tmp_path / "t.csv", text, repeat=True, speed=300.0)
    assert values_at(repeated, 1000, 1001, 1002, 1003.5, 1004.5) == [1, 2, 1, 2, 1]
    assert repeated.read(1003.5).age_s(1003.5) == 0
    assert repeated.holds_until_s(1002.5, 0.0, 1.0) == 1003
    assert repeated.holds_until_s(1003.5, 2.0, 9.0) == 1004
    assert repeated.holds_until_s(1003.5, 0.0, 9.0) == math.inf


@pytest.mark.parametrize(
    ("text", "values", "why"),
    [
        ("time,value\n", {}, "has no rows of time,value"),
        ("", {}, "has no rows of time,value"),
        ("0,1\n0,2\n", {}, "row 2: its time is not after the last"),
        ("0,1\n1,many\n", {}, "row 2: 'many' is no number"),
        ("0,1\n1\n", {}, "row 2: list index out of range"),
        ("0,1\n", {"column": "x"}, 'has no head that names the column "x"'),
        ("time,a,b\n0,1,2\n", {"column": "x"}, 'has no column "x", only time, a, b'),
        ("0,1\n", {"start": "noon"}, 'start is "noon", neither a date nor seconds'),
    ],
)
def test_a_trace_that_cannot_be_followed_is_a_sentence(
    text: str, values: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=why):
        trace(tmp_path / "t.csv", text, **values)
    with pytest.raises(ConfigError, match=r"here: cannot read .*: No such file"):
        Trace(TraceOptions(kind="trace", file=str(tmp_path / "none")), 0.0, "here")


def test_a_file_is_read_as_its_writer_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "price"
    source = WatchedFile(FileOptions(kind="file", file=str(path), unit="EUR/h", scale=2.0))
    with pytest.raises(SignalAway, match="cannot read"):
        source.read(0.0)
    path.write_text("1.5\n")
    os.utime(path, (500.0, 500.0))
    reading = source.read(560.0)
    assert (str(reading), reading.age_s(560.0)) == ("3 EUR/h", 60.0)
    path.write_text("2026-01-01T00:00:00Z,9\n2026-01-01T01:00:00Z,0.25\n\n")
    reading = source.read(at("2026-01-01T01:10:00Z"))
    assert (reading.value, reading.age_s(at("2026-01-01T01:10:00Z"))) == (0.5, 600.0)
    path.write_text("none yet")
    with pytest.raises(SignalAway, match="'none yet' is no number"):
        source.read(0.0)


def test_a_file_of_json_as_aws_prints_spot_prices(tmp_path: Path) -> None:
    path = tmp_path / "spot.json"
    newest = {"SpotPrice": "0.4100", "Timestamp": "2026-01-01T01:00:00+00:00"}
    path.write_text(json.dumps({"SpotPriceHistory": [newest, {"SpotPrice": "9"}]}))
    options = FileOptions(
        kind="file",
        file=str(path),
        path="SpotPriceHistory[0].SpotPrice",
        time_path="SpotPriceHistory[0].Timestamp",
    )
    reading = WatchedFile(options).read(0.0)
    assert (reading.value, reading.time_s) == (0.41, at("2026-01-01T01:00:00Z"))
    path.write_text("{")
    with pytest.raises(SignalAway, match="is not JSON"):
        WatchedFile(options).read(0.0)


def test_a_path_leads_through_tables_and_lists() -> None:
    document = {"data": [{"value": 1}, {"value": 2}], "a.b": 0}
    assert at_path(document, "data[1].value") == at_path(document, "data.1.value") == 2
    for path in ("data[2].value", "data.value", "nothing", "data[0].value.x"):
        with pytest.raises(SignalAway, match="the answer has nothing at"):
            at_path(document, path)


def test_power_is_the_sum_that_nvidia_smi_measures() -> None:
    asked: list[Sequence[str]] = []

    def smi(command: Sequence[str]) -> str:
        asked.append(command)
        return "312.50\n287.50\n"

    nvml = Nvml(NvmlOptions(kind="nvml", gpus=("0", "3")), smi)
    assert str(nvml.read(1.0)) == "600 W"
    assert asked[0][-1] == "--id=0,3" and asked[0][0] == "nvidia-smi"
    with pytest.raises(SignalAway, match="no number"):
        Nvml(NvmlOptions(kind="nvml"), lambda command: "[N/A]\n").read(1.0)

    def absent(command: Sequence[str]) -> str:
        raise subprocess.CalledProcessError(9, command)

    with pytest.raises(SignalAway, match="cannot be asked"):
        Nvml(NvmlOptions(kind="nvml"), absent).read(1.0)
