"""Derive everything that is kept beside the ledger from its rows again, and say what differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, func, literal, select, union_all

from penstock.governance import Discrepancy
from penstock_plugins.store.ledger_tables import (
    DIMENSIONS,
    SPANS,
    SUMS,
    counters,
    debits,
    dimensions,
    key_use,
    ledger,
    rollups,
)
from penstock_plugins.store.rollups import sums_of_rows
from penstock_plugins.store.totals import spent_where

_NANO = 1_000_000_000


def discrepancies(connection: Connection) -> Iterator[Discrepancy]:
    """Yield whatever differs."""
    yield from _counters(connection)
    yield from _dimensions(connection)
    for span in SPANS:
        yield from _rollups(connection, span, 1)
        yield from _rollups(connection, span, -1)
    yield from _key_use(connection)


def _counters(connection: Connection) -> Iterator[Discrepancy]:
    charged = (
        select(debits.c.counter_id, func.sum(debits.c.charged).label("charged"))
        .group_by(debits.c.counter_id)
        .subquery()
    )
    statement = (
        select(counters, func.coalesce(charged.c.charged, 0).label("charged"))
        .outerjoin(charged, charged.c.counter_id == counters.c.id)
        .where(counters.c.is_durable.is_(True))
    )
    for row in connection.execute(statement).all():
        seed = 0
        if row.seed_where is not None and row.seed_through:
            seed = spent_where(connection, msgspec.json.decode(row.seed_where), row.period, row.seed_through)
        if row.total != seed + row.charged:
            yield Discrepancy(what=row.counter, period=row.period, recorded=row.total, derived=seed + row.charged)


def _dimensions(connection: Connection) -> Iterator[Discrepancy]:
    """Yield the combinations of dimensions that are not those of the rows that refer to them."""
    of_ledger = {name: ledger.c[name] for name in DIMENSIONS if name not in ("model", "end_user")}
    of_ledger["model"] = func.coalesce(func.nullif(ledger.c.model_served, ""), ledger.c.model_asked)  # type: ignore[assignment]
    differs = [func.coalesce(column, "") != dimensions.c[name] for name, column in of_ledger.items()]
    for number, end_user in (
        (ledger.c.dimensions_id, literal("")),
        (ledger.c.end_user_dimensions_id, ledger.c.end_user),
    ):
        condition = dimensions.c.end_user != end_user
        for each in differs:
            condition = condition | each
        statement = (
            select(dimensions.c.id, func.count())
            .join(ledger, number == dimensions.c.id)
            .where(condition)
            .group_by(dimensions.c.id)
        )
        for row in connection.execute(statement):
            yield Discrepancy(what=f"dimensions {row[0]}: rows of others", period=0, recorded=row[1], derived=0)


def _rollups(connection: Connection, span: int, sign: int) -> Iterator[Discrepancy]:
    group = ledger.c.dimensions_id if sign > 0 else ledger.c.end_user_dimensions_id
    seconds = ledger.c.started_at_ns // _NANO
    start = seconds - seconds % span
    none: list[ColumnElement[Any]] = [literal(0)] * len(SUMS)
    derived = select(
        start.label("start"), group.label("group"), *_named("d", sums_of_rows()), *_named("r", none)
    ).where(group.is_not(None))
    recorded = select(
        rollups.c.start, rollups.c.dimensions_id, *_named("d", none), *_named("r", [rollups.c[name] for name in SUMS])
    ).where(rollups.c.span == sign * span)
    both = union_all(derived, recorded).subquery()
    sums = [func.sum(both.c[f"{side}_{name}"]) for name in SUMS for side in "dr"]
    differs = literal(value=False)
    for index in range(0, len(sums), 2):
        differs = differs | (sums[index] != sums[index + 1])  # type: ignore[assignment]
    statement = select(both.c.start, both.c.group, *sums).group_by(both.c.start, both.c.group).having(differs)
    for row in connection.execute(statement):
        for index, name in enumerate(SUMS):
            was_derived, was_recorded = row[2 + 2 * index], row[3 + 2 * index]
            if was_derived != was_recorded:
                what = f"rollup of {span} s, dimensions {row.group}: {name}"
                yield Discrepancy(what=what, period=row.start, recorded=was_recorded, derived=was_derived)


def _named(side: str, values: Sequence[ColumnElement[Any]]) -> list[ColumnElement[Any]]:
    return [value.label(f"{side}_{name}") for name, value in zip(SUMS, values, strict=True)]


def _key_use(connection: Connection) -> Iterator[Discrepancy]:
    derived = (
        select(ledger.c.virtual_key_id, (func.max(ledger.c.started_at_ns) // 1_000_000).label("at_ms"))
        .where(ledger.c.outcome != "adjustment")
        .group_by(ledger.c.virtual_key_id)
        .subquery()
    )
    statement = select(derived, key_use.c.last_used_at_ms).outerjoin(
        key_use, key_use.c.virtual_key_id == derived.c.virtual_key_id
    )
    for row in connection.execute(statement):
        if row.at_ms != row.last_used_at_ms:
            recorded = row.last_used_at_ms or 0
            yield Discrepancy(what=f"last use of {row.virtual_key_id}", period=0, recorded=recorded, derived=row.at_ms)
