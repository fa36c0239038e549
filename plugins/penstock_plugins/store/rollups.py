"""Sums over the ledger, from rollups of days, three hours and quarters of an hour; what these cannot tell, from rows.

A range of time is covered by the longest buckets that lie in it. Its ends, where they are no quarter of an hour, are
summed from the rows themselves, so the answer is exact for any range in any time zone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import add
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from sqlalchemy import ColumnElement, Connection, Integer, Select, case, column, func, literal, select
from sqlalchemy import values as values_of

from penstock import Usage
from penstock.governance import UsageQuery, UsageRow
from penstock_plugins.store.commits import FAILED
from penstock_plugins.store.ledger_tables import SPANS, SUMS, TOKENS, dimensions, ledger, rollups

COLUMN_OF = {
    "key": "virtual_key_id",
    "principal": "principal_id",
    "end_user": "end_user",
    "model": "model",
    "provider": "provider",
    "project": "project_id",
    "team": "team_id",
    "tag": "tags",
}
"""What usage can be grouped by."""
FILTERS = (
    "organization_id", "team_id", "project_id", "virtual_key_id", "principal_id", "end_user", "binding_id", "provider",
    "model", "tag",
)  # fmt: skip
MAX_BUCKETS = 10_000
_NANO = 1_000_000_000
_STEP = SPANS[-1]
_STEP_NS = _STEP * _NANO
_PART = 1000
Sums = list[int]
Group = tuple[str | None, ...]


def check_filters(where: Mapping[str, str]) -> None:
    """Raise ValueError for what cannot be filtered by."""
    for name in where:
        if name not in FILTERS:
            raise ValueError(f"{name!r} cannot be filtered by; there are {', '.join(FILTERS)}")


def sums_of_rows() -> list[ColumnElement[Any]]:
    """Return what SUMS are of rows of the ledger."""
    values = {
        "requests": case((ledger.c.outcome == "adjustment", 0), else_=1),
        "errors": case((ledger.c.outcome.in_(FAILED), 1), else_=0),
        "unpriced": case((ledger.c.cost_source == "unpriced", 1), else_=0),
        "estimated": case((ledger.c.usage_source == "estimated", 1), else_=0),
    }
    return [values[name] if name in values else ledger.c[name] for name in SUMS]


def usage(connection: Connection, query: UsageQuery) -> Sequence[UsageRow]:
    """Return sums by bucket and group. Raises ValueError."""
    groups = _Groups(query)
    buckets = list(buckets_of(query))
    found: dict[tuple[int, Group], Sums] = {}
    for sign in groups.signs:
        for bucket, values, sums in _sums_of(connection, groups, buckets, sign):
            for group in groups.of(values):
                _add(found, (bucket, group), sums)
            if sign < 0 and groups.is_split:  # what end users did is in the sums of all as well
                for group in groups.of(groups.without_end_user(values)):
                    _add(found, (bucket, group), [-value for value in sums])
    rows = [_row(query, buckets[bucket][0], group, sums) for (bucket, group), sums in found.items() if any(sums)]
    return sorted(rows, key=lambda row: (row.bucket_start or "", [value or "" for value in row.group.values()]))


def _add(found: dict[tuple[int, Group], Sums], key: tuple[int, Group], sums: Sequence[int]) -> None:
    held = found.get(key)
    found[key] = list(sums) if held is None else list(map(add, held, sums))


def _row(query: UsageQuery, label: str | None, group: Group, sums: Sums) -> UsageRow:
    named: dict[str, Any] = dict(zip(SUMS, sums, strict=True))
    return UsageRow(
        group=dict(zip(query.group_by, group, strict=True)),
        bucket_start=label,
        requests=named["requests"],
        errors=named["errors"],
        usage=Usage(**{name: named[name] for name in TOKENS}),
        cost_nano_usd=named["cost_nano_usd"],
        unpriced=named["unpriced"],
        estimated=named["estimated"],
    )


class _Groups:
    """Say what is summed, and which groups it belongs to."""

    def __init__(self, query: UsageQuery) -> None:
        check_filters(query.where)
        if len(query.group_by) > 3 or len(set(query.group_by)) != len(query.group_by):
            raise ValueError("usage is grouped by at most three, each once")
        for name in query.group_by:
            if name not in COLUMN_OF:
                raise ValueError(f"usage cannot be grouped by {name!r}; there are {', '.join(COLUMN_OF)}")
        self._names = query.group_by
        self._tag = query.where.get("tag")
        wants_one = "end_user" in query.where
        self.is_split = "end_user" in query.group_by and not wants_one
        self.signs = (-1,) if wants_one else (1, -1) if self.is_split else (1,)
        self.columns = [dimensions.c[COLUMN_OF[name]] for name in query.group_by]
        if self._tag is not None:
            self.columns.append(dimensions.c.tags)
        self.where = [dimensions.c[name] == value for name, value in query.where.items() if name != "tag"]

    def of(self, values: Sequence[str]) -> list[Group]:
        """Return the groups that sums with these values of ``columns`` belong to: one for each tag."""
        if self._tag is not None and self._tag not in _tags(values[-1]):
            return []
        groups: list[Group] = [()]
        for name, value in zip(self._names, values, strict=False):
            choices: Sequence[str | None] = _tags(value) or (None,) if name == "tag" else (value or None,)
            groups = [(*group, choice) for group in groups for choice in choices]
        return groups

    def without_end_user(self, values: Sequence[str]) -> Sequence[str]:
        """Return the values that the sums of all are found by."""
        at = self._names.index("end_user")
        return [*values[:at], "", *values[at + 1 :]]


def _tags(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(msgspec.json.decode(text))) if text else ()


# --- time ---------------------------------------------------------------------------------------------------------


def buckets_of(query: UsageQuery) -> Iterator[tuple[str | None, int, int]]:
    """Yield label, start and end of each bucket, nanoseconds since the epoch. Raises ValueError."""
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
            absolute += timedelta(seconds=_STEP)
            local = absolute.astimezone(zone)
            if not local.minute:
                return local
        return (start.astimezone(UTC) + timedelta(hours=1)).astimezone(zone)
    if bucket == "day":
        day = (start.replace(tzinfo=None) + timedelta(days=1)).replace(hour=0)
    else:
        day = (start.replace(tzinfo=None, day=1, hour=0) + timedelta(days=32)).replace(day=1)
    return datetime.fromtimestamp(day.replace(tzinfo=zone).timestamp(), zone)  # where midnight does not exist, after it


def cover(since: int, until: int, spans: Sequence[int] = SPANS) -> Iterator[tuple[int, int, int]]:
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


def _sums_of(
    connection: Connection, groups: _Groups, buckets: Sequence[tuple[str | None, int, int]], sign: int
) -> Iterator[tuple[int, Sequence[str], Sequence[int]]]:
    """Yield number of the bucket, values of the groups' columns, and sums."""
    runs: list[tuple[int, int, int, int]] = []
    ends: list[tuple[int, int, int]] = []
    for number, (_, since_ns, until_ns) in enumerate(buckets):
        first, last = -(-since_ns // _STEP_NS) * _STEP, until_ns // _STEP_NS * _STEP
        if first >= last:
            ends.append((number, since_ns, until_ns))
            continue
        ends += [(number, since_ns, first * _NANO), (number, last * _NANO, until_ns)]
        runs += [(number, sign * span, start, end) for span, start, end in cover(first, last)]
    width = len(groups.columns)
    for statement in (
        *_from_rollups(groups, runs),
        *_from_rows(groups, [each for each in ends if each[1] < each[2]], sign),
    ):
        for row in connection.execute(statement):
            yield row[0], row[1 : 1 + width], row[1 + width :]


def _from_rollups(groups: _Groups, runs: Sequence[tuple[int, int, int, int]]) -> Iterator[Select[Any]]:
    columns = [column(name, Integer) for name in ("number", "span", "first", "last")]
    for part in _parts(runs):
        run = values_of(*columns, name="run").data(part).cte("run")
        yield (
            select(run.c.number, *groups.columns, *(func.sum(rollups.c[name]) for name in SUMS))
            .select_from(run)
            .join(rollups, (rollups.c.span == run.c.span) & rollups.c.start.between(run.c.first, run.c.last - 1))
            .join(dimensions, dimensions.c.id == rollups.c.dimensions_id)
            .where(*groups.where)
            .group_by(run.c.number, *groups.columns)
        )


def _from_rows(groups: _Groups, ends: Sequence[tuple[int, int, int]], sign: int) -> Iterator[Select[Any]]:
    number = ledger.c.dimensions_id if sign > 0 else ledger.c.end_user_dimensions_id
    for bucket, since_ns, until_ns in ends:
        yield (
            select(literal(bucket), *groups.columns, *(func.sum(value) for value in sums_of_rows()))
            .select_from(ledger)
            .join(dimensions, dimensions.c.id == number)
            .where(ledger.c.started_at_ns >= since_ns, ledger.c.started_at_ns < until_ns, *groups.where)
            .group_by(literal(bucket), *groups.columns)
        )


def _parts(runs: Sequence[tuple[int, int, int, int]]) -> Iterator[Sequence[tuple[int, int, int, int]]]:
    for start in range(0, len(runs), _PART):
        yield runs[start : start + _PART]
