"""Any value in JSON's types, and text without credentials: what may be written down, whatever it was."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

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
