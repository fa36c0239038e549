"""Asks that are decided in callbacks of the event loop, where no task runs."""

from __future__ import annotations

import asyncio
import threading

import anyio
import pytest

from penstock.governance import Claim
from penstock_plugins.store.counters import MemoryCounters

pytestmark = pytest.mark.anyio


async def test_ask_waits_on_where_others_came_while_it_was_answered() -> None:
    counters = MemoryCounters(lambda: None)
    claims = [Claim("budget:bud_1", 1, 5, 10, True, True)]
    pending = counters.reserve(claims)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_awaited, pending)
        await anyio.lowlevel.checkpoint()
        (ask,) = counters.asks
        counters.asks.clear()
        ask.accounts[0].is_known = counters.is_shared = True
        tried = anyio.Event()

        def try_again() -> None:
            try:
                counters.try_again(ask)
            finally:
                tried.set()

        # As the store's writer calls back: from a thread that knows of no task.
        writer = threading.Thread(target=asyncio.get_running_loop().call_soon_threadsafe, args=(try_again,))
        writer.start()
        with anyio.fail_after(5):
            await tried.wait()
        writer.join()
        assert counters.asks == [ask]
        tasks.cancel_scope.cancel()


async def _awaited(pending: object) -> None:
    await pending  # type: ignore[misc]
