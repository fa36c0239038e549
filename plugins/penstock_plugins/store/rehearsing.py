"""What ``penstock check`` opens in a database's stead: its objects, copied; the database itself is only read."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs

from penstock import ConfigurationError, Secret
from penstock_plugins.store.database import Database
from penstock_plugins.store.files import Place, read_private
from penstock_plugins.store.opening import StoreSettings
from penstock_plugins.store.schema import COLUMNS, check_columns, check_schema, known_schema, migrate
from penstock_plugins.store.unlocking import CHECK, fault_of_keys

_TABLES = ("objects", "unique_values", "meta")
"""All that a start reads before it counts; ledgers may be large."""


@contextmanager
def rehearsed(settings: StoreSettings) -> Iterator[StoreSettings]:
    """Yield where a start can be rehearsed that leaves nothing behind. Raises ConfigurationError."""
    place = settings.place
    with TemporaryDirectory(prefix="penstock-check-") as folder:
        copy = attrs.evolve(settings, place=Place(Path(folder) / place.database.name))
        if not place.database.exists():
            place.check_folder()
            yield copy
            return
        try:
            with closing(sqlite3.connect(_reading(place.database), uri=True)) as source:
                copy = _with_keys(copy, settings, _look_into(source, place.database))
                _copy(source, copy)
        except sqlite3.Error as error:
            raise ConfigurationError(f"url: {place.database} cannot be used: {error}") from error
        yield copy


def _reading(database: Path) -> str:
    """Return how to open a database so that nothing is made beside it."""
    path = database.resolve()
    is_logged = path.with_name(f"{path.name}-wal").exists()  # somebody has it open, or has died with it
    return f"{path.as_uri()}?{'mode=ro' if is_logged else 'immutable=1'}"


def _look_into(source: sqlite3.Connection, path: Path) -> str | None:
    """Return the check value of the keys, None for a database that holds nothing yet."""
    tables = {name for (name,) in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and "alembic_version" not in tables:
        raise ConfigurationError(f"url: {path} is a database of another program")
    if not tables:
        return None
    (schema,) = source.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
    check_schema(schema, path)
    if schema == known_schema():
        check_columns(source.execute(COLUMNS), path)
    (check,) = source.execute("SELECT value FROM meta WHERE name = ?", (CHECK,)).fetchone() or (None,)
    return None if check is None else str(check)


def _with_keys(copy: StoreSettings, settings: StoreSettings, check: str | None) -> StoreSettings:
    """Return the settings with the keys that are in files beside the database. Raises ConfigurationError."""
    if check is None:
        return copy
    place = settings.place
    fault = fault_of_keys(check, place, settings.encryption_key, settings.pepper)
    if fault is not None:
        raise ConfigurationError(fault)
    return attrs.evolve(
        copy,
        encryption_key=settings.encryption_key or _kept(place.key),
        pepper=settings.pepper or _kept(place.pepper),
    )


def _kept(path: Path) -> Secret:
    text = read_private(path)
    assert text is not None, "it was there when it was seen to fit"
    return Secret(text)


def _copy(source: sqlite3.Connection, copy: StoreSettings) -> None:
    copy.place.prepare()
    database = Database(copy.url)
    try:
        migrate(database)
    finally:
        database.close()
    with closing(sqlite3.connect(copy.place.database)) as writing, writing:
        for table in _TABLES:
            here, there = _columns(writing, table), _columns(source, table)
            columns = [name for name in here if name in there]
            if not columns:
                continue
            names, marks = ", ".join(columns), ", ".join("?" for _ in columns)
            rows = source.execute(f"SELECT {names} FROM {table}")  # noqa: S608 - names of our own
            writing.executemany(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})", rows)  # noqa: S608


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
