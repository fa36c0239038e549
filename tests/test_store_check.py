"""``penstock check`` on a configuration with a store: it says what a start would, and leaves nothing behind."""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import anyio
import msgspec
import pytest

from accounting_process import make_intent
from penstock.cli import main
from penstock_plugins.store.journal import Journal
from store_fixtures import store_harness

Check = Callable[..., tuple[int, str]]
CONFIG = """
[gateway]
listen = "127.0.0.1:0"
plugins = ["store", "virtual_keys", "routing", "mock"]

[plugins.store]
url = "sqlite:///{database}"
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    def run(database: str = "penstock.db") -> tuple[int, str]:
        (tmp_path / "penstock.toml").write_text(CONFIG.format(database=database))
        monkeypatch.setattr(sys, "argv", ["penstock", "check", "-c", str(tmp_path / "penstock.toml")])
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        return status, capsys.readouterr().err

    return run


def test_check_makes_no_database(check: Check, tmp_path: Path) -> None:
    status, printed = check()
    assert status == 0
    assert "ok, 4 plugins" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["penstock.toml"]


def test_check_makes_no_folders_either(check: Check, tmp_path: Path) -> None:
    assert check("deep/er/penstock.db")[0] == 0
    assert not (tmp_path / "deep").exists()


def test_check_says_where_no_database_can_be(check: Check, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, complaints = check("file/penstock.db")
    assert status == 2
    assert "[plugins.store] url: " in complaints
    assert f"{os.sep}file is no folder" in complaints


def test_check_names_a_budget_that_cannot_be_read(check: Check, tmp_path: Path) -> None:
    start_once(tmp_path)
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as database, database:
        database.execute(UNREADABLE)
    status, complaints = check()
    assert status == 2
    assert "[plugins.store] budget bud_x of organization org_" in complaints
    assert "cannot be read: " in complaints


def test_check_beside_a_running_gateway_sees_what_is_in_its_log_and_leaves_it(check: Check, tmp_path: Path) -> None:
    start_once(tmp_path)
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as database:
        database.execute("PRAGMA wal_autocheckpoint = 0")
        with database:
            database.execute(UNREADABLE)
        before = everything_in(tmp_path)
        status, complaints = check()
        assert (status, "budget bud_x" in complaints) == (2, True)
        assert everything_in(tmp_path) == before


UNREADABLE = """
INSERT INTO objects SELECT 'budget', 'bud_x', id, NULL, NULL, 1, 0, 0, NULL, 1, '{}' FROM objects
WHERE kind = 'organization'
"""


def test_check_leaves_a_database_that_is_there_as_it_is(check: Check, tmp_path: Path) -> None:
    start_once(tmp_path)
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '0001'")
        database.execute("DROP TABLE ledger")
    before = everything_in(tmp_path)
    assert check()[0] == 0
    assert everything_in(tmp_path) == before


def test_check_replays_no_journal_and_counts_with_nobody(check: Check, tmp_path: Path) -> None:
    start_once(tmp_path)
    journal = Journal(tmp_path / "penstock.db.journal", "dead")
    journal.add_intent("req_1", msgspec.msgpack.encode(make_intent("req_1")))
    journal.close()
    before = everything_in(tmp_path)
    assert check()[0] == 0
    assert everything_in(tmp_path) == before


def test_check_says_what_a_start_would_of_a_database_that_is_there(check: Check, tmp_path: Path) -> None:
    start_once(tmp_path)
    with closing(sqlite3.connect(tmp_path / "penstock.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    status, complaints = check()
    assert status == 2
    assert "penstock.db has schema 9999" in complaints
    (tmp_path / "penstock.db.key").unlink()
    before = everything_in(tmp_path)
    assert check()[0] == 2
    assert everything_in(tmp_path) == before


def start_once(folder: Path) -> None:
    """Have a gateway make its store in ``folder``."""

    async def start() -> None:
        async with store_harness(folder):
            pass

    anyio.run(start)


def everything_in(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
        if path.name != "penstock.toml" and not path.name.endswith("-shm")  # memory that is in no file
    }
