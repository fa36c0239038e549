"""Long work on objects is prepared beside the writer: it keeps nobody waiting, and is as good as if it had."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import text

from penstock.governance import ConflictError, Scope, Transaction
from penstock_plugins.store.database import Database
from penstock_plugins.store.following import Objects
from penstock_plugins.store.schema import migrate

pytestmark = pytest.mark.anyio
KIND = "routing_policy"
SCOPE = Scope("org_1")


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[tuple[Database, Objects]]:
    database = Database(f"sqlite:///{folder}/a.db")
    migrate(database)
    async with database:
        yield database, Objects(database, time.time)


class Interrupted:
    """Be work that stops midway each time, until somebody has written something."""

    def __init__(self) -> None:
        self.runs = 0
        self.is_midway = threading.Semaphore(0)
        self.may_go_on = threading.Semaphore(0)

    def __call__(self, change: Transaction) -> int:
        self.runs += 1
        number = len(change.list(KIND))
        change.insert(KIND, f"rp_long_{self.runs}", SCOPE, {"name": "long", "number": number}, {"name": ("long",)})
        self.is_midway.release()
        assert self.may_go_on.acquire(timeout=20)
        return number


def inserting(name: str) -> Any:
    return lambda change: change.insert(KIND, f"rp_{name}", SCOPE, {"name": name}, {"name": (name,)})


async def test_others_write_while_long_work_is_prepared(tmp_path: Path) -> None:
    async with opened(tmp_path) as (database, objects), anyio.create_task_group() as tasks:
        work = Interrupted()
        tasks.start_soon(lambda: objects.transact(work, is_long=True))
        await anyio.to_thread.run_sync(work.is_midway.acquire)
        with anyio.fail_after(10):
            await database.write(lambda connection: connection.execute(text("INSERT INTO meta VALUES ('a', 'b')")))
        work.may_go_on.release()
    assert work.runs == 1


async def test_long_work_is_begun_anew_where_objects_have_changed_meanwhile(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, objects), anyio.create_task_group() as tasks:
        work = Interrupted()
        found: list[int] = []

        async def run() -> None:
            found.append(await objects.transact(work, is_long=True))

        tasks.start_soon(run)
        for number in range(3):
            await anyio.to_thread.run_sync(work.is_midway.acquire)
            await objects.transact(inserting(f"other {number}"))
            work.may_go_on.release()
        await anyio.to_thread.run_sync(work.is_midway.acquire)  # on the writer, where nobody comes between any more
        work.may_go_on.release()
    assert (work.runs, found) == (4, [3])
    async with opened(tmp_path) as (_, objects):
        names = await objects.read(lambda reading: [stored.id for stored in reading.list(KIND)])
        assert names == ["rp_long_4", "rp_other 0", "rp_other 1", "rp_other 2"]


async def test_what_prepared_work_reads_is_what_it_has_written(tmp_path: Path) -> None:
    def work(change: Transaction) -> None:
        old = change.find(KIND, "name", ["old"])
        assert old is not None
        with pytest.raises(ConflictError):
            change.insert(KIND, "rp_b", SCOPE, {}, {"name": ("old",)})
        renamed = change.replace(old, {"name": "renamed"}, {"name": ("renamed",)})
        with pytest.raises(ConflictError):
            change.replace(old, {}, {})
        change.insert(KIND, "rp_b", SCOPE, {"name": "old"}, {"name": ("old",)})
        assert [stored.id for stored in change.list(KIND, limit=2)] == ["rp_b", "rp_keep"]
        assert change.list(KIND, where={"name": "renamed"}) == [renamed]
        assert change.list(KIND, scope=Scope("org_2")) == []
        gone = change.archive(renamed)
        assert change.find(KIND, "name", ["renamed"]) is None
        assert gone not in change.list(KIND)
        assert gone in change.list(KIND, include_archived=True, after="rp_keep")
        with pytest.raises(ConflictError):
            change.archive(gone)

    async with opened(tmp_path) as (_, objects):
        await objects.transact(inserting("old"))
        await objects.transact(inserting("keep"))
        await objects.transact(work, is_long=True)

        def look(reading: Any) -> tuple[list[str], list[str], str, int]:
            every = reading.list(KIND, include_archived=True)
            active = reading.list(KIND)
            return (
                [stored.id for stored in every],
                [stored.id for stored in active],
                reading.find(KIND, "name", ["old"]).id,
                reading.get(KIND, "rp_old").version,
            )

        ids = ["rp_b", "rp_keep", "rp_old"]
        assert await objects.read(look) == (ids, ids[:2], "rp_b", 3)
