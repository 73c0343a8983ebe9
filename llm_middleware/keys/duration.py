"""How long a key lives, and how often its budget is renewed: ``30s``, ``15m``, ``12h``, ``7d``, ``2w``,
``1mo``.

The grammar is strict, as a typing error here would make a key that lives too long: one number and one unit;
hours, minutes and seconds may follow each other in that order (``1h30m``). Nothing else combines. A month is
the calendar's, in UTC: from the 31st it goes to the last day there is.
"""

from __future__ import annotations

import calendar
import functools
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from ..errors import InvalidRequestError

__all__ = ["Duration", "parse_duration"]

_GRAMMAR = re.compile(
    r"(?P<months>[0-9]+)mo|(?P<weeks>[0-9]+)w|(?P<days>[0-9]+)d"
    r"|(?=[0-9])(?:(?P<hours>[0-9]+)h)?(?:(?P<minutes>[0-9]+)m)?(?:(?P<seconds>[0-9]+)s)?"
)
_SECONDS = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_LONGEST = 100 * 366 * 86400  # a century
_EXAMPLES = '"30s", "15m", "12h", "1h30m", "7d", "2w", "1mo" or null'


@dataclass(frozen=True, slots=True)
class Duration:
    """So many calendar months, or so many seconds."""

    months: int
    seconds: int

    def after(self, start: float, times: int = 1) -> float:
        """``start``, in seconds since the epoch, and so many times this later."""
        if not self.months:
            return start + self.seconds * times
        moment = datetime.fromtimestamp(start, UTC)
        years, month = divmod(moment.month - 1 + self.months * times, 12)
        year = moment.year + years
        day = min(moment.day, calendar.monthrange(year, month + 1)[1])
        return moment.replace(year=year, month=month + 1, day=day).timestamp()

    def following(self, start: float, now: float) -> float:
        """The first of the moments that follow ``start`` at this distance and are later than ``now``."""
        length = self.seconds or self.months * 31 * 86400  # no month is longer, so this is never too many
        times = max(1, int((now - start) // length))
        while self.after(start, times) <= now:
            times += 1
        return self.after(start, times)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Duration | None:
    """None where it is none."""
    match = _GRAMMAR.fullmatch(text) if 0 < len(text) <= 32 else None
    if match is None:
        return None
    numbers = {name: int(digits) for name, digits in match.groupdict().items() if digits is not None}
    if 0 in numbers.values():
        return None
    months = numbers.pop("months", 0)
    seconds = sum(_SECONDS[name] * number for name, number in numbers.items())
    return Duration(months, seconds) if months <= 1200 and seconds <= _LONGEST else None


def parse_duration(text: object, *, field: str = "duration") -> Duration | None:
    """What ``text`` means; None for None, which is for ever. `InvalidRequestError` names the field."""
    if text is None:
        return None
    duration = _parsed(text) if isinstance(text, str) else None
    if duration is None:
        shown = text[:40] if isinstance(text, str) else f"a value of type {type(text).__name__}"
        raise InvalidRequestError(
            f"{field}: expected {_EXAMPLES}, got {shown!r}", param=field, code="invalid_duration"
        )
    return duration
