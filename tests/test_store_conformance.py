"""The bundled store keeps what the protocols promise, with several databases open on one file."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from penstock.governance import ObjectStore
from penstock.testing.conformance.object_store import check_object_store
from penstock.testing.conformance.vault import check_vault
from penstock_plugins.store.database import Database
from penstock_plugins.store.following import Objects
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.vault import Ring, SealedVault, new_encryption_key, new_pepper

pytestmark = pytest.mark.filterwarnings("error")


def test_object_store_conforms(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    database = Database(url)
    migrate(database)
    database.close()

    @asynccontextmanager
    async def open_store() -> AsyncIterator[ObjectStore]:
        async with Database(url) as database, anyio.create_task_group() as tasks:
            objects = Objects(database, time.time)
            await objects.refresh()
            tasks.start_soon(objects.follow)
            yield objects
            tasks.cancel_scope.cancel()

    anyio.run(check_object_store, open_store)


def test_vault_conforms() -> None:
    ring, pepper = Ring(new_encryption_key()), new_pepper().encode()
    stranger = SealedVault(Ring(new_encryption_key()), new_pepper().encode())
    check_vault(SealedVault(ring, pepper), SealedVault(Ring(ring.text()), pepper), stranger)
