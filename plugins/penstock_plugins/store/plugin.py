"""The store plugin: what other plugins find is there from the constructor on, and answers within the lifespan."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import attrs

from penstock import BindingDirectory, ConfigurationError, KeyDirectory, Secret, Services, hookimpl
from penstock.governance import (
    BudgetDirectory,
    Counters,
    Ledger,
    LedgerReader,
    LocalAdmin,
    ObjectStore,
    PolicyDirectory,
    Reading,
    Transaction,
    Vault,
)
from penstock_plugins.store.bindings import StoredBindings, not_open
from penstock_plugins.store.files import Place

if TYPE_CHECKING:
    from penstock_plugins.store.following import Objects
    from penstock_plugins.store.opening import OpenStore

T = TypeVar("T")
_SCHEME = "sqlite:///"


@attrs.frozen(kw_only=True)
class StoreConfig:
    """The ``[plugins.store]`` table."""

    url: str = "sqlite:///penstock.db"
    """The database, as SQLAlchemy names it; a relative path is relative to the configuration file."""
    encryption_key: Secret | None = None
    """32 bytes in hex or base64 that seal credentials; more after it, separated by commas, only open. Unset: the file
    ``<database>.key``, made at the first start."""
    pepper: Secret | None = None
    """What keys and tokens are hashed under, at least 16 characters. Unset: the file ``<database>.pepper``, made at the
    first start. It cannot be changed without new secrets for all."""
    journal_sync: Literal["none", "always"] = "none"
    """Whether each record of the ledger's journal is synced to the disk before a provider is asked. ``none`` survives
    the death of the process at any moment, and loses to a power failure what the system had not written yet."""

    def place(self, folder: Path) -> Place:
        """Return where the database is. Raises ConfigurationError for what is no file of SQLite."""
        path = self.url.removeprefix(_SCHEME)
        if path == self.url or not path or path.startswith((":", "?")) or "?" in path:
            raise ConfigurationError(f'url: must be {_SCHEME}PATH, such as "{_SCHEME}penstock.db"')
        return Place((folder / path).resolve())


class Standing:
    """Stand in for an object of the store until it is open, and be that object from then on.

    Its methods become attributes of this one, so that a call on the hot path costs no look-up more.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            opened = self.__dict__["opened"]
        except KeyError:
            raise not_open() from None
        return getattr(opened, name)


def put_in_place(standing: Standing, opened: object) -> None:
    """Have a stand-in be ``opened`` from now on."""
    members = vars(standing)
    members["opened"] = opened
    for name in dir(type(opened)):
        if not name.startswith("_") and callable(getattr(type(opened), name)):
            members[name] = getattr(opened, name)


class WatchedObjects:
    """The ObjectStore of one generation of plugins, whose watchers go with it."""

    def __init__(self) -> None:
        self._opened: Objects | None = None
        self._calls: list[Callable[[], None]] = []

    @asynccontextmanager
    async def opened(self, objects: Objects, *first: Callable[[], None]) -> AsyncIterator[None]:
        """Answer from ``objects``, and have ``first`` called at every change before all watchers."""
        self._opened = objects
        for call in first:
            self.watch(call)
        try:
            yield
        finally:
            for call in self._calls:
                objects.unwatch(call)
            self._calls.clear()

    @property
    def _objects(self) -> Objects:
        if self._opened is None:
            raise not_open()
        return self._opened

    async def read(self, work: Callable[[Reading], T]) -> T:
        return await self._objects.read(work)

    async def transact(self, work: Callable[[Transaction], T], *, is_long: bool = False) -> T:
        return await self._objects.transact(work, is_long=is_long)

    @property
    def revision(self) -> int:
        return self._objects.revision

    def watch(self, call: Callable[[], None]) -> None:
        self._objects.watch(call)
        self._calls.append(call)


@attrs.define(eq=False)
class Store:
    """Keep objects, secrets and money, and answer the data plane from memory."""

    Config = StoreConfig

    config: StoreConfig
    services: Services
    _place: Place = attrs.field(init=False)
    _objects: WatchedObjects = attrs.field(init=False, factory=WatchedObjects)
    _bindings: StoredBindings = attrs.field(init=False)
    _standing: dict[str, Standing] = attrs.field(init=False, factory=dict)
    """By the name of the member of OpenStore that takes its place."""

    def __attrs_post_init__(self) -> None:
        self._place = self.config.place(self.services.folder)
        self._bindings = StoredBindings(self.services)
        provide: Callable[[Any, Any], None] = self.services.provide
        provide(ObjectStore, self._objects)
        provide(BindingDirectory, self._bindings)
        provide(LocalAdmin, self._stand("local_admin"))
        provide(Vault, self._stand("vault"))
        provide(KeyDirectory, self._stand("keys"))
        provide(BudgetDirectory, self._stand("budgets"))
        provide(PolicyDirectory, self._stand("policies"))
        provide(Counters, self._stand("counters"))
        provide(Ledger, self._stand("ledger"))
        provide(LedgerReader, self._stand("ledger_reader"))

    def _stand(self, member: str) -> Standing:
        standing = self._standing[member] = Standing()
        return standing

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Open the store with the first generation of plugins that uses it, and close it after the last."""
        from penstock_plugins.store.bootstrap import Beginnings  # noqa: PLC0415 - who lists plugins needs no database
        from penstock_plugins.store.opening import StoreSettings, open_store  # noqa: PLC0415
        from penstock_plugins.store.rehearsing import rehearsed  # noqa: PLC0415

        beginnings = Beginnings(
            environment=os.environ, types=self.services.providers.types, namespace=self.services.namespace
        )
        given = StoreSettings(
            place=self._place,
            encryption_key=self.config.encryption_key,
            pepper=self.config.pepper,
            journal_sync=self.config.journal_sync,
        )
        with rehearsed(given) if self.services.is_rehearsal else nullcontext(given) as settings:
            async with self.services.shared.use(
                ("penstock.store", settings.place.database),
                lambda: open_store(settings, beginnings, self.services.clock),
            ) as store:
                if store.settings != settings:
                    raise ConfigurationError("encryption_key, pepper and journal_sync need a restart to change")
                unreadable = [*store.budgets.unreadable, *store.policies.unreadable]
                if self.services.is_rehearsal and unreadable:
                    raise ConfigurationError(*map(str, unreadable))
                async with self._opened(store):
                    yield

    @asynccontextmanager
    async def _opened(self, store: OpenStore) -> AsyncIterator[None]:
        for member, standing in self._standing.items():
            put_in_place(standing, getattr(store, member))
        self._bindings.open(store.bindings)
        async with self._objects.opened(store.objects, self._bindings.refresh):
            yield
