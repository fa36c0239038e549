"""The store of objects as the process sees it: changes made here are in force when a transaction returns, changes made
elsewhere are looked for twice a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import Connection

from penstock.governance import Reading, StoredObject, StoreUnavailableError, Transaction
from penstock_plugins.store.database import Database
from penstock_plugins.store.objects import Clock, SQLReading, SQLTransaction, changed_since, read_revision
from penstock_plugins.store.prepared import OvertakenError, PreparedTransaction, Rows

T = TypeVar("T")
POLL_SECONDS = 0.5
_ATTEMPTS = 3
"""How often long work is begun anew where others have changed objects meanwhile, before it is done on the writer."""

_log = logging.getLogger("penstock.store")


class Follower(Protocol):
    """Answer from memory by what the store holds."""

    @property
    def kinds(self) -> Sequence[str]:
        """Return the kinds it wants to see."""
        ...

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        """Work out, in a thread, what changed objects mean; what is returned puts it in force, in the event loop.

        Called for one set of changes after the other, archived objects among them. May be called again for changes
        whose plan was not put in force.
        """
        ...


class Objects:
    """Keep objects in a database and have followers and watchers know of every change."""

    def __init__(self, database: Database, clock: Clock, followers: Sequence[Follower] = ()) -> None:
        self._database = database
        self._clock = clock
        self._followers = tuple(followers)
        self._kinds = sorted({kind for follower in followers for kind in follower.kinds})
        self._revision = 0
        self._refreshing = anyio.Lock()
        self._calls: list[Callable[[], None]] = []

    @property
    def revision(self) -> int:
        return self._revision

    async def read(self, work: Callable[[Reading], T]) -> T:
        return await self._database.read(lambda connection: work(SQLReading(connection)))

    async def transact(self, work: Callable[[Transaction], T], *, is_long: bool = False) -> T:
        def run(connection: Connection) -> tuple[T, int | None]:
            transaction = SQLTransaction(connection, self._clock)
            return work(transaction), transaction.revision

        result, revision = await (self._prepare(work, run) if is_long else self._database.write(run))
        if revision is not None and revision > self._revision:
            try:
                await self.refresh()
            except StoreUnavailableError as error:  # the change is made; what is answered by it follows
                _log.warning("a change is stored but not yet in force: %s", error)
        return result

    async def _prepare(
        self, work: Callable[[Transaction], T], otherwise: Callable[[Connection], tuple[T, int | None]]
    ) -> tuple[T, int | None]:
        """Run ``work`` beside the writer, which only writes what comes of it; on the writer if that never succeeds."""

        def prepare(connection: Connection) -> tuple[T, Rows]:
            transaction = PreparedTransaction(connection, self._clock)
            return work(transaction), transaction.rows()

        for _ in range(_ATTEMPTS):
            result, rows = await self._database.read(prepare)
            try:
                return result, await self._database.write(rows.commit)
            except OvertakenError:
                continue
        return await self._database.write(otherwise)

    def watch(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def unwatch(self, call: Callable[[], None]) -> None:
        """Call back no more."""
        self._calls.remove(call)

    async def refresh(self) -> None:
        """Put in force whatever has changed. Raises StoreUnavailableError."""
        with anyio.CancelScope(shield=True):
            async with self._refreshing:
                known = self._revision
                revision, changed = await self._database.read(lambda connection: self._changes(connection, known))
                if revision == known:
                    return
                swaps = await anyio.to_thread.run_sync(self._plan, changed)
                for swap in swaps:
                    swap()
                self._revision = revision
                self._tell()

    def _changes(self, connection: Connection, known: int) -> tuple[int, list[StoredObject]]:
        revision = read_revision(connection)
        if revision == known:
            return revision, []
        if revision < known:
            raise StoreUnavailableError("the database is older than what was read from it before; start again")
        return revision, changed_since(connection, known, self._kinds)

    def _plan(self, changed: Sequence[StoredObject]) -> list[Callable[[], None]]:
        return [
            follower.plan([stored for stored in changed if stored.kind in follower.kinds])
            for follower in self._followers
        ]

    def _tell(self) -> None:
        for call in tuple(self._calls):
            try:
                call()
            except Exception:  # noqa: BLE001 - somebody else's code
                _log.exception("a watcher of the store failed")

    async def follow(self) -> None:
        """Look for changes of other processes, until cancelled."""
        is_reachable = True
        while True:
            await anyio.sleep(POLL_SECONDS)
            try:
                if await self._database.has_changed():
                    await self.refresh()
                is_reachable = True
            except StoreUnavailableError as error:
                if is_reachable:
                    _log.error("changes of other processes are not seen just now: %s", error)
                is_reachable = False
            except Exception:  # noqa: BLE001 - what could not be taken this time is tried again
                _log.exception("changes of other processes could not be put in force")
