"""Sums over the ledger, from rollups; what these cannot tell, from rows.

A range of time is covered by the longest buckets that lie in it. Its ends, shorter than the shortest of them, are
summed from the rows themselves, so the answer is exact for any range in any time zone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from operator import add, itemgetter, sub
from typing import Any

import attrs
import msgspec
from sqlalchemy import ColumnElement, Connection, Integer, Select, case, column, func, select, tuple_
from sqlalchemy import values as values_of

from penstock import Usage
from penstock.governance import UsageQuery, UsageRow
from penstock_plugins.store.buckets import Bucket, buckets_of, cover
from penstock_plugins.store.ledger_tables import (
    FAILED,
    LEVELS,
    SUMS,
    Level,
    dimensions,
    end_users,
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
_NANO = 1_000_000_000
_PART = 1000
_FEW = 4096
"""Combinations of dimensions that are worth telling apart in memory: the database need not sort by their text."""
_FEW_SUMS = 20_000
Sums = Sequence[int]
Group = tuple[str | None, ...]
Found = dict[tuple[int, Group], Sums]
"""By number of the bucket, and group."""


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
    make = _RowMaker(query, names)
    limit = query.limit
    after = None if query.after is None else (query.after[0], _text_of(query.after[1]))
    rows: list[UsageRow] = []
    first, count = (0 if after is None else _number_of(buckets, after[0])), 1
    while first < len(buckets) and (limit is None or len(rows) < limit):
        part = buckets[first:] if limit is None else buckets[first : first + count]
        beyond = after[1] if after is not None and part[0][0] == after[0] else None
        page = _Page(beyond, None if limit is None else limit - len(rows))
        found = _added_up(connection, groups, names, part, page)
        texts = {group: _text_of(group) for _, group in found}
        there = sorted(found, key=lambda each: (each[0], texts[each[1]]))
        if beyond is not None:
            there = [each for each in there if each[0] or texts[each[1]] > beyond]
        is_cut = page.limit is not None and len(there) >= page.limit
        there = there[: page.limit]
        rows += [make(part[each[0]][0], each[1], found[each]) for each in there if any(found[each])]
        if is_cut:  # there may be more of the last bucket, where sums of nothing are left out
            number, group = there[-1]
            first, after = first + number, (part[number][0], texts[group])
        else:
            first += len(part)
            count *= 2
    return rows


@attrs.frozen
class _Page:
    """Say which groups are wanted: the first ones, in their order, beyond one in the first bucket."""

    beyond: tuple[str, ...] | None
    limit: int | None


def _text_of(group: Group) -> tuple[str, ...]:
    """Return what groups are in the order of."""
    return tuple(value or "" for value in group)


def _number_of(buckets: Sequence[Bucket], label: str | None) -> int:
    """Return the number of the first bucket that is not before the one of a label."""
    labels = [label for label, _, _ in buckets]
    if label in labels or label is None:
        return 0 if label is None else labels.index(label)
    at = datetime.fromisoformat(label).timestamp()
    return next((number for number, (_, _, end) in enumerate(buckets) if end > at * _NANO), len(buckets))


def _added_up(
    connection: Connection, groups: _Groups, names: Sequence[str], buckets: Sequence[Bucket], page: _Page
) -> Found:
    found: Found = {}
    for level, is_taken in groups.levels:
        asked = _Asked(connection, groups, level, names, page, is_taken)
        for number, those, sums in _sums_of(asked, buckets):
            for group in those:
                held = found.get((number, group))
                if held is None:
                    found[number, group] = [-each for each in sums] if is_taken else sums
                else:
                    found[number, group] = list(map(sub if is_taken else add, held, sums))
    return found


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
        self.end_user = query.where.get("end_user")
        """The only one whose exchanges are summed."""
        wanted = {COLUMN_OF[name] for name in query.group_by} | {
            "tags" if name == "tag" else name for name in query.where
        }
        self.is_by_end_user = "end_user" in query.group_by and self.end_user is None
        rest = level_of(wanted - {"end_user"})
        level = level_of(wanted)
        self.levels = ((level, False), (rest, False), (level, True)) if self.is_by_end_user else ((level, False),)
        """What to add up, and (``True``) to take away: what end users did is in the sums of all as well."""
        self._of_dimensions = [name for name in query.group_by if name != "end_user"]
        self.columns = [dimensions.c[COLUMN_OF[name]] for name in self._of_dimensions]
        self.order = [None if name == "end_user" else COLUMN_OF[name] for name in query.group_by]
        """The columns that groups are in the order of; None: the end user."""
        if self._tag is not None:
            self.columns.append(dimensions.c.tags)
        others = ((name, value) for name, value in query.where.items() if name not in ("tag", "end_user"))
        self.where = [dimensions.c[name] == value for name, value in others]

    def of(self, values: Sequence[str], end_user: str | None) -> list[Group]:
        """Return the groups that sums with these values of ``columns`` belong to: one for each tag."""
        if self._tag is not None and self._tag not in tags_in(values[-1]):
            return []
        end_user = end_user or self.end_user
        by_name = dict(zip(self._of_dimensions, values, strict=False))
        groups: list[Group] = [()]
        for name in self._names:
            choices: Sequence[str | None]
            if name == "end_user":
                choices = (end_user,)
            else:
                choices = tags_in(by_name[name]) or (None,) if name == "tag" else (by_name[name] or None,)
            groups = [(*group, choice) for group in groups for choice in choices]
        return groups


def tags_in(text: str) -> tuple[str, ...]:
    """Return the tags of dimensions, each once."""
    return tuple(dict.fromkeys(msgspec.json.decode(text))) if text else ()


@attrs.frozen
class _Asked:
    """Hold what is asked of one level."""

    connection: Connection
    groups: _Groups
    level: Level
    names: Sequence[str]
    page: _Page
    is_taken: bool

    @property
    def where(self) -> list[ColumnElement[bool]]:
        """Return what dimensions must be."""
        return [dimensions.c.level == self.level.kept_by, *self.groups.where]

    @property
    def is_by_end_user(self) -> bool:
        """Whether sums are those of each end user."""
        return self.groups.is_by_end_user and self.level.is_of_end_users and not self.is_taken

    def is_end_user(self, id_: ColumnElement[Any]) -> list[ColumnElement[bool]]:
        """Return what the id of an end user must be."""
        if self.groups.end_user is None:
            return []
        of_name = select(end_users.c.id).where(end_users.c.end_user == self.groups.end_user)
        return [id_ == of_name.scalar_subquery()]


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


@attrs.frozen
class _End:
    """A part of a bucket that no bucket of rollups fits in."""

    number: int
    since_ns: int
    until_ns: int


def _sums_of(asked: _Asked, buckets: Sequence[Bucket]) -> Iterator[tuple[int, Sequence[Group], Sums]]:
    """Yield number of the bucket, groups and sums."""
    runs: list[_Run] = []
    ends: list[_End] = []
    step = asked.level.spans[-1]
    for number, (_, since_ns, until_ns) in enumerate(buckets):
        first, last = -(-since_ns // (step * _NANO)) * step, until_ns // (step * _NANO) * step
        if first >= last:
            ends.append(_End(number, since_ns, until_ns))
            continue
        ends += [_End(number, since_ns, first * _NANO), _End(number, last * _NANO, until_ns)]
        for span, start, end in cover(first, last, asked.level.spans):
            before = runs[-1] if runs else None
            if before and (before.span, before.last, before.length) == (span, start, end - start):
                runs[-1] = attrs.evolve(before, last=end)
            else:
                runs.append(_Run(number, span, start, end, end - start))
    known = _few(asked, len(buckets))
    for part in _parts(runs):
        if known is None:
            yield from _by_columns(asked, _of_rollups(asked, part, asked.groups.columns))
            continue
        for row in asked.connection.execute(_of_rollups(asked, part, [rollups.c.dimensions_id])).all():
            yield row[0], known[row[1]], row[2:]
    for part in _parts([end for end in ends if end.since_ns < end.until_ns]):
        yield from _by_columns(asked, _of_rows(asked, part))


def _by_columns(asked: _Asked, statement: Select[Any]) -> Iterator[tuple[int, Sequence[Group], Sums]]:
    width = 1 + len(asked.groups.columns)
    if not asked.is_by_end_user:
        for row in asked.connection.execute(statement).all():
            yield row[0], asked.groups.of(row[1:width], None), row[width:]
        return
    sums = statement.subquery()  # the texts of end users only after they are added up
    named = select(*sums.c, end_users.c.end_user).join(end_users, end_users.c.id == sums.c.end_user_id)
    for row in asked.connection.execute(_first(asked, named, sums)).all():
        yield row[0], asked.groups.of(row[1:width], row[-1]), row[width + 1 : -1]


def _first(asked: _Asked, named: Select[Any], sums: Any) -> Select[Any]:
    """Return a query for no more groups than the page holds: end users are many, their rows costly to make.

    Groups among the first of all are among the first of each part of the time that they are in.
    """
    if asked.page.limit is None or any(each is dimensions.c.tags for each in asked.groups.columns):
        return named
    columns = [end_users.c.end_user if name is None else sums.c[name] for name in asked.groups.order]
    if asked.page.beyond is not None:
        named = named.where((sums.c.number > 0) | (tuple_(*columns) > tuple_(*asked.page.beyond)))
    return named.order_by(sums.c.number, *columns).limit(asked.page.limit)


def _few(asked: _Asked, buckets: int) -> dict[int, list[Group]] | None:
    """Return the groups of the dimensions asked for, by their ids; None where these are better joined."""
    if asked.is_by_end_user or not asked.groups.columns:
        return None
    statement = select(dimensions.c.id, *asked.groups.columns).where(*asked.where).limit(_FEW + 1)
    rows = asked.connection.execute(statement).all()
    if len(rows) > _FEW:
        return None
    is_little = len(rows) * buckets <= _FEW_SUMS or len(rows) <= 2 * len({row[1:] for row in rows})
    return {row[0]: asked.groups.of(row[1:], None) for row in rows} if is_little else None


def _of_rollups(asked: _Asked, runs: Sequence[_Run], by: Sequence[ColumnElement[Any]]) -> Select[Any]:
    run = _values("run", _Run, runs)
    number = run.c.number + (rollups.c.start - run.c.first) // run.c.length
    is_in = (
        (rollups.c.level == asked.level.number)
        & (rollups.c.span == run.c.span)
        & rollups.c.start.between(run.c.first, run.c.last - 1)
    )
    groups = [number.label("number"), *by, *([rollups.c.end_user_id] if asked.is_by_end_user else [])]
    sums = [func.sum(rollups.c[name]).label(f"sum_{name}") for name in asked.names]
    statement = select(*groups, *sums).select_from(run).join(rollups, is_in).group_by(*groups)
    statement = statement.where(*asked.is_end_user(rollups.c.end_user_id))
    if any(each.table is dimensions for each in by):
        return statement.join(dimensions, dimensions.c.id == rollups.c.dimensions_id).where(*asked.where)
    if asked.groups.where:
        return statement.where(rollups.c.dimensions_id.in_(select(dimensions.c.id).where(*asked.where)))
    return statement


def _of_rows(asked: _Asked, ends: Sequence[_End]) -> Select[Any]:
    end = _values("part", _End, ends)
    is_in = (ledger.c.started_at_ns >= end.c.since_ns) & (ledger.c.started_at_ns < end.c.until_ns)
    groups = [
        end.c.number.label("number"),
        *asked.groups.columns,
        *([ledger.c.end_user_id] if asked.is_by_end_user else []),
    ]
    sums = [func.sum(value).label(f"sum_{number}") for number, value in enumerate(sums_of_rows(asked.names))]
    statement = select(*groups, *sums).select_from(end).join(ledger, is_in).group_by(*groups)
    if asked.level.is_of_end_users:
        statement = statement.where(ledger.c.end_user_id.is_not(None))
    statement = statement.where(*asked.is_end_user(ledger.c.end_user_id))
    return statement.join(dimensions, dimensions.c.id == ledger.c.dimensions_id).where(*asked.groups.where)


def _values(name: str, of: type, rows: Sequence[Any]) -> Any:
    columns = [column(field.name, Integer) for field in attrs.fields(of)]
    return values_of(*columns, name=name).data([attrs.astuple(each) for each in rows]).cte(name)


def _parts(parts: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(parts), _PART):
        yield parts[start : start + _PART]
