"""Where requests are worked on: the store, the ledger, the providers, and how a call in a transaction comes about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import attrs
import msgspec

from penstock import Services
from penstock.governance import LedgerReader, ObjectStore, PriceTable, Reading, Transaction, Vault
from penstock_plugins.management import idempotency
from penstock_plugins.management.calls import Call, Means
from penstock_plugins.management.faults import RefusedError
from penstock_plugins.management.keys import VIRTUAL_KEYS
from penstock_plugins.management.permissions import Actor, missing
from penstock_plugins.management.places import find
from penstock_plugins.management.rest.asks import Answer, Ask
from penstock_plugins.management.rest.routes import ANY_TOKEN, PUBLIC, Route
from penstock_plugins.management.times import write_time
from penstock_plugins.management.tokens import identify

T = TypeVar("T")


@attrs.frozen(eq=False)
class Written:
    """Hold an answer as bytes."""

    status: int
    version: int | None
    body: bytes = attrs.field(repr=False)
    is_replayed: bool = False


@attrs.frozen(eq=False)
class Desk:
    """Work on requests."""

    services: Services
    store: ObjectStore
    vault: Vault

    @property
    def means(self) -> Means:
        """Return what calls work with."""
        return Means(self.services, self.vault)

    @property
    def ledger(self) -> LedgerReader:
        """Return the ledger. Raises RefusedError where no plugin keeps one."""
        found = self.services.find(LedgerReader)  # type: ignore[type-abstract]
        if found is None:
            raise RefusedError("store_unavailable", "No enabled plugin keeps a ledger.")
        return found

    @property
    def prices(self) -> PriceTable | None:
        """Return the table of prices, if a plugin brings one."""
        return self.services.find(PriceTable)  # type: ignore[type-abstract]

    async def answer(self, route: Route, ask: Ask) -> Written:
        """Do what a route says. Raises RefusedError."""
        if route.outside is not None:
            done = await route.outside(self, ask)
            return done if isinstance(done, Written) else written(done)
        if route.reads is not None:
            work = route.reads
            return written(await self._with_last_use(await self.read(ask, lambda call: work(call, ask), route), route))
        assert route.writes is not None, "a route reads, writes or works outside"
        await self.admit(ask, route)  # nobody unknown gets at the one writer
        return await self.write(ask, route.writes, route, await self._last_use(ask, route))

    async def authenticate(self, token: bytes | None) -> None:
        """Raise RefusedError unless a token is in force."""
        await self.store.read(lambda tx: identify(tx, self.means, token))

    async def admit(self, ask: Ask, route: Route) -> None:
        """Raise RefusedError unless whoever asks may use the route somewhere."""
        await self.store.read(lambda tx: self._call(tx, ask, route))

    async def read(self, ask: Ask, work: Callable[[Call], T], route: Route) -> T:
        """Run work on one view of the store, on behalf of whoever asks. Raises RefusedError."""
        return await self.store.read(lambda tx: work(self._call(tx, ask, route)))

    async def write(
        self, ask: Ask, work: Callable[[Call, Ask], Answer], route: Route, last_used: Mapping[str, int] | None = None
    ) -> Written:
        """Run work in one transaction; with an ``Idempotency-Key``, once. Raises RefusedError."""

        def run(tx: Transaction) -> Written:
            call = attrs.evolve(self._call(tx, ask, route), last_used=last_used or {})
            once = None
            if ask.once is not None and ask.method == "POST":
                once = idempotency.once_of(self.vault, ask.once, ask.method, ask.path, ask.raw)
                kept = idempotency.recall(call, once)
                if kept is not None:
                    return Written(*kept, is_replayed=True)
            answer = written(work(call, ask))
            if once is not None:
                idempotency.keep(call, once, answer.status, answer.version, answer.body)
            return answer

        return await self.store.transact(run, is_long=route.is_long)

    def _call(self, tx: Reading, ask: Ask, route: Route) -> Call:
        means = self.means
        actor: Actor = identify(tx, means, ask.token)
        if route.permission not in (PUBLIC, ANY_TOKEN) and not actor.may_somewhere(route.permission):
            raise missing(route.permission, actor.home)
        return Call(actor, tx, means, means.now_ms(), ask.request_id, ask.source)

    async def _last_use(self, ask: Ask, route: Route) -> Mapping[str, int]:
        """Return when the key that a request changes was last used."""
        reader = self.services.find(LedgerReader)  # type: ignore[type-abstract]
        if reader is None or route.resource is not VIRTUAL_KEYS or "id" not in ask.parts:
            return {}
        stored = await self.read(ask, lambda call: find(call, ("virtual_key",), ask.name), route)
        return await reader.last_used([stored.id])

    async def _with_last_use(self, answer: Answer, route: Route) -> Answer:
        """Put into the views of keys when they were last used, which the ledger knows."""
        reader = self.services.find(LedgerReader)  # type: ignore[type-abstract]
        if reader is None or route.resource is not VIRTUAL_KEYS or answer.content is None:
            return answer
        views: list[dict[str, Any]] = answer.content.get("data", [answer.content])
        found = await reader.last_used([view["id"] for view in views]) if views else {}
        for view in views:
            if view["id"] in found:
                view["last_used_at"] = write_time(found[view["id"]])
        return answer


def written(answer: Answer) -> Written:
    """Return an answer as bytes."""
    body = b"" if answer.content is None else msgspec.json.encode(answer.content)
    return Written(answer.status, answer.version, body)
