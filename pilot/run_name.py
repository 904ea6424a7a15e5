"""Names of runs that nobody has named."""

import datetime
import secrets


def generated_name() -> str:
    """A name nobody has used: date, time and four random hex digits."""
    now = datetime.datetime.now().astimezone()
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
