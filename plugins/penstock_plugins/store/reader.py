"""Read the ledger, and correct it by appending."""

from __future__ import annotations

import heapq
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection, Row, Select, bindparam, false, func, or_, select, tuple_

from penstock import Usage
from penstock.governance import Debit, Discrepancy, LedgerEntry, UsageQuery, UsageRow
from penstock_plugins.store.budgets import unreadable_in
from penstock_plugins.store.commits import Books, Receipt, debits_in
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.ledger_tables import (
    ALL,
    SCOPES,
    TOKENS,
    counters,
    dimensions,
    end_users,
    key_use,
    ledger,
)
from penstock_plugins.store.policies import unreadable_policies
from penstock_plugins.store.rollups import check_filters, tags_in, usage
from penstock_plugins.store.sweep import write_in_order
from penstock_plugins.store.totals import seed_of_budget, spent_since
from penstock_plugins.store.verification import discrepancies

_PART = 500
_FEW = 64
"""Combinations of dimensions whose newest rows are looked up one by one."""
_SHARED = (*SCOPES, "binding_id", "provider", "tags")
_OTHER = ("usage", "attempts", "debits", "end_user", *_SHARED)
_SAME = tuple(name for name in LedgerEntry.__struct_fields__ if name not in _OTHER)
_ROWS = (
    select(ledger, *(dimensions.c[name] for name in _SHARED), end_users.c.end_user)
    .join(dimensions, dimensions.c.id == ledger.c.dimensions_id)
    .outerjoin(end_users, end_users.c.id == ledger.c.end_user_id)
)


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

    async def left(self, request_id: str) -> int:
        """Return what an exchange has cost after all its corrections, nano-USD; 0 for one that is not there."""
        return await self._database.read(lambda connection: _left(connection, request_id))

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
        for each in await self._database.read(_discrepancies):
            yield each


def _discrepancies(connection: Connection) -> list[Discrepancy]:
    return [*discrepancies(connection), *unreadable_in(connection), *unreadable_policies(connection)]


def find_entry(connection: Connection, request_id: str) -> LedgerEntry | None:
    """Return one row."""
    entries = _read(connection, connection.execute(_ROWS.where(ledger.c.request_id == request_id)).all())
    return entries[0] if entries else None


def _page(
    connection: Connection, where: Mapping[str, str], between: tuple[int, int], after: str | None, limit: int
) -> list[LedgerEntry]:
    """Return rows by time, and those of the same time in the order of their commit, newest first."""
    newest = (
        select(ledger.c.started_at_ns, ledger.c.sequence)
        .where(ledger.c.started_at_ns >= between[0], ledger.c.started_at_ns < between[1])
        .order_by(ledger.c.started_at_ns.desc(), ledger.c.sequence.desc())
        .limit(limit)
    )
    if after is not None:
        at = select(ledger.c.started_at_ns, ledger.c.sequence).where(ledger.c.request_id == after)
        last = connection.execute(at).one_or_none()
        if last is None:
            return []
        newest = newest.where(tuple_(ledger.c.started_at_ns, ledger.c.sequence) < tuple_(*last))
    found = [row.sequence for row in _newest(connection, newest, where, limit)]
    rows: dict[int, Any] = {}
    for start in range(0, len(found), _PART):
        statement = _ROWS.where(ledger.c.sequence.in_(found[start : start + _PART]))
        rows.update({row.sequence: row for row in connection.execute(statement)})
    return _read(connection, [rows[sequence] for sequence in found])


def _newest(
    connection: Connection, newest: Select[tuple[int, int]], where: Mapping[str, str], limit: int
) -> Sequence[Row[tuple[int, int]]]:
    if not where:
        return connection.execute(newest).all()
    wanted = [dimensions.c.level == ALL.number]
    wanted += [dimensions.c[name] == value for name, value in where.items() if name not in ("tag", "end_user")]
    if "tag" in where:
        texts = connection.scalars(select(dimensions.c.tags).where(*wanted).distinct()).all()
        wanted.append(dimensions.c.tags.in_([text for text in texts if where["tag"] in tags_in(text)]))
    of_these = select(dimensions.c.id).where(*wanted)
    # Whoever's they are, adding nothing keeps the index of these from being used.
    is_of_these = (ledger.c.dimensions_id + 0).in_(of_these)
    if "end_user" in where:
        of_name = connection.scalar(select(end_users.c.id).where(end_users.c.end_user == where["end_user"]))
        newest = newest.where(ledger.c.end_user_id == of_name) if of_name is not None else newest.where(false())
        return connection.execute(newest.where(is_of_these) if len(where) > 1 else newest).all()
    ids = connection.scalars(of_these.limit(_FEW + 1)).all()
    if len(ids) > _FEW:
        return connection.execute(newest.where(is_of_these)).all()
    each = newest.where(ledger.c.dimensions_id == bindparam("dimensions_id"))
    rows = (row for id_ in ids for row in connection.execute(each, {"dimensions_id": id_}))
    return heapq.nlargest(limit, rows, key=tuple)


def _read(connection: Connection, rows: Sequence[Any]) -> list[LedgerEntry]:
    debits = {row.sequence: debits_in(row.debits) for row in rows if row.debits}
    names = _counters_of(connection, sorted({counter_id for each in debits.values() for counter_id, _, _ in each}))
    return [
        _entry(row, [Debit(counter=names[id_][0], period=names[id_][1], reserved=reserved)
                     for id_, reserved, _ in debits.get(row.sequence, ())])
        for row in rows
    ]  # fmt: skip


def _entry(row: Any, charged: Sequence[Debit]) -> LedgerEntry:
    tokens = {name: getattr(row, name) for name in TOKENS}
    return LedgerEntry(
        **{name: getattr(row, name) for name in (*_SAME, *SCOPES)},
        end_user=row.end_user,
        binding_id=row.binding_id or None,
        provider=row.provider or None,
        usage=None if row.usage_source is None else Usage(**tokens, source=row.usage_source),
        attempts=tuple(json.loads(row.attempts)) if row.attempts else (),
        debits=tuple(charged),
        tags=tuple(json.loads(row.tags)) if row.tags else (),
    )


def _counters_of(connection: Connection, ids: Sequence[int]) -> dict[int, tuple[str, int]]:
    found: dict[int, tuple[str, int]] = {}
    for start in range(0, len(ids), _PART):
        statement = select(counters.c.id, counters.c.counter, counters.c.period)
        for row in connection.execute(statement.where(counters.c.id.in_(ids[start : start + _PART]))):
            found[row.id] = (row.counter, row.period)
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
            found[counter, period] = spent_since(connection, where, period)
    return found


def _last_used(connection: Connection, ids: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for start in range(0, len(ids), _PART):
        statement = select(key_use).where(key_use.c.virtual_key_id.in_(ids[start : start + _PART]))
        found.update({row.virtual_key_id: row.last_used_at_ms for row in connection.execute(statement)})
    return found


def _left(connection: Connection, request_id: str, *, but: str = "") -> int:
    """Return what an exchange has cost after its corrections, of which one may be left out."""
    same = or_(ledger.c.request_id == request_id, ledger.c.adjusts == request_id)
    total = select(func.coalesce(func.sum(ledger.c.cost_nano_usd), 0)).where(same, ledger.c.request_id != but)
    return int(connection.execute(total).scalar_one())


def _checked(connection: Connection, entry: LedgerEntry) -> LedgerEntry:
    """Return a correction as it is entered: charged to what the row it corrects was charged to."""
    corrected = None if entry.adjusts is None else find_entry(connection, entry.adjusts)
    if corrected is None or corrected.outcome == "adjustment":
        raise LookupError(f"there is no exchange {entry.adjusts} to correct")
    left = _left(connection, corrected.request_id, but=entry.request_id)
    if left + entry.cost_nano_usd < 0:
        raise ValueError(f"exchange {entry.adjusts} has cost {left} nano-USD, less than what is to be taken from it")
    return msgspec.structs.replace(entry, outcome="adjustment", cost_source="adjustment", debits=corrected.debits)
