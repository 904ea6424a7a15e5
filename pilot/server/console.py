"""The ServerApp's log on standard output: whole plain lines."""

import logging
import sys
from typing import Any

logger = logging.getLogger("pilot")


class _Handler(logging.StreamHandler[Any]):
    """Writes to what sys.stdout is at that moment: Flower and pytest exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stdout


class _Formatter(logging.Formatter):
    """The message alone; warnings and errors say so in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def configure_logging() -> None:
    """Print the logger "pilot" to standard output, in whole plain lines. Once is enough."""
    if not any(isinstance(handler, _Handler) for handler in logger.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
