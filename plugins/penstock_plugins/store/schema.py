"""The schema of the database: whether it is the one this version knows, and how it becomes that.

Migrations are Alembic's, in ``migrations/versions/<number>_<what>.py``; from the first release on they add, and never
take away what an older version needs. Before it some were rewritten: a database of that time may bear a number of this
version and have other tables, which is found by their columns. Alembic is imported only where there is something to
migrate.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from penstock import ConfigurationError
from penstock_plugins.store.database import Database, file_of
from penstock_plugins.store.files import Place
from penstock_plugins.store.ledger_tables import ledger

COLUMNS = """
SELECT tables.name, columns.name, columns."notnull" AND columns.dflt_value IS NULL
FROM sqlite_master AS tables JOIN pragma_table_info(tables.name) AS columns WHERE tables.type = 'table'
"""
"""Of all tables: the table's name, the column's, and whether who inserts a row must give it."""
_NAMED = 3
_MIGRATIONS = Path(__file__).parent / "migrations"


def known_schema() -> str:
    """Return the number of the newest migration there is here."""
    return max(path.name[:4] for path in (_MIGRATIONS / "versions").glob("[0-9][0-9][0-9][0-9]_*.py"))


def schema_of(connection: Connection) -> str | None:
    """Return the number of the schema of a database; None for an empty one. Raises ConfigurationError for others'."""
    tables = inspect(connection).get_table_names()
    if "alembic_version" in tables:
        found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return None if found is None else str(found)
    if tables:
        raise ConfigurationError(f"url: {connection.engine.url.database} is a database of another program")
    return None


def check_schema(found: str | None, path: Path) -> None:
    """Raise ConfigurationError for a schema that a newer version has made."""
    known = known_schema()
    if found is not None and found > known:
        raise ConfigurationError(
            f"url: {path} has schema {found}, and this version of penstock knows no newer than {known}; "
            "upgrade penstock, or restore a backup made by this version"
        )


def check_columns(found: Iterable[Iterable[object]], path: Path) -> None:
    """Raise ConfigurationError where ``COLUMNS`` of a database are not what this version reads and writes."""
    columns: dict[object, dict[object, object]] = {}
    for table, column, is_needed in found:
        columns.setdefault(table, {})[column] = is_needed
    faults = []
    for name, table in ledger.metadata.tables.items():
        there, here = columns.get(name), {column.name for column in table.columns}
        if there is None:
            faults.append(f"there is no table {name}")
            continue
        faults += [f"{name} has no column {column}" for column in sorted(here - there.keys())]
        faults += [f"{name} has a column {column}" for column in there if there[column] and column not in here]
    if faults:
        rest = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise ConfigurationError(
            f"url: {path} was made by an unreleased version and has other tables ({', '.join(faults[:_NAMED])}{rest}); "
            "export its objects with the version that made it and apply them to a new database, or begin anew"
        )


def migrate(database: Database) -> None:
    """Bring the database to the schema of this version, in one transaction. Raises ConfigurationError.

    A database that holds something is copied first (``<db>.before-<schema>``); one that fails is left as it was.
    """
    path = file_of(database.url)
    known = known_schema()
    try:
        with database.writer.begin() as connection:  # other processes that start wait here
            found = schema_of(connection)
            check_schema(found, path)
            if found != known:
                if found is not None:
                    copy_database(path, Place(path).copy_before(known))
                _upgrade(connection)
            check_columns(connection.exec_driver_sql(COLUMNS), path)
    except ConfigurationError:
        raise
    except DBAPIError as error:
        raise ConfigurationError(f"url: {path} cannot be used: {error.orig}") from error
    except Exception as error:
        raise ConfigurationError(
            f"url: {path} could not be brought to schema {known} and is left as it was: {error}"
        ) from error


def _upgrade(connection: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - heavy, and rarely needed
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def copy_database(source: Path, copy: Path, complete: Callable[[Path], None] | None = None) -> None:
    """Copy a database that may be in use, whole and consistent, mode 0600.

    ``copy`` appears when it is done, and ``complete`` has put into it what else belongs there.
    """
    part = copy.with_name(f"{copy.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    try:
        with (
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reading,
            closing(sqlite3.connect(part)) as writing,
        ):
            reading.backup(writing)
        if complete is not None:
            complete(part)
        with closing(sqlite3.connect(part)) as writing:
            writing.execute("PRAGMA journal_mode = DELETE")  # one file, without a write-ahead log beside it
        part.replace(copy)
    finally:
        part.unlink(missing_ok=True)
