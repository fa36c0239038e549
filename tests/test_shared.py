"""What outlives a generation: entered once, left after the last user, in a task of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from penstock.shared import Shared

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
