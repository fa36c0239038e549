"""The management plugin: the API below ``/api``, on the objects of the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs

from penstock import ConfigurationError, Mount, Services, hookimpl
from penstock.governance import ObjectStore, Vault

if TYPE_CHECKING:
    from penstock_plugins.management.rest.desk import Desk


@attrs.frozen(kw_only=True)
class ManagementConfig:
    """The ``[plugins.management]`` table."""

    prefix: str = "/api"
    """Where the API is served; its own paths begin with ``/v1`` below that."""


@attrs.define(eq=False)
class Management:
    """Serve the management API."""

    Config = ManagementConfig

    config: ManagementConfig
    services: Services
    _app: Any = attrs.field(default=None, init=False, repr=False)

    @hookimpl
    def register_routes(self) -> Iterable[Mount]:
        """Mount the API; what it needs is imported by the first request."""
        return [Mount(self.config.prefix, self._serve)]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Say at once where there is no store to manage."""
        if self.services.find(ObjectStore) is None or self.services.find(Vault) is None:  # type: ignore[type-abstract]
            raise ConfigurationError('needs a store: put "store" into [gateway] plugins')
        yield

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            from penstock_plugins.management.rest.app import make_app  # noqa: PLC0415 - the data plane pays for nothing

            self._app = make_app(self._desk())
        await self._app(scope, receive, send)

    def _desk(self) -> Desk:
        from penstock_plugins.management.rest.desk import Desk  # noqa: PLC0415

        store = self.services.get(ObjectStore)  # type: ignore[type-abstract]
        return Desk(self.services, store, self.services.get(Vault))  # type: ignore[type-abstract]
