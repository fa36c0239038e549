"""Time: the buckets that a question is asked in, and the buckets of rollups that make up a range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from penstock.governance import UsageQuery
from penstock_plugins.store.ledger_tables import STEP

MAX_BUCKETS = 10_000
_NANO = 1_000_000_000
Bucket = tuple[str | None, int, int]
"""Label, start and end, nanoseconds since the epoch."""


def buckets_of(query: UsageQuery) -> Iterator[Bucket]:
    """Yield each bucket. Raises ValueError."""
    try:
        zone = ZoneInfo(query.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{query.timezone!r} is no time zone") from None
    if query.bucket is None:
        if query.since_ns < query.until_ns:
            yield None, query.since_ns, query.until_ns
        return
    start = _floor(datetime.fromtimestamp(query.since_ns // _NANO, zone), query.bucket)
    for _ in range(MAX_BUCKETS):
        start_ns = int(start.timestamp()) * _NANO
        if start_ns >= query.until_ns:
            return
        following = _next(start, query.bucket, zone)
        end_ns = int(following.timestamp()) * _NANO
        yield start.isoformat(), max(start_ns, query.since_ns), min(end_ns, query.until_ns)
        start = following
    raise ValueError(f"that is more than {MAX_BUCKETS} buckets; ask for less time or longer buckets")


def _floor(local: datetime, bucket: str) -> datetime:
    if bucket == "hour":
        zone = local.tzinfo
        # In absolute time, so that an hour the clocks repeat stays two.
        return (local.astimezone(UTC) - timedelta(minutes=local.minute, seconds=local.second)).astimezone(zone)
    floored = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    return floored.replace(day=1) if bucket == "month" else floored


def _next(start: datetime, bucket: str, zone: ZoneInfo) -> datetime:
    if bucket == "hour":
        absolute = start.astimezone(UTC)
        for _ in range(8):  # quarters of an hour: clocks may move by half an hour
            absolute += timedelta(seconds=STEP)
            local = absolute.astimezone(zone)
            if not local.minute:
                return local
        return (start.astimezone(UTC) + timedelta(hours=1)).astimezone(zone)
    if bucket == "day":
        day = (start.replace(tzinfo=None) + timedelta(days=1)).replace(hour=0)
    else:
        day = (start.replace(tzinfo=None, day=1, hour=0) + timedelta(days=32)).replace(day=1)
    return datetime.fromtimestamp(day.replace(tzinfo=zone).timestamp(), zone)  # where midnight does not exist, after it


def cover(since: int, until: int, spans: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield span, start and end of runs of buckets that make up a range that begins and ends with the shortest."""
    span = spans[0]
    first, last = -(-since // span) * span, until // span * span
    if first >= last:
        if len(spans) > 1 and since < until:
            yield from cover(since, until, spans[1:])
        return
    if since < first:
        yield from cover(since, first, spans[1:])
    yield span, first, last
    if last < until:
        yield from cover(last, until, spans[1:])
