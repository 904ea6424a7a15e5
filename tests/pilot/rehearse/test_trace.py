"""Traces: files read whole or refused by line; drawn ones have the distribution that they say."""

from itertools import pairwise
from pathlib import Path

import pytest

from pilot.rehearse.draw import faults, solar, weibull, windows
from pilot.rehearse.trace import Happening, TraceError, read_trace, write_trace


def test_a_trace_is_read_as_it_was_written_and_by_time(tmp_path: Path) -> None:
    happenings = [
        Happening(60.0, "a", "freeze", 12.5),
        Happening(0.0, "a", "up"),
        Happening(90.0, "server", "kill", 10.0),
        Happening(95.0, "redis", "away", 3.0),
    ]
    write_trace(tmp_path / "t.csv", happenings)
    assert read_trace(tmp_path / "t.csv") == sorted(happenings)
    (tmp_path / "u.csv").write_text("# of a night\n\n5, a , up\n")
    assert read_trace(tmp_path / "u.csv") == [Happening(5.0, "a", "up")]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("1,a", "needs time, client, event and perhaps seconds, not 2 fields"),
        ("soon,a,up", "its time is 'soon', not a number of seconds"),
        ("-1,a,up", "its time is '-1'"),
        ("inf,a,up", "its time is 'inf'"),
        ("1,a,freeze,nan", "its seconds is 'nan'"),
        ("1,,up", "names no client"),
        ("1,a,melt", "'melt' does not happen to a: one of up, down,"),
        ("1,server,up", "'up' does not happen to server: one of kill, crash, freeze, jump does"),
    ],
)
def test_a_line_that_says_nothing_is_refused_by_file_and_line(
    line: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"0,a,up\n{line}\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value).startswith(f"{path}, line 2: {why}")


def test_a_trace_that_is_not_there_or_no_text_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe0,a,up")
    with pytest.raises(TraceError, match="cannot read the trace"):
        read_trace(tmp_path / "bytes.csv")


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0])
def test_weibull_machines_are_up_for_their_share_of_the_time(shape: float) -> None:
    names = [f"c{i}" for i in range(200)]
    trace = weibull(names, hours=400, up_h=6.0, down_h=2.0, seed=1, shape=shape)
    up_s = total_s = 0.0
    for name in names:
        own = [one for one in trace if one.client == name]
        assert all(a.event != b.event for a, b in pairwise(own))
        for a, b in pairwise(own):
            total_s += b.time_s - a.time_s
            up_s += (b.time_s - a.time_s) * (a.event == "up")
    assert up_s / total_s == pytest.approx(0.75, abs=0.01)


def test_windows_of_the_sun_begin_and_end_with_a_notice() -> None:
    trace = windows("a", solar(2, noon_h=12, hours=6), notice_s=60)
    hour = 3600.0
    assert trace == [
        Happening(9 * hour, "a", "up"),
        Happening(15 * hour - 60, "a", "notice", 60),
        Happening(15 * hour, "a", "down"),
        Happening(33 * hour, "a", "up"),
        Happening(39 * hour - 60, "a", "notice", 60),
        Happening(39 * hour, "a", "down"),
    ]


def test_faults_are_of_every_kind_and_end_with_everybody_up() -> None:
    trace = faults(["a", "b"], seconds=5000, every_s=5, seed=3)
    of_clients = {"up", "down", "notice", "freeze", "cut", "slow", "late", "crash", "break", "lie"}
    kinds = of_clients | {"stale", "double", "kill", "jump", "away"}
    assert {one.event for one in trace} == kinds
    assert trace == faults(["a", "b"], seconds=5000, every_s=5, seed=3)
    assert trace != faults(["a", "b"], seconds=5000, every_s=5, seed=4)
    assert {(one.client, one.event) for one in trace if one.time_s == 5000} == {
        ("a", "up"),
        ("b", "up"),
    }
