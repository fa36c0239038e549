"""The rows of counters: found by name and period, or made with what was spent before there was such a counter.

A budget made in the middle of a window counts what its scope has spent since the window began: the *seed*. Which rows
of the ledger are in it is kept with it, so that every total can be derived from the ledger again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs
import msgspec
from sqlalchemy import ColumnElement, Connection, Select, func, insert, select

from penstock_plugins.store.buckets import cover
from penstock_plugins.store.bulk import find_one, find_where
from penstock_plugins.store.ledger_tables import (
    ALL,
    STEP,
    Level,
    counters,
    dimensions,
    end_users,
    ledger,
    level_of,
    rollups,
)
from penstock_plugins.store.tables import objects

CounterSeed = Callable[[Connection, str], Mapping[str, str] | None]
"""Return the dimensions, and their values, that the spend of a counter is found by; None for no spend."""
Name = tuple[str, int]
"""Of a counter, and its period."""

_NANO = 1_000_000_000
_FOR_EVER = 86_400 << 24
_FIND = find_where((counters.c.id, counters.c.total), counters.c.counter, counters.c.period)
_LAST = select(func.max(ledger.c.sequence))
_COLUMN_OF_SCOPE = {
    "organization": "organization_id",
    "team": "team_id",
    "project": "project_id",
    "virtual_key": "virtual_key_id",
    "principal": "principal_id",
}


@attrs.frozen
class Total:
    """The row of a counter."""

    id: int
    amount: int


def find_or_add(connection: Connection, names: Iterable[tuple[Name, bool]], seed: CounterSeed) -> dict[Name, Total]:
    """Return the totals of counters (``True``: durable), adding those that are missing."""
    found = {}
    for name, is_durable in names:
        if name in found:
            continue
        row = find_one(connection, _FIND, ("counter", "period"), name)
        found[name] = Total(row[0], row[1]) if row else _add(connection, name, is_durable, seed)
    return found


def _add(connection: Connection, name: Name, is_durable: bool, seed: CounterSeed) -> Total:
    where = seed(connection, name[0]) if is_durable else None
    through = last_sequence(connection)
    amount = 0 if where is None else spent_since(connection, where, name[1])
    made = connection.execute(
        insert(counters).values(
            counter=name[0],
            period=name[1],
            is_durable=is_durable,
            total=amount,
            seed=amount,
            seed_through=through,
            seed_where=None if where is None else msgspec.json.encode(where, order="sorted").decode(),
        )
    )
    assert made.inserted_primary_key is not None
    return Total(made.inserted_primary_key[0], amount)


def last_sequence(connection: Connection) -> int:
    """Return the number of the ledger's last row; 0 where it is empty."""
    return int(find_one(connection, _LAST, (), ())[0] or 0)


def spent_since(connection: Connection, where: Mapping[str, str], period: int) -> int:
    """Return what was spent from the start of a period until now, from rollups where they can tell."""
    level = level_of(set(where))
    if level.is_of_end_users:  # one of very many: its own rows are found at once, its rollups among all others'
        return spent_where(connection, where, period, last_sequence(connection))
    first = -(-period // STEP) * STEP
    amount = 0
    for span, start, end in cover(first, _FOR_EVER, level.spans):
        in_run = (rollups.c.level == level.number, rollups.c.span == span, rollups.c.start.between(start, end - 1))
        rows = select(func.sum(rollups.c.cost_nano_usd)).where(
            *in_run, rollups.c.dimensions_id.in_(_dimensions(where, level))
        )
        amount += connection.execute(rows).scalar() or 0
    in_first = (ledger.c.started_at_ns >= period * _NANO, ledger.c.started_at_ns < first * _NANO)
    of_earlier = (ledger.c.counts_from_ns.is_not(None), ledger.c.counts_from_ns < period * _NANO)
    amount += _cost_of(connection, where, *in_first)
    return amount - _cost_of(connection, where, ledger.c.started_at_ns >= period * _NANO, *of_earlier)


def spent_where(connection: Connection, where: Mapping[str, str], period: int, through: int) -> int:
    """Return what was spent from the start of a period up to a row of the ledger, from rows."""
    since = period * _NANO
    # A correction counts when the row it corrects did, which is not later than itself.
    counts_from = func.coalesce(ledger.c.counts_from_ns, ledger.c.started_at_ns)
    return _cost_of(
        connection, where, ledger.c.started_at_ns >= since, counts_from >= since, ledger.c.sequence <= through
    )


def _cost_of(connection: Connection, where: Mapping[str, str], *conditions: ColumnElement[bool]) -> int:
    rest = {name: value for name, value in where.items() if name != "end_user"}
    wanted = list(conditions)
    if rest:
        wanted.append((ledger.c.dimensions_id + 0).in_(_dimensions(rest, ALL)))  # not by its index
    if "end_user" in where:
        of_name = select(end_users.c.id).where(end_users.c.end_user == where["end_user"])
        wanted.append(ledger.c.end_user_id == of_name.scalar_subquery())
    return connection.execute(select(func.sum(ledger.c.cost_nano_usd)).where(*wanted)).scalar() or 0


def _dimensions(where: Mapping[str, str], level: Level) -> Select[tuple[int]]:
    values = (dimensions.c[name] == value for name, value in where.items())
    return select(dimensions.c.id).where(dimensions.c.level == level.kept_by, *values)


def seed_of_budget(connection: Connection, counter: str) -> Mapping[str, str] | None:
    """Return what the spend of a budget's counter is found by: ``budget:<id>`` or ``budget:<id>:<subject>``."""
    kind, _, rest = counter.partition(":")
    budget_id, _, subject = rest.partition(":")
    if kind != "budget":
        return None
    budget = connection.execute(
        select(objects.c.document).where(objects.c.kind == "budget", objects.c.id == budget_id)
    ).scalar()
    if budget is None:
        return None
    where = {}
    scope, scope_id = budget["scope"], budget["scope_id"]
    if scope in _COLUMN_OF_SCOPE:
        where[_COLUMN_OF_SCOPE[scope]] = scope_id
    elif scope == "group":
        where["principal_id"] = subject
    else:
        where["virtual_key_id" if scope_id.startswith("vk_") else "project_id"] = scope_id
        where["end_user"] = subject
    if budget.get("provider"):
        where["binding_id"] = budget["provider"]
    return where
