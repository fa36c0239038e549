"""Sums over the ledger, from rollups; what these cannot tell, from rows.

A range of time is covered by the longest buckets that lie in it. Its ends, where they are no quarter of an hour, are
summed from the rows themselves, so the answer is exact for any range in any time zone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import add, itemgetter, sub
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import attrs
import msgspec
from sqlalchemy import ColumnElement, Connection, Integer, Select, case, column, func, literal, select
from sqlalchemy import values as values_of

from penstock import Usage
from penstock.governance import UsageQuery, UsageRow
from penstock_plugins.store.ledger_tables import (
    END_USERS,
    FAILED,
    LEVELS,
    STEP,
    SUMS,
    Level,
    dimensions,
    ledger,
    level_of,
    rollups,
)

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
_STEP_NS = STEP * _NANO
_PART = 1000
_FEW = 4096
"""Combinations of dimensions that are worth telling apart in memory: the database need not sort by their text."""
_FEW_SUMS = 20_000
Sums = Sequence[int]
Group = tuple[str | None, ...]
Signed = tuple[Group, bool]
"""A group that sums are added to, or (``True``) taken from."""


def check_filters(where: Mapping[str, str]) -> None:
    """Raise ValueError for what cannot be filtered by."""
    for name in where:
        if name not in FILTERS:
            raise ValueError(f"{name!r} cannot be filtered by; there are {', '.join(FILTERS)}")


def sums_of_rows(names: Sequence[str] = SUMS) -> list[ColumnElement[Any]]:
    """Return what SUMS are of rows of the ledger."""
    values = {
        "requests": case((ledger.c.outcome == "adjustment", 0), else_=1),
        "errors": case((ledger.c.outcome.in_(FAILED), 1), else_=0),
        "unpriced": case((ledger.c.cost_source == "unpriced", 1), else_=0),
        "estimated": case((ledger.c.usage_source == "estimated", 1), else_=0),
    }
    return [values[name] if name in values else ledger.c[name] for name in names]


def usage(connection: Connection, query: UsageQuery) -> Sequence[UsageRow]:
    """Return sums by bucket and group. Raises ValueError."""
    groups = _Groups(query)
    buckets = list(buckets_of(query))
    names = _names_of_sums(connection, query)
    found: dict[tuple[int, Group], Sums] = {}
    for level in groups.levels:
        asked = _Asked(connection, groups, level, names)
        for bucket, signed, sums in _sums_of(asked, buckets):
            for group, is_taken in signed:
                held = found.get((bucket, group))
                if held is None:
                    found[bucket, group] = [-each for each in sums] if is_taken else sums
                else:
                    found[bucket, group] = list(map(sub if is_taken else add, held, sums))
    texts = {group: tuple(value or "" for value in group) for group in {group for _, group in found}}
    make = _RowMaker(query, names)
    there = sorted(found, key=lambda each: (each[0], texts[each[1]]))
    return [make(buckets[each[0]][0], each[1], sums) for each in there if any(sums := found[each])]


class _RowMaker:
    """Make rows of sums with these names; there may be many."""

    def __init__(self, query: UsageQuery, names: Sequence[str]) -> None:
        at = dict.fromkeys(SUMS, len(names)) | {name: index for index, name in enumerate(names)}
        at["source"] = len(names) + 1
        self._more = (0, attrs.fields(Usage).source.default)
        self._usage = itemgetter(*(at[field.name] for field in attrs.fields(Usage)))
        self._others = itemgetter(
            *(at[name] for name in ("requests", "errors", "cost_nano_usd", "unpriced", "estimated"))
        )
        self._group_by = query.group_by

    def __call__(self, label: str | None, group: Group, sums: Sums) -> UsageRow:
        values = (*sums, *self._more)
        requests, errors, cost, unpriced, estimated = self._others(values)
        return UsageRow(
            group=dict(zip(self._group_by, group, strict=True)),
            bucket_start=label,
            requests=requests,
            errors=errors,
            usage=Usage(*self._usage(values)),
            cost_nano_usd=cost,
            unpriced=unpriced,
            estimated=estimated,
        )


def _names_of_sums(connection: Connection, query: UsageQuery) -> tuple[str, ...]:
    """Return those of SUMS that are not 0 throughout; sums of what is never negative are where their total is."""
    level = LEVELS[-1]
    span = level.spans[0]
    first, last = query.since_ns // _NANO // span * span, query.until_ns // _NANO
    of_days = (rollups.c.level == level.number, rollups.c.span == span, rollups.c.start.between(first, last))
    totals = connection.execute(select(*(func.sum(rollups.c[name]) for name in SUMS)).where(*of_days)).one()
    always = ("requests", "cost_nano_usd")
    return tuple(name for name, total in zip(SUMS, totals, strict=True) if total or name in always)


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
        wanted = {COLUMN_OF[name] for name in query.group_by} | {
            "tags" if name == "tag" else name for name in query.where
        }
        self._is_split = "end_user" in query.group_by and "end_user" not in query.where
        rest = level_of(wanted - {"end_user"})
        self.levels = (END_USERS, rest) if self._is_split else (level_of(wanted),)
        self.columns = [dimensions.c[COLUMN_OF[name]] for name in query.group_by]
        if self._tag is not None:
            self.columns.append(dimensions.c.tags)
        self.where = [dimensions.c[name] == value for name, value in query.where.items() if name != "tag"]

    def of(self, values: Sequence[str], level: Level) -> list[Signed]:
        """Return the groups that sums with these values of ``columns`` belong to: one for each tag."""
        found = [(group, False) for group in self._of(values)]
        if level is END_USERS and self._is_split:  # what end users did is in the sums of all as well
            at = self._names.index("end_user")
            found += [(group, True) for group in self._of([*values[:at], "", *values[at + 1 :]])]
        return found

    def _of(self, values: Sequence[str]) -> list[Group]:
        if self._tag is not None and self._tag not in tags_in(values[-1]):
            return []
        groups: list[Group] = [()]
        for name, value in zip(self._names, values, strict=False):
            choices: Sequence[str | None] = tags_in(value) or (None,) if name == "tag" else (value or None,)
            groups = [(*group, choice) for group in groups for choice in choices]
        return groups


def tags_in(text: str) -> tuple[str, ...]:
    """Return the tags of dimensions, each once."""
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


@attrs.frozen
class _Asked:
    """Hold what is asked of one level."""

    connection: Connection
    groups: _Groups
    level: Level
    names: Sequence[str]

    @property
    def where(self) -> list[ColumnElement[bool]]:
        """Return what dimensions must be."""
        return [dimensions.c.level == self.level.number, *self.groups.where]


@attrs.frozen
class _Run:
    """Cover buckets of a query that follow each other, each by as many buckets of rollups of one span."""

    number: int
    """Of the first of them."""
    span: int
    first: int
    last: int
    length: int
    """Of each bucket, in seconds."""


def _sums_of(
    asked: _Asked, buckets: Sequence[tuple[str | None, int, int]]
) -> Iterator[tuple[int, Sequence[Signed], Sequence[int]]]:
    """Yield number of the bucket, groups and sums."""
    runs: list[_Run] = []
    ends: list[tuple[int, int, int]] = []
    for number, (_, since_ns, until_ns) in enumerate(buckets):
        first, last = -(-since_ns // _STEP_NS) * STEP, until_ns // _STEP_NS * STEP
        if first >= last:
            ends.append((number, since_ns, until_ns))
            continue
        ends += [(number, since_ns, first * _NANO), (number, last * _NANO, until_ns)]
        for span, start, end in cover(first, last, asked.level.spans):
            before = runs[-1] if runs else None
            if before and (before.span, before.last, before.length) == (span, start, end - start):
                runs[-1] = attrs.evolve(before, last=end)
            else:
                runs.append(_Run(number, span, start, end, end - start))
    known = _few(asked, len(buckets))
    for part in _parts(runs):
        if known is None:
            yield from _by_columns(asked, _of_rollups(asked, part))
            continue
        statement = _of_rollups(asked, part, rollups.c.dimensions_id)
        for row in asked.connection.execute(statement).all():
            yield row[0], known[row[1]], row[2:]
    for number, since_ns, until_ns in ends:
        if since_ns < until_ns:
            yield from _by_columns(asked, _of_rows(asked, number, since_ns, until_ns))


def _by_columns(asked: _Asked, statement: Select[Any]) -> Iterator[tuple[int, Sequence[Signed], Sequence[int]]]:
    width = 1 + len(asked.groups.columns)
    for row in asked.connection.execute(statement).all():
        yield row[0], asked.groups.of(row[1:width], asked.level), row[width:]


def _few(asked: _Asked, buckets: int) -> dict[int, list[Signed]] | None:
    """Return the groups of the dimensions asked for, by their ids; None where these are better joined."""
    statement = select(dimensions.c.id, *asked.groups.columns).where(*asked.where).limit(_FEW + 1)
    rows = asked.connection.execute(statement).all()
    if len(rows) > _FEW:
        return None
    is_little = len(rows) * buckets <= _FEW_SUMS or len(rows) <= 2 * len({row[1:] for row in rows})
    return {row[0]: asked.groups.of(row[1:], asked.level) for row in rows} if is_little else None


def _of_rollups(asked: _Asked, runs: Sequence[_Run], *by: ColumnElement[Any]) -> Select[Any]:
    columns = [column(field.name, Integer) for field in attrs.fields(_Run)]
    run = values_of(*columns, name="run").data([attrs.astuple(each) for each in runs]).cte("run")
    number = run.c.number + (rollups.c.start - run.c.first) // run.c.length
    is_in = (
        (rollups.c.level == asked.level.number)
        & (rollups.c.span == run.c.span)
        & rollups.c.start.between(run.c.first, run.c.last - 1)
    )
    sums = [func.sum(rollups.c[name]) for name in asked.names]
    groups = by or asked.groups.columns
    statement = select(number, *groups, *sums).select_from(run).join(rollups, is_in).group_by(number, *groups)
    if not by:
        return statement.join(dimensions, dimensions.c.id == rollups.c.dimensions_id).where(*asked.where)
    if asked.groups.where:
        return statement.where(rollups.c.dimensions_id.in_(select(dimensions.c.id).where(*asked.where)))
    return statement


def _of_rows(asked: _Asked, bucket: int, since_ns: int, until_ns: int) -> Select[Any]:
    number = ledger.c.end_user_dimensions_id if asked.level is END_USERS else ledger.c.dimensions_id
    return (
        select(literal(bucket), *asked.groups.columns, *(func.sum(value) for value in sums_of_rows(asked.names)))
        .select_from(ledger)
        .join(dimensions, dimensions.c.id == number)
        .where(ledger.c.started_at_ns >= since_ns, ledger.c.started_at_ns < until_ns, *asked.groups.where)
        .group_by(literal(bucket), *asked.groups.columns)
    )


def _parts(runs: Sequence[_Run]) -> Iterator[Sequence[_Run]]:
    for start in range(0, len(runs), _PART):
        yield runs[start : start + _PART]
