"""The store's database: one writer thread, many readers; callers hand over functions that get a connection.

SQLite now. Callers write SQLAlchemy Core and stay free of what only SQLite knows; that is all in this module.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import anyio
import anyio.to_thread
import attrs
import msgspec
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError

from penstock.governance import StoreUnavailableError

T = TypeVar("T")
Work = Callable[[Connection], T]

BUSY_SECONDS = 5.0
"""How long a statement waits for another process's transaction."""
_READERS = 4
_CALLERS_FAULT = (IntegrityError, ProgrammingError, DataError)


@attrs.define(eq=False)
class _Job:
    """One transaction for the writer thread."""

    work: Callable[[Connection], Any]
    finish: Callable[[Any, BaseException | None], None]
    is_dropped: bool = False


class Database:
    """Run work in transactions: ``async with Database(url) as database``.

    Work is a function of a SQLAlchemy ``Connection`` inside one transaction, runs in a thread, and must not keep the
    connection. What it raises rolls the transaction back.
    """

    def __init__(self, url: str | URL) -> None:
        self.url = make_url(url)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="penstock-store-writer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._watch: Any = None
        self._data_version: int | None = None
        self.writer: Engine = _new_engine(self.url, is_writer=True)
        """For what runs before or beside the writer thread, such as migrations."""
        self._reader = _new_engine(self.url, is_writer=False)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._limit = anyio.CapacityLimiter(_READERS)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish what is queued, then let go of the database."""
        self._is_closed = True
        self._jobs.put(None)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._thread.join)
            await anyio.to_thread.run_sync(self.close)
            await asyncio.sleep(0)  # callbacks of the last jobs run before whoever closes goes on

    def close(self) -> None:
        """Let go of every connection; for who has not entered."""
        if self._watch is not None:
            self._watch.close()
        self._reader.dispose()
        self.writer.dispose()

    async def read(self, work: Work[T]) -> T:
        """Run ``work`` on one consistent view, in a thread. Raises StoreUnavailableError."""
        if self._is_closed:
            raise _closed()
        return await anyio.to_thread.run_sync(self._read, work, limiter=self._limit)

    def _read(self, work: Work[T]) -> T:
        try:
            with self._reader.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            raise _translated(error) from error

    async def write(self, work: Work[T]) -> T:
        """Run ``work`` in one transaction on the writer thread and commit it. Raises StoreUnavailableError.

        Cancelled while it waits for its turn it does not run at all; after that it is committed all the same.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def finish(result: T, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        job = self._put(_Job(work, finish))
        try:
            return await future
        except asyncio.CancelledError:
            job.is_dropped = True
            raise

    def write_now(self, work: Work[T]) -> T:
        """Run ``work`` in one transaction in this thread, which waits for it. Raises StoreUnavailableError."""
        try:
            with self.writer.begin() as connection:
                return work(connection)
        except DBAPIError as error:
            raise _translated(error) from error

    def write_soon(self, work: Work[Any], done: Callable[[BaseException | None], None]) -> None:
        """Queue ``work`` for a transaction of its own and return at once; works run in the order they were queued.

        ``done`` is called in the event loop with None once it is committed, or with what it failed with. To be called
        in the event loop. Raises StoreUnavailableError once the database is closed.
        """
        self._put(_Job(work, lambda _, error: done(error)))

    def _put(self, job: _Job) -> _Job:
        if self._is_closed:
            raise _closed()
        self._jobs.put(job)
        return job

    def _write_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.is_dropped:
                continue
            result: Any = None
            error: BaseException | None = None
            try:
                with self.writer.begin() as connection:
                    result = job.work(connection)
            except DBAPIError as fault:
                error = _translated(fault)
                error.__cause__ = fault if error is not fault else None
            except StopIteration as fault:  # a future cannot carry one
                error = RuntimeError(f"work raised {fault!r}")
            except BaseException as fault:  # noqa: BLE001 - it belongs to whoever handed over the work
                error = fault
            assert self._loop is not None
            with suppress(RuntimeError):  # the loop is closed, so nobody waits
                self._loop.call_soon_threadsafe(job.finish, result, error)

    async def has_changed(self) -> bool:
        """Say, cheaply, whether anybody may have committed since the last call. Raises StoreUnavailableError."""
        if self._is_closed:
            raise _closed()
        return await anyio.to_thread.run_sync(self._look, limiter=self._limit)

    def _look(self) -> bool:
        try:
            if self._watch is None:
                self._watch = self._reader.raw_connection()
            version = _data_version(self._watch)
        except (DBAPIError, sqlite3.Error) as error:
            raise StoreUnavailableError(f"the store's database cannot be read: {error}") from error
        changed, self._data_version = version != self._data_version, version
        return changed


def _data_version(connection: Any) -> int:
    """Return what changes whenever another connection commits."""
    return int(connection.driver_connection.execute("PRAGMA data_version").fetchone()[0])


def file_of(url: URL) -> Path:
    """Return the database's file."""
    return Path(url.database or "")


def _new_engine(url: URL, *, is_writer: bool) -> Engine:
    engine = create_engine(
        url,
        pool_size=1 if is_writer else _READERS + 1,
        max_overflow=0 if not is_writer else 1,
        connect_args={"timeout": BUSY_SECONDS},
        json_serializer=lambda value: msgspec.json.encode(value).decode(),
        json_deserializer=msgspec.json.decode,
    )
    # sqlite3 would begin transactions by itself, at the first change only, and commit before DDL.
    begin = "BEGIN IMMEDIATE" if is_writer else "BEGIN"
    pragmas = ("journal_mode = WAL", "journal_size_limit = 67108864") if is_writer else ("query_only = ON",)

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None
        for pragma in ("synchronous = NORMAL", "foreign_keys = ON", *pragmas):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _translated(error: DBAPIError) -> Exception:
    """Return what the caller is told: a fault of its statements as it is, all else as an unavailable store."""
    if isinstance(error, _CALLERS_FAULT):
        return error
    return StoreUnavailableError(f"the store's database cannot be used: {error.orig}")


def _closed() -> StoreUnavailableError:
    return StoreUnavailableError("the store is closed")
