"""Periods of budgets: calendar and rolling, in zones that move their clocks."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.governance import Period, period_for, period_of, read_time, write_time
from penstock.governance.objects import Budget, Window

ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Asia/Kolkata",
    "America/St_Johns", "America/Sao_Paulo", "America/Havana", "Pacific/Apia", "Africa/Casablanca", "Asia/Tehran",
    "Pacific/Chatham", "Africa/Monrovia",
)  # fmt: skip
ROLLING: tuple[Window, ...] = ("minute", "hour", "day", "week", "month")
MOMENTS = st.integers(0, 4_000_000_000)


def at(text: str) -> int:
    return int(read_time(text))


def span(period: Period) -> tuple[str, str | None]:
    return write_time(period.start), None if period.end is None else write_time(period.end)


def hours(window: Window, now: str, zone: str) -> float:
    found = period_of(window, at(now), timezone=zone)
    assert found.end is not None
    return (found.end - found.start) / 3600


@given(st.sampled_from(ROLLING), MOMENTS, st.floats(0, 0.999), st.sampled_from(ZONES), st.one_of(st.none(), MOMENTS))
def test_periods_tile_time(window: Window, second: int, rest: float, zone: str, anchor: int | None) -> None:
    found = period_of(window, second + rest, timezone=zone, anchor=anchor)
    assert found.end is not None
    assert found.start <= second < found.end
    for moment in (found.start, (found.start + found.end) // 2, found.end - 1):
        assert period_of(window, moment, timezone=zone, anchor=anchor) == found
    following = period_of(window, found.end, timezone=zone, anchor=anchor)
    assert following.start == found.end
    assert period_of(window, found.start - 1, timezone=zone, anchor=anchor).end == found.start


@given(st.sampled_from(ROLLING), MOMENTS, MOMENTS, st.sampled_from(ZONES), st.one_of(st.none(), MOMENTS))
def test_later_moments_are_in_later_periods(
    window: Window, first: int, second: int, zone: str, anchor: int | None
) -> None:
    early, late = (
        period_of(window, moment, timezone=zone, anchor=anchor) for moment in sorted((first, second))
    )  # fmt: skip
    assert early == late or (early.end is not None and early.end <= late.start)


@given(
    st.sampled_from((*ROLLING, "total", "manual")), MOMENTS, st.integers(1, 4_000_000_000), st.floats(0, 0.999),
    st.sampled_from(ZONES),
)  # fmt: skip
def test_reset_moves_the_start_and_never_the_end(window: Window, now: int, second: int, rest: float, zone: str) -> None:
    reset = second + rest
    plain = period_of(window, now, timezone=zone)
    moved = period_of(window, now, timezone=zone, reset_at=reset)
    assert moved.end == plain.end
    if reset > plain.start and (plain.end is None or reset <= plain.end - 1):
        assert reset <= moved.start < reset + 1
    elif reset <= plain.start or plain.end is None or reset >= plain.end:
        assert moved == plain
    else:
        assert moved.start == plain.end - 1


def test_what_was_spent_in_the_second_of_a_reset_is_not_in_the_period_after_it() -> None:
    reset = at("2026-11-30T12:00:00Z") + 0.7
    assert period_of("total", reset + 0.1, reset_at=reset).start == at("2026-11-30T12:00:01Z")


@given(MOMENTS, st.sampled_from(ZONES), st.sampled_from(("day", "week", "month")))
def test_calendar_periods_begin_where_the_local_date_does(now: int, zone: str, window: Window) -> None:
    found = period_of(window, now, timezone=zone)
    first = datetime.fromtimestamp(found.start, ZoneInfo(zone))
    last = datetime.fromtimestamp(found.start - 1, ZoneInfo(zone))
    assert last.replace(tzinfo=None) < first.replace(tzinfo=None)
    assert first.date() > last.date()
    if window == "month":
        assert first.month != last.month
    if window == "week":
        assert first.weekday() < last.weekday() or first.date() - last.date() > timedelta(days=1)


@pytest.mark.parametrize(
    ("window", "now", "zone", "start", "end"),
    [
        ("minute", "2026-05-06T07:08:09Z", "UTC", "2026-05-06T07:08:00Z", "2026-05-06T07:09:00Z"),
        ("hour", "2026-05-06T07:08:09Z", "Asia/Kathmandu", "2026-05-06T06:15:00Z", "2026-05-06T07:15:00Z"),
        ("hour", "2026-05-06T07:08:09Z", "Asia/Kolkata", "2026-05-06T06:30:00Z", "2026-05-06T07:30:00Z"),
        ("day", "2026-05-06T23:30:00Z", "Europe/Berlin", "2026-05-06T22:00:00Z", "2026-05-07T22:00:00Z"),
        ("week", "2026-01-01T12:00:00Z", "UTC", "2025-12-29T00:00:00Z", "2026-01-05T00:00:00Z"),
        ("week", "2026-05-03T23:59:59Z", "UTC", "2026-04-27T00:00:00Z", "2026-05-04T00:00:00Z"),
        ("month", "2028-02-29T12:00:00Z", "UTC", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
        ("month", "2026-12-31T23:30:00Z", "Europe/Berlin", "2026-12-31T23:00:00Z", "2027-01-31T23:00:00Z"),
        ("total", "2026-05-06T07:08:09Z", "UTC", "1970-01-01T00:00:00Z", None),
        ("manual", "2026-05-06T07:08:09Z", "UTC", "1970-01-01T00:00:00Z", None),
        # Midnight of 4 November 2018 fell into a gap in São Paulo: the day began at one o'clock.
        ("day", "2018-11-04T12:00:00Z", "America/Sao_Paulo", "2018-11-04T03:00:00Z", "2018-11-05T02:00:00Z"),
        # Midnight of 2 November 2025 came twice in Havana: the day began with the first.
        ("day", "2025-11-02T04:30:00Z", "America/Havana", "2025-11-02T04:00:00Z", "2025-11-03T05:00:00Z"),
        # Samoa had no 30 December 2011.
        ("day", "2011-12-30T10:00:00Z", "Pacific/Apia", "2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z"),
    ],
)
def test_calendar_period(window: Window, now: str, zone: str, start: str, end: str | None) -> None:
    assert span(period_of(window, at(now), timezone=zone)) == (start, end)


@pytest.mark.parametrize(
    ("window", "now", "zone", "length"),
    [
        ("day", "2026-03-29T12:00:00Z", "Europe/Berlin", 23),
        ("day", "2026-10-25T12:00:00Z", "Europe/Berlin", 25),
        ("week", "2026-03-25T12:00:00Z", "Europe/Berlin", 167),
        ("day", "2026-04-04T22:00:00Z", "Australia/Lord_Howe", 24.5),
        ("day", "2026-10-04T00:00:00Z", "Australia/Lord_Howe", 23.5),
        ("hour", "2026-11-01T05:30:00Z", "America/New_York", 1),
        ("hour", "2026-11-01T06:30:00Z", "America/New_York", 1),
        ("hour", "2026-04-04T15:10:00Z", "Australia/Lord_Howe", 0.5),
        ("hour", "2026-10-03T15:40:00Z", "Australia/Lord_Howe", 0.5),
    ],
)
def test_period_where_the_clock_is_moved(window: Window, now: str, zone: str, length: float) -> None:
    assert hours(window, now, zone) == length


@pytest.mark.parametrize(
    ("window", "anchor", "now", "zone", "start", "end"),
    [
        ("month", "2026-01-31T09:00:00Z", "2026-02-10T00:00:00Z", "UTC",
         "2026-01-31T09:00:00Z", "2026-02-28T09:00:00Z"),
        ("month", "2026-01-31T09:00:00Z", "2026-03-10T00:00:00Z", "UTC",
         "2026-02-28T09:00:00Z", "2026-03-31T09:00:00Z"),
        ("month", "2026-01-31T09:00:00Z", "2028-02-29T09:00:00Z", "UTC",
         "2028-02-29T09:00:00Z", "2028-03-31T09:00:00Z"),
        ("month", "2026-01-31T09:00:00Z", "2025-12-31T08:59:59Z", "UTC",
         "2025-11-30T09:00:00Z", "2025-12-31T09:00:00Z"),
        ("day", "2026-03-01T09:00:00+01:00", "2026-04-02T12:00:00Z", "Europe/Berlin",
         "2026-04-02T07:00:00Z", "2026-04-03T07:00:00Z"),
        ("week", "2026-03-04T09:00:00+01:00", "2026-04-02T12:00:00Z", "Europe/Berlin",
         "2026-04-01T07:00:00Z", "2026-04-08T07:00:00Z"),
        ("hour", "2026-03-01T00:20:30Z", "2026-04-02T12:00:00Z", "Europe/Berlin",
         "2026-04-02T11:20:30Z", "2026-04-02T12:20:30Z"),
    ],
)  # fmt: skip
def test_rolling_period(window: Window, anchor: str, now: str, zone: str, start: str, end: str) -> None:
    found = period_of(window, at(now), timezone=zone, anchor=read_time(anchor))
    assert span(found) == (start, end)


@pytest.mark.parametrize("window", ["total", "manual"])
def test_anchor_is_refused_where_nothing_rolls(window: Window) -> None:
    with pytest.raises(ValueError, match="cycle_anchor_at"):
        period_of(window, 0, anchor=0)


def test_unknown_zone_and_window_are_refused() -> None:
    with pytest.raises(ValueError, match="timezone: 'Mars/Olympus'"):
        period_of("day", 0, timezone="Mars/Olympus")
    with pytest.raises(ValueError, match="timezone"):
        period_of("day", 0, timezone="../etc/passwd")
    fortnight: Any = "fortnight"
    with pytest.raises(ValueError, match="window"):
        period_of(fortnight, 0)


def test_period_of_a_budget_follows_its_members() -> None:
    budget = Budget(
        scope="project", scope_id="proj_1", window="month", limit_nano_usd=1, timezone="Europe/Berlin",
        cycle_anchor_at="2026-01-31T10:00:00+01:00", period_reset_at="2026-03-05T00:00:00Z",
    )  # fmt: skip
    now = at("2026-03-10T00:00:00Z")
    assert span(period_for(budget, now)) == ("2026-03-05T00:00:00Z", "2026-03-31T08:00:00Z")
    assert span(period_for(budget, now, reset_at=0.0)) == ("2026-02-28T09:00:00Z", "2026-03-31T08:00:00Z")


def test_time_without_an_offset_is_refused() -> None:
    with pytest.raises(ValueError, match="offset"):
        read_time("2026-03-10T00:00:00")
