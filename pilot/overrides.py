"""What is typed after `--run-config`: TOML files and key=value, merged before `config.py` checks them."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from pilot.config import Scalar
from pilot.errors import ConfigError

_OVERRIDE = re.compile(r"""\s*([^\s=]+)\s*=\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"']+)(?=\s|$)""")


def load_run_config(values: Sequence[str]) -> dict[str, Scalar]:
    """Merge `--run-config` arguments, later ones winning: TOML files and 'key=value …' strings.

    Raises ConfigError for a missing or malformed file, and for text that is not key=value.
    """
    merged: dict[str, Scalar] = {}
    for value in values:
        if value.endswith(".toml"):
            merged.update(_read_file(Path(value)))
        else:
            merged.update(_parse_overrides(value))
    return merged


def _read_file(path: Path) -> dict[str, Scalar]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read run-config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"run-config file {path} is not TOML: {error}") from error
    for key, value in table.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ConfigError(f"run-config file {path}: {key} must be a single value, not a table")
    return table


def _parse_overrides(text: str) -> dict[str, Scalar]:
    values: dict[str, Scalar] = {}
    position = 0
    while text[position:].strip():
        match = _OVERRIDE.match(text, position)
        if match is None:
            rest = text[position:].strip()
            raise ConfigError(
                f'--run-config "{rest}" is neither a .toml file nor key=value (strings in quotes)'
            )
        key, raw = match.groups()
        try:
            values[key] = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"--run-config {key}={raw}: write a number, true, false or a quoted string "
                f"({key}='\"{raw}\"')"
            ) from error
        position = match.end()
    return values
