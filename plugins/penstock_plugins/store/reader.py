"""Read the ledger, and correct it by appending."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection, func, or_, select, tuple_

from penstock import Usage
from penstock.governance import Debit, Discrepancy, LedgerEntry, UsageQuery, UsageRow
from penstock_plugins.store.commits import Books, Receipt
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.ledger_tables import TOKENS, counters, debits, key_use, ledger
from penstock_plugins.store.rollups import check_filters, usage
from penstock_plugins.store.sweep import write_in_order
from penstock_plugins.store.totals import last_sequence, seed_of_budget, spent_where
from penstock_plugins.store.verification import discrepancies

_PART = 500
_SAME = tuple(
    field.name
    for field in attrs.fields(LedgerEntry)
    if field.name not in ("usage", "attempts", "debits", "tags")
)  # fmt: skip


@attrs.define(eq=False)
class SQLLedgerReader:
    """Implement LedgerReader."""

    _database: Database
    _books: Books
    _counters: MemoryCounters

    async def entry(self, request_id: str) -> LedgerEntry | None:
        """Return one row."""
        return await self._database.read(lambda connection: find_entry(connection, request_id))

    async def entries(
        self, where: Mapping[str, str], *, since_ns: int, until_ns: int, after: str | None, limit: int
    ) -> Sequence[LedgerEntry]:
        """Return rows, newest first. Raises ValueError for what cannot be filtered by."""
        check_filters(where)
        return await self._database.read(
            lambda connection: _page(connection, where, (since_ns, until_ns), after, limit)
        )

    async def usage(self, query: UsageQuery) -> Sequence[UsageRow]:
        """Return sums, by bucket and group. Raises ValueError."""
        return await self._database.read(lambda connection: usage(connection, query))

    async def spent(self, counters: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Return the committed totals of durable counters, by name and period."""
        names = list(counters)
        return await self._database.read(lambda connection: _spent(connection, names))

    async def last_used(self, virtual_key_ids: Sequence[str]) -> Mapping[str, int]:
        """Return when keys were last used, milliseconds since the epoch; those never used are left out."""
        ids = list(virtual_key_ids)
        return await self._database.read(lambda connection: _last_used(connection, ids))

    async def adjust(self, entry: LedgerEntry) -> None:
        """Append a correction. Raises LookupError without the row, ValueError for one beyond it."""

        def append(connection: Connection) -> Receipt:
            return self._books.append(connection, [_checked(connection, entry)])

        def apply(receipt: Receipt) -> None:
            self._books.remember(receipt)
            self._counters.charged(receipt.charges)

        await write_in_order(self._database, append, apply)

    async def verify(self) -> AsyncIterator[Discrepancy]:
        """Derive every total anew from the rows and yield what differs."""
        for found in await self._database.read(lambda connection: list(discrepancies(connection))):
            yield found


def find_entry(connection: Connection, request_id: str) -> LedgerEntry | None:
    """Return one row."""
    rows = connection.execute(select(ledger).where(ledger.c.request_id == request_id)).all()
    entries = _read(connection, rows)
    return entries[0] if entries else None


def _page(
    connection: Connection, where: Mapping[str, str], between: tuple[int, int], after: str | None, limit: int
) -> list[LedgerEntry]:
    statement = select(ledger).where(ledger.c.started_at_ns >= between[0], ledger.c.started_at_ns < between[1])
    for name, value in where.items():
        if name == "tag":
            statement = statement.where(ledger.c.tags.contains(msgspec.json.encode(value).decode(), autoescape=True))
        elif name == "model":
            statement = statement.where(func.coalesce(ledger.c.model_served, ledger.c.model_asked) == value)
        else:
            statement = statement.where(ledger.c[name] == value)
    if after is not None:
        at = connection.execute(select(ledger.c.started_at_ns).where(ledger.c.request_id == after)).scalar()
        if at is None:
            return []
        statement = statement.where(tuple_(ledger.c.started_at_ns, ledger.c.request_id) < tuple_(at, after))
    newest = statement.order_by(ledger.c.started_at_ns.desc(), ledger.c.request_id.desc()).limit(limit)
    return _read(connection, connection.execute(newest).all())


def _read(connection: Connection, rows: Sequence[Any]) -> list[LedgerEntry]:
    charged = _debits_of(connection, [row.sequence for row in rows])
    return [_entry(row, charged.get(row.sequence, ())) for row in rows]


def _entry(row: Any, charged: Sequence[Debit]) -> LedgerEntry:
    tokens = {name: getattr(row, name) for name in TOKENS}
    return LedgerEntry(
        **{name: getattr(row, name) for name in _SAME},
        usage=None if row.usage_source is None else Usage(**tokens, source=row.usage_source),
        attempts=tuple(json.loads(row.attempts)) if row.attempts else (),
        debits=tuple(charged),
        tags=tuple(json.loads(row.tags)) if row.tags else (),
    )


def _debits_of(connection: Connection, sequences: Sequence[int]) -> dict[int, list[Debit]]:
    found: dict[int, list[Debit]] = {}
    for start in range(0, len(sequences), _PART):
        statement = (
            select(debits.c.sequence, debits.c.reserved, counters.c.counter, counters.c.period)
            .join(counters, counters.c.id == debits.c.counter_id)
            .where(debits.c.sequence.in_(sequences[start : start + _PART]))
            .order_by(debits.c.sequence, debits.c.counter_id)
        )
        for row in connection.execute(statement):
            debit = Debit(counter=row.counter, period=row.period, reserved=row.reserved)
            found.setdefault(row.sequence, []).append(debit)
    return found


def _spent(connection: Connection, names: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int]:
    found: dict[tuple[str, int], int] = {}
    for start in range(0, len(names), _PART):
        part = names[start : start + _PART]
        statement = select(counters.c.counter, counters.c.period, counters.c.total).where(
            counters.c.is_durable.is_(True), tuple_(counters.c.counter, counters.c.period).in_(part)
        )
        found.update({(row.counter, row.period): row.total for row in connection.execute(statement)})
    for counter, period in set(names).difference(found):  # nothing was reserved of it yet: what it will begin with
        where = seed_of_budget(connection, counter)
        if where is not None:
            found[counter, period] = spent_where(connection, where, period, last_sequence(connection))
    return found


def _last_used(connection: Connection, ids: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for start in range(0, len(ids), _PART):
        statement = select(key_use).where(key_use.c.virtual_key_id.in_(ids[start : start + _PART]))
        found.update({row.virtual_key_id: row.last_used_at_ms for row in connection.execute(statement)})
    return found


def _checked(connection: Connection, entry: LedgerEntry) -> LedgerEntry:
    """Return a correction as it is entered: charged to what the row it corrects was charged to."""
    corrected = None if entry.adjusts is None else find_entry(connection, entry.adjusts)
    if corrected is None or corrected.outcome == "adjustment":
        raise LookupError(f"there is no exchange {entry.adjusts} to correct")
    same = or_(ledger.c.request_id == entry.adjusts, ledger.c.adjusts == entry.adjusts)
    left = connection.execute(
        select(func.coalesce(func.sum(ledger.c.cost_nano_usd), 0)).where(same, ledger.c.request_id != entry.request_id)
    ).scalar_one()
    if left + entry.cost_nano_usd < 0:
        raise ValueError(f"exchange {entry.adjusts} has cost {left} nano-USD, less than what is to be taken from it")
    return attrs.evolve(entry, outcome="adjustment", cost_source="adjustment", debits=corrected.debits)
