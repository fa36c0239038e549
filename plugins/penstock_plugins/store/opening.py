"""Open a store: keys, schema, what it begins with, then everything that runs on it. Once per process and database."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Literal

import anyio
import anyio.to_thread
import attrs
from sqlalchemy import Connection

from penstock import ConfigurationError, Secret
from penstock.governance import StoreUnavailableError
from penstock_plugins.store.accounting import open_accounting
from penstock_plugins.store.bindings import BindingTable
from penstock_plugins.store.bootstrap import Beginnings, fill, is_empty
from penstock_plugins.store.budgets import StoredBudgets
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.files import Place, read_private, write_private
from penstock_plugins.store.following import Objects
from penstock_plugins.store.keys import StoredKeys
from penstock_plugins.store.ledger import JournaledLedger
from penstock_plugins.store.objects import SQLTransaction
from penstock_plugins.store.policies import StoredPolicies
from penstock_plugins.store.reader import SQLLedgerReader
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.unlocking import unlock
from penstock_plugins.store.vault import SealedVault

_log = logging.getLogger("penstock.store")


@attrs.frozen(kw_only=True)
class StoreSettings:
    """Say which database, and what of it the configuration gives."""

    place: Place
    encryption_key: Secret | None = None
    pepper: Secret | None = None
    journal_sync: Literal["none", "always"] = "none"

    @property
    def url(self) -> str:
        """Return the database as SQLAlchemy names it."""
        return f"sqlite:///{self.place.database}"


@attrs.frozen
class KeptToken:
    """Hand out the first administrator's token while its file is there and private: a LocalAdmin."""

    place: Place

    @property
    def admin_token(self) -> str | None:
        try:
            return read_private(self.place.admin_token)
        except ConfigurationError as error:
            _log.warning("%s", error)
            return None


@attrs.frozen(eq=False, kw_only=True)
class OpenStore:
    """Hold what runs on one open database, for every generation of plugins in the process."""

    settings: StoreSettings
    database: Database
    vault: SealedVault
    objects: Objects
    keys: StoredKeys
    bindings: BindingTable
    budgets: StoredBudgets
    policies: StoredPolicies
    local_admin: KeptToken
    counters: MemoryCounters
    ledger: JournaledLedger
    ledger_reader: SQLLedgerReader


@asynccontextmanager
async def open_store(
    settings: StoreSettings, beginnings: Beginnings, clock: Callable[[], float]
) -> AsyncIterator[OpenStore]:
    """Open the store and keep it in step with other processes. Raises ConfigurationError."""
    await anyio.to_thread.run_sync(settings.place.prepare)
    with settings.place.in_use():
        async with Database(settings.url) as database:
            vault = await anyio.to_thread.run_sync(prepare, database, settings, beginnings, clock)
            keys, bindings, budgets = StoredKeys(), BindingTable(vault), StoredBudgets()
            policies = StoredPolicies()
            objects = Objects(database, clock, (keys, bindings, budgets, policies))
            await objects.refresh()
            journal = Place(settings.place.database.resolve()).journal
            is_synced = settings.journal_sync == "always"
            async with open_accounting(database, journal, sync=is_synced, clock=clock) as accounting:
                store = OpenStore(
                    settings=settings,
                    database=database,
                    vault=vault,
                    objects=objects,
                    keys=keys,
                    bindings=bindings,
                    budgets=budgets,
                    policies=policies,
                    local_admin=KeptToken(settings.place),
                    counters=accounting.counters,
                    ledger=accounting.ledger,
                    ledger_reader=accounting.reader,
                )
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(objects.follow)
                    yield store
                    tasks.cancel_scope.cancel()


def prepare(
    database: Database, settings: StoreSettings, beginnings: Beginnings | None, clock: Callable[[], float]
) -> SealedVault:
    """Bring schema, keys and a fresh store's objects into being, one process after the other; blocks.

    Without ``beginnings`` a store that is empty stays empty. Raises ConfigurationError.
    """
    with settings.place.starting():
        migrate(database)

        def begin(connection: Connection) -> SealedVault:
            vault = unlock(connection, settings.place, settings.encryption_key, settings.pepper)
            transaction = SQLTransaction(connection, clock)
            if beginnings is not None and is_empty(transaction):
                secret = fill(transaction, vault, beginnings)
                write_private(settings.place.admin_token, f"{secret}\n", replace=True)
            return vault

        try:
            return database.write_now(begin)
        except StoreUnavailableError as error:
            raise ConfigurationError(f"url: {error}") from error
