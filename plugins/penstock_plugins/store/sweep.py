"""Enter what dead processes left: their journals are replayed, their leases freed. Doing it twice changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread
import attrs
import msgspec
from sqlalchemy import Connection

from penstock.governance import Intent, LedgerEntry, StoreUnavailableError
from penstock_plugins.store import leases
from penstock_plugins.store.commits import Books, Receipt
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.journal import ENTRY, INTENT, DeadJournal, is_held, take_dead
from penstock_plugins.store.ledger import MOST_REFUSED, cleaned, entry_of

T = TypeVar("T")
_PART = 500
_log = logging.getLogger("penstock.store")
_intents = msgspec.msgpack.Decoder(Intent)
_entries = msgspec.msgpack.Decoder(LedgerEntry)


async def write_in_order(database: Database, work: Callable[[Connection], T], apply: Callable[[T], None]) -> T:
    """Run a transaction, and ``apply`` what it returned before anything that is written later is applied."""
    over = anyio.Event()
    found: list[T] = []
    failed: list[BaseException] = []

    def done(error: BaseException | None) -> None:
        if error is None:
            apply(found[-1])
        else:
            failed.append(error)
        over.set()

    database.write_soon(lambda connection: found.append(work(connection)), done)
    with anyio.CancelScope(shield=True):
        await over.wait()
    if failed:
        raise failed[0]
    return found[-1]


@attrs.define(eq=False)
class Sweeper:
    """Look for what dead processes left."""

    database: Database
    books: Books
    counters: MemoryCounters
    folder: Path
    holder: str
    """This process, which is not dead."""

    async def sweep(self) -> int:
        """Enter everything there is; returns how many processes had left something. Raises StoreUnavailableError."""
        dead = await anyio.to_thread.run_sync(lambda: list(take_dead(self.folder)))
        try:
            for journal in dead:
                await self._replay(journal)
        finally:
            for journal in dead:
                journal.release()
        return len(dead) + await self._free_orphans()

    async def _replay(self, journal: DeadJournal) -> None:
        entries, is_whole = await anyio.to_thread.run_sync(read_dead, journal)
        for start in range(0, len(entries), _PART):
            part = entries[start : start + _PART]
            try:
                await self._enter(part)
            except StoreUnavailableError:
                raise
            except Exception:  # noqa: BLE001 - one row at fault must not keep the others out
                is_whole = await self._enter_each(part) and is_whole
        await self.database.write(lambda connection: leases.leave(connection, journal.holder))
        await anyio.to_thread.run_sync(journal.remove if is_whole else journal.set_aside)
        if entries:
            _log.warning("replayed %d exchanges from the journal of a process that had ended", len(entries))

    async def _enter(self, entries: list[LedgerEntry]) -> None:
        def apply(receipt: Receipt) -> None:
            self.books.remember(receipt)
            self.counters.charged(receipt.charges)

        await write_in_order(self.database, lambda connection: self.books.append(connection, entries), apply)

    async def _enter_each(self, entries: list[LedgerEntry]) -> bool:
        is_whole = True
        in_a_row = 0
        for entry in entries:
            try:
                await self._enter_somehow(entry)
                in_a_row = 0
            except StoreUnavailableError:
                raise
            except Exception as error:  # it stays where an operator finds it
                _log.error("the database refuses ledger entry %s: %r", entry.request_id, error)
                is_whole = False
                in_a_row += 1
                if in_a_row > MOST_REFUSED:  # the ledger is at fault: all of it is tried again later
                    raise StoreUnavailableError(f"the ledger's database refuses every row: {error!r}") from error
        return is_whole

    async def _enter_somehow(self, entry: LedgerEntry) -> None:
        try:
            await self._enter([entry])
        except StoreUnavailableError:
            raise
        except Exception:  # noqa: BLE001 - what is wrong with it may be something that cleaning takes away
            await self._enter([cleaned(entry)])

    async def _free_orphans(self) -> int:
        """Free the leases of processes whose journal is gone."""
        holders = await self.database.read(leases.all_holders)
        gone = [holder for holder in holders if holder != self.holder and not is_held(self.folder, holder)]
        for holder in gone:
            await self.database.write(lambda connection, holder=holder: leases.leave(connection, holder))  # type: ignore[misc]
        return len(gone)


def read_dead(journal: DeadJournal) -> tuple[list[LedgerEntry], bool]:
    """Return what a journal says must be in the ledger, and whether all of it could be read."""
    entries: dict[str, LedgerEntry] = {}
    intents: dict[str, Intent] = {}
    is_whole = True
    for kind, payload in journal.records():
        try:
            if kind == ENTRY:
                entry = _entries.decode(payload)
                entries.setdefault(entry.request_id, entry)
            elif kind == INTENT:
                intent = _intents.decode(payload)
                intents[intent.request_id] = intent
        except msgspec.DecodeError as error:
            _log.error("a record of journal %s cannot be read: %s", journal.holder, error)
            is_whole = False
    interrupted = [entry_of(intent) for request_id, intent in intents.items() if request_id not in entries]
    return [*entries.values(), *interrupted], is_whole
