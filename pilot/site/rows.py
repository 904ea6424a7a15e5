"""Rows that a device of this site takes at once, where its operator rather than the run says how many.

The node configuration is a client's, the environment variable a machine's: the narrower one wins, and both win
over the run's `device-batch-size`. Standard library only, as a ClientApp and `pilot node` read it, too.
"""

import os
from collections.abc import Mapping

from pilot.errors import PilotError

ROWS_VARIABLE = "PILOT_DEVICE_BATCH_SIZE"  # of a machine; wins over the run's `device-batch-size`
ROWS_KEY = "device-batch-size"  # of a client's node configuration, and of a run's
MOST_ROWS = 1 << 20


def checked_rows(value: object, what: str) -> int:
    """`value` if it is a number of rows, or 0 for what fits. Raises PilotError; `what` says who set it."""
    if type(value) is not int or not 0 <= value <= MOST_ROWS:
        raise PilotError(
            f"{what} is {value!r}: set it to a number of rows, or to 0 for what the device has memory for"
        )
    return value


def rows_of_node(node_config: Mapping[str, object]) -> int | None:
    """What a node configuration says, None for nothing. Raises PilotError for what is no number of rows."""
    if ROWS_KEY not in node_config:
        return None
    return checked_rows(node_config[ROWS_KEY], f"{ROWS_KEY} in --node-config")


def given_rows(configured: int) -> int:
    """What this machine says, else `configured`, the run's. Raises PilotError for what is no number of rows."""
    text = os.environ.get(ROWS_VARIABLE, "")
    if not text:
        return configured
    return checked_rows(int(text) if text.isascii() and text.isdecimal() else text, ROWS_VARIABLE)
