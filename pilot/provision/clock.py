"""The wall clock: what a provisioner decides must mean the same after its restart, and to calendars."""

import time


class WallClock:
    """A `Clock` whose seconds are those since 1970; it may be set back, which lengthens what was being
    waited for."""

    def now_s(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
