"""A database that refuses rows, one, every one, or what is written beside them: what was spent goes on counting."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from accounting_process import COUNTER, START, accounting, make_entry, make_intent, money, reserved
from fault_upstream import until
from penstock.governance import Exceeded, LedgerUnavailableError, StoreUnavailableError
from penstock_plugins.store import turns
from penstock_plugins.store.accounting import Accounting, open_accounting
from penstock_plugins.store.database import Database
from penstock_plugins.store.schema import migrate
from test_counters_processes import rows_of

pytestmark = pytest.mark.anyio
NO_ROWS = "CREATE TRIGGER broken BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'broken'); END"
NO_LEASES = "CREATE TRIGGER broken BEFORE INSERT ON leases BEGIN SELECT RAISE(ABORT, 'broken'); END"
NO_BAD_ROWS = (
    "CREATE TRIGGER broken BEFORE INSERT ON ledger WHEN NEW.request_id LIKE 'bad%' "
    "BEGIN SELECT RAISE(ABORT, 'broken'); END"
)
REPAIRED = "DROP TRIGGER broken"
WAITS = "waits for the database to take a row again"


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what has failed be tried again at once."""
    monkeypatch.setattr(turns, "_LONGEST_PAUSE", 0.01)


def run(database: Path, statement: str) -> None:
    with closing(sqlite3.connect(database, timeout=10)) as other, other:
        other.execute(statement)


async def spend(accounts: Accounting, request_id: str, amount: int = 5) -> None:
    held = await reserved(accounts.counters, money(amount, 100))
    assert not isinstance(held, Exceeded)
    accounts.counters.settle(held, {COUNTER: amount})
    accounts.ledger.settle(make_entry(request_id, amount, COUNTER))


async def test_fault_of_the_whole_ledger_lets_no_budget_be_beaten(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    async with accounting(database) as accounts:
        await spend(accounts, "req_1", 60)
        await accounts.ledger.flush()
        run(database, NO_ROWS)
        await spend(accounts, "req_2", 30)
        await accounts.ledger.flush()  # it is set aside
        assert isinstance(await reserved(accounts.counters, money(20, 100)), Exceeded)
        run(database, REPAIRED)
    async with accounting(database) as accounts:
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 90}


async def test_few_refused_in_a_row_are_an_outage_until_a_row_is_committed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "a.db"
    async with accounting(database) as accounts:
        run(database, NO_ROWS)
        for number in range(6):
            await spend(accounts, f"req_{number}")
        await until(lambda: WAITS in caplog.text, "an outage")
        with pytest.raises(LedgerUnavailableError, match="refuses every row"):
            accounts.ledger.open(make_intent("req_new"))
        assert accounts.counters.used(COUNTER, START) == 30
        run(database, REPAIRED)
        await accounts.ledger.flush()
        accounts.ledger.open(make_intent("req_new"))
        accounts.ledger.settle(make_entry("req_new", 0))
        await accounts.ledger.flush()
        assert rows_of(database, "SELECT COUNT(*) FROM ledger") == [(4,)]
        assert accounts.counters.used(COUNTER, START) == 30
    assert caplog.text.count("refuses ledger entry") == 3
    async with accounting(database) as accounts:
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 30}


async def test_row_that_can_be_written_behind_many_that_cannot_ends_the_outage(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    async with accounting(database) as accounts:
        run(database, NO_BAD_ROWS)
        for request_id in (*(f"bad_{number}" for number in range(5)), "req_1"):
            await spend(accounts, request_id)
        with anyio.fail_after(20):
            await accounts.ledger.flush()
        accounts.ledger.open(make_intent("req_2"))
        accounts.ledger.settle(make_entry("req_2", 0))
        await accounts.ledger.flush()
        assert rows_of(database, "SELECT COUNT(*) FROM ledger WHERE request_id IN ('req_1', 'req_2')") == [(2,)]
        assert accounts.counters.used(COUNTER, START) == 30


async def test_restart_while_every_row_is_refused_keeps_the_journal(tmp_path: Path) -> None:
    database = tmp_path / "a.db"
    async with accounting(database) as accounts:
        for number in range(5):
            accounts.ledger.open(make_intent(f"req_{number}", 5, COUNTER))
        run(database, NO_ROWS)
    with pytest.raises(StoreUnavailableError, match="refuses every row"):
        async with accounting(database):
            pass
    run(database, REPAIRED)
    async with accounting(database) as accounts:
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 25}


async def test_fault_of_what_is_written_beside_a_row_is_not_held_against_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "a.db"
    async with Database(f"sqlite:///{database}") as opened:
        await anyio.to_thread.run_sync(migrate, opened)
        async with (
            open_accounting(opened, tmp_path / "journal") as first,
            open_accounting(opened, tmp_path / "journal") as second,
        ):
            await until(lambda: first.counters.is_shared, "two to count")
            held = await reserved(second.counters, money(5, 100))
            assert not isinstance(held, Exceeded)
            run(database, NO_LEASES)
            second.counters.settle(held, {COUNTER: 5})
            second.ledger.settle(make_entry("req_1", 5, COUNTER))
            for _ in range(4):
                with pytest.raises(StoreUnavailableError):
                    await reserved(second.counters, money(1, 100, "budget:bud_other"))
            run(database, REPAIRED)
            await second.ledger.flush()
            assert rows_of(database, "SELECT COUNT(*), SUM(cost_nano_usd) FROM ledger") == [(1, 5)]
            assert second.counters.used(COUNTER, START) == 5
    assert "refuses ledger entry" not in caplog.text
