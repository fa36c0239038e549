"""Sums over the ledger, from rollups of days, three hours and quarters of an hour; what these cannot tell, from rows.

A range of time is covered by the longest buckets that lie in it. Its ends, where they are no quarter of an hour, are
summed from the rows themselves, so the answer is exact for any range in any time zone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from sqlalchemy import ColumnElement, Connection, Select, case, func, select

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
    check_filters(query.where)
    groups = _Groups(connection, query)
    found: dict[tuple[str | None, Group], Sums] = defaultdict(lambda: [0] * len(SUMS))
    for label, since, until in buckets_of(query):
        for sign, dimensions_id, sums in _sums_between(connection, since, until, groups.signs):
            for group in groups.of(sign, dimensions_id):
                _add(found[label, group], sums)
            if sign < 0 and groups.is_split:  # what end users did is in the sums of all as well
                for group in groups.without_end_user(dimensions_id):
                    _add(found[label, group], [-value for value in sums])
    rows = [_row(query, label, group, sums) for (label, group), sums in found.items() if any(sums)]
    return sorted(rows, key=lambda row: (row.bucket_start or "", [value or "" for value in row.group.values()]))


def _add(held: Sums, sums: Sequence[int]) -> None:
    held[:] = [each + more for each, more in zip(held, sums, strict=True)]


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
    """Say which groups the sums of a combination of dimensions belong to."""

    def __init__(self, connection: Connection, query: UsageQuery) -> None:
        if len(query.group_by) > 3 or len(set(query.group_by)) != len(query.group_by):
            raise ValueError("usage is grouped by at most three, each once")
        for name in query.group_by:
            if name not in COLUMN_OF:
                raise ValueError(f"usage cannot be grouped by {name!r}; there are {', '.join(COLUMN_OF)}")
        self._query = query
        wants_one = "end_user" in query.where
        self.is_split = "end_user" in query.group_by and not wants_one
        self.signs = (-1,) if wants_one else (1, -1) if self.is_split else (1,)
        self._groups: dict[int, list[Group]] = {}
        self._without: dict[int, list[Group]] = {}
        for values in connection.execute(self._select()).mappings():
            if "tag" not in query.where or query.where["tag"] in _tags(values["tags"]):
                self._groups[values["id"]] = self._groups_of(values)
                if self.is_split and values["end_user"]:
                    self._without[values["id"]] = self._groups_of({**values, "end_user": ""})

    def _select(self) -> Select[Any]:
        where = self._query.where
        statement = select(dimensions).where(
            *(dimensions.c[name] == value for name, value in where.items() if name != "tag")
        )
        return statement if -1 in self.signs else statement.where(dimensions.c.end_user == "")

    def _groups_of(self, values: Mapping[Any, Any]) -> list[Group]:
        groups: list[Group] = [()]
        for name in self._query.group_by:
            value = values[COLUMN_OF[name]]
            choices: Sequence[str | None] = _tags(value) or (None,) if name == "tag" else (value or None,)
            groups = [(*group, choice) for group in groups for choice in choices]
        return groups

    def of(self, _sign: int, dimensions_id: int) -> Sequence[Group]:
        return self._groups.get(dimensions_id, ())

    def without_end_user(self, dimensions_id: int) -> Sequence[Group]:
        return self._without.get(dimensions_id, ())


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


def _sums_between(
    connection: Connection, since_ns: int, until_ns: int, signs: Sequence[int]
) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Yield sign, dimensions and sums of what happened in a range."""
    first = -(-since_ns // (_STEP * _NANO)) * _STEP
    last = until_ns // (_STEP * _NANO) * _STEP
    if first >= last:
        yield from _sums_of_rows(connection, since_ns, until_ns, signs)
        return
    yield from _sums_of_rows(connection, since_ns, first * _NANO, signs)
    for span, start, end in cover(first, last):
        for sign in signs:
            for row in connection.exec_driver_sql(_ROLLUPS, (sign * span, start, end)):
                yield sign, row[0], row[1:]
    yield from _sums_of_rows(connection, last * _NANO, until_ns, signs)


_ROLLUPS = (
    f"SELECT dimensions_id, {', '.join(f'SUM({name})' for name in SUMS)} FROM {rollups.name} "  # noqa: S608 - our names
    "WHERE span = ? AND start >= ? AND start < ? GROUP BY dimensions_id"
)


def _sums_of_rows(
    connection: Connection, since_ns: int, until_ns: int, signs: Sequence[int]
) -> Iterator[tuple[int, int, Sequence[int]]]:
    if since_ns >= until_ns:
        return
    for sign in signs:
        group = ledger.c.dimensions_id if sign > 0 else ledger.c.end_user_dimensions_id
        statement = (
            select(group, *(func.sum(value) for value in sums_of_rows()))
            .where(ledger.c.started_at_ns >= since_ns, ledger.c.started_at_ns < until_ns, group.is_not(None))
            .group_by(group)
        )
        for row in connection.execute(statement):
            yield sign, row[0], row[1:]
