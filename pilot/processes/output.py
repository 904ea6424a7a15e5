"""What a program printed, as one line for an error message. Standard library only."""

import re
from typing import IO

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def plain(text: str) -> str:
    """`text` without the terminal's colours, which Flower writes into pipes too."""
    return _ANSI.sub("", text)


def last_line(log: IO[bytes], *, containing: str = "") -> str:
    """The last line of `log` that contains `containing`, in any case, or else its last line."""
    log.seek(0)
    text = plain(log.read().decode("utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matching = [line for line in lines if containing.lower() in line.lower()]
    return (matching or lines or ["no output"])[-1]
