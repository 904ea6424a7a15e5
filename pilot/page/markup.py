"""HTML from values: all that is written by it is escaped."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_AMOUNT = re.compile(r"[\d.,:]+ (?:%|s|min|h|[MG]B)")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """`value` as HTML; what is Markup stays as it is, None is a dash."""
    if isinstance(value, Markup):
        return value
    if value is None or value == "":
        return Markup("–")
    if isinstance(value, bool):
        return Markup("yes" if value else "no")
    if isinstance(value, int):
        return Markup(f"{value:,}")
    if isinstance(value, float):
        return Markup(f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}")
    return Markup(escape(str(value)))


def join(parts: Iterable[str]) -> Markup:
    return Markup("\n".join(text(part) for part in parts if part))


def element(tag: str, content: Any = "", **attributes: Any) -> Markup:
    """`<tag …>content</tag>`; an attribute's `_` becomes `-`, and one that is None is left out."""
    pairs = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "" if content == "" else text(content)
    return Markup(f"<{tag}{''.join(pairs)}>{inner}</{tag}>")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    caption: str = "",
    most_rows: int = 300,
) -> Markup:
    """A table whose numbers stand to the right; of more than `most_rows` rows it says how many there are."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    if len(rows) > most_rows:
        caption = f"{caption} (the first {most_rows:,} of {len(rows):,} rows)".strip()
    head = join(
        element("th", column, scope="col", class_="n" if number else None)
        for column, number in zip(columns, numeric, strict=True)
    )
    body = []
    for row in rows[:most_rows]:
        cells = (
            element("td", value, class_=_cell_class(value, number))
            for value, number in zip(row, numeric, strict=True)
        )
        body.append(element("tr", join(cells)))
    whole = join(
        [
            element("caption", caption) if caption else "",
            element("thead", element("tr", head)),
            element("tbody", join(body)),
        ]
    )
    scrolls = {"tabindex": 0, "role": "region", "aria_label": caption or ", ".join(columns)}
    return element("div", element("table", whole), class_="table", **scrolls)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return _AMOUNT.fullmatch(value) is not None
    return value is None or isinstance(value, int | float)


def _cell_class(value: Any, number: bool) -> str | None:
    if number:
        return "n"
    return "long" if isinstance(value, str) and len(value) > 30 else None


def tiles(facts: Mapping[str, tuple[str, str]]) -> Markup:
    """Name → (value, a remark) as large figures."""
    pairs = []
    for name, (value, remark) in facts.items():
        small = element("small", remark) if remark else Markup("")
        shown = Markup(text(value) + small)
        pairs.append(element("div", join([element("dt", name), element("dd", shown)])))
    return element("dl", join(pairs), class_="tiles")


def json_text(value: Any) -> Markup:
    """`value` as JSON that can stand in a script element: nothing in it can end the element."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)
