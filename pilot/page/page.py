"""The page itself: one HTML file that opens without a network, of one run or of several beside each other."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from pilot.page import curves, sections
from pilot.page.chart import MOST_PLACES, colour, seconds_text
from pilot.page.markup import Markup, element, join, json_text, table, text
from pilot.page.sections import Figures
from pilot.page.story import Story

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Content:
    """What a page says, without the frame around it: its title, its body, and the charts' specifications."""

    title: str
    body: Markup
    figures: Mapping[str, Any]


def page(stories: Sequence[Story], script: str) -> str:
    """The HTML of `stories`, the first of which gives the page its name; `script` draws the charts."""
    shown = content(stories)
    scripts = [_unbroken(script), _unbroken(part_of_page("page.js"))]
    allowed = " ".join(f"'sha256-{_digest(one)}'" for one in scripts)
    return document(shown, policy(allowed), [Markup(f"<script>{one}</script>") for one in scripts])


def content(stories: Sequence[Story], above: str = "") -> Content:
    """What the page of `stories` says; `above`: markup at its top."""
    figures = Figures()
    names = _distinct(stories)
    several = len(stories) > 1
    parts = [_comparison(stories, names, figures)] if several else []
    for i, story in enumerate(stories):
        parts.append(_run(story, names[i], figures, f"run{i}-", heading=several))
    title = " and ".join(names) if len(names) < 4 else f"{len(names)} runs"
    top = [above, element("p", "Pilot report", class_="kicker"), element("h1", title)]
    if several:
        links = (element("li", element("a", name, href=f"#run{i}")) for i, name in enumerate(names))
        top.append(element("nav", element("ul", join(links)), aria_label="Runs"))
    else:
        top.append(sections.head(stories[0]))
    unscripted = element("p", "The charts need JavaScript; the tables below do not.")
    top.append(element("noscript", unscripted))
    body = [
        element("header", join(top), class_="top"),
        element("main", join(parts)),
        _footer(stories),
    ]
    return Content(title, join(body), figures.specs)


def policy(scripts: str, more: str = "") -> str:
    """The Content-Security-Policy of a page that runs `scripts` only and loads nothing; `more` allows more."""
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'{more}"
    )


def part_of_page(name: str) -> str:
    """The text of a file beside this one."""
    return (_HERE / name).read_text(encoding="utf-8")


def document(
    shown: Content,
    allowed: str,
    scripts: Sequence[Markup],
    attributes: Mapping[str, str] | None = None,
) -> str:
    """The whole HTML; `allowed`: its policy; `attributes` of its root."""
    more = "".join(f' {name}="{escape(value)}"' for name, value in (attributes or {}).items())
    return f"""<!doctype html>
<html lang="en"{more}>
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{allowed}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{text(shown.title)} · Pilot report</title>
<style>{part_of_page("page.css")}</style>
</head>
<body>
{shown.body}
<script type="application/json" id="figures">{json_text(shown.figures)}</script>
{join(scripts)}
</body>
</html>
"""


def _run(story: Story, name: str, figures: Figures, prefix: str, *, heading: bool) -> Markup:
    parts = [
        sections.who_trained_when(story, figures, prefix),
        sections.learning(story, figures, prefix),
        sections.where_time_went(story, figures, prefix),
        sections.taking_part(story, figures, prefix),
        sections.the_clients(story),
        sections.speed_and_bytes(story, figures, prefix),
        sections.energy(story, figures, prefix),
        sections.seen_rows(story, figures, prefix),
        sections.refused(story),
        sections.configuration(story),
    ]
    if heading:
        parts = [element("h2", name, id=f"{prefix}title"), sections.head(story), *parts]
    label = {"aria_labelledby": f"{prefix}title"} if heading else {"aria_label": name}
    return element("article", join(parts), id=prefix.rstrip("-"), **label)


def _comparison(stories: Sequence[Story], names: Sequence[str], figures: Figures) -> Markup:
    """The curves of all runs in the same charts, and their figures in one table."""
    runs = {name: story.measures.points for name, story in zip(names, stories, strict=True)}
    shown = []
    for quantity, title in (("train_loss", "Training loss"), ("bpb", "Bits per byte")):
        for over in ("tokens", "time"):
            name = f"all-{quantity}-{over}".replace("_", "-")
            figure = curves.curve(name, runs, quantity=quantity, over=over)
            if figure is not None:
                shown.append(sections.part(f"{title} against {over}", "", figures.show(figure)))
    columns = ["run", "state", "tokens", "rounds", "bits per byte", "time", "training"]
    columns += ["clients", "tokens/s of a client", "refused"]
    rows = [
        _line(i, name, story) for i, (name, story) in enumerate(zip(names, stories, strict=True))
    ]
    compared = [
        element("h2", "Side by side", id="side-by-side"),
        table(columns, rows, caption="The runs in numbers"),
        element("div", join(shown), class_="pair"),
    ]
    return element("section", join(compared), aria_labelledby="side-by-side")


def _line(index: int, name: str, story: Story) -> list[object]:
    found = story.measures
    bpbs = [point.bpb for point in found.points if point.bpb is not None]
    rates = [pace.tokens_per_s for pace in found.paces if pace.tokens_per_s is not None]
    share = found.training_share
    swatch = element("span", class_="swatch", style=f"background:{colour(index)}")
    return [
        Markup(f"{swatch}{text(name)}"),
        story.state,
        found.points[-1].tokens if found.points else 0,
        len(found.presences),
        bpbs[-1] if bpbs else None,
        seconds_text(story.timeline.end_s),
        None if share is None else f"{100 * share:.0f} %",
        len(story.timeline.clients),
        round(median(rates)) if rates else None,
        len(story.timeline.refusals),
    ]


def _footer(stories: Sequence[Story]) -> Markup:
    events = sum(story.measures.events for story in stories)
    made = (
        f"Made by pilot {version('pilot')} from {events:,} events; it loads nothing from a network."
    )
    borders = (
        " When an order was sent and answered is the server's clock; what lies between them is laid out by "
        "the client's own seconds."
    )
    some = ""
    if max(len(story.measures.presences) for story in stories) > MOST_PLACES:
        some = " Charts of many rounds show some of them, evenly spaced, and the last."
    return element("footer", made + borders + some)


def _distinct(stories: Sequence[Story]) -> list[str]:
    """The runs' names, those that occur twice with a number."""
    names: list[str] = []
    for story in stories:
        name, number = story.name, 2
        while name in names:
            name, number = f"{story.name} ({number})", number + 1
        names.append(name)
    return names


def _unbroken(script: str) -> str:
    """`script` so that nothing in it ends its element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
