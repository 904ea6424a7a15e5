"""Lines of the page: losses and bits per byte, speeds, bytes. Pure."""

from collections.abc import Mapping, Sequence

from pilot.page.chart import (
    Figure,
    Spec,
    Unit,
    colour,
    scale_of,
    seconds_text,
    short,
    shortened,
    spec_of,
    thinned,
    tips,
    unit_for,
)
from pilot.page.measures import Measures, Pace, Point

_LINE_HEIGHT = 200
_LABELLED_LINES = 8
_DOTS = 150  # that have room on a line
_THIN_PLACES = 200  # of charts with a line per client
_MEGA = 1e6


def curve(
    name: str,
    runs: Mapping[str, Sequence[Point]],
    *,
    quantity: str,
    over: str,
    behind: Sequence[Pace] = (),
) -> Figure | None:
    """`quantity` ("train_loss" or "bpb") of each run over "tokens" or "time". None without any value.

    `behind`: the clients' own losses of one run, drawn thinly.
    """
    label = {"train_loss": "training loss, nats per token", "bpb": "validation, bits per byte"}
    span_s = max((p.at_s for points in runs.values() for p in points), default=0.0)
    tokens = max((p.tokens for points in runs.values() for p in points), default=0)
    unit, scale = unit_for(span_s), scale_of(tokens)
    values = []
    for run, points in runs.items():
        shown = thinned(point.round_number for point in points)
        for order, point in enumerate(points):
            if point.round_number not in shown:
                continue
            height = point.train_loss if quantity == "train_loss" else point.bpb
            if height is None:
                continue
            place = unit.of(point.at_s) if over == "time" else point.tokens / scale[1]
            values.append(
                {
                    "series": run,
                    "x": place,
                    "y": round(height, 5),
                    "order": order,
                    "round": point.round_number,
                    "tokens": f"{point.tokens:,}",
                    "time": seconds_text(point.at_s),
                }
            )
    if not values:
        return None
    thin = _thin(behind, runs, unit, scale[1], over) if quantity == "train_loss" else []
    axis = unit.axis if over == "time" else f"tokens{scale[0]}"
    title = f"{label[quantity].capitalize()}, against {over}"
    colours = {run: colour(i) for i, run in enumerate(runs)} if len(runs) > 1 else {}
    spec = _lines(title, values, axis, label[quantity], colours, thin=thin)
    columns = ["run", "round", "tokens", "time", label[quantity]]
    rows = [[v["series"], v["round"], v["tokens"], v["time"], v["y"]] for v in values]
    return Figure(name, title, spec, columns, rows)


def _thin(
    paces: Sequence[Pace],
    runs: Mapping[str, Sequence[Point]],
    unit: Unit,
    scale: float,
    over: str,
) -> list[Spec]:
    """The clients' losses at the places of the rounds in which they were merged."""
    shown = thinned((p.round_number for series in runs.values() for p in series), _THIN_PLACES)
    points = {p.round_number: p for series in runs.values() for p in series}
    points = {number: points[number] for number in shown}
    clients = list(dict.fromkeys(pace.client for pace in paces))
    return [
        {
            "client": pace.client,
            "x": unit.of(point.at_s) if over == "time" else point.tokens / scale,
            "y": round(pace.loss, 5),
            "order": pace.round_number,
            "round": pace.round_number,
            "colour": colour(clients.index(pace.client)),
        }
        for pace in paces
        if pace.loss is not None and (point := points.get(pace.round_number)) is not None
    ]


def pace(name: str, paces: Sequence[Pace], clients: Sequence[str], what: str) -> Figure | None:
    """`what` ("tokens_per_s" or "mfu") of each client over the rounds. None without any value."""
    label = {"tokens_per_s": "tokens per second while training", "mfu": "MFU, %"}[what]
    values = []
    shown = thinned((one.round_number for one in paces), _THIN_PLACES)
    for one in sorted(paces, key=lambda p: p.round_number):
        if one.round_number not in shown:
            continue
        height = one.tokens_per_s if what == "tokens_per_s" else one.mfu
        if height is not None:
            height = round(height * 100, 2) if what == "mfu" else round(height, 1)
            values.append(
                {
                    "series": one.client,
                    "x": one.round_number,
                    "y": height,
                    "order": one.round_number,
                    "round": one.round_number,
                    "tokens": f"{one.tokens:,}",
                    "time": seconds_text(one.at_s),
                }
            )
    if not values:
        return None
    colours = {client: colour(i) for i, client in enumerate(clients)}
    title = f"{label[0].upper()}{label[1:]}, by client and round"
    spec = _lines(title, values, "round", label, colours, zero=True)
    rows = [[v["series"], v["round"], v["y"]] for v in values]
    return Figure(name, title, spec, ["client", "round", label], rows)


def traffic(name: str, found: Measures) -> Figure | None:
    """Bytes up and down by round. None where the events hold none."""
    if not found.traffic:
        return None
    shown = thinned(one.round_number for one in found.traffic)
    drawn = [one for one in found.traffic if one.round_number in shown]
    values = [
        {"series": series, "x": one.round_number, "y": round(amount / _MEGA, 3)}
        | {"order": one.round_number, "round": one.round_number, "tokens": "", "time": ""}
        for one in drawn
        for series, amount in (("down", one.down), ("up", one.up))
    ]
    title = "Bytes of tensors by round: down to clients, up to the server"
    colours = {"down": "var(--down)", "up": "var(--up)"}
    spec = _lines(title, values, "round", "MB per round", colours, zero=True)
    rows = [[one.round_number, one.down, one.up] for one in drawn]
    return Figure(name, title, spec, ["round", "bytes down", "bytes up"], rows)


def _lines(
    title: str,
    values: Sequence[Spec],
    x_title: str,
    y_title: str,
    colours: Mapping[str, str],
    *,
    zero: bool = False,
    thin: Sequence[Spec] = (),
) -> Spec:
    """Lines with their names at their ends; one line without a name if there are no `colours`."""
    heights = [v["y"] for v in (*values, *thin)]
    low, high = (0.0 if zero else min(heights)), max(heights)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    domain = [low if zero else low - margin, high + margin]
    y_scale = {"domain": domain, "nice": False, "zero": zero}
    places = [v["x"] for v in values]
    x_scale = {"domain": [min(places), max(places) or 1], "nice": False, "zero": False}
    x: Spec = {"field": "x", "type": "quantitative", "scale": x_scale}
    x["axis"] = {"title": x_title, "grid": False, "tickCount": 6, "format": ",~r"}
    y: Spec = {"field": "y", "type": "quantitative", "scale": y_scale}
    y["axis"] = {"title": y_title, "tickCount": 5, "domain": False, "ticks": False}
    shade: Spec = {"value": "var(--ink)"}
    if colours:
        scale: Spec = {"domain": list(colours), "range": list(colours.values())}
        shade = {"field": "series", "type": "nominal", "scale": scale, "legend": None}
    shown = ["series", "round", "y", "tokens", "time"]
    layers: list[Spec] = []
    if thin:
        own: Spec = {"field": "colour", "type": "nominal", "scale": None}
        clipped = {"type": "line", "strokeWidth": 1.1, "opacity": 0.55, "clip": True}
        encoding: Spec = {"x": x, "y": y, "detail": {"field": "client"}, "stroke": own}
        encoding |= {"order": {"field": "order"}}
        layers.append({"data": {"values": list(thin)}, "mark": clipped, "encoding": encoding})
    encoding = {"x": x, "y": y, "detail": {"field": "series"}, "order": {"field": "order"}}
    line: Spec = {"type": "line", "strokeWidth": 2, "strokeJoin": "round"}
    layers.append(
        {"data": {"values": list(values)}, "mark": line, "encoding": {**encoding, "stroke": shade}}
    )
    size = 22 if len(values) <= _DOTS else 5
    dot: Spec = {"type": "point", "filled": True, "size": size, "opacity": 1}
    encoding = {"x": x, "y": y, "fill": shade, "tooltip": tips(*shown)}
    layers.append({"data": {"values": list(values)}, "mark": dot, "encoding": encoding})
    layers.append(_end_labels(values, domain, shade, x, y, named=bool(colours)))
    return spec_of(title, layers, height=_LINE_HEIGHT)


def _end_labels(
    values: Sequence[Spec], domain: Sequence[float], shade: Spec, x: Spec, y: Spec, *, named: bool
) -> Spec:
    """The last value of each line, and its name if there are several, far enough apart to be read."""
    last: dict[str, Spec] = {value["series"]: value for value in values}
    ends = sorted(last.values(), key=lambda value: value["y"])
    if len(ends) > _LABELLED_LINES:
        ends = []
    gap = 13 / _LINE_HEIGHT * (domain[1] - domain[0])
    heights = spread([value["y"] for value in ends], gap, domain[1])
    right = x["scale"]["domain"][1]
    labels = [
        {
            "series": value["series"],
            "x": right,
            "y": height,
            "text": f"{short(value['y'])} {shortened(value['series'])}"
            if named
            else short(value["y"]),
        }
        for value, height in zip(ends, heights, strict=True)
    ]
    mark = {"type": "text", "align": "left", "dx": 7, "fontSize": 11, "fontWeight": 600}
    encoding = {"x": x, "y": y, "text": {"field": "text"}, "fill": shade}
    return {"data": {"values": labels}, "mark": {**mark, "limit": 160}, "encoding": encoding}


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """`heights` (ascending) moved so that each is at least `gap` above the one before, none above `top`."""
    moved = list(heights)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    if moved and moved[-1] > top:
        moved[-1] = top
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - gap)
    return moved
