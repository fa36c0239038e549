"""Provide prices: the published table, an operator's overrides over it, and what to do where both know nothing."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import anyio
import attrs

from penstock import ConfigurationError, Services, hookimpl
from penstock.governance import ObjectStore, Price, PriceTable, Rates, Reading, StoreUnavailableError, read_usd
from penstock_plugins.prices.overrides import KIND, Override, in_force, read_overrides
from penstock_plugins.prices.table import DatedPrice, PublishedPrices, shipped

MAX_REMEMBERED = 4096
"""How many models' prices are kept at hand; clients can ask for any number of names."""
RETRY_SECONDS = 0.5
"""How soon overrides that could not be read are read again."""
_log = logging.getLogger("penstock.prices")


@attrs.frozen(kw_only=True)
class EstimateConfig:
    """The ``[plugins.prices.estimate]`` table: what stands in for prices nobody knows, USD per million tokens."""

    input: str
    """Of input of any kind, such as ``"3"``."""
    output: str
    """Of output of any kind, such as ``"15"``."""
    request: str = "0"
    """USD per request."""


@attrs.frozen(kw_only=True)
class PricesConfig:
    """The ``[plugins.prices]`` table."""

    unknown: Literal["zero_and_flag", "refuse", "estimate"] = "zero_and_flag"
    """What becomes of a model without a price: it costs nothing and is marked, is refused by the plugin budgets, or
    costs what ``estimate`` says."""
    estimate: EstimateConfig | None = None
    """Needed with ``unknown = "estimate"``."""


@attrs.frozen
class _Known:
    """What is known of one model's price."""

    overrides: tuple[Override, ...]
    published: tuple[DatedPrice, ...]

    def at(self, moment: float) -> Price | None:
        published = self._published_at(moment)
        override = in_force(self.overrides, moment)
        if override is None:
            return published
        if published is None:
            return override.price
        return attrs.evolve(override.price, max_output_tokens=published.max_output_tokens)

    def _published_at(self, moment: float) -> Price | None:
        for dated in reversed(self.published):
            if dated.is_in_force(moment):
                return dated.price
        return self.published[0].price if self.published else None  # older than all: the first known


class Table:
    """Find prices in memory."""

    def __init__(
        self,
        published: PublishedPrices,
        unknown: Literal["refuse", "zero_and_flag", "estimate"] = "zero_and_flag",
        estimate: Price | None = None,
    ) -> None:
        self._published = published
        self._unknown: Literal["refuse", "zero_and_flag", "estimate"] = unknown
        self._estimate = estimate
        self._overrides: Sequence[Override] = ()
        self._known: dict[tuple[str, str, str], _Known] = {}

    @property
    def unknown(self) -> Literal["refuse", "zero_and_flag", "estimate"]:
        """Return what to do for a model without a price."""
        return self._unknown

    def put_overrides(self, overrides: Sequence[Override]) -> None:
        """Take these overrides, latest first, in place of those before."""
        self._overrides = overrides
        self._known.clear()

    def find(self, provider: str, model: str, at: float, *, base_url: str = "") -> Price | None:
        """Return the price of a provider type's model at a moment (seconds since the epoch).

        An address the table knows decides whose prices count, then the type. The type ``mock`` costs what the model
        costs wherever it comes from.
        """
        key = (provider, model, base_url)
        known = self._known.get(key)
        if known is None:
            overrides = tuple(one for one in self._overrides if one.covers(provider, model))
            known = _Known(overrides, self._published.find(provider, model, base_url))
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[key] = known
        return known.at(at)

    def estimate(self, provider: str) -> Price | None:  # noqa: ARG002 - the protocol leaves room for more than one
        """Return what stands in for a model without a price under the policy ``estimate``."""
        return self._estimate


@attrs.define(eq=False)
class Prices:
    """Provide a PriceTable."""

    Config = PricesConfig

    config: PricesConfig
    services: Services
    _table: Table = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._table = Table(shipped(), self.config.unknown, _estimate(self.config))
        self.services.provide(PriceTable, self._table)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Follow the overrides in the store, where there is one."""
        store = self.services.find(ObjectStore)  # type: ignore[type-abstract]
        if store is None:
            yield
            return
        changes = _Changes()
        store.watch(changes.note)
        self._table.put_overrides(await store.read(_overrides_in))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow, store, changes)
            yield
            tasks.cancel_scope.cancel()

    async def _follow(self, store: ObjectStore, changes: _Changes) -> None:
        while True:
            await changes.wait()
            try:
                self._table.put_overrides(await store.read(_overrides_in))
            except StoreUnavailableError as error:  # the prices known so far stay
                _log.error("price overrides could not be read, and will be: %s", error)
                changes.note()
                await anyio.sleep(RETRY_SECONDS)


class _Changes:
    """Remember that the store has changed, once however often it did."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def note(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()
        self._event = anyio.Event()


def _overrides_in(reading: Reading) -> tuple[Override, ...]:
    return read_overrides(reading.list(KIND))


def _estimate(config: PricesConfig) -> Price | None:
    given = config.estimate
    if given is None:
        if config.unknown == "estimate":
            raise ConfigurationError('estimate: is missing; unknown = "estimate" needs its rates')
        return None
    amounts = {}
    for name in ("input", "output", "request"):
        try:
            amounts[name] = read_usd(getattr(given, name))
        except ValueError as error:
            raise ConfigurationError(f"estimate.{name}: {error}") from None
    return Price(rates=Rates(**amounts), version="estimate of the configuration")
