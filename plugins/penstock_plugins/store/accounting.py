"""Ledger and counters of one process on an open database: what they run on, from joining the others to leaving them."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import anyio
import anyio.to_thread
import attrs

from penstock.governance import StoreUnavailableError
from penstock_plugins.store import leases
from penstock_plugins.store.commits import Books
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.journal import Journal, pid_of
from penstock_plugins.store.ledger import JournaledLedger
from penstock_plugins.store.outages import Outage
from penstock_plugins.store.reader import SQLLedgerReader
from penstock_plugins.store.sweep import Sweeper
from penstock_plugins.store.totals import CounterSeed, seed_of_budget
from penstock_plugins.store.turns import Turns

TICK_SECONDS = 0.04
"""How soon what another process wants is given back."""
ALONE_TICK_SECONDS = 0.1
"""How soon another process that starts is noticed."""
REFRESH_SECONDS = 0.5
SWEEP_SECONDS = 3.0
FORGET_SECONDS = 60.0
_JOIN_SECONDS = 5.0
_FLUSH_SECONDS = 10.0
_OLD_SECONDS = 2 * 86_400
_log = logging.getLogger("penstock.store")


@attrs.define(eq=False, kw_only=True)
class Accounting:
    """Hold what counts and what keeps the ledger."""

    holder: str
    database: Database
    counters: MemoryCounters
    ledger: JournaledLedger
    reader: SQLLedgerReader
    turns: Turns
    sweeper: Sweeper
    clock: Callable[[], float]
    """Wall clock, seconds since the epoch: the one that the periods of counters are taken from."""

    async def join(self) -> None:
        """Enter what dead processes left, then count with those that live."""
        await self.sweeper.sweep()
        is_alone = await self.database.write(lambda connection: leases.join(connection, self.holder))
        self.counters.is_shared = self.turns.is_registered_shared = not is_alone
        with anyio.move_on_after(_JOIN_SECONDS) as waiting:
            while await self.database.read(lambda connection: leases.is_anyone_exclusive(connection, self.holder)):
                if is_alone:
                    return
                await anyio.sleep(TICK_SECONDS)
                await self.sweeper.sweep()
        if waiting.cancelled_caught:
            others = await self.database.read(leases.all_holders)
            pids = [found for other in others if other != self.holder and (found := pid_of(self.sweeper.folder, other))]
            _log.warning(
                "another gateway on this database (process %s) does not answer: until it does, or ends, requests under "
                "a budget or a rate limit are refused with 503; see whether it hangs or is stopped, and end it if so",
                ", ".join(map(str, pids)) or "unknown",
            )

    async def tick(self) -> None:
        """Keep in step with other processes, for ever."""
        due = dict.fromkeys((self._refresh, self._sweep, self.forget), anyio.current_time())
        every = {self._refresh: REFRESH_SECONDS, self._sweep: SWEEP_SECONDS, self.forget: FORGET_SECONDS}
        outage = Outage("what other processes count and left cannot be read just now", "it can be read again")
        failed = None
        while True:
            await anyio.sleep(TICK_SECONDS if self.counters.is_shared else ALONE_TICK_SECONDS)
            now = anyio.current_time()
            action = self._look
            try:
                for action in (self._look, *(action for action, at in due.items() if now >= at)):
                    if action in due:
                        due[action] = now + every[action]
                    await action()
                    if action == failed:
                        outage.worked()
                        failed = None
            except (StoreUnavailableError, OSError) as error:  # of the database, or of the journals' folder
                outage.failed(error)
                failed = action

    async def _look(self) -> None:
        count, wanted = await self.database.read(lambda connection: leases.calls_to_answer(connection, self.holder))
        counters, turns = self.counters, self.turns
        if not counters.is_shared:
            if count:
                counters.is_shared = True
                turns.wake_now()
            return
        turns.answer(wanted)
        turns.wants_all = not count
        if not count or counters.dirty:
            turns.wake()

    async def _refresh(self) -> None:
        idle = self.counters.look_for_idle()
        if self.counters.is_shared:
            self.turns.give_back(idle)
            self.turns.refresh()

    async def _sweep(self) -> None:
        await self.sweeper.sweep()

    async def forget(self) -> None:
        """Delete what is counted of minutes and days that are long over. Raises StoreUnavailableError."""
        if self.counters.is_shared:
            before = int(self.clock()) - _OLD_SECONDS
            await self.database.write(lambda connection: leases.forget_old(connection, before))

    async def leave(self) -> None:
        """Commit what is left to commit; what cannot be stays in the journal."""
        with anyio.move_on_after(_FLUSH_SECONDS, shield=True) as flushing:
            while len(self.ledger) or self.counters.dirty:
                if not await self.turns.run_one():
                    await anyio.sleep(TICK_SECONDS)
        if flushing.cancelled_caught or self.ledger.open_intents:
            _log.warning("%d exchanges are left to the next start", len(self.ledger) + self.ledger.open_intents)
            return
        try:
            await self.database.write(lambda connection: leases.leave(connection, self.holder))
        except StoreUnavailableError as error:
            _log.warning("the next process to start will say that this one has ended: %s", error)


@asynccontextmanager
async def open_accounting(
    database: Database,
    folder: Path,
    *,
    sync: bool = False,
    seed: CounterSeed = seed_of_budget,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Accounting]:
    """Count and keep the ledger in an open database, with the journal in ``folder``. Raises OSError."""
    holder = uuid4().hex
    journal = await anyio.to_thread.run_sync(lambda: Journal(folder, holder, sync=sync))
    try:
        books = Books(seed)
        turns = Turns(database, books, holder)
        ledger = turns.ledger = JournaledLedger(journal, turns.wake)
        counters = turns.counters
        accounting = Accounting(
            holder=holder,
            database=database,
            counters=counters,
            ledger=ledger,
            reader=SQLLedgerReader(database, books, counters),
            turns=turns,
            sweeper=Sweeper(database, books, counters, folder, holder),
            clock=clock,
        )
        await accounting.join()
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(turns.run)
                tasks.start_soon(accounting.tick)
                yield accounting
                tasks.cancel_scope.cancel()
        finally:
            await _leave(accounting)
    finally:
        journal.close()


async def _leave(accounting: Accounting) -> None:
    with anyio.CancelScope(shield=True):
        await accounting.leave()
