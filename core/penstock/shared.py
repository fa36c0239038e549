"""What outlives one generation of plugins: opened by the first that uses it, closed after the last.

A reload builds all plugins anew while exchanges of the old ones still run. What may exist only once in a process (the
connection to a store, what it counts in memory) is held here, in a task of its own, by a key that names it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.abc
import attrs

T = TypeVar("T")


@attrs.define(eq=False)
class _Kept:
    """One thing in use."""

    users: int = 0
    value: Any = None
    end: anyio.Event = attrs.Factory(anyio.Event)
    ended: anyio.Event = attrs.Factory(anyio.Event)


class Shared:
    """Hold things that several generations use, by key."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}
        self._opening = anyio.Lock()
        self._tasks: anyio.abc.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Make ``use`` possible; whoever uses something must have let go of it before this is left."""
        async with anyio.create_task_group() as self._tasks:
            yield
            self._tasks.cancel_scope.cancel()

    @asynccontextmanager
    async def use(self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
        """Yield what is kept under ``key``; the first user enters ``make()``, the last has it left.

        Raises what ``make()`` raises on entering.
        """
        async with self._opening:
            kept = self._kept.get(key)
            if kept is None:
                kept = _Kept()
                assert self._tasks is not None, "things are shared within a running gateway"
                await self._tasks.start(self._hold, kept, make)
                self._kept[key] = kept
            kept.users += 1
        try:
            yield kept.value
        finally:
            kept.users -= 1
            if not kept.users:
                with anyio.CancelScope(shield=True):
                    async with self._opening:
                        if not kept.users:  # nobody has come meanwhile
                            self._kept.pop(key, None)
                            kept.end.set()
                            await kept.ended.wait()

    async def _hold(
        self,
        kept: _Kept,
        make: Callable[[], AbstractAsyncContextManager[Any]],
        *,
        task_status: anyio.abc.TaskStatus[None],
    ) -> None:
        """Enter and leave in one task, as task groups inside demand."""
        try:
            with anyio.CancelScope(shield=True):
                async with make() as kept.value:
                    task_status.started()
                    await kept.end.wait()
        finally:
            kept.ended.set()
