"""Transactions of the store: alone, in order, and each failing by itself."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from sqlalchemy import Connection, func, insert, select
from sqlalchemy.exc import IntegrityError

from penstock.governance import StoreUnavailableError
from penstock_plugins.store import database as database_module
from penstock_plugins.store.database import Database
from penstock_plugins.store.tables import meta, metadata


def run(folder: Path, check: Callable[[Database], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Database(f"sqlite:///{folder}/a.db") as database:
            await database.write(metadata.create_all)
            await check(database)

    anyio.run(main)


def adding(name: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        connection.execute(insert(meta).values(name=name, value=""))

    return work


def names(connection: Connection) -> list[str]:
    return list(connection.execute(select(meta.c.name).order_by(meta.c.name)).scalars())


def test_what_raises_is_rolled_back_and_reaches_the_caller(tmp_path: Path) -> None:
    async def check(database: Database) -> None:
        def fail(connection: Connection) -> None:
            adding("a")(connection)
            raise LookupError("on purpose")

        with pytest.raises(LookupError):
            await database.write(fail)
        await database.write(adding("b"))
        with pytest.raises(IntegrityError):
            await database.write(adding("b"))
        assert await database.read(names) == ["b"]

    run(tmp_path, check)


def test_queued_works_run_in_order_and_fail_alone(tmp_path: Path) -> None:
    async def check(database: Database) -> None:
        done: list[BaseException | None] = []
        for name in ("a", "b", "a", "c"):
            database.write_soon(adding(name), done.append)
        assert done == []
        await database.write(adding("d"))
        assert [type(error) for error in done] == [type(None), type(None), IntegrityError, type(None)]
        assert await database.read(names) == ["a", "b", "c", "d"]

    run(tmp_path, check)


def test_leaving_finishes_what_is_queued(tmp_path: Path) -> None:
    async def main() -> None:
        done: list[BaseException | None] = []
        async with Database(f"sqlite:///{tmp_path}/a.db") as database:
            await database.write(metadata.create_all)
            for number in range(50):
                database.write_soon(adding(str(number)), done.append)
        assert done == [None] * 50
        with pytest.raises(StoreUnavailableError):
            await database.write(adding("x"))
        with pytest.raises(StoreUnavailableError):
            database.write_soon(adding("x"), done.append)

    anyio.run(main)


def test_cancelled_before_its_turn_it_does_not_run(tmp_path: Path) -> None:
    async def check(database: Database) -> None:
        leave = threading.Event()

        def hold(connection: Connection) -> None:
            leave.wait(10)
            adding("held")(connection)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(database.write, hold)
            await anyio.lowlevel.checkpoint()
            with anyio.CancelScope() as scope:
                scope.cancel()
                await database.write(adding("cancelled"))
            leave.set()
        assert await database.read(names) == ["held"]

    run(tmp_path, check)


def test_read_sees_one_moment(tmp_path: Path) -> None:
    async def check(database: Database) -> None:
        url = database.url

        def look(connection: Connection) -> tuple[int, int]:
            count = select(func.count()).select_from(meta)
            first = connection.execute(count).scalar_one()
            other = Database(url)
            other.write_now(adding("meanwhile"))
            other.close()
            return first, connection.execute(count).scalar_one()

        assert await database.read(look) == (0, 0)
        assert await database.read(names) == ["meanwhile"]
        with pytest.raises(StoreUnavailableError, match="readonly"):
            await database.read(adding("x"))

    run(tmp_path, check)


def test_change_by_another_connection_is_noticed_once(tmp_path: Path) -> None:
    async def check(database: Database) -> None:
        await database.has_changed()
        assert not await database.has_changed()
        await database.write(adding("a"))
        assert await database.has_changed()
        assert not await database.has_changed()

    run(tmp_path, check)


def test_locked_database_is_unavailable_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)

    async def check(database: Database) -> None:
        other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailableError, match="locked"):
            await database.write(adding("a"))
        assert await database.read(names) == []
        other.rollback()
        other.close()
        await database.write(adding("a"))

    run(tmp_path, check)
