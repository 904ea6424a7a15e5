"""The values of run-config keys: of which type, within which limits, and how a mistake is named."""

import difflib
import math
import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pilot.errors import ConfigError

Scalar = bool | int | float | str
AUTO: Literal["auto"] = "auto"
AutoFloat = float | Literal["auto"]  # "auto": the program chooses the number


def check_name(name: str, what: str) -> None:
    """Raise ConfigError unless `name` can name a run or a client, and so a directory and a Redis key."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f'{what} "{name}" must start with a letter or digit, followed by at most 99 letters, digits, '
            '".", "_" or "-"'
        )


def check_alert_url(url: str, name: str) -> None:
    """Raise ConfigError, without showing the address, unless `url` is one that can be posted to."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isascii() or any(c.isspace() for c in url):
        raise ConfigError(f"{name} must be an address such as https://host/path")


def dashed(name: str) -> str:
    return name.replace("_", "-")


def unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f'did you mean "{close[0]}"? ' if close else ""
    return f'unknown run-config key "{key}": {hint}valid keys are {", ".join(sorted(known))}'


def check_value(key: str, value: Any, declared: Any) -> Scalar:
    kind: Any = declared.type
    if kind == AutoFloat:
        if value == AUTO:
            return AUTO
        kind, auto = float, f' or "{AUTO}"'
    else:
        auto = ""
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1 << 1000 else math.inf  # beyond: OverflowError
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"run-config key {key}={value!r} must be {names[kind]}{auto}")
    low, high = declared.metadata["low"], declared.metadata["high"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"run-config key {key}={value} must be finite")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ConfigError(f"run-config key {key}={value} must fit into 64 bits")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise ConfigError(f"run-config key {key}={value} must be {bounds}")
    choices = declared.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f'run-config key {key}="{value}" must be one of {", ".join(choices)}')
    checked: Scalar = value
    return checked
