"""What the doctor says of one thing: it is well, something must be done, or it cannot be known here."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    OK = "ok"
    FIX = "to do"
    UNKNOWN = "not known"  # nothing to be done for it, as far as one can tell


@dataclass(frozen=True)
class Finding:
    """`what` was looked at, what was found, and for FIX the `cure`."""

    what: str
    level: Level
    text: str
    cure: str = ""

    def line(self) -> str:
        cure = f": {self.cure}" if self.cure else ""
        return f"{self.level:<9}  {self.what}: {self.text}{cure}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ok(what: str, text: str) -> Finding:
    return Finding(what, Level.OK, text)


def fix(what: str, text: str, cure: str) -> Finding:
    return Finding(what, Level.FIX, text, cure)


def unknown(what: str, text: str) -> Finding:
    return Finding(what, Level.UNKNOWN, text)
