"""What people typed and sites sent, as HTML."""

import itertools

import pytest

from pilot.page.bars import presence
from pilot.page.chart import MOST_PLACES, seconds_text, shortened, thinned, unit_for
from pilot.page.curves import spread
from pilot.page.markup import Markup, element, join, json_text, table, text
from pilot.page.measures import Measures, Presence

HOSTILE = "<img src=x onerror=alert(1)>\"'&</script>"


def test_text_is_escaped_and_markup_is_not() -> None:
    assert text(HOSTILE) == "&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;&lt;/script&gt;"
    assert text(Markup("<b>x</b>")) == "<b>x</b>"
    assert "<img" not in element("p", HOSTILE, title=HOSTILE)
    assert "<img" not in table([HOSTILE], [[HOSTILE]], caption=HOSTILE)
    assert join([element("b", "a"), "<i>"]) == "<b>a</b>\n&lt;i&gt;"


def test_json_in_a_script_element_cannot_end_it() -> None:
    written = json_text({"name": f"{HOSTILE}<!--\u2028"})
    assert not set("<>&\u2028") & set(written)


def test_a_long_table_says_how_many_rows_it_leaves_out() -> None:
    written = table(["n"], [[i] for i in range(500)], caption="c", most_rows=10)
    assert written.count("<tr>") == 11
    assert "the first 10 of 500 rows" in written


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.04, "0.0 s"), (99.9, "99.9 s"), (245.0, "4:05 min"), (12_000.0, "3:20 h")],
)
def test_durations_as_people_write_them(seconds: float, written: str) -> None:
    assert seconds_text(seconds) == written


@pytest.mark.parametrize(
    ("span_s", "unit"),
    [(90.0, "seconds"), (600.0, "minutes"), (50_000.0, "hours"), (1e6, "days")],
)
def test_the_unit_of_an_axis_fits_the_run(span_s: float, unit: str) -> None:
    assert unit_for(span_s).name == unit


def test_labels_at_the_ends_of_lines_keep_a_distance_and_stay_inside() -> None:
    assert spread([1.0, 1.0, 5.0], 1.0, 10.0) == [1.0, 2.0, 5.0]
    assert spread([9.5, 9.8, 9.9], 1.0, 10.0) == [8.0, 9.0, 10.0]
    assert spread([], 1.0, 10.0) == []


def test_long_names_keep_both_ends() -> None:
    assert shortened("site-a") == "site-a"
    assert shortened("disturbed-6b0a72d1-12770") == "distur…-12770"


def test_a_chart_of_many_rounds_shows_some_of_them_and_the_last() -> None:
    assert thinned([3, 1, 3, 2]) == {1, 2, 3}
    shown = sorted(thinned(range(1, 10_001)))
    assert len(shown) == MOST_PLACES and shown[-1] == 10_000
    gaps = {after - before for before, after in itertools.pairwise(shown)}
    assert gaps <= {16, 17}


def test_bars_of_many_rounds_fill_the_room_between_those_that_are_shown() -> None:
    found = Measures(presences=[Presence(i, ["a"], ["a"]) for i in range(1, 6001)])
    figure = presence("p", found)
    assert figure is not None and len(figure.rows) == MOST_PLACES
    bars = figure.spec["data"]["values"]
    assert all(8 < bar["to"] - bar["from"] < 10 for bar in bars)  # of every tenth round
