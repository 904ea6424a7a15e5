"""`pilot rehearse`: a comparison from a file to a table, its events for `pilot report`, and where it stops."""

import json
from pathlib import Path
from typing import Any

import pytest

from pilot.cli import main
from pilot.page.story import read_story
from pilot.rehearse.points import grid
from pilot.run.events import EVENTS_FILE, read_events

SCENARIO = """
about = "Two sites for an hour."
hours = 1
shard-rows = 200
[run-config]
depth = 1
vocab-size = 300
sequence-len = 8
total-batch-size = 64
device-batch-size = 1
num-shards = 400
total-tokens = 1000000
min-clients = 1
quorum = 1
round-min-duration = 300.0
round-max-duration = 300.0
eval-rows = 12
clients-timeout = 7200.0
[series.carbon]
file = "carbon.csv"
[site]
tokens-per-s = 32
jitter = 0.0
boot-s = 5.0
start-s = 0.5
idle-w = 500
training-w = 1000
carbon = "carbon"
price = 0.5
[sites.a]
[sites.b]
[policies.all]
[policies.green]
follow = "carbon"
start-below = 100
stop-above = 100
"""


@pytest.fixture
def scenario(tmp_path: Path) -> list[str]:
    (tmp_path / "carbon.csv").write_text("0,400\n1800,50\n")
    (tmp_path / "two.toml").write_text(SCENARIO)
    return ["rehearse", "--scenario", f"{tmp_path / 'two.toml'}", "-o", f"{tmp_path / 'out'}"]


def outcomes(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main([*arguments, "--jobs", "1", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_policies_and_settings_are_compared_in_tokens_energy_grams_and_money(
    scenario: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = outcomes([*scenario, "--sweep", "round-min-duration=100,300"], capsys)
    assert [(one["policy"], one["settings"]) for one in found] == [
        (policy, {"round-min-duration": seconds})
        for policy in ("all", "green")
        for seconds in (100, 300)
    ]
    all_short, all_long, _, green = found
    # of 300 s a round: sending, starting, scoring and the reply take about two
    assert all_long["rounds"] == 11 and 32 <= all_short["rounds"] <= 35
    assert all_long["tokens"] == pytest.approx(11 * 2 * 298 * 32, rel=0.01)
    assert green["rounds"] == 5
    assert green["tokens"] == pytest.approx(5 * 2 * 298 * 32, rel=0.01)
    # two sites on for an hour and for half of one, and at work nearly all the time
    assert all_long["footprint"]["kwh"] == pytest.approx(2.0, rel=0.03)
    assert all_long["footprint"]["grams"] == pytest.approx(400 + 50, rel=0.03)
    assert green["footprint"]["grams"] == pytest.approx(50, rel=0.03)
    assert all_long["footprint"]["money"] == pytest.approx(1.0, rel=0.03)
    assert all_long["goodput"] > 0.95 and all_long["participation"] == 1
    for one in found:  # each has left what a page is drawn from
        assert read_story(Path(one["directory"])).measures.points


def test_a_rehearsal_says_what_it_recommends_and_what_it_does_not_know(
    scenario: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                *scenario,
                "--jobs",
                "1",
                "--run-config",
                "round-min-duration=600 round-max-duration=600",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert printed.startswith("Two sites for an hour.\n")
    assert "Take all: it trains 1" in printed and "less CO2 per token" in printed
    assert "What a rehearsal does not know: the loss." in printed
    assert "Pages: pilot report" in printed


def test_a_rehearsal_stops_at_an_event_or_a_time_and_all_before_is_the_same(
    scenario: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "out" / "all" / EVENTS_FILE
    assert main([*scenario, "--policy", "all", "--until", "3000s"]) == 0
    events = whole.read_bytes().splitlines()
    times = [event["time"] for event in read_events(whole)]
    assert 2700 < times[-1] - times[0] <= 3000
    assert main([*scenario, "--policy", "all", "--until", "20"]) == 0
    assert whole.read_bytes().splitlines() == events[:20]
    assert "stopped after 20 events" in capsys.readouterr().out


def test_a_trace_alone_is_rehearsed_with_equal_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "night.csv").write_text("0,a,up\n0,b,up\n600,b,down\n")
    (tmp_path / "run.toml").write_text(SCENARIO.split("[run-config]")[1].split("[")[0])
    found = outcomes(
        [
            *["rehearse", "--trace", f"{tmp_path / 'night.csv'}", "--tokens-per-s", "32"],
            *["--run-config", f"{tmp_path / 'run.toml'}", "-o", f"{tmp_path / 'out'}"],
        ],
        capsys,
    )
    assert found[0]["hours"] == pytest.approx(1 + 1 / 6)
    # a trains all the time, b for one round and half of another, which it loses
    assert found[0]["tokens"] == pytest.approx(32 * (4200 + 300), rel=0.1)
    assert found[0]["wasted_tokens"] > 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ([], "name what to rehearse"),
        (["--scenario", "four-regions"], "there is no scenario four-regions: three-regions"),
        (["--scenario", "three-regions", "--policy", "x"], "there is no policy x: single-site"),
        (
            ["--scenario", "three-regions", "--until", "soon"],
            "neither a number of events nor a time",
        ),
        (["--scenario", "three-regions", "--until", "9"], "--until stops one run"),
        (["--scenario", "three-regions", "--sweep", "quorum"], "is not KEY=VALUE,VALUE"),
        (["--scenario", "three-regions", "--sweep", "quorun=1"], 'did you mean "quorum"'),
        (["--scenario", "three-regions", "--hours", "0"], "--hours must be above 0"),
        (["--trace", "none.csv"], "cannot read the trace"),
        (["--from-run", "/nowhere/at/all"], "is no run that can be rehearsed"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(
    more: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rehearse", *more]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1


def test_a_grid_is_every_combination() -> None:
    assert grid("") == [{}]
    assert grid("quorum=1,2 wire-up=int8,int4") == [
        {"quorum": quorum, "wire-up": wire} for quorum in (1, 2) for wire in ("int8", "int4")
    ]
