"""Tables of a TOML file as frozen dataclasses: every key is declared once, and each mistake is one
sentence."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pilot.errors import ConfigError

T = TypeVar("T")
_NAMES = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}


def key(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field of such a dataclass; without a default the key must be there."""
    metadata = {"low": low, "above": above, "choices": tuple(choices)}
    return field(default=default, metadata=metadata)


TABLE: Any = field(default_factory=dict)  # of strings, empty unless it is there


def read_table(cls: type[T], table: object, where: str) -> T:
    """`table` as a `cls`, whose fields' names have underscores for dashes.

    Raises ConfigError for a key that is unknown, missing, of another type or out of range.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table")
    fields = {one.name.replace("_", "-"): one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for name in table:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(fields)}"
            raise ConfigError(f'{where} has no key "{name}": {hint}')
    values = {}
    for name, one in fields.items():
        if name in table:
            what = f"{where}: {name}"
            values[one.name] = _checked(table[name], hints[one.name], one.metadata, what)
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where} needs the key {name}")
    return cls(**values)


def _checked(value: object, kind: Any, metadata: Mapping[str, Any], what: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):  # `X | None`
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{what} must be a list of strings")
        return tuple(value)
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise ConfigError(f"{what} must be a table of strings")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{what} must be {_NAMES[kind]}, not {value!r}")
    _check_range(value, metadata, what)
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], what: str) -> None:
    choices, low, above = (
        metadata.get("choices"),
        metadata.get("low"),
        metadata.get("above"),
    )
    if choices and value not in choices:
        raise ConfigError(f'{what} is "{value}": one of {", ".join(choices)} is possible')
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{what} must be a finite number")
    if low is not None and value < low:
        raise ConfigError(f"{what} is {value:g}: it must be at least {low:g}")
    if above is not None and value <= above:
        raise ConfigError(f"{what} is {value:g}: it must be above {above:g}")
