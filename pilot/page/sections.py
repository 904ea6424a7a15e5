"""What the page says of one run, part by part: a sentence, a chart, and its numbers."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from pilot.config import DEFAULTS
from pilot.page import bars, curves
from pilot.page import lanes as lane_charts
from pilot.page.chart import STATE_COLOURS, Figure, colour, seconds_text, short
from pilot.page.markup import Markup, element, join, table, text, tiles
from pilot.page.measures import Energy
from pilot.page.story import Story
from pilot.page.timeline import State, is_death
from pilot.wire.jsonable import jsonable

_MANY_REFUSALS = 200


class Figures:
    """The specifications of a page by the names of their places, as sections add them."""

    def __init__(self) -> None:
        self.specs: dict[str, dict[str, Any]] = {}

    def show(self, figure: Figure, **attributes: Any) -> Markup:
        """Room for `figure`, which a keyboard reaches, and its numbers below it."""
        self.specs[figure.name] = figure.spec
        attributes |= {"tabindex": 0, "role": "group", "aria_label": figure.title}
        height = f"min-height:{figure.spec['height'] + 30}px"
        room = element("div", id=figure.name, class_="chart", style=height, **attributes)
        if not figure.rows:
            return element("figure", room)
        numbers = join(
            [
                element("summary", "Numbers"),
                table(figure.columns, figure.rows, caption=figure.title),
            ]
        )
        return element("figure", join([room, element("details", numbers)]))


def part(title: str, lede: str, *content: str) -> Markup:
    """A part of the page: its heading, what it says in a sentence, and the rest."""
    head = [element("h3", title), element("p", lede, class_="lede") if lede else ""]
    return element("section", join([*head, *content]), class_="part")


def head(story: Story) -> Markup:
    """Model, state and the large figures of a run."""
    facts, found = story.facts, story.measures
    state = element("span", story.state, class_=f"state {story.state.replace(' ', '-')}")
    began = datetime.fromtimestamp(story.timeline.began, UTC)
    line = Markup(
        f"{state}{text(_model(story))} Started {began:%d %B %Y, %H:%M} UTC, "
        f"{seconds_text(story.timeline.end_s)} of events."
    )
    last = found.points[-1] if found.points else None
    bpbs = [point for point in found.points if point.bpb is not None]
    tokens = last.tokens if last else 0
    wanted = f"of {facts.total_tokens:,}" if facts.total_tokens else "committed"
    shown = {
        "tokens": (f"{tokens:,}", wanted),
        "bits per byte": (
            f"{bpbs[-1].bpb:.4f}" if bpbs else "–",
            f"after round {bpbs[-1].round_number}" if bpbs else "not scored yet",
        ),
        "training loss": (
            f"{last.train_loss:.4f}" if last and last.train_loss is not None else "–",
            "nats per token, last round",
        ),
        "rounds": (str(len(found.presences)), "committed"),
        "clients": (str(len(story.timeline.clients)), "took part"),
        "replies refused": (str(len(story.timeline.refusals)), _of_replies(story)),
    }
    if found.goodput is not None:
        shown["goodput"] = (f"{100 * found.goodput:.0f} %", "of all clients' time")
    elif found.training_share is not None:
        shown["time in training"] = (f"{100 * found.training_share:.0f} %", "at least one client")
    return join([element("p", line, class_="model"), tiles(shown)])


def _of_replies(story: Story) -> str:
    return f"of {story.measures.replies + len(story.timeline.refusals)}"


def _model(story: Story) -> str:
    config, facts = story.facts.config, story.facts
    if not config:
        return "No snapshot says yet what is trained."
    size = f", {facts.parameters:,} parameters" if facts.parameters else ""
    data = f"{config.get('source', '?')}, {config.get('num-shards', '?')} shards"
    return (
        f"{str(config.get('arch', 'classic')).capitalize()} GPT of depth {config.get('depth', '?')}{size}, "
        f"{config.get('sequence-len', '?')} tokens of context; data: {data}."
    )


def who_trained_when(story: Story, figures: Figures, prefix: str) -> Markup:
    """The picture of the run."""
    timeline = story.timeline
    figure = lane_charts.lanes(f"{prefix}lanes", timeline)
    shown = {one.state for one in timeline.intervals}
    swatches = [(state.value, STATE_COLOURS[state], "") for state in State if state in shown]
    if timeline.outages:
        swatches.append(("no server", "var(--band)", ""))
    if timeline.refusals:
        swatches.append(("reply refused", "var(--s-refused)", "diamond"))
    away_s = sum(end_s - start_s for start_s, end_s in timeline.outages)
    lede = _trained_sentence(story)
    if timeline.outages:
        spans = "one span" if len(timeline.outages) == 1 else f"{len(timeline.outages)} spans"
        lede += f" For {seconds_text(away_s)}, in {spans}, no server led the run."
    lede += " Drag to move in time; Shift and the wheel, or + and -, zoom; Escape shows all."
    domain = figure.spec["layer"][1]["encoding"]["x"]["scale"]["domain"]
    room = figures.show(figure, data_zoom="window_start", data_domain=str(domain))
    return part("Who trained when", lede, key(swatches), room)


def _trained_sentence(story: Story) -> str:
    refusals = len(story.timeline.refusals)
    deaths = sum(is_death(one.reason) for one in story.timeline.refusals)
    farewells = sum(one.state is State.DRAINED for one in story.timeline.intervals)
    said = [f"{refusals} replies were refused or lost" if refusals else "no reply was refused"]
    said += [f"{_times(deaths)} a process or node was gone"] if deaths else []
    said += [f"{_times(farewells)} a client left in order"] if farewells else []
    return f"A lane per client, blank where it waits: {', '.join(said)}."


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def key(swatches: Iterable[tuple[str, str, str]]) -> Markup:
    """What colours mean: (name, colour, form)."""
    items = (
        element("li", join([element("i", style=f"background:{shade}", class_=form or None), name]))
        for name, shade, form in swatches
    )
    return element("ul", join(items), class_="key")


def learning(story: Story, figures: Figures, prefix: str) -> Markup:
    """Loss and bits per byte, against tokens and time."""
    runs = {story.name: story.measures.points}
    shown = []
    for quantity, title in (("train_loss", "Training loss"), ("bpb", "Bits per byte")):
        for over in ("tokens", "time"):
            name = f"{prefix}{quantity}-{over}".replace("_", "-")
            behind = story.measures.paces if quantity == "train_loss" else ()
            figure = curves.curve(name, runs, quantity=quantity, over=over, behind=behind)
            if figure is not None:
                lede = "" if quantity == "bpb" else "Thin: each client's own loss."
                shown.append(part(f"{title} against {over}", lede, figures.show(figure)))
    return element("div", join(shown), class_="pair") if shown else Markup("")


def taking_part(story: Story, figures: Figures, prefix: str) -> Markup:
    """Liveness beside participation, by round and by client."""
    presence = bars.presence(f"{prefix}presence", story.measures)
    participation = bars.participation(f"{prefix}participation", story.measures)
    shown = []
    if presence is not None:
        swatches = [
            ("merged", "var(--s-training)", ""),
            ("with an order, nothing merged", "var(--unmerged)", ""),
        ]
        lede = "How many clients had an order in each round, and how many of them were merged."
        shown.append(part("Clients by round", lede, key(swatches), figures.show(presence)))
    if participation is not None:
        swatches = [("alive", "var(--alive)", "dot"), ("merged", "var(--s-training)", "dot")]
        lede = (
            "Alive: its time less what it was silent, dead or away. Merged: of the rounds with an order. "
            "The gap between them is work that was lost."
        )
        room = figures.show(participation)
        shown.append(part("Liveness and participation", lede, key(swatches), room))
    return element("div", join(shown), class_="pair")


def where_time_went(story: Story, figures: Figures, prefix: str) -> Markup:
    """Goodput, and the rest: of the federation, and of each client."""
    found = story.measures
    spent = bars.time_spent(f"{prefix}spent", found)
    shown = []
    if spent is not None:
        share = found.training_share or 0.0
        lede = f"In {100 * share:.0f} % of the time at least one client trained"
        if found.goodput is not None:
            lede += (
                f"; goodput, merged steps over all clients' time, was {100 * found.goodput:.0f} %"
            )
        lede += ". The rest by what everyone waited for."
        shown.append(part("Where the time went", lede, figures.show(spent)))
    if story.timeline.clients:
        own = lane_charts.client_time(f"{prefix}client-time", story.timeline)
        lede = "From each client's coming to the end, in the colours of the lanes; the palest is waiting."
        shown.append(part("Each client's time", lede, figures.show(own)))
    return element("div", join(shown), class_="pair")


def speed_and_bytes(story: Story, figures: Figures, prefix: str) -> Markup:
    """Tokens per second, MFU, bytes up and down."""
    found, clients = story.measures, story.timeline.clients
    shown, missing = [], list[str]()
    rate = curves.pace(f"{prefix}rate", found.paces, clients, "tokens_per_s")
    if rate is not None:
        shown.append(part("Tokens per second", "", figures.show(rate)))
    mfu = curves.pace(f"{prefix}mfu", found.paces, clients, "mfu")
    if mfu is not None:
        shown.append(part("MFU", "", figures.show(mfu)))
    elif rate is not None:
        missing.append("MFU: no data sheet says what these devices can do, as with CPUs.")
    traffic = curves.traffic(f"{prefix}bytes", found)
    if traffic is not None:
        down, up = sum(t.down for t in found.traffic), sum(t.up for t in found.traffic)
        lede = f"{megabytes(down)} went down to clients and {megabytes(up)} came up, in tensors."
        shown.append(part("Bytes", lede, figures.show(traffic)))
    else:
        missing.append("Bytes: an older version of pilot wrote these events.")
    if missing:
        shown.append(part("Not known", " ".join(missing)))
    return element("div", join(shown), class_="pair")


def energy(story: Story, figures: Figures, prefix: str) -> Markup:
    """Energy, carbon and price, where events have them."""
    figure = bars.energy(f"{prefix}energy", story.measures)
    if figure is None:
        return Markup("")
    whole = sum(story.measures.energy.values(), Energy())
    said = [f"{short(whole.kwh or 0.0)} kWh"]
    said += [f"{short(whole.grams)} g of CO2"] if whole.grams is not None else []
    said += [f"{short(whole.money)} of money"] if whole.money is not None else []
    lede = f"{', '.join(said)} in all, as far as clients say it"
    tokens = story.measures.points[-1].tokens if story.measures.points else 0
    if tokens and whole.kwh:
        lede += f"; {short(whole.kwh / tokens * 1e6)} kWh per million tokens of the model"
    return part("Energy and price", f"{lede}.", figures.show(figure))


def megabytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def the_clients(story: Story) -> Markup:
    """The table of clients."""
    columns = ["client", "rounds merged", "with an order", "tokens", "tokens/s", "MFU", "training"]
    columns += ["goodput", "alive", "refused", "down", "up"]
    rows = []
    for i, one in enumerate(story.measures.clients):
        dot = element("span", class_="swatch", style=f"background:{colour(i)}")
        rows.append(
            [
                Markup(f"{dot}{text(one.client)}"),
                one.merged,
                one.asked,
                one.tokens,
                None if one.tokens_per_s is None else round(one.tokens_per_s),
                _percent(one.mfu),
                _percent(one.training_share),
                _percent(one.goodput),
                _percent(one.alive_share),
                one.refused,
                None if one.bytes_down is None else megabytes(one.bytes_down),
                None if one.bytes_up is None else megabytes(one.bytes_up),
            ]
        )
    keep = [i for i in range(len(columns)) if i < 5 or any(row[i] is not None for row in rows)]
    columns, rows = [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]
    lede = "Tokens per second are the median of its rounds, while it trained."
    return part("Clients", lede, table(columns, rows, caption="Clients of the run"))


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def seen_rows(story: Story, figures: Figures, prefix: str) -> Markup:
    """The heat map of shards."""
    figure = bars.shards(f"{prefix}shards", story.measures)
    if figure is None:
        return part("Rows seen", "No row is committed yet.")
    rows = sum(story.measures.shards.values())
    lede = f"{rows:,} rows are committed. A cell is one shard in one epoch; full colour is the whole shard."
    return part("Rows seen, by shard and epoch", lede, figures.show(figure))


def refused(story: Story) -> Markup:
    """Refused replies with their reasons, the most frequent first, then one by one."""
    refusals = story.timeline.refusals
    if not refusals:
        return part("Refused replies", "None.")
    counts: dict[str, tuple[int, dict[str, None]]] = {}
    for one in refusals:
        number, clients = counts.get(one.reason, (0, {}))
        counts[one.reason] = (number + 1, {**clients, one.client or "unknown": None})
    ranked = sorted(counts.items(), key=lambda item: -item[1][0])
    rows = [[number, reason, ", ".join(clients)] for reason, (number, clients) in ranked]
    each = [
        [seconds_text(one.at_s), one.round_number, one.client, one.reason]
        for one in refusals[:_MANY_REFUSALS]
    ]
    listed = join(
        [
            element("summary", "One by one"),
            table(["time", "round", "client", "reason"], each, caption="Refused replies"),
        ]
    )
    lede = "Their rows went back to the ledger; nothing of them is in the model."
    counted = table(["times", "reason", "clients"], rows, caption="Refused replies by reason")
    return part("Refused replies", lede, counted, element("details", listed))


def configuration(story: Story) -> Markup:
    """All keys, those that differ from the defaults in bold; versions and fingerprints."""
    facts = story.facts
    if not facts.config:
        return part("Configuration", "No snapshot is in the run's directory yet.")
    rows = []
    for key_name, value in sorted(jsonable(facts.config).items()):
        own = key_name != "run-name" and DEFAULTS.get(key_name) != value
        cells = element("td", key_name) + element("td", value)
        rows.append(element("tr", Markup(cells), class_="set" if own else None))
    listed = element("table", element("tbody", join(rows)))
    versions = [[name, value] for name, value in jsonable(facts.versions).items()]
    prints = [[name, value] for name, value in jsonable(facts.fingerprints).items()]
    lede = "Bold: other than the default."
    return part(
        "Configuration",
        lede,
        element("div", listed, class_="columns"),
        table(["software", "version"], versions, caption="Versions") if versions else "",
        element(
            "details",
            join(
                [
                    element("summary", "Fingerprints of data and code"),
                    table(["of", "fingerprint"], prints, caption="Fingerprints"),
                ]
            ),
        )
        if prints
        else "",
    )
