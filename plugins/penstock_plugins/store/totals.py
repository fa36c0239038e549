"""The rows of counters: found by name and period, or made with what was spent before there was such a counter.

A budget made in the middle of a window counts what its scope has spent since the window began: the *seed*. Which rows
of the ledger are in it is kept with it, so that every total can be derived from the ledger again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs
import msgspec
from sqlalchemy import Connection, func, insert, select

from penstock_plugins.store.bulk import find_one, find_where
from penstock_plugins.store.ledger_tables import counters, ledger
from penstock_plugins.store.tables import objects

CounterSeed = Callable[[Connection, str], Mapping[str, str] | None]
"""Return the columns of the ledger, and their values, that the spend of a counter is found by; None for no spend."""
Name = tuple[str, int]
"""Of a counter, and its period."""

_NANO = 1_000_000_000
_FIND = find_where((counters.c.id, counters.c.total), counters.c.counter, counters.c.period)
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
    amount = 0 if where is None else spent_where(connection, where, name[1], through)
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
    return int(connection.execute(select(func.coalesce(func.max(ledger.c.sequence), 0))).scalar_one())


def spent_where(connection: Connection, where: Mapping[str, str], period: int, through: int) -> int:
    """Return what was spent from the start of a period up to a row of the ledger."""
    since = period * _NANO
    return int(
        connection.execute(
            select(func.coalesce(func.sum(ledger.c.cost_nano_usd), 0)).where(
                # A correction counts when the row it corrects did, which is not later than itself.
                ledger.c.started_at_ns >= since,
                ledger.c.counted_at_ns >= since,
                ledger.c.sequence <= through,
                *(ledger.c[column] == value for column, value in where.items()),
            )
        ).scalar_one()
    )


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
