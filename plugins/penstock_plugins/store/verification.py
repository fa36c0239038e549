"""Derive everything that is kept beside the ledger from its rows again, and say what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, FromClause, Select, and_, func, literal, or_, select, union_all

from penstock.governance import Discrepancy
from penstock_plugins.store.commits import debits_in
from penstock_plugins.store.ledger_tables import (
    ALL,
    DIMENSIONS,
    LEVELS,
    NOBODY,
    STEP,
    SUMS,
    Level,
    counters,
    dimensions,
    end_users,
    key_use,
    ledger,
    rollups,
)
from penstock_plugins.store.rollups import sums_of_rows
from penstock_plugins.store.totals import spent_where

_NANO = 1_000_000_000
_PART = 1000


def discrepancies(connection: Connection) -> Iterator[Discrepancy]:
    """Yield whatever differs."""
    yield from _counters(connection)
    yield from _dimensions(connection)
    yield from _all_rollups(connection)
    yield from _key_use(connection)


def _counters(connection: Connection) -> Iterator[Discrepancy]:
    charged: Counter[int] = Counter()
    rows = connection.scalars(select(ledger.c.debits).where(ledger.c.debits.is_not(None)))
    for part in rows.partitions(_PART):
        for text in part:
            for counter_id, _, charge in debits_in(text):
                charged[counter_id] += charge
    for row in connection.execute(select(counters).where(counters.c.is_durable.is_(True))).all():
        seed = 0
        if row.seed_where is not None and row.seed_through:
            seed = spent_where(connection, msgspec.json.decode(row.seed_where), row.period, row.seed_through)
        derived = seed + charged.pop(row.id, 0)
        if row.total != derived:
            yield Discrepancy(what=row.counter, period=row.period, recorded=row.total, derived=derived)
    for counter_id, amount in charged.items():
        yield Discrepancy(what=f"counter {counter_id} that rows are charged to", period=0, recorded=0, derived=amount)


def _dimensions(connection: Connection) -> Iterator[Discrepancy]:
    """Yield the combinations of dimensions that are not those of the rows that refer to them."""
    model = func.coalesce(func.nullif(ledger.c.model_served, ""), ledger.c.model_asked, "")
    is_wrong = (dimensions.c.level.is_(None)) | (dimensions.c.level != ALL.number) | (dimensions.c.model != model)
    yield from _referred(
        connection, "dimensions", select(ledger.c.dimensions_id, func.count()).outerjoin_from(
            ledger, dimensions, dimensions.c.id == ledger.c.dimensions_id
        ).where(is_wrong).group_by(ledger.c.dimensions_id)
    )  # fmt: skip
    yield from _referred(
        connection, "end user", select(ledger.c.end_user_id, func.count()).outerjoin_from(
            ledger, end_users, end_users.c.id == ledger.c.end_user_id
        ).where(ledger.c.end_user_id.is_not(None), end_users.c.id.is_(None)).group_by(ledger.c.end_user_id)
    )  # fmt: skip


def _referred(connection: Connection, what: str, statement: Select[Any]) -> Iterator[Discrepancy]:
    for id_, rows in connection.execute(statement).all():
        yield Discrepancy(what=f"{what} {id_}: rows of others", period=0, recorded=rows, derived=0)


def _all_rollups(connection: Connection) -> Iterator[Discrepancy]:
    """Derive the finest rollups from rows, and others from finer ones where these are right."""
    right: set[tuple[Level, int]] = set()
    for level in LEVELS:
        finer = (ALL, STEP)
        for span in reversed(level.spans):
            derived = _of_finer(level, span, *finer) if finer in right else _of_rows(level, span)
            found = list(_rollups(connection, level, span, derived))
            yield from found
            finer = (level, span)
            if not found:
                right.add(finer)


def _of_rows(level: Level, span: int) -> Select[Any]:
    seconds, sums = ledger.c.started_at_ns // _NANO, sums_of_rows()
    end_user = ledger.c.end_user_id if level.is_of_end_users else literal(NOBODY)
    is_in = end_user.is_not(None)
    if level.kept_by == ALL.number:
        return _derived(seconds, span, ledger.c.dimensions_id, end_user, sums).where(is_in)
    fine, coarse = dimensions.alias("fine"), dimensions.alias("coarse")
    statement = _derived(seconds, span, _coarse_id(fine, coarse), end_user, sums).where(is_in)
    return statement.join_from(ledger, fine, fine.c.id == ledger.c.dimensions_id).outerjoin(
        coarse, _is_coarse(level, fine, coarse)
    )


def _of_finer(level: Level, span: int, of_level: Level, of_span: int) -> Select[Any]:
    finer = rollups.alias("finer")
    sums = [finer.c[name] for name in SUMS]
    of_these = (finer.c.level == of_level.number, finer.c.span == of_span)
    if level is of_level:
        return _derived(finer.c.start, span, finer.c.dimensions_id, finer.c.end_user_id, sums).where(*of_these)
    fine, coarse = dimensions.alias("fine"), dimensions.alias("coarse")
    statement = _derived(finer.c.start, span, _coarse_id(fine, coarse), finer.c.end_user_id, sums).where(*of_these)
    return statement.join_from(finer, fine, fine.c.id == finer.c.dimensions_id).outerjoin(
        coarse, _is_coarse(level, fine, coarse)
    )


def _derived(
    seconds: ColumnElement[int],
    span: int,
    group: ColumnElement[Any],
    end_user: ColumnElement[Any],
    sums: Sequence[ColumnElement[Any]],
) -> Select[Any]:
    none: list[ColumnElement[Any]] = [literal(0)] * len(SUMS)
    start = (seconds - seconds % span).label("start")
    named = (*_named("d", sums), *_named("r", none))
    return select(start, group.label("group"), end_user.label("end_user"), *named)


def _coarse_id(fine: FromClause, coarse: FromClause) -> ColumnElement[int]:
    return func.coalesce(coarse.c.id, -fine.c.id)  # no id is negative: such dimensions were never made coarse


def _is_coarse(level: Level, fine: FromClause, coarse: FromClause) -> ColumnElement[bool]:
    same = (coarse.c[name] == (fine.c[name] if name in level.dimensions else "") for name in DIMENSIONS)
    return and_(coarse.c.level == level.kept_by, *same)


def _rollups(connection: Connection, level: Level, span: int, derived: Select[Any]) -> Iterator[Discrepancy]:
    none: list[ColumnElement[Any]] = [literal(0)] * len(SUMS)
    recorded = select(
        rollups.c.start, rollups.c.dimensions_id, rollups.c.end_user_id,
        *_named("d", none), *_named("r", [rollups.c[name] for name in SUMS]),
    ).where(rollups.c.level == level.number, rollups.c.span == span)  # fmt: skip
    both = union_all(derived, recorded).subquery()
    sums = [func.sum(both.c[f"{side}_{name}"]) for name in SUMS for side in "dr"]
    differs = or_(*(sums[index] != sums[index + 1] for index in range(0, len(sums), 2)))
    groups = (both.c.start, both.c.group, both.c.end_user)
    statement = select(*groups, *sums).group_by(*groups).having(differs)
    for row in connection.execute(statement):
        for index, name in enumerate(SUMS):
            was_derived, was_recorded = row[3 + 2 * index], row[4 + 2 * index]
            if was_derived != was_recorded:
                what = f"rollup of {span} s, dimensions {row.group}: {name}"
                yield Discrepancy(what=what, period=row.start, recorded=was_recorded, derived=was_derived)


def _named(side: str, values: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    return [value.label(f"{side}_{name}") for name, value in zip(SUMS, values, strict=True)]


def _key_use(connection: Connection) -> Iterator[Discrepancy]:
    latest = (
        select(ledger.c.dimensions_id, func.max(ledger.c.started_at_ns).label("at"))
        .where(ledger.c.outcome != "adjustment")
        .group_by(ledger.c.dimensions_id)
        .subquery()
    )
    derived = (
        select(dimensions.c.virtual_key_id, (func.max(latest.c.at) // 1_000_000).label("at_ms"))
        .join_from(latest, dimensions, dimensions.c.id == latest.c.dimensions_id)
        .group_by(dimensions.c.virtual_key_id)
        .subquery()
    )
    statement = select(derived, key_use.c.last_used_at_ms).outerjoin(
        key_use, key_use.c.virtual_key_id == derived.c.virtual_key_id
    )
    for row in connection.execute(statement):
        if row.at_ms != row.last_used_at_ms:
            recorded = row.last_used_at_ms or 0
            yield Discrepancy(what=f"last use of {row.virtual_key_id}", period=0, recorded=recorded, derived=row.at_ms)
