"""What ledger and counters of a process run on: the store's clock, and what is said of faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import attrs
import pytest
from sqlalchemy import select

from accounting_process import money, reserved
from penstock.governance import Claim, Exceeded, StoreUnavailableError
from penstock_plugins.store.accounting import Accounting, open_accounting
from penstock_plugins.store.database import Database
from penstock_plugins.store.ledger_tables import counters as counter_rows
from penstock_plugins.store.schema import migrate

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
