"""Rate limits of keys and bindings kept in a store, counted by its counters."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from penstock import Exchange, RateLimits, Services, hookimpl
from penstock.governance import Counters
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from store_fixtures import Owners, insert_binding, insert_key, objects_of, owners_of, services_of

pytestmark = pytest.mark.anyio

USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}
ANSWER = http_reply(json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode())
BODY = b'{"model":"m","messages":[{"role":"user","content":"Hi"}]}'
PLUGINS = ("store", "virtual_keys", "rate_limits", "routing", "prices", "budgets", "openai_compatible")
START = (int(time.time()) // 86_400 + 1) * 86_400 + 3_600.0
"""An hour into tomorrow, seconds since the epoch: what is long over by the wall clock is swept away meanwhile."""


@attrs.define(eq=False)
class Clock:
    """Time that a test moves."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@attrs.define(eq=False)
class Limited:
    """A gateway on a store, with one binding for each upstream."""

    gateway: Harness
    clock: Clock
    services: Services
    owners: Owners
    secret: str = ""
    key_id: str = ""

    async def ask(self) -> Reply:
        fields = [(b"authorization", b"Bearer " + self.secret.encode())]
        return await self.gateway.request("POST", "/v1/chat/completions", fields, BODY)

    async def statuses(self, count: int) -> list[int]:
        return [(await self.ask()).status for _ in range(count)]

    @property
    def counters(self) -> Counters:
        return self.services.get(Counters)  # type: ignore[type-abstract]

    async def add_binding(self, name: str, upstream: FakeUpstream, **limits: int) -> str:
        scope, scope_id = self.owners.project.scope, self.owners.project.id
        stored = await insert_binding(
            self.services,
            scope,
            scope_id,
            name,
            type="openai_compatible",
            base_url=upstream.base_url,
            rate_limits=RateLimits(**limits),
        )
        return stored.id

    async def add_key(self, *bindings: str, **limits: int) -> None:
        self.secret, stored = await insert_key(
            self.services, self.owners, provider_bindings=bindings, rate_limits=RateLimits(**limits)
        )
        self.key_id = stored.id


@asynccontextmanager
async def limited(folder: Path, *upstreams: FakeUpstream, clock: Clock | None = None) -> AsyncIterator[Limited]:
    moved = clock or Clock()

    class Timed:
        """Move the clock, before anybody looks at it."""

        def __init__(self, services: Services) -> None:
            services.clock = moved

        @hookimpl
        def authenticate(self, exchange: Exchange) -> None:
            """Leave it to the next."""

    tables: dict[str, dict[str, Any]] = {
        "store": {"url": f"sqlite:///{folder}/penstock.db"},
        "virtual_keys": {},
        "routing": {},
    }
    async with Harness([("timed", Timed), *PLUGINS], tables, list(upstreams), bare=True) as gateway:
        services = services_of(gateway)
        yield Limited(gateway, moved, services, await owners_of(objects_of(services)))


def answering() -> FakeUpstream:
    return FakeUpstream([[ANSWER]], repeat=True)


async def test_limits_of_a_stored_key_are_kept(tmp_path: Path) -> None:
    upstream = answering()
    async with limited(tmp_path, upstream) as it:
        await it.add_key(await it.add_binding("up", upstream), rpm=3, tpm=10_000, rpd=50, concurrency=2)
        assert await it.statuses(4) == [200, 200, 200, 429]
        minute = int(START) // 60 * 60
        assert it.counters.used(f"rpm:{it.key_id}", minute) == 3
        assert it.counters.used(f"tpm:{it.key_id}", minute) == 150
        it.clock.now += 120
        assert await it.statuses(1) == [200]


async def test_stored_binding_at_its_limit_is_skipped(tmp_path: Path) -> None:
    first, second = answering(), answering()
    async with limited(tmp_path, first, second) as it:
        bindings = [await it.add_binding("one", first, rpm=1), await it.add_binding("two", second)]
        await it.add_key(*bindings)
        assert await it.statuses(3) == [200] * 3
        assert (len(first.requests), len(second.requests)) == (1, 2)


async def test_day_s_requests_survive_a_restart(tmp_path: Path) -> None:
    upstream, clock = answering(), Clock()
    async with limited(tmp_path, upstream, clock=clock) as it:
        binding = await it.add_binding("up", upstream)
        await it.add_key(binding, rpd=3)
        secret, key_id = it.secret, it.key_id
        assert await it.statuses(2) == [200, 200]
    clock.now += 60
    async with limited(tmp_path, upstream, clock=clock) as it:
        it.secret, it.key_id = secret, key_id
        assert await it.statuses(3) == [200, 429, 429]
        clock.now += 86_400
        assert await it.statuses(1) == [200]


async def test_parallel_requests_get_exactly_what_is_left(tmp_path: Path) -> None:
    upstream = answering()
    found: list[int] = []
    async with limited(tmp_path, upstream) as it:
        await it.add_key(await it.add_binding("up", upstream), rpm=11)

        async def ask() -> None:
            found.append((await it.ask()).status)

        async with anyio.create_task_group() as clients:
            for _ in range(40):
                clients.start_soon(ask)
    assert (found.count(200), found.count(429)) == (11, 29)


async def test_two_gateways_on_one_store_share_a_limit_exactly(tmp_path: Path) -> None:
    clock, replies = Clock(), list[Reply]()

    async def ask(gateway: Limited) -> None:
        replies.append(await gateway.ask())

    async with answering() as upstream, limited(tmp_path, clock=clock) as one:
        await one.add_key(await one.add_binding("up", upstream), rpm=20)
        async with limited(tmp_path, clock=clock) as two, anyio.create_task_group() as clients:
            two.secret = one.secret
            for _ in range(30):
                clients.start_soon(ask, one)
                clients.start_soon(ask, two)
    assert [reply.body for reply in replies if reply.status not in (200, 429)] == []
    assert [reply.status for reply in replies].count(200) == 20


async def test_minutes_that_are_over_are_forgotten_and_the_day_is_not(tmp_path: Path) -> None:
    upstream = answering()
    async with limited(tmp_path, upstream) as it:
        await it.add_key(await it.add_binding("up", upstream), rpm=5, rpd=100)
        for _ in range(10):
            assert await it.statuses(1) == [200]
            it.clock.now += 60
        minute = int(START) // 60 * 60
        used = [it.counters.used(f"rpm:{it.key_id}", minute + 60 * number) for number in range(10)]
        assert used == [0] * 8 + [1, 1]
        assert it.counters.used(f"rpd:{it.key_id}", minute // 86_400 * 86_400) == 10
