"""Backups of a store that may be in use, and putting one in its place. Blocking; for the command line."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import attrs

from penstock import ConfigurationError, hash_key
from penstock_plugins.store.completing import enter, settled_in
from penstock_plugins.store.files import Place, read_private, sync_folder, write_private
from penstock_plugins.store.opening import StoreSettings
from penstock_plugins.store.schema import check_schema, copy_database
from penstock_plugins.store.unlocking import fault_of_keys, pepper_of


class RefusedError(Exception):
    """Say why a command does nothing."""


def back_up(settings: StoreSettings, file: Path, *, with_keys: bool) -> None:
    """Write a copy that holds all that was settled when this was called. Raises RefusedError, ConfigurationError."""
    place = settings.place
    if not place.database.is_file():
        raise RefusedError(f"there is no database {place.database}")
    copies = {place.key: Place(file).key, place.pepper: Place(file).pepper} if with_keys else {}
    for made in (file, *copies.values()):
        if made.exists():
            raise RefusedError(f"{made} is there already; a backup replaces nothing")
    kept = {made: read_private(path) for path, made in copies.items()}
    try:
        settled = settled_in(place.journal)  # first: what is committed and deleted meanwhile is in the copy then
        copy_database(place.database, file, lambda part: enter(part, settled))
    except (OSError, sqlite3.Error) as error:
        raise RefusedError(f"{file} could not be written: {error}") from error
    for made, text in kept.items():
        if text is not None:
            write_private(made, f"{text}\n")
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    sync_folder(file.absolute().parent)


@attrs.frozen
class Found:
    """Say what a backup holds."""

    schema: str
    check: str | None
    """The value that tells whether keys fit."""


def examine(file: Path) -> Found:
    """Look into a backup. Raises RefusedError for what is none, or is damaged."""
    if not file.is_file():
        raise RefusedError(f"there is no file {file}")
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            schema = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            check = connection.execute("SELECT value FROM meta WHERE name = 'vault.check'").fetchone()
    except sqlite3.Error as error:
        raise RefusedError(f"{file} is no backup of a store: {error}") from error
    if state != "ok" or schema is None:
        raise RefusedError(f"{file} is damaged: {state}")
    return Found(schema[0], None if check is None else check[0])


@contextmanager
def replacing(settings: StoreSettings) -> Iterator[None]:
    """Keep every gateway from opening the database. Raises RefusedError while one has it open."""
    with settings.place.alone() as is_alone:
        if not is_alone:
            raise RefusedError(f"a gateway has {settings.place.database} open; stop it first")
        yield


def restore(settings: StoreSettings, file: Path) -> None:
    """Put a backup in the place of the database, within ``replacing``. Raises RefusedError, ConfigurationError.

    The file appears in one step: whatever happens meanwhile, there is the one database or the other.
    """
    place = settings.place
    found = examine(file)
    check_schema(found.schema, file)
    _check_keys(settings, file, found)
    part = place.database.with_name(f"{place.database.name}.restoring")
    try:
        place.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        copy_database(file, part)
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        _settle_log(place.database)
        part.replace(place.database)
        sync_folder(place.database.parent)
    except (OSError, sqlite3.Error) as error:
        part.unlink(missing_ok=True)
        raise RefusedError(f"{place.database} is left as it was: {error}") from error
    _drop_unknown_token(settings)


def _drop_unknown_token(settings: StoreSettings) -> None:
    """Remove the administrator's token kept beside the database where the restored one does not know it."""
    place = settings.place
    token = read_private(place.admin_token)
    if token is None:
        return
    hashed = hash_key(pepper_of(settings.pepper, place.pepper), token.encode()).hex()
    with closing(sqlite3.connect(place.database)) as connection:
        query = "SELECT 1 FROM unique_values WHERE kind = 'api_token' AND name = 'hash' AND value = ?"
        if connection.execute(query, (f'["{hashed}"]',)).fetchone() is None:
            place.admin_token.unlink(missing_ok=True)


def _check_keys(settings: StoreSettings, file: Path, found: Found) -> None:
    """See that the keys here fit the backup, or take those that came with it where there are none."""
    place, brought = settings.place, Place(file)
    pairs = (
        (settings.encryption_key, place.key, brought.key),
        (settings.pepper, place.pepper, brought.pepper),
    )
    missing = [(path, other) for given, path, other in pairs if given is None and not path.exists()]
    for path, other in missing:
        if not other.exists():
            raise RefusedError(f"{path} is missing, and nothing in the backup can be opened without; put it there")
    fault = fault_of_keys(
        found.check, Place(file) if len(missing) == 2 else place, settings.encryption_key, settings.pepper
    )
    if fault is not None:
        raise RefusedError(f"{fault}; a backup works with the keys of the time it was made")
    for path, other in missing:
        text = read_private(other)
        assert text is not None
        write_private(path, f"{text}\n")


def _settle_log(database: Path) -> None:
    """Take the write-ahead log into the database it belongs to, so that none is left to be taken for another's."""
    if database.is_file():
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for ending in ("-wal", "-shm"):
        database.with_name(database.name + ending).unlink(missing_ok=True)


def check_place(place: Place) -> None:
    """Raise ConfigurationError where there is no database to work on."""
    if not place.database.is_file():
        raise ConfigurationError(f"url: there is no database {place.database}; a gateway makes it when it starts")
