"""Windows of a calendar, such as "Mon-Fri 22:00-06:00" or "Apr-Sep 11:00-15:30", in a time zone. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from pilot.errors import ConfigError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_HOURS = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
_AHEAD_DAYS = 9  # every window that depends on the day of the week has begun or ended by then


@dataclass(frozen=True)
class Window:
    """Minutes of the day from `begin` to `end` (after midnight: above 1440), of the days on which it
    begins."""

    begin: int
    end: int
    days: frozenset[int]  # 0: Monday
    months: frozenset[int]  # 1: January

    def spans(self, day: date, zone: ZoneInfo) -> tuple[float, float] | None:
        """(begin, end) of the window that begins on `day`, in seconds since 1970; None if none does."""
        if day.weekday() not in self.days or day.month not in self.months:
            return None
        return _moment_s(day, self.begin, zone), _moment_s(day, self.end, zone)


@dataclass(frozen=True)
class Calendar:
    """Open while any of its windows is."""

    windows: tuple[Window, ...]
    zone: ZoneInfo

    def open_until_s(self, now_s: float) -> float | None:
        """When the calendar closes; None if it is closed now. A week ahead at the latest."""
        until_s = now_s
        for begin_s, end_s in sorted(self._spans(now_s)):
            if begin_s <= until_s < end_s:  # also of windows that follow without a gap
                until_s = end_s
        return until_s if until_s > now_s else None

    def opens_s(self, now_s: float) -> float | None:
        """When the next window begins; None if none does within a week."""
        return min((begin_s for begin_s, _ in self._spans(now_s) if begin_s > now_s), default=None)

    def _spans(self, now_s: float) -> Iterable[tuple[float, float]]:
        today = datetime.fromtimestamp(now_s, self.zone).date()
        for offset in range(-1, _AHEAD_DAYS):
            for window in self.windows:
                if span := window.spans(today + timedelta(days=offset), self.zone):
                    yield span


def read_calendar(texts: Sequence[str], zone: str, where: str) -> Calendar:
    """Raises ConfigError for a window or a time zone that there is not."""
    if not texts:
        raise ConfigError(f"{where} needs at least one window")
    windows = tuple(_window(text, where) for text in texts)
    try:
        return Calendar(windows, ZoneInfo(zone))
    except (KeyError, ValueError, OSError):  # of ZoneInfo: not found, or no name at all
        raise ConfigError(
            f'{where}: there is no time zone "{zone}" (one of them is Europe/Berlin)'
        ) from None


def _window(text: str, where: str) -> Window:
    """Raises ConfigError."""
    *names, hours = text.split() or [""]
    match = _HOURS.fullmatch(hours)
    begin = end = -1
    if match:
        first, first_min, last, last_min = map(int, match.groups())
        begin, end = 60 * first + first_min, 60 * last + last_min
        if max(first_min, last_min) > 59 or begin >= 1440 or end > 1440 or begin == end:
            match = None
    days: set[int] = set()
    months: set[int] = set()
    for name in names:
        day, month = _numbers(name, _DAYS), _numbers(name, _MONTHS)
        days |= day
        months |= {number + 1 for number in month}
        if not day and not month:
            match = None
    if match is None:
        raise _wrong(text, where)
    return Window(
        begin,
        end if end > begin else end + 1440,
        frozenset(days or range(7)),
        frozenset(months or range(1, 13)),
    )


def _wrong(text: str, where: str) -> ConfigError:
    return ConfigError(
        f'{where}: "{text}" is no window: write days or months if you like, and hours, such as '
        '"Mon-Fri 22:00-06:00", "Apr-Sep Sat,Sun 10:00-16:00" or "00:00-24:00"'
    )


def _numbers(text: str, names: Sequence[str]) -> set[int]:
    """Of "fri-mon" 4, 5, 6 and 0; nothing if any word of it is none of `names`."""
    found = set()
    for part in text.lower().split(","):
        first, _, last = part.partition("-")
        if first not in names or (last or first) not in names:
            return set()
        begin, end = names.index(first), names.index(last or first)
        found |= {
            number % len(names) for number in range(begin, end + 1 + len(names) * (end < begin))
        }
    return found


def _moment_s(day: date, minutes: int, zone: ZoneInfo) -> float:
    """A local time that the clocks skip in spring counts as an hour later, one that comes twice as its
    first."""
    moved = day + timedelta(days=minutes // 1440)
    local = datetime.combine(moved, time(minutes % 1440 // 60, minutes % 60), tzinfo=zone)
    return local.astimezone(UTC).timestamp()
