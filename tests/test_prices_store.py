"""Price overrides kept in a store are in force as soon as they are made."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import attrs
import pytest

from penstock import Services
from penstock.governance import PriceTable
from penstock.governance.objects import PriceOverride
from store_fixtures import Owners, archive, change, insert, objects_of, owners_of, services_of, store_harness

pytestmark = pytest.mark.anyio

SECONDS = 2.0
"""Within which a change is in force."""


@attrs.frozen
class Stored:
    """A gateway with store and prices."""

    services: Services
    owners: Owners

    def input_rate(self, model: str = "gpt-5-mini") -> int | None:
        table = self.services.get(PriceTable)  # type: ignore[type-abstract]
        price = table.find("openai", model, time.time())
        return None if price is None else price.rates.input

    async def until_rate_is(self, rate: int | None) -> None:
        with anyio.fail_after(SECONDS):
            while self.input_rate() != rate:
                await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def stored(folder: Path) -> AsyncIterator[Stored]:
    async with store_harness(folder, "store", "prices", "virtual_keys", "routing", "openai") as harness:
        services = services_of(harness)
        yield Stored(services, await owners_of(objects_of(services)))


def override(rate: int) -> PriceOverride:
    rates = {"input": rate, "output": None}
    return PriceOverride(
        provider="openai", model="gpt-5*", effective_at="2026-01-01T00:00:00Z", rates=rates, scope_id="org_default"
    )


async def test_override_is_in_force_from_its_making_to_its_end(tmp_path: Path) -> None:
    async with stored(tmp_path) as it:
        published = it.input_rate()
        store = objects_of(it.services)
        made = await insert(store, "price_override", it.owners.organization.scope, override(5))
        await it.until_rate_is(5)
        changed = await change(store, made, rates={"input": 6})
        await it.until_rate_is(6)
        await archive(store, changed)
        await it.until_rate_is(published)


async def test_override_is_in_force_after_a_restart(tmp_path: Path) -> None:
    async with stored(tmp_path) as it:
        await insert(objects_of(it.services), "price_override", it.owners.organization.scope, override(7))
    async with stored(tmp_path) as it:
        assert it.input_rate() == 7
