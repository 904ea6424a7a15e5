"""Who trained when, as charts: a lane per client, and each client's time by what it did. Pure."""

from collections.abc import Sequence

from pilot.page.chart import (
    Figure,
    Spec,
    Unit,
    client_scale,
    seconds_text,
    spec_of,
    state_colour,
    tips,
    unit_for,
    zoom,
)
from pilot.page.timeline import Interval, State, Timeline, coarse

MAX_INTERVALS = 6000  # drawn one by one; a picture of more is made coarser
_PIECES = 1200  # of a coarse lane
_MOST_MARKS = 1000  # of refusals: the latest


def lanes(name: str, timeline: Timeline) -> Figure:
    """A lane per client, spans without a server behind them, refusals as marks."""
    unit = unit_for(timeline.end_s)
    drawn = timeline.intervals
    if len(drawn) > MAX_INTERVALS:
        pieces = max(60, min(_PIECES, MAX_INTERVALS // max(1, len(timeline.clients))))
        drawn = coarse(drawn, timeline.end_s / pieces)
    clients = timeline.clients
    step = max(5, min(38, 1400 // max(1, len(clients))))
    y: Spec = {
        "field": "client",
        "type": "nominal",
        "scale": {"domain": clients, "paddingInner": 0.3, "paddingOuter": 0.25},
        "axis": {
            "title": None,
            "labelPadding": 16,
            "labelLimit": 130,
            "labelOverlap": "greedy",
            "domain": False,
            "ticks": False,
            "grid": False,
        },
    }
    x: Spec = {
        "field": "start",
        "type": "quantitative",
        "scale": {"domain": [0, unit.of(timeline.end_s)], "nice": False},
        "axis": {"title": unit.axis, "grid": False, "tickCount": 8},
    }
    layers = [
        _outages(timeline, unit),
        {
            "data": {"values": [_interval(one, unit) for one in drawn]},
            "mark": {"type": "bar", "clip": True, "cornerRadius": 1},
            "params": [zoom("window")],
            "encoding": {
                "x": x,
                "x2": {"field": "end"},
                "y": y,
                "color": state_colour(),
                "tooltip": tips("client", "state", "from", "to", "lasted", "round", "detail"),
            },
        },
        _refusal_marks(timeline, unit, y),
        _client_dots(clients),
    ]
    summary = [
        [client, *(seconds_text(timeline.seconds(client).get(state, 0.0)) for state in State)]
        for client in clients
    ]
    title = f"Who trained when: {len(clients)} clients over {seconds_text(timeline.end_s)}"
    spec = spec_of(title, layers, height=step * len(clients) + 8)
    return Figure(name, title, spec, ["client", *State], summary)


def _outages(timeline: Timeline, unit: Unit) -> Spec:
    values = [
        {"start": unit.of(a), "end": unit.of(b), "what": "no server", "lasted": seconds_text(b - a)}
        for a, b in timeline.outages
    ]
    return {
        "data": {"values": values},
        "mark": {"type": "rect", "color": "var(--band)", "clip": True},
        "encoding": {
            "x": {"field": "start", "type": "quantitative"},
            "x2": {"field": "end"},
            "tooltip": tips("what", "lasted"),
        },
    }


def _refusal_marks(timeline: Timeline, unit: Unit, y: Spec) -> Spec:
    clients = set(timeline.clients)
    values = [
        {
            "at": unit.of(one.at_s),
            "client": one.client,
            "what": "reply refused",
            "round": one.round_number,
            "reason": one.reason,
            "time": seconds_text(one.at_s),
        }
        for one in timeline.refusals[-_MOST_MARKS:]
        if one.client in clients
    ]
    return {
        "data": {"values": values},
        "mark": {
            "type": "point",
            "shape": "diamond",
            "size": 44,
            "filled": True,
            "fill": "var(--s-refused)",
            "stroke": "var(--surface)",
            "strokeWidth": 1.2,
            "opacity": 1,
            "clip": True,
        },
        "encoding": {
            "x": {"field": "at", "type": "quantitative"},
            "y": y,
            "tooltip": tips("client", "what", "time", "round", "reason"),
        },
    }


def _client_dots(clients: Sequence[str]) -> Spec:
    """The colour that a client has in the other charts, left of its lane."""
    return {
        "data": {"values": [{"client": client} for client in clients]},
        "mark": {"type": "point", "filled": True, "size": 50, "opacity": 1, "clip": False},
        "encoding": {
            "x": {"value": -9},
            "y": {"field": "client", "type": "nominal"},
            "fill": {"field": "client", "type": "nominal", "scale": client_scale(clients)}
            | {"legend": None},
        },
    }


def _interval(one: Interval, unit: Unit) -> Spec:
    return {
        "client": one.client,
        "state": one.state.value,
        "start": unit.of(one.start_s),
        "end": unit.of(one.end_s),
        "from": seconds_text(one.start_s),
        "to": seconds_text(one.end_s),
        "lasted": seconds_text(one.length_s),
        "round": one.round_number,
        "detail": one.detail,
    }


def client_time(name: str, timeline: Timeline) -> Figure:
    """The shares of each client's time, from its coming to the end of the run, by state."""
    values = []
    for client in timeline.clients:
        there_s = timeline.there_s(client)
        spent = timeline.seconds(client)
        waited_s = max(0.0, there_s - sum(spent.values()))
        left = 0.0
        order = [State.TRAINING, *(state for state in State if state is not State.TRAINING)]
        parts = [(state.value, spent.get(state, 0.0)) for state in order] + [("waiting", waited_s)]
        for state, seconds in parts:
            if seconds > 0 and there_s:
                share = seconds / there_s
                values.append(
                    {"client": client, "state": state, "start": left, "end": left + share}
                    | {"share": f"{100 * share:.1f} %", "lasted": seconds_text(seconds)}
                    | {
                        "text": f"{100 * share:.0f} %"
                        if state == State.TRAINING and share >= 0.06
                        else ""
                    }
                )
                left += share
    y: Spec = {"field": "client", "type": "nominal", "sort": None, "scale": {"paddingInner": 0.3}}
    y["axis"] = {"title": None, "domain": False, "ticks": False, "labelPadding": 6}
    y["axis"] |= {"labelLimit": 130}
    x: Spec = {"field": "start", "type": "quantitative", "axis": None}
    x["scale"] = {"domain": [0, 1], "nice": False}
    shown = tips("client", "state", "share", "lasted")
    bar = {"x": x, "x2": {"field": "end"}, "y": y, "fill": state_colour(), "tooltip": shown}
    text: Spec = {
        "type": "text",
        "align": "left",
        "dx": 4,
        "fontSize": 10.5,
        "fill": "var(--on-state)",
    }
    layers: list[Spec] = [
        {"mark": {"type": "bar", "cornerRadius": 1}, "encoding": bar},
        {
            "mark": {**text, "tooltip": None},
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        },
    ]
    title = "Each client's time, by what it did"
    spec = spec_of(title, layers, height=30 * len(timeline.clients), data=values)
    rows = [[v["client"], v["state"], v["share"], v["lasted"]] for v in values]
    return Figure(name, title, spec, ["client", "state", "share", "time"], rows)
