"""A gateway with a store, prices and budgets of its own, and a clock that stands still: what tests of money run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs

from penstock import Services, display_prefix, hash_key, new_key
from penstock.governance import (
    KINDS,
    Claim,
    Counters,
    Exceeded,
    Ledger,
    LedgerEntry,
    LedgerReader,
    ObjectStore,
    PriceTable,
    Scope,
    Vault,
    new_id,
    period_for,
    unique_values,
)
from penstock.governance.objects import Binding, Budget, Group, PriceOverride, User, VirtualKey
from penstock.testing import FakeUpstream, Harness, RecordedRequest, Reply, Sample, Step
from penstock.testing.client import Body, Fields
from penstock.testing.samples import SAMPLES
from penstock_plugins.budgets import Budgets
from penstock_plugins.prices import Prices
from penstock_plugins.providers.anthropic import Anthropic
from penstock_plugins.providers.openai_compatible import OpenAICompatible
from penstock_plugins.routing import Routing
from penstock_plugins.store import Store
from penstock_plugins.virtual_keys import VirtualKeys

NOW = 1_796_040_000.5
"""30 November 2026, 12:00 UTC: a Monday, so that every window has begun."""
TOKEN = 1_000
"""What a token costs unless a test says otherwise, nano-USD."""
RATES: dict[str, int | None] = {"input": TOKEN * 1_000_000, "output": TOKEN * 1_000_000}
ANSWERED = 5 * TOKEN
"""What a sample answer costs: three tokens in, two out."""
CHAT = "/v1/chat/completions"
BODY = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}


def answer(request: RecordedRequest) -> Sequence[Step]:
    """Answer each sample request with its sample answer."""
    is_stream = b'"stream":true' in request.body.replace(b" ", b"")
    path = request.target.decode().partition("?")[0]
    return next(found for found in SAMPLES if found.path == path and found.is_stream == is_stream).answer()


def always(*steps: Step) -> FakeUpstream:
    """Return an upstream that answers every request with these steps."""
    return FakeUpstream([list(steps)], repeat=True)


@attrs.define(eq=False)
class Clock:
    """Tell a time that only tests move."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


@attrs.define(eq=False)
class Governed:
    """A running gateway and what its store holds."""

    harness: Harness
    services: Services
    clock: Clock
    organization_id: str = ""
    team_id: str = ""
    project_id: str = ""
    user_id: str = ""
    key_id: str = ""
    bindings: list[str] = attrs.field(factory=list)
    """Ids, one of each provider for each upstream."""

    def get(self, protocol: type[Any]) -> Any:
        return self.services.get(protocol)

    @property
    def counters(self) -> Counters:
        return self.services.get(Counters)  # type: ignore[type-abstract]

    @property
    def reader(self) -> LedgerReader:
        return self.services.get(LedgerReader)  # type: ignore[type-abstract]

    @property
    def store(self) -> ObjectStore:
        return self.services.get(ObjectStore)  # type: ignore[type-abstract]

    @property
    def scope(self) -> Scope:
        return Scope(self.organization_id, self.team_id, self.project_id)

    # --- objects --------------------------------------------------------------------------------------------------

    async def insert(self, kind: str, value: Any, object_id: str | None = None) -> str:
        chosen = object_id or new_id(KINDS[kind].prefix)
        document = attrs.asdict(value)
        unique = unique_values(KINDS[kind], document, self.scope)
        await self.store.transact(lambda change: change.insert(kind, chosen, self.scope, document, unique))
        return chosen

    async def change(self, kind: str, object_id: str, **members: Any) -> None:
        def work(change: Any) -> None:
            stored = change.get(kind, object_id)
            document = {**stored.document, **members}
            change.replace(stored, document, unique_values(KINDS[kind], document, stored.scope))

        await self.store.transact(work)

    async def archive(self, kind: str, object_id: str) -> None:
        def work(change: Any) -> None:
            change.archive(change.get(kind, object_id))

        await self.store.transact(work)

    async def budget(self, limit: int, scope: str = "virtual_key", **members: Any) -> str:
        """Add a budget, by default a total of the key."""
        given = {"scope": scope, "scope_id": self.scope_id(scope), "window": "total", "limit_nano_usd": limit}
        return await self.insert("budget", Budget(**{**given, **members}))

    def scope_id(self, scope: str) -> str:
        ids = {
            "organization": self.organization_id,
            "team": self.team_id,
            "project": self.project_id,
            "virtual_key": self.key_id,
            "principal": self.user_id,
            "end_user": self.key_id,
        }
        return ids.get(scope, "")

    async def key(self, user_id: str, **members: Any) -> tuple[str, str]:
        """Add a virtual key; returns its id and secret."""
        secret, key_id = new_key(), new_id("vk_")
        hashed = hash_key(self.get(Vault).pepper, secret.encode()).hex()
        shown = display_prefix(secret)
        given = {"name": key_id, "project_id": self.project_id, "principal_id": user_id}
        await self.insert(
            "virtual_key", VirtualKey(**{**given, "hash": hashed, "display_prefix": shown, **members}), key_id
        )
        return key_id, secret

    async def user(self) -> str:
        slug = new_id("u").lower()
        return await self.insert("user", User(slug=slug, organization_id=self.organization_id))

    async def group(self, *member_ids: str) -> str:
        slug = new_id("g").lower()
        return await self.insert("group", Group(slug=slug, organization_id=self.organization_id, member_ids=member_ids))

    async def price(self, provider: str, model: str, rates: dict[str, int | None]) -> None:
        """Set a price, and wait until it counts."""
        price = PriceOverride(
            provider=provider,
            model=model,
            effective_at="2020-01-01T00:00:00Z",
            rates=rates,
            scope_id=self.organization_id,
        )
        override = await self.insert("price_override", price)
        table: PriceTable = self.get(PriceTable)
        name = model.replace("*", "m")
        with anyio.fail_after(10):
            while (found := table.find(provider, name, NOW)) is None or override not in found.version:
                await anyio.lowlevel.checkpoint()

    # --- what is known --------------------------------------------------------------------------------------------

    def spent(self, budget_id: str, budget: Budget, subject: str | None = None) -> int:
        name = f"budget:{budget_id}" if subject is None else f"budget:{budget_id}:{subject}"
        return self.counters.used(name, period_for(budget, self.clock.now).start)

    async def total(self, budget_id: str, subject: str | None = None) -> int:
        """Return what is settled of a budget by its current period, in memory; the ledger must say the same."""
        stored = await self.store.read(lambda reading: reading.get("budget", budget_id))
        assert stored is not None
        budget = Budget(**stored.document)
        name = f"budget:{budget_id}" if subject is None else f"budget:{budget_id}:{subject}"
        counter = (name, period_for(budget, self.clock.now).start)
        await self._meet(*counter)
        await self.get(Ledger).flush()
        committed = (await self.reader.spent([counter])).get(counter, 0)
        assert self.counters.used(*counter) == committed
        return committed

    async def _meet(self, name: str, period: int) -> None:
        """Have a counter's total in memory, as the first exchange does."""
        met = self.counters.reserve([Claim(name, period, 0, None, is_durable=True)])
        if isinstance(met, Awaitable):
            met = await met
        assert not isinstance(met, Exceeded)
        self.counters.settle(met)

    async def rows(self, **where: str) -> list[LedgerEntry]:
        """Return the rows of the ledger, oldest first."""
        await self.get(Ledger).flush()
        found = await self.reader.entries(where, since_ns=0, until_ns=2**62, after=None, limit=10_000)
        return list(reversed(found))

    async def discrepancies(self) -> list[Any]:
        await self.get(Ledger).flush()
        return [found async for found in self.reader.verify()]

    # --- what clients do ------------------------------------------------------------------------------------------

    async def ask(self, body: Body = BODY, path: str = CHAT, headers: Fields = ()) -> Reply:
        return await self.harness.request("POST", path, headers, body)

    async def send(self, sample: Sample, headers: Sequence[tuple[bytes, bytes]] = ()) -> Reply:
        fields = [(b"Content-Type", sample.content_type), *headers] if sample.body else headers
        return await self.harness.request(sample.method, sample.path, fields, sample.body)


def _clocked(clock: Clock, found: list[Services]) -> type[Any]:
    @attrs.define(eq=False)
    class Clocked:
        services: Services

        def __attrs_post_init__(self) -> None:
            self.services.clock = clock
            found.append(self.services)

    return Clocked


@asynccontextmanager
async def governed(
    folder: Path,
    upstream: FakeUpstream | Sequence[FakeUpstream] | None = None,
    *,
    plugins: Sequence[Any] = (),
    first: Sequence[Any] = (),
    config: dict[str, dict[str, Any]] | None = None,
    socket: bool = False,
    clock: Clock | None = None,
    is_fresh: bool = True,
    rates: dict[str, int | None] | None = RATES,
) -> AsyncIterator[Governed]:
    """Run a gateway on a store in ``folder``, with one key and a binding of each provider for each upstream.

    ``first`` stand before the budgets, ``plugins`` after them; without ``is_fresh`` the store is left as it is.
    """
    clock = clock or Clock()
    found: list[Services] = []
    if upstream is None:
        upstream = FakeUpstream([answer], repeat=True)
    upstreams = [upstream] if isinstance(upstream, FakeUpstream) else upstream
    names = [
        ("clocked", _clocked(clock, found)),
        ("store", Store),
        ("virtual_keys", VirtualKeys),
        ("prices", Prices),
        ("routing", Routing),
        *first,
        ("budgets", Budgets),
        *plugins,
        ("openai_compatible", OpenAICompatible),
        ("anthropic", Anthropic),
    ]
    tables = {"store": {"url": f"sqlite:///{folder}/penstock.db"}, "virtual_keys": {}, "routing": {}, **(config or {})}
    async with Harness(names, tables, upstreams, socket=socket, bare=True) as harness:
        gateway = Governed(harness, found[0], clock)
        await _fill(gateway, upstreams, rates, is_fresh=is_fresh)
        yield gateway


async def _fill(
    gateway: Governed, upstreams: Sequence[FakeUpstream], rates: dict[str, int | None] | None, *, is_fresh: bool
) -> None:
    kinds = ("organization", "team", "project", "user")
    ids = await gateway.store.read(lambda reading: [reading.list(kind)[0].id for kind in kinds])
    gateway.organization_id, gateway.team_id, gateway.project_id, gateway.user_id = ids
    if not is_fresh:
        return
    vault = gateway.get(Vault)
    for number, upstream in enumerate(upstreams):
        for kind in ("openai_compatible", "anthropic"):
            binding_id = new_id("gpc_")
            binding = Binding(
                name=f"{kind}-{number}",
                type=kind,
                scope_id=gateway.organization_id,
                base_url=upstream.base_url,
                credential=vault.seal("sk-upstream", context=f"provider_binding:{binding_id}"),
                fallback_priority=number,
            )
            await gateway.insert("provider_binding", binding, binding_id)
            gateway.bindings.append(binding_id)
    gateway.key_id, gateway.harness.key = await gateway.key(gateway.user_id)
    if rates is not None:
        for kind in ("openai_compatible", "anthropic"):
            await gateway.price(kind, "*", rates)
