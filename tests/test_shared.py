"""What outlives a generation: entered once, left after the last user, in a task of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from fault_upstream import until
from penstock import hookimpl
from penstock.services import Services
from penstock.shared import Shared
from penstock.testing import Harness

pytestmark = pytest.mark.anyio


class Thing:
    """Count how often it was opened and closed."""

    def __init__(self) -> None:
        self.opened = self.closed = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Thing]:
        self.opened += 1
        # A task group must be left by the task that entered it, whoever uses the thing last.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            yield self
            tasks.cancel_scope.cancel()
        self.closed += 1


async def test_second_user_gets_what_the_first_opened_and_the_last_closes_it() -> None:
    thing, shared = Thing(), Shared()
    async with shared.running():
        first, second = shared.use("key", thing.open), shared.use("key", thing.open)
        assert await first.__aenter__() is thing
        assert await second.__aenter__() is thing
        await first.__aexit__(None, None, None)
        assert (thing.opened, thing.closed) == (1, 0)
        await second.__aexit__(None, None, None)
        assert (thing.opened, thing.closed) == (1, 1)


async def test_users_may_come_and_go_in_tasks_of_their_own() -> None:
    thing, shared = Thing(), Shared()

    async def use(entered: anyio.Event, leave: anyio.Event) -> None:
        async with shared.use("key", thing.open):
            entered.set()
            await leave.wait()

    async with shared.running(), anyio.create_task_group() as tasks:
        events = [(anyio.Event(), anyio.Event()) for _ in range(3)]
        for entered, leave in events:
            tasks.start_soon(use, entered, leave)
        for entered, _ in events:
            await entered.wait()
        for _, leave in events:
            leave.set()
    assert (thing.opened, thing.closed) == (1, 1)


async def test_other_key_opens_another() -> None:
    one, other, shared = Thing(), Thing(), Shared()
    async with shared.running(), shared.use("one", one.open), shared.use("other", other.open):
        assert (one.opened, other.opened) == (1, 1)


async def test_after_the_last_user_it_is_opened_anew() -> None:
    thing, shared = Thing(), Shared()
    async with shared.running():
        for _ in range(2):
            async with shared.use("key", thing.open):
                pass
    assert (thing.opened, thing.closed) == (2, 2)


async def test_fault_on_opening_reaches_the_user_and_nothing_is_kept() -> None:
    thing, shared = Thing(), Shared()

    @asynccontextmanager
    async def broken() -> AsyncIterator[Thing]:
        raise OSError("no such place")
        yield thing

    async with shared.running():
        with pytest.raises(OSError, match="no such place"):
            async with shared.use("key", broken):
                pass
        async with shared.use("key", thing.open) as found:
            assert found is thing


async def test_user_that_fails_lets_go() -> None:
    thing, shared = Thing(), Shared()
    async with shared.running():
        with pytest.raises(ValueError, match="mine"):
            async with shared.use("key", thing.open):
                raise ValueError("mine")
    assert thing.closed == 1


@asynccontextmanager
async def closing_badly() -> AsyncIterator[str]:
    yield "open"
    raise OSError("the disk is full")


async def test_fault_on_closing_is_reported_once_and_ends_nothing_else() -> None:
    faults: list[Exception] = []
    thing, shared = Thing(), Shared(faults.append)
    async with shared.running(), shared.use("other", thing.open):
        for _ in range(2):
            async with shared.use("key", closing_badly) as found:
                assert found == "open"
        await anyio.lowlevel.checkpoint()
        assert thing.closed == 0
    assert [str(fault) for fault in faults] == ["what plugins share as 'key' failed while it was closed: OSError"] * 2
    assert [str(fault.__cause__) for fault in faults] == ["the disk is full"] * 2


class Sharing:
    """Share what cannot be closed well."""

    def __init__(self, services: Services) -> None:
        self.services = services

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        async with self.services.shared.use(id(self), closing_badly):
            yield


async def test_reload_whose_old_plugins_close_badly_leaves_the_gateway_running() -> None:
    async with Harness([Sharing]) as harness:
        gateway = harness.gateway
        before = gateway.generation
        await gateway.reload(lambda: gateway.configuration)
        await until(lambda: before.is_ending and harness.faults, "a fault")
        assert (await harness.request("GET", "/v1/models")).status == 200
        (fault,) = harness.faults
        assert "failed while it was closed" in str(fault)
        harness.faults.clear()


async def test_fault_while_in_use_is_seen() -> None:
    @asynccontextmanager
    async def dying() -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
            yield

    async def fail() -> None:
        raise OSError("died")

    faults: list[Exception] = []
    shared = Shared(faults.append)
    with pytest.raises(BaseExceptionGroup):
        async with shared.running(), shared.use("key", dying):
            await anyio.sleep_forever()
    assert faults == []


async def test_what_is_shared_may_use_what_is_shared_under_another_key() -> None:
    inner, shared = Thing(), Shared()

    @asynccontextmanager
    async def outer() -> AsyncIterator[Thing]:
        async with shared.use("inner", inner.open) as found:
            yield found

    with anyio.fail_after(5):
        async with shared.running(), shared.use("outer", outer) as first:
            async with shared.use("inner", inner.open) as second:
                assert first is second is inner
            assert inner.closed == 0
    assert (inner.opened, inner.closed) == (1, 1)


async def test_who_comes_while_it_closes_waits_and_opens_anew() -> None:
    shared, closing, close = Shared(), anyio.Event(), anyio.Event()
    said: list[str] = []

    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        said.append("opened")
        yield
        closing.set()
        await close.wait()
        said.append("closed")

    async def use_once() -> None:
        async with shared.use("key", slow):
            pass

    async def come() -> None:
        await closing.wait()
        tasks.start_soon(use_once)
        await anyio.wait_all_tasks_blocked()
        close.set()

    async with shared.running(), anyio.create_task_group() as tasks:
        tasks.start_soon(come)
        await use_once()
    assert said == ["opened", "closed"] * 2
