"""What all charts of the page share: their form as Vega-Lite specifications, colours, texts of numbers. Pure.

Colours are CSS variables, which the SVG takes from page.css: one picture serves light and dark. What events say
stands in `values` only, never in an expression or a field's name.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pilot.page.timeline import State

Spec = dict[str, Any]

MOST_PLACES = 600  # along an axis: a chart of more rounds shows some of them
COLOURS = 8  # of clients and of runs: --c0 .. --c7
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
STATE_COLOURS = {state: f"var(--s-{state.value.replace(' ', '-')})" for state in State}


@dataclass(frozen=True)
class Figure:
    """A chart: its name in the page, what it shows in a sentence, and the same numbers as a table."""

    name: str
    title: str
    spec: Spec
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Unit:
    """A unit of time for an axis."""

    name: str
    seconds: float

    def of(self, seconds: float) -> float:
        return round(seconds / self.seconds, 5)

    @property
    def axis(self) -> str:
        return f"{self.name} since the start"


def thinned(values: Iterable[int], most: int = MOST_PLACES) -> set[int]:
    """The different `values`, or of more than `most` evenly spaced ones and the last."""
    known = sorted(set(values))
    if len(known) <= most:
        return set(known)
    step = len(known) / most
    return {known[len(known) - 1 - int(i * step)] for i in range(most)}


def unit_for(span_s: float) -> Unit:
    for name, seconds, up_to_s in (
        ("seconds", 1.0, 120.0),
        ("minutes", 60.0, 3 * 3600.0),
        ("hours", 3600.0, 4 * 86400.0),
    ):
        if span_s <= up_to_s:
            return Unit(name, seconds)
    return Unit("days", 86400.0)


def colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


def spec_of(
    title: str, layers: Sequence[Spec], *, height: int, data: Sequence[Spec] | None = None
) -> Spec:
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": title,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "background": None,
        "layer": list(layers),
        "config": _CONFIG,
    }
    if data is not None:
        spec["data"] = {"values": list(data)}
    return spec


_CONFIG: Spec = {
    "font": _FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "gridColor": "var(--grid)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
    },
}


def zoom(name: str) -> Spec:
    """Drag moves the axis, the wheel with Shift zooms: without it, the page scrolls."""
    select = {"type": "interval", "encodings": ["x"], "zoom": "wheel![event.shiftKey]"}
    return {"name": name, "select": select, "bind": "scales"}


def state_colour() -> Spec:
    names = [*(state.value for state in State), "waiting"]
    colours = [*STATE_COLOURS.values(), "var(--waiting)"]
    scale = {"domain": names, "range": colours}
    return {"field": "state", "type": "nominal", "scale": scale, "legend": None}


def client_scale(clients: Sequence[str]) -> Spec:
    return {"domain": list(clients), "range": [colour(i) for i in range(len(clients))]}


def tips(*fields: str) -> list[Spec]:
    return [{"field": name, "type": "nominal"} for name in fields]


def scale_of(tokens: float) -> tuple[str, float]:
    for name, scale in ((", billions", 1e9), (", millions", 1e6), (", thousands", 1e3)):
        if tokens >= scale:
            return name, scale
    return "", 1.0


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shortened(name: str, most: int = 13) -> str:
    """`name` without its middle, where it is longer than `most` letters: runs differ at their ends."""
    kept = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - kept]}…{name[-kept:]}"


def seconds_text(seconds: float) -> str:
    """As people write it: 12.3 s, 4:05 min, 3:20 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d} h"
