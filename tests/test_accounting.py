"""What ledger and counters of a process run on: the store's clock, and what is said of faults."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio
import anyio.to_thread
import attrs
import pytest
from sqlalchemy import select

from accounting_process import COUNTER, START, make_entry, money, reserved
from fault_upstream import until
from penstock.governance import Claim, Exceeded, StoreUnavailableError
from penstock_plugins.store import accounting as accounting_module
from penstock_plugins.store import leases
from penstock_plugins.store.accounting import Accounting, open_accounting
from penstock_plugins.store.commits import Books, Receipt
from penstock_plugins.store.counters import WAIT_SECONDS
from penstock_plugins.store.database import Database
from penstock_plugins.store.journal import Journal
from penstock_plugins.store.ledger_tables import counters as counter_rows
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.totals import seed_of_budget

pytestmark = pytest.mark.anyio
LONG_AGO = 10_000 * 86_400
"""Some minute's start, seconds since the epoch, long over by any other clock."""
CLAIM = Claim("rpm:vk_1", LONG_AGO, 1, 1)


@attrs.define(eq=False)
class Clock:
    """Time that a test moves."""

    now: float = LONG_AGO + 30.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def two_processes(folder: Path, clock: Clock) -> AsyncIterator[tuple[Accounting, Accounting]]:
    """Yield the accounting of two that share a counter whose limit is reached."""
    async with Database(f"sqlite:///{folder}/penstock.db") as database:
        await anyio.to_thread.run_sync(migrate, database)
        journal = folder / "journal"
        async with (
            open_accounting(database, journal, clock=clock) as first,
            open_accounting(database, journal, clock=clock) as second,
        ):
            held = await reserved(first.counters, CLAIM)
            assert not isinstance(held, Exceeded)
            first.counters.settle(held, {CLAIM.counter: 1})
            while await reserved(second.counters, CLAIM) != Exceeded(CLAIM, used=1, settled=1):
                await anyio.lowlevel.checkpoint()
            yield first, second


async def counted(accounts: Accounting) -> list[int]:
    rows = select(counter_rows.c.total).where(counter_rows.c.counter == CLAIM.counter)
    return await accounts.database.read(lambda connection: list(connection.scalars(rows)))


async def test_counter_in_force_by_the_store_s_clock_is_kept(tmp_path: Path) -> None:
    async with two_processes(tmp_path, Clock()) as (first, _):
        await first.forget()
        assert await counted(first) == [1]


async def test_counter_long_over_by_the_store_s_clock_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    async with two_processes(tmp_path, clock) as (first, _):
        clock.now += 3 * 86_400
        await first.forget()
        assert await counted(first) == []


async def test_fault_without_a_text_is_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    async with Database(f"sqlite:///{tmp_path}/penstock.db") as database:
        await anyio.to_thread.run_sync(migrate, database)
        async with open_accounting(database, tmp_path / "journal", seed=fail) as accounts:
            with pytest.raises(StoreUnavailableError, match="AssertionError"):
                await reserved(accounts.counters, money(1, 10))
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == ["ledger and counters could not be written, and will be: AssertionError()"]


async def test_database_that_is_down_is_one_line_and_another_once_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tries = []

    def down(*_: object) -> None:
        tries.append(1)
        if len(tries) <= 3:
            raise StoreUnavailableError("the disk is gone")

    async with Database(f"sqlite:///{tmp_path}/penstock.db") as database:
        await anyio.to_thread.run_sync(migrate, database)
        async with open_accounting(database, tmp_path / "journal", seed=down) as accounts:
            accounts.ledger.settle(make_entry("req_1", 5, COUNTER))
            await accounts.ledger.flush()
            assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 5}
    assert [record.getMessage() for record in caplog.records if record.name == "penstock.store"] == [
        "ledger and counters could not be written, and will be: StoreUnavailableError('the disk is gone')",
        "ledger and counters are written again; 3 tries had failed",
    ]


async def test_look_at_other_processes_that_fails_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with Database(f"sqlite:///{tmp_path}/penstock.db") as database:
        await anyio.to_thread.run_sync(migrate, database)
        async with open_accounting(database, tmp_path / "journal") as accounts:
            with closing(sqlite3.connect(tmp_path / "penstock.db")) as other:
                other.execute("ALTER TABLE counters RENAME TO away")
                other.commit()
                await until(lambda: "cannot be read just now" in caplog.text, "a line")
                for _ in range(2):
                    with pytest.raises(StoreUnavailableError):
                        await accounts.database.read(lambda connection: leases.calls_to_answer(connection, "another"))
                other.execute("ALTER TABLE away RENAME TO counters")
                other.commit()
            await until(lambda: "can be read again" in caplog.text, "another line")
    said = [record.getMessage() for record in caplog.records if record.name == "penstock.store"]
    assert len(said) == 2


async def test_newcomer_beside_one_that_hangs_refuses_and_says_whom_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting_module, "_JOIN_SECONDS", 0.1)
    claim = money(1, 10)
    async with Database(f"sqlite:///{tmp_path}/penstock.db") as database:
        await anyio.to_thread.run_sync(migrate, database)
        hanging = Journal(tmp_path / "journal", "hanging")
        await database.write(lambda connection: leases.join(connection, "hanging"))
        async with open_accounting(database, tmp_path / "journal") as accounts:
            began = anyio.current_time()
            with pytest.raises(StoreUnavailableError, match="counts alone and does not answer"):
                await reserved(accounts.counters, claim)
            assert WAIT_SECONDS <= anyio.current_time() - began < 2 * WAIT_SECONDS
            (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
            assert f"(process {os.getpid()}) does not answer" in said
            assert "are refused with 503" in said
            assert said.endswith("end it if so")
            hanging.close()
            await accounts.sweeper.sweep()
            assert not isinstance(await reserved(accounts.counters, claim), Exceeded)


def test_end_users_in_any_number_leave_dimensions_remembered() -> None:
    books = Books(seed_of_budget)
    books.remember(Receipt({}, dimension_ids={(4, "org_1"): 1}, end_user_ids={}, counter_ids={}))
    for start in range(0, 200_000, 20_000):
        seen = {(f"user {number}",): number for number in range(start, start + 20_000)}
        books.remember(Receipt({}, dimension_ids={}, end_user_ids=seen, counter_ids={}))
    assert books.dimension_id((4, "org_1")) == 1
    assert books.end_user_id(("user 199999",)) == 199_999
    assert books.end_user_id(("user 0",)) is None
