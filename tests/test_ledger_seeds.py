"""What a counter begins with: what its scope has spent since the period began, found without reading all rows."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting_process import make_entry
from penstock.governance import LedgerEntry
from penstock_plugins.store.commits import Books
from penstock_plugins.store.database import Database
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.totals import last_sequence, spent_since, spent_where

START = 1_790_000_000
WHERE = (
    {"organization_id": "org_1"},
    {"project_id": "proj_1"},
    {"project_id": "proj_1", "end_user": "ada"},
    {"virtual_key_id": "vk_2", "end_user": "ada"},
    {"virtual_key_id": "vk_1"},
    {"principal_id": "user_1", "binding_id": "gpc_1"},
)
numbers = itertools.count(1)


def entry(at: float, key: int, end_user: str | None, cost: int) -> LedgerEntry:
    return msgspec.structs.replace(
        make_entry(f"req_{next(numbers)}", cost),
        started_at_ns=int((START + at) * 1e9),
        organization_id="org_1",
        project_id=f"proj_{key}",
        virtual_key_id=f"vk_{key}",
        principal_id="user_1",
        binding_id=f"gpc_{key}",
        end_user=end_user,
        debits=(),
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('seeds')}/penstock.db")
    migrate(database)
    return database


entries = st.lists(
    st.builds(
        entry,
        st.floats(0, 200_000),
        st.integers(1, 2),
        st.sampled_from([None, "ada", "bob"]),
        st.integers(0, 10**9),
    ),
    max_size=12,
)


@given(rows=entries, since=st.floats(-2_000, 200_000), where=st.sampled_from(WHERE))
def test_what_rollups_say_is_what_the_rows_say(
    database: Database, rows: list[LedgerEntry], since: float, where: dict[str, str]
) -> None:
    books = Books(lambda _, __: None)
    with database.writer.begin() as connection:
        books.append(connection, rows)
        period = int(START + since)
        derived = spent_where(connection, where, period, last_sequence(connection))
        assert spent_since(connection, where, period) == derived


@pytest.mark.parametrize("where", [{"project_id": "p", "end_user": "new"}, {"virtual_key_id": "v", "end_user": "new"}])
def test_new_end_user_costs_no_scan(database: Database, where: dict[str, str]) -> None:
    asked: list[str] = []
    with database.writer.begin() as connection:
        raw = connection.connection.driver_connection
        assert raw is not None
        raw.set_trace_callback(asked.append)
        spent_since(connection, where, START)
        raw.set_trace_callback(None)
        sums = [statement for statement in asked if statement.startswith("SELECT sum")]
        plans = [str(row[3]) for each in sums for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {each}")]
    assert any("sqlite_autoindex_end_users_1 (end_user=?" in step for step in plans)
    assert any("ledger_by_end_user (end_user_id=?" in step for step in plans)
    assert not any(step.startswith("SCAN") for step in plans)
