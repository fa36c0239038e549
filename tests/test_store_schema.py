"""Migrations: what they make, what they refuse, and that a failed one leaves everything as it was."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import inspect

from penstock import ConfigurationError
from penstock_plugins.store import schema
from penstock_plugins.store.database import Database
from penstock_plugins.store.files import Place
from penstock_plugins.store.opening import StoreSettings
from penstock_plugins.store.rehearsing import rehearsed
from penstock_plugins.store.tables import metadata

_NEXT = """
from alembic import op
import sqlalchemy as sa

revision = "9999"
down_revision = "{before}"


def upgrade():
    op.add_column("audit", sa.Column("colour", sa.String))
    {more}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


def migrate(path: Path) -> None:
    database = Database(f"sqlite:///{path}")
    try:
        schema.migrate(database)
    finally:
        database.close()


def columns(path: Path, table: str) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def add_migration(folder: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> None:
    """Have the schema of a later version be the one that is known."""
    before = schema.known_schema()
    later = folder / "migrations"
    shutil.copytree(Path(schema.__file__).parent / "migrations", later, ignore=shutil.ignore_patterns("__pycache__"))
    (later / "versions" / "9999_later.py").write_text(_NEXT.format(before=before, more=more))
    monkeypatch.setattr(schema, "_MIGRATIONS", later)


def test_migrations_make_the_tables_that_are_declared(path: Path) -> None:
    import penstock_plugins.store.ledger_tables  # noqa: F401, PLC0415 - declares tables too

    migrate(path)
    database = Database(f"sqlite:///{path}")
    with database.writer.begin() as connection:
        found = inspect(connection)
        made = {
            name: (
                {(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(name)},
                {(index["name"], tuple(index["column_names"])) for index in found.get_indexes(name)},
                tuple(found.get_pk_constraint(name)["constrained_columns"]),
            )
            for name in metadata.tables
        }
    database.close()
    declared = Database(f"sqlite:///{path}.declared")
    with declared.writer.begin() as connection:
        metadata.create_all(connection)
        found = inspect(connection)
        for name in metadata.tables:
            wanted = (
                {(column["name"], str(column["type"]), column["nullable"]) for column in found.get_columns(name)},
                {(index["name"], tuple(index["column_names"])) for index in found.get_indexes(name)},
                tuple(found.get_pk_constraint(name)["constrained_columns"]),
            )
            assert made[name] == wanted, name
    declared.close()


def test_next_migration_runs_on_what_is_there_after_a_copy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(path)
    add_migration(path.parent, monkeypatch)
    migrate(path)
    assert "colour" in columns(path, "audit")
    copy = path.with_name("a.db.before-9999")
    assert "colour" not in columns(copy, "audit")
    assert copy.stat().st_mode & 0o777 == 0o600
    migrate(path)


def test_failed_migration_leaves_the_database_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(path)
    add_migration(path.parent, monkeypatch, 'raise ValueError("on purpose")')
    with pytest.raises(ConfigurationError) as caught:
        migrate(path)
    assert str(caught.value) == f"url: {path} could not be brought to schema 9999 and is left as it was: on purpose"
    assert "colour" not in columns(path, "audit")
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() != ("9999",)


def test_newer_schema_and_strange_databases_are_refused(path: Path) -> None:
    migrate(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match=r"has schema 9999, and this version of penstock knows no newer"):
        migrate(path)
    other = path.with_name("b.db")
    with closing(sqlite3.connect(other)) as connection, connection:
        connection.execute("CREATE TABLE t (a)")
    with pytest.raises(ConfigurationError, match="is a database of another program"):
        migrate(other)


def test_start_on_a_current_schema_imports_no_alembic(path: Path) -> None:
    migrate(path)
    program = (
        "import sys\n"
        "from penstock_plugins.store.database import Database\n"
        "from penstock_plugins.store.schema import migrate\n"
        f"database = Database('sqlite:///{path}')\n"
        "migrate(database)\n"
        "database.close()\n"
        "print('alembic' in sys.modules)\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout == "False\n"


def test_listing_the_plugin_imports_no_database() -> None:
    program = "import penstock_plugins.store, sys; print('sqlalchemy' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout == "False\n"


_OLD_LEDGER = """
ALTER TABLE ledger DROP COLUMN attempts;
ALTER TABLE ledger ADD COLUMN colour TEXT;
ALTER TABLE rollups RENAME COLUMN dimensions_id TO scope_id;
DROP TABLE end_users;
"""


@pytest.mark.parametrize("number", ["0002", None])
def test_database_of_an_unreleased_version_is_refused_as_it_is(path: Path, number: str | None) -> None:
    migrate(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(_OLD_LEDGER)
        if number is not None:
            connection.execute("UPDATE alembic_version SET version_num = ?", (number,))
    before = number or schema.known_schema()
    with pytest.raises(ConfigurationError) as caught:
        migrate(path)
    assert str(caught.value) == (
        f"url: {path} was made by an unreleased version and has other tables (ledger has no column attempts, there is "
        "no table end_users, rollups has no column dimensions_id and 1 more); export its objects with the version that "
        "made it and apply them to a new database, or begin anew"
    )
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (before,)


def test_check_refuses_a_database_of_an_unreleased_version(path: Path) -> None:
    migrate(path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(_OLD_LEDGER)
    settings = StoreSettings(place=Place(path))
    with pytest.raises(ConfigurationError, match="was made by an unreleased version"), rehearsed(settings):
        pass
