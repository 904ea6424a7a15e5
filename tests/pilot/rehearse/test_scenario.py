"""Scenarios: what a file says becomes sites and what happens to them, or one sentence about its mistake."""

from itertools import pairwise
from pathlib import Path

import pytest

from pilot.commands.rehearse import SCENARIOS
from pilot.rehearse.scenario import Policy, ScenarioError, of_trace, read_scenario
from pilot.rehearse.trace import Happening

HOUR = 3600.0
TEXT = """
hours = 6
[series.low]
file = "low.csv"
[site]
tokens-per-s = 100
idle-w = 10
training-w = 20
[sites.a]
carbon = "low"
[sites.b]
carbon = 50
price = 2.5
price-per = "hour"
up = { maintenance = { every-h = 10, lasts-h = 1, first-h = 3, notice-s = 60 } }
[policies.green]
follow = "carbon"
start-below = 100
stop-above = 150
[policies.one]
sites = ["b"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "low.csv").write_text("0,200\n7200,90\n14400,160\n")
    (tmp_path / "s.toml").write_text(TEXT)
    return tmp_path / "s.toml"


def test_a_policy_starts_and_drains_its_sites_by_their_series(path: Path) -> None:
    scenario = read_scenario(path)
    sites, trace = scenario.under(scenario.policies["green"])
    assert [site.machine.name for site in sites] == ["a", "b"]
    assert [(one.time_s, one.event) for one in trace if one.client == "a"] == [
        (2 * HOUR, "up"),
        (4 * HOUR - 60, "notice"),
        (4 * HOUR, "down"),
    ]
    # b is always below, and away for its maintenance all the same
    own = [(one.time_s, one.event) for one in trace if one.client == "b" and one.time_s < 6 * HOUR]
    assert own == [
        (0, "up"),
        (3 * HOUR - 60, "notice"),
        (3 * HOUR, "down"),
        (4 * HOUR, "up"),
    ]


def test_other_policies_take_the_sites_as_they_are(path: Path) -> None:
    scenario = read_scenario(path)
    sites, trace = scenario.under(scenario.policies["one"])
    assert [site.machine.name for site in sites] == ["b"] and {one.client for one in trace} == {"b"}
    [b] = sites
    assert b.price and (b.price.per, b.price.series.at(0)) == ("hour", 2.5)
    sites, trace = scenario.under(Policy())
    assert [one for one in trace if one.client == "a"] == [Happening(0, "a", "up")]


@pytest.mark.parametrize(
    ("text", "instead", "why"),
    [
        ("hours = 6", "hours = 0", "hours is 0"),
        ("hours = 6", "", "it lacks 'hours'"),
        ("idle-w = 10", "idel-w = 10", "site a has idel-w, which nothing reads"),
        ("idle-w = 10", "idle-w = 90", "no less training"),
        ('carbon = "low"', 'carbon = "lows"', "there is no series lows: low are"),
        ('sites = ["b"]', 'sites = ["c"]', "policy one names c, which is no site"),
        (
            "stop-above = 150",
            "stop-above = 50",
            "policy green starts below 100 and stops above less",
        ),
        ('follow = "carbon"', 'follow = "moon"', "follows 'moon'"),
        ("maintenance", "holidays", "'holidays': always, weibull"),
        ("every-h", "every", "unexpected keyword argument"),
        ("hours = 6", "hours = ", "is not TOML"),
        ("tokens-per-s = 100", "", "tokens_per_s"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file(
    text: str, instead: str, why: str, path: Path
) -> None:
    path.write_text(TEXT.replace(text, instead))
    with pytest.raises(ScenarioError, match=why) as caught:
        read_scenario(path)
    assert str(path) in str(caught.value)


def test_a_policy_that_follows_what_a_site_has_not_is_refused(path: Path) -> None:
    scenario = read_scenario(path)
    with pytest.raises(ScenarioError, match="follows price, and site a has none"):
        scenario.under(Policy(follow="price", start_below=1, stop_above=1))


def test_a_trace_alone_is_a_scenario_of_equal_machines(path: Path) -> None:
    trace = [Happening(0, "x", "up"), Happening(0, "y", "up"), Happening(1800, "server", "kill", 5)]
    scenario = of_trace("night", trace, tokens_per_s=10)
    assert (list(scenario.sites), scenario.hours) == (["x", "y"], 1.5)
    assert scenario.under(Policy())[1] == sorted(trace)
    with pytest.raises(ScenarioError, match="nobody is ever up"):
        of_trace("night", trace[2:], tokens_per_s=10)
    with pytest.raises(ScenarioError, match="names x, which is no site"):
        read_scenario(path).with_trace(trace)


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_scenarios_of_the_project_can_be_read_and_their_policies_differ(path: Path) -> None:
    scenario = read_scenario(path)
    assert scenario.about and len(scenario.policies) > 1
    traces = [scenario.under(policy)[1] for policy in scenario.policies.values()]
    assert all(traces) and all(a != b for a, b in pairwise(traces))
