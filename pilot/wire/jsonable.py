"""Any value as JSON, whatever it was: for events (`jsonable`), and for the header of a message (`header_text`).

Events are read by people and by strict parsers: NaN becomes null there, and credentials are cut out. A header
is read by `messages.from_header` only, so NaN stays NaN.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pilot.config import Scalar
from pilot.redis_url import redact_url

MAX_DEPTH = 8  # of nested values; what lies deeper, or in a cycle, is written as its repr
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_CREDENTIALS = re.compile(r"@|password=|username=", re.IGNORECASE)


def jsonable(value: Any, depth: int = 0) -> Any:
    """`value` in JSON's types: numbers of numpy and torch as numbers, NaN and infinity as None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return redact(str(value))
    try:
        if depth < MAX_DEPTH:
            if isinstance(value, Mapping):
                return {str(key): jsonable(item, depth + 1) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return [jsonable(item, depth + 1) for item in value]
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                names = [field.name for field in dataclasses.fields(value)]
                return {name: jsonable(getattr(value, name), depth + 1) for name in names}
            if hasattr(value, "tolist"):  # arrays and tensors, numpy's and torch's scalars
                return jsonable(value.tolist(), depth + 1)
        return redact(str(value))
    except Exception as error:  # noqa: BLE001 - a foreign type's own methods may raise anything
        return f"<{type(value).__name__}: {type(error).__name__}>"


def redact(text: str) -> str:
    """`text` without the credentials of the URLs in it."""

    def without(match: re.Match[str]) -> str:
        url = match.group()
        return redact_url(url) if _CREDENTIALS.search(url) else url

    return _URL.sub(without, text)


def header_text(header: Mapping[Any, Any]) -> str:
    """`header` as JSON. Takes anything, raises nothing: what JSON has no form for becomes text."""
    return (
        "{"
        + ", ".join(f"{_json_text(_as_text(k))}: {_json_text(v)}" for k, v in header.items())
        + "}"
    )


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain)
    except (TypeError, ValueError, RecursionError):  # odd keys, cycles, an endless integer
        return json.dumps(_as_text(value))


def _plain(value: Any) -> Scalar | None:
    """`value` as something that every transport takes: a bool, int, float, str or None.

    Takes anything, raises nothing: one odd metric must not cost an hour of training. Tensors and numpy
    scalars of one element become numbers; what has no better form becomes text.
    """
    try:
        item = value.item() if hasattr(value, "item") else value
        for kind in (bool, int, float):
            if isinstance(item, kind):
                return kind(item)
    except Exception:  # noqa: BLE001 - a foreign type's own methods may raise anything
        item = value
    return None if item is None else _as_text(item)


def _as_text(value: Any) -> str:
    """`value` for people, in characters that UTF-8 has."""
    try:
        text = str(value) if isinstance(value, str) else repr(value)
        return text.encode("utf-8", "replace").decode("utf-8")
    except Exception:  # noqa: BLE001 - a foreign type's own methods may raise anything
        return f"<{type(value).__name__}>"
