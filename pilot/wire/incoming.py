"""What a client says, read in one place: typed, finite, bounded values, or a sentence why it cannot be read.

Whatever a client puts into a Flower message, nothing behind this module meets it raw, and nothing here raises.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message

from pilot.wire.messages import (
    MAX_NAME_CHARS,
    HelloReply,
    Part,
    TrainReply,
    from_header,
    plain,
)
from pilot.wire.records import from_records

Reply = HelloReply | TrainReply

log = logging.getLogger("pilot")


@dataclass(frozen=True)
class Said:
    """What one client said, and the `name` by which it calls itself ("" if it gives none).

    `error` is a sentence if it is no reply of ours; then there is no message.
    """

    name: str = ""
    message: Reply | None = None
    parts: Sequence[Part] = ()
    error: str = ""


def read(reply: Message | Exception) -> Said:
    """What stands in a Flower message that is not an error; an exception is what reading it raised already.

    Never raises.
    """
    name = ""
    try:
        if isinstance(reply, Exception):
            raise reply
        header, parts = from_records(reply.content)
        name = _name(header.get("node_name"))
        message = from_header(header)
        if not isinstance(message, Reply):
            raise ValueError(f"a client does not send a {type(message).__name__}")
    except Exception as error:  # noqa: BLE001 - anything that a client's bytes may cause
        return Said(name, error=sentence(error))
    return Said(name, message, parts)


def sentence(error: Exception) -> str:
    """`error` for people: ours say what is wrong, others need their type to be understood."""
    if isinstance(error, ValueError) and str(error).startswith("not a Pilot message"):
        return plain(str(error))
    return plain(f"it cannot be read ({type(error).__name__}: {error})")


def _name(value: object) -> str:
    """Raises ValueError for a name that would not be a client's own if it were cut."""
    if not value:
        return ""
    name = str(value) if isinstance(value, str | int) else ""
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise ValueError("not a Pilot message: its client's name is none, or an endless one")
    return plain(name, MAX_NAME_CHARS).strip()
