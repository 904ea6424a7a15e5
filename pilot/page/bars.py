"""Bars, dots and cells of the page: where time went, who took part, which rows the model has seen. Pure."""

from pilot.page.chart import Figure, Spec, seconds_text, short, spec_of, thinned, tips
from pilot.page.measures import TRAINING, Energy, Measures

_LABELLED_CELLS = 30
_LEAST_S = 0.05  # of a cause that has a bar


def time_spent(name: str, found: Measures) -> Figure | None:
    """Seconds by what the federation did, longest first. None before a first commit."""
    whole_s = found.whole_s
    if not whole_s:
        return None
    values: list[Spec] = [
        {
            "cause": cause.replace("-", " "),
            "seconds": round(seconds, 2),
            "text": f"{seconds_text(seconds)}  ·  {100 * seconds / whole_s:.0f} %",
            "kind": TRAINING if cause == TRAINING else "rest",
        }
        for cause, seconds in sorted(found.spent.items(), key=lambda item: -item[1])
        if seconds >= _LEAST_S
    ]
    y: Spec = {"field": "cause", "type": "nominal", "sort": None, "scale": {"paddingInner": 0.35}}
    y["axis"] = {"title": None, "domain": False, "ticks": False, "labelPadding": 6}
    longest = max(value["seconds"] for value in values)
    x: Spec = {"field": "seconds", "type": "quantitative", "axis": None}
    x["scale"] = {"domain": [0, longest * 1.7], "nice": False}
    domain, shades = [TRAINING, "rest"], ["var(--s-training)", "var(--rest)"]
    fill: Spec = {"field": "kind", "type": "nominal", "legend": None}
    fill["scale"] = {"domain": domain, "range": shades}
    text: Spec = {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "fill": "var(--ink)"}
    bar = {"type": "bar", "cornerRadiusEnd": 2}
    layers: list[Spec] = [
        {"mark": bar, "encoding": {"x": x, "y": y, "fill": fill, "tooltip": tips("cause", "text")}},
        {"mark": text, "encoding": {"x": x, "y": y, "text": {"field": "text"}}},
    ]
    title = f"Where {seconds_text(whole_s)} of the federation went"
    spec = spec_of(title, layers, height=24 * len(values), data=values)
    rows = [[value["cause"], value["seconds"]] for value in values]
    return Figure(name, title, spec, ["what", "seconds"], rows)


def presence(name: str, found: Measures) -> Figure | None:
    """Clients by round: merged, and with an order of which nothing was merged. None without rounds."""
    if not found.presences:
        return None
    values: list[Spec] = []
    numbers = [one.round_number for one in found.presences]
    shown = thinned(numbers)
    half = 0.42 * max(1.0, (max(numbers) - min(numbers)) / len(shown))
    for one in found.presences:
        if one.round_number not in shown:
            continue
        merged = len(one.merged)
        asked = max(len(one.asked), merged)
        for what, low, high in (("merged", 0, merged), ("not merged", merged, asked)):
            if high > low:
                values.append(
                    {"round": one.round_number, "what": what, "low": low, "high": high}
                    | {"from": one.round_number - half, "to": one.round_number + half}
                    | {"clients": high - low, "of": asked}
                )
    x: Spec = {"field": "from", "type": "quantitative"}
    x["scale"] = {
        "domain": [min(numbers) - half - 0.08, max(numbers) + half + 0.08],
        "nice": False,
        "zero": False,
    }
    x["axis"] = {"title": "round", "grid": False, "format": "d", "tickMinStep": 1}
    most = max(value["high"] for value in values) if values else 1
    y: Spec = {
        "field": "low",
        "type": "quantitative",
        "scale": {"domain": [0, most], "nice": False},
    }
    y["axis"] = {"title": "clients", "tickMinStep": 1, "format": "d", "tickCount": 4}
    y["axis"] |= {"domain": False, "ticks": False}
    scale: Spec = {
        "domain": ["merged", "not merged"],
        "range": ["var(--s-training)", "var(--unmerged)"],
    }
    fill: Spec = {"field": "what", "type": "nominal", "legend": None, "scale": scale}
    encoding: Spec = {"x": x, "x2": {"field": "to"}, "y": y, "y2": {"field": "high"}, "fill": fill}
    encoding["tooltip"] = tips("round", "what", "clients", "of")
    title = "Clients by round: with an order, and merged"
    layers: list[Spec] = [{"mark": {"type": "rect"}, "encoding": encoding}]
    spec = spec_of(title, layers, height=120, data=values)
    rows = [
        [one.round_number, len(one.asked), len(one.merged)]
        for one in found.presences
        if one.round_number in shown
    ]
    return Figure(name, title, spec, ["round", "with an order", "merged"], rows)


def participation(name: str, found: Measures) -> Figure | None:
    """Per client: the share of its time in which it was alive, and of its rounds that were merged."""
    values: list[Spec] = []
    for one in found.clients:
        if one.asked and one.alive_share is not None:
            for what, share in (("alive", one.alive_share), ("merged", one.merged / one.asked)):
                values.append(
                    {"client": one.client, "what": what, "share": round(100 * share, 1)}
                    | {"text": f"{what} {100 * share:.0f} %"}
                )
    if not values:
        return None
    y: Spec = {"field": "client", "type": "nominal", "sort": None}
    y["axis"] = {"title": None, "domain": False, "ticks": False, "labelPadding": 6, "grid": True}
    y["axis"] |= {"labelLimit": 130}
    x: Spec = {"field": "share", "type": "quantitative", "scale": {"domain": [0, 100]}}
    x["axis"] = {"title": "% of its time alive, % of its rounds merged", "grid": False}
    x["axis"] |= {"tickCount": 5}
    scale: Spec = {"domain": ["alive", "merged"], "range": ["var(--alive)", "var(--s-training)"]}
    shade: Spec = {"field": "what", "type": "nominal", "legend": None, "scale": scale}
    shown = tips("client", "what", "share")
    dot: Spec = {"type": "point", "filled": True, "size": 110, "opacity": 1}
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "strokeWidth": 3, "stroke": "var(--rest)"},
            "encoding": {"x": x, "y": y, "detail": {"field": "client"}},
        },
        {"mark": dot, "encoding": {"x": x, "y": y, "fill": shade, "tooltip": shown}},
        *_beside(values, x, y),
    ]
    title = "Liveness and participation of each client"
    spec = spec_of(title, layers, height=34 * len(found.clients), data=values)
    rows = [[v["client"], v["what"], v["share"]] for v in values]
    return Figure(name, title, spec, ["client", "what", "%"], rows)


def _beside(values: list[Spec], x: Spec, y: Spec) -> list[Spec]:
    """The two shares of each client in words, on the side that has room."""
    labels: dict[bool, list[Spec]] = {True: [], False: []}
    for alive, merged in zip(values[::2], values[1::2], strict=True):
        low, high = sorted((alive["share"], merged["share"]))
        words = {"client": alive["client"], "text": f"{alive['text']}, {merged['text']}"}
        labels[low > 50].append(words | {"share": low if low > 50 else high})
    return [
        {
            "data": {"values": own},
            "mark": {
                "type": "text",
                "align": "right" if on_left else "left",
                "dx": -11 if on_left else 11,
                "fontSize": 11,
                "fill": "var(--ink)",
            },
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        }
        for on_left, own in labels.items()
    ]


def shards(name: str, found: Measures) -> Figure | None:
    """Rows that the model has seen, by shard and epoch, as a share of the shard where its size is known."""
    if not found.shards:
        return None
    known = sorted({shard for _, shard in found.shards} | set(found.shard_rows))
    epochs = sorted({epoch for epoch, _ in found.shards})
    most = max(found.shards.values())
    values: list[Spec] = []
    for epoch in epochs:
        for shard in known:
            rows = found.shards.get((epoch, shard), 0)
            size = found.shard_rows.get(shard)
            share = rows / size if size else rows / most
            values.append(
                {"epoch": epoch, "shard": shard, "rows": rows, "share": round(min(1.0, share), 4)}
                | {"size": size, "text": f"{100 * share:.0f} %" if size else f"{rows:,}"}
            )
    x: Spec = {"field": "shard", "type": "ordinal"}
    x["axis"] = {"labelAngle": 0, "labelOverlap": "greedy", "domain": False, "ticks": False}
    x["axis"] |= {"labelSeparation": 6}
    y: Spec = {"field": "epoch", "type": "ordinal"}
    y["axis"] = {"labelAngle": 0, "labelOverlap": "greedy", "domain": False, "ticks": False}
    opacity: Spec = {"field": "share", "type": "quantitative", "legend": None}
    opacity["scale"] = {"domain": [0, 1], "range": [0.05, 1]}
    encoding: Spec = {"x": x, "y": y, "opacity": opacity}
    encoding["tooltip"] = tips("epoch", "shard", "rows", "size")
    cell = {"type": "rect", "fill": "var(--heat)", "cornerRadius": 2}
    layers: list[Spec] = [
        {"mark": {**cell, "stroke": "var(--surface)", "strokeWidth": 2}, "encoding": encoding}
    ]
    if len(values) <= _LABELLED_CELLS:
        over: Spec = {"field": "share", "type": "quantitative", "legend": None}
        over["scale"] = {"type": "threshold", "domain": [0.55]} | {
            "range": ["var(--ink)", "var(--on-heat)"]
        }
        text: Spec = {"x": x, "y": y, "text": {"field": "text"}, "fill": over}
        layers.append({"mark": {"type": "text", "fontSize": 11}, "encoding": text})
    height = max(40, min(34 * len(epochs), 420))
    title = "Rows that the model has seen, by shard and epoch"
    spec = spec_of(title, layers, height=height, data=values)
    table = [[v["epoch"], v["shard"], v["rows"], v["size"]] for v in values if v["rows"]]
    return Figure(name, title, spec, ["epoch", "shard", "rows seen", "rows of the shard"], table)


def energy(name: str, found: Measures) -> Figure | None:
    """What each client's training took, in kWh. None where no event says it."""
    known = {client: used for client, used in found.energy.items() if used.kwh is not None}
    if not known:
        return None
    values: list[Spec] = [
        {
            "client": client or "unknown",
            "kwh": round(used.kwh or 0.0, 4),
            "text": _energy_text(used),
        }
        for client, used in known.items()
    ]
    y: Spec = {"field": "client", "type": "nominal", "sort": None, "scale": {"paddingInner": 0.35}}
    y["axis"] = {"title": None, "domain": False, "ticks": False, "labelPadding": 6}
    y["axis"] |= {"labelLimit": 130}
    most = max(value["kwh"] for value in values) or 1.0
    x: Spec = {"field": "kwh", "type": "quantitative", "axis": None}
    x["scale"] = {"domain": [0, most * 1.9], "nice": False}
    text: Spec = {"type": "text", "align": "left", "dx": 6, "fontSize": 11, "fill": "var(--ink)"}
    bar = {"type": "bar", "cornerRadiusEnd": 2, "fill": "var(--s-training)"}
    layers: list[Spec] = [
        {"mark": bar, "encoding": {"x": x, "y": y, "tooltip": tips("client", "text")}},
        {"mark": text, "encoding": {"x": x, "y": y, "text": {"field": "text"}}},
    ]
    title = "Energy of each client's training"
    spec = spec_of(title, layers, height=28 * len(values), data=values)
    rows = [[client or "unknown", one.kwh, one.grams, one.money] for client, one in known.items()]
    return Figure(name, title, spec, ["client", "kWh", "g of CO2", "money"], rows)


def _energy_text(used: Energy) -> str:
    said = [f"{short(used.kwh or 0.0)} kWh"]
    said += [f"{short(used.grams)} g CO2"] if used.grams is not None else []
    said += [f"{short(used.money)} money"] if used.money is not None else []
    return "  ·  ".join(said)
