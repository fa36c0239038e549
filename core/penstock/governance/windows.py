"""In which period a moment falls: windows of budgets, by the calendar of a zone or rolling from an anchor; pure.

Periods of one window tile time: each moment is in exactly one, and every moment of a period gives the same. A boundary
on a wall clock (midnight, the first of a month) is the first instant at which that clock shows it or more, so a day
that begins in a gap begins after it, and one whose midnight comes twice begins with the first.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from math import ceil, floor
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs

from penstock.governance.objects import Budget, Window

_FIXED = {"minute": 60, "hour": 3600}
"""Seconds of the windows that follow no date."""
_ZONES = 256


@attrs.frozen
class Period:
    """Bound a period: seconds since the epoch."""

    start: int
    """The first second in it."""
    end: int | None
    """The first second after it; None where only a reset ends it."""


def period_of(
    window: Window, now: float, *, timezone: str = "UTC", anchor: float | None = None, reset_at: float = 0.0
) -> Period:
    """Return the period ``now`` falls in; ``now``, ``anchor`` and ``reset_at`` are seconds since the epoch.

    Without an anchor windows follow the calendar of the IANA zone ``timezone``; weeks begin on Monday (ISO 8601). With
    one they roll from it: minutes and hours by the second, days, weeks and months at its local time in the zone, months
    on its day or, where they are shorter, on their last. ``total`` and ``manual`` begin with the epoch and never end.
    A reset within the period moves its start, never its end, to the first whole second after it, so that nothing from
    before it is in; what follows it within that second is in too, as is any moment of the period. 0 is no reset.

    Raises ValueError for an unknown zone or window, an anchor on total or manual, and years outside 1 to 9999.
    """
    moment = floor(now)
    if window in ("total", "manual"):
        if anchor is not None:
            raise ValueError(f"cycle_anchor_at: has no meaning for the window {window!r}, which does not roll")
        found = Period(0, None)
    elif window in _FIXED:
        found = _fixed_period(_FIXED[window], moment, timezone, anchor)
    elif window in ("day", "week", "month"):
        found = _dated_period(window, moment, zone_of(timezone), anchor)
    else:
        raise ValueError(f"window: {window!r} is none of minute, hour, day, week, month, total, manual")
    return found if not reset_at else _after_reset(found, reset_at)


def _after_reset(found: Period, reset_at: float) -> Period:
    """Return a period that starts with a reset, if there was one in it."""
    start, end = ceil(reset_at), found.end
    if end is not None:
        if reset_at >= end:
            return found
        start = min(start, end - 1)
    return Period(start, end) if start > found.start else found


def period_for(budget: Budget, now: float, reset_at: float | None = None) -> Period:
    """Return the period of a budget; without ``reset_at`` that of its ``period_reset_at`` holds.

    Raises ValueError as ``period_of`` and ``read_time`` do.
    """
    anchor = None if budget.cycle_anchor_at is None else read_time(budget.cycle_anchor_at)
    if reset_at is None:
        reset_at = 0.0 if budget.period_reset_at is None else read_time(budget.period_reset_at)
    return period_of(budget.window, now, timezone=budget.timezone, anchor=anchor, reset_at=reset_at)


def read_time(text: str) -> float:
    """Return the seconds since the epoch of an RFC 3339 time. Raises ValueError for any other text."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no offset from UTC; end it with Z, or with one such as +02:00")
    return moment.timestamp()


def write_time(moment: int) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC, such as ``2026-12-01T00:00:00Z``."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@lru_cache(_ZONES)
def zone_of(name: str) -> ZoneInfo:
    """Return the zone of an IANA name such as ``Europe/Berlin``. Raises ValueError for any other."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"timezone: {name!r} is no IANA time zone, such as Europe/Berlin") from None


# --- minutes and hours --------------------------------------------------------------------------------------------


def _fixed_period(length: int, now: int, timezone: str, anchor: float | None) -> Period:
    """Return the period of so many seconds; by the calendar it starts where the local clock shows a full one."""
    if anchor is not None:
        start = now - (now - floor(anchor)) % length
        return Period(start, start + length)
    zone = zone_of(timezone)
    offset = _offset(zone, now)
    start = now - (now + offset) % length
    end = start + length
    if _offset(zone, start) != offset:
        start = _transition(zone, start, now)
    if _offset(zone, end - 1) != offset:
        end = _transition(zone, now, end - 1)
    return Period(start, end)


def _offset(zone: ZoneInfo, moment: int) -> int:
    """Return the seconds by which local time is ahead of UTC."""
    ahead = datetime.fromtimestamp(moment, zone).utcoffset()
    return 0 if ahead is None else round(ahead.total_seconds())


def _transition(zone: ZoneInfo, before: int, after: int) -> int:
    """Return the first second with the offset of ``after``, which that of ``before`` is not; there is one change."""
    offset = _offset(zone, after)
    while after - before > 1:
        middle = (before + after) // 2
        if _offset(zone, middle) == offset:
            after = middle
        else:
            before = middle
    return after


# --- days, weeks, months ------------------------------------------------------------------------------------------


def _dated_period(window: Window, now: int, zone: ZoneInfo, anchor: float | None) -> Period:
    """Return the period between two dates at one local time; their numbers count on from one to the next."""
    local = datetime.fromtimestamp(now, zone).replace(tzinfo=None)
    if anchor is None:
        first = datetime(1970, 1, 5)  # a Monday, on the clock of the zone
    else:
        first = datetime.fromtimestamp(floor(anchor), zone).replace(tzinfo=None, fold=0)
    if window == "month":
        base = first.replace(day=1) if anchor is None else first
        number, wall_of = _months_between(base, local), _monthly(base)
    else:
        length = 1 if window == "day" else 7
        number, wall_of = (local.date() - first.date()).days // length, _daily(first, length)
    while now < (start := _first_instant(wall_of(number), zone)):
        number -= 1
    while now >= (end := _first_instant(wall_of(number + 1), zone)):
        number, start = number + 1, end
    return Period(start, end)


def _daily(first: datetime, length: int) -> Callable[[int], datetime]:
    return lambda number: first + timedelta(days=number * length)


def _monthly(first: datetime) -> Callable[[int], datetime]:
    """Count months from ``first``, on its day or on the last of a shorter month."""

    def wall_of(number: int) -> datetime:
        year, month = divmod(first.year * 12 + first.month - 1 + number, 12)
        return first.replace(year=year, month=month + 1, day=min(first.day, _days_in(year, month + 1)))

    return wall_of


def _months_between(first: datetime, last: datetime) -> int:
    return (last.year - first.year) * 12 + last.month - first.month


def _days_in(year: int, month: int) -> int:
    following = date(year + month // 12, month % 12 + 1, 1) if year < 9999 or month < 12 else None
    return 31 if following is None else (following - timedelta(days=1)).day


def _first_instant(wall: datetime, zone: ZoneInfo) -> int:
    """Return the first second at which the zone's clock shows ``wall`` or later."""
    aware = wall.replace(tzinfo=zone)
    instant = floor(aware.timestamp())
    if datetime.fromtimestamp(instant, zone).replace(tzinfo=None, fold=0) == wall:
        return instant
    # In a gap: with the offset from before it the clock has passed it already, with the one from after it has not.
    return _transition(zone, floor(aware.replace(fold=1).timestamp()), instant)
