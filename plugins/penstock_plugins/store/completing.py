"""Make a copy of the database whole: enter what was settled and is only in journals yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import msgspec
from sqlalchemy import Connection

from penstock.governance import LedgerEntry
from penstock_plugins.store.commits import Books
from penstock_plugins.store.database import Database
from penstock_plugins.store.journal import ENTRY, read_records, take_dead
from penstock_plugins.store.schema import known_schema, schema_of
from penstock_plugins.store.sweep import read_dead
from penstock_plugins.store.totals import seed_of_budget

_PART = 500
_entries = msgspec.msgpack.Decoder(LedgerEntry)


def settled_in(folder: Path) -> list[LedgerEntry]:
    """Return what the journals in a folder hold: of living processes what they have settled, of dead ones all."""
    found: dict[str, LedgerEntry] = {}
    dead = list(take_dead(folder))
    try:
        for journal in dead:
            found |= {entry.request_id: entry for entry in read_dead(journal)[0]}
        holders = {journal.holder for journal in dead}
        for path in sorted(folder.glob("*.journal")):
            if path.name.partition(".")[0] not in holders:
                found |= {entry.request_id: entry for entry in _settled(path)}
    finally:
        for journal in dead:
            journal.release()
    return list(found.values())


def _settled(path: Path) -> Iterator[LedgerEntry]:
    content = b""
    with suppress(FileNotFoundError):  # all of it is committed
        content = path.read_bytes()
    for kind, payload in read_records(content):
        if kind == ENTRY:
            with suppress(msgspec.DecodeError):
                yield _entries.decode(payload)


def enter(path: Path, entries: list[LedgerEntry]) -> None:
    """Put into a database of the known schema what its ledger does not have. Raises StoreUnavailableError."""
    with closing(Database(f"sqlite:///{path}")) as database:
        books = Books(seed_of_budget)

        def append(connection: Connection) -> None:
            if entries and schema_of(connection) == known_schema():
                for start in range(0, len(entries), _PART):
                    books.append(connection, entries[start : start + _PART])

        database.write_now(append)
