"""The bundled store keeps what the protocols promise, with several databases open on one file."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from penstock.governance import ObjectStore, Transaction
from penstock.testing.conformance.object_store import OpenStore, check_object_store
from penstock.testing.conformance.vault import check_vault
from penstock_plugins.store.database import Database
from penstock_plugins.store.following import Objects
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.vault import Ring, SealedVault, new_encryption_key, new_pepper

T = TypeVar("T")
pytestmark = pytest.mark.filterwarnings("error")


def test_object_store_conforms(tmp_path: Path) -> None:
    anyio.run(check_object_store, _opening(tmp_path, Objects))


def _opening(tmp_path: Path, kind: type[Objects]) -> OpenStore:
    url = f"sqlite:///{tmp_path}/a.db"
    database = Database(url)
    migrate(database)
    database.close()

    @asynccontextmanager
    async def open_store() -> AsyncIterator[ObjectStore]:
        async with Database(url) as database, anyio.create_task_group() as tasks:
            objects = kind(database, time.time)
            await objects.refresh()
            tasks.start_soon(objects.follow)
            yield objects
            tasks.cancel_scope.cancel()

    return open_store


class _Patient(Objects):
    """Prepare every transaction beside the writer."""

    async def transact(self, work: Callable[[Transaction], T], *, is_long: bool = True) -> T:
        return await super().transact(work, is_long=is_long)


def test_what_is_prepared_beside_the_writer_conforms_too(tmp_path: Path) -> None:
    anyio.run(check_object_store, _opening(tmp_path, _Patient))


def test_vault_conforms() -> None:
    ring, pepper = Ring(new_encryption_key()), new_pepper().encode()
    stranger = SealedVault(Ring(new_encryption_key()), new_pepper().encode())
    check_vault(SealedVault(ring, pepper), SealedVault(Ring(ring.text()), pepper), stranger)
