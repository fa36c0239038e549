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
class _Opened:
    """One time that a thing is open."""

    value: Any = None
    fault: Exception | None = None
    """Why it could not be entered."""
    entering: anyio.CancelScope = attrs.Factory(anyio.CancelScope)
    entered: anyio.Event = attrs.Factory(anyio.Event)
    """Set once it is, or cannot be."""
    end: anyio.Event = attrs.Factory(anyio.Event)
    ended: anyio.Event = attrs.Factory(anyio.Event)


@attrs.define(eq=False)
class _Kept:
    """What is under one key; it stays while somebody uses or closes it, so that nobody opens it twice."""

    users: int = 0
    lock: anyio.Lock = attrs.Factory(anyio.Lock)
    opened: _Opened | None = None


class Shared:
    """Hold things that several generations use, by key."""

    def __init__(self, report: Callable[[Exception], None] | None = None) -> None:
        """Take whom to tell of what fails while it is closed; without anybody that ends ``running``."""
        self._report = report
        self._kept: dict[Hashable, _Kept] = {}
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

        What ``make()`` returns may use other keys meanwhile; its own it would wait for without end. Raises what it
        raises on entering; what it raises on leaving is reported, and whoever comes next opens anew.
        """
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept()
        kept.users += 1
        try:
            async with kept.lock:
                if kept.opened is None:
                    kept.opened = await self._open(key, make)
                value = kept.opened.value
            yield value
        finally:
            kept.users -= 1
            if not kept.users:
                with anyio.CancelScope(shield=True):
                    await self._close(key, kept)

    async def _open(self, key: Hashable, make: Callable[[], AbstractAsyncContextManager[Any]]) -> _Opened:
        assert self._tasks is not None, "things are shared within a running gateway"
        opened = _Opened()
        self._tasks.start_soon(self._hold, key, opened, make)
        try:
            await opened.entered.wait()
        except BaseException:  # nobody waits for it any more: give up entering, or leave at once
            if not opened.entered.is_set():
                opened.entering.cancel()
            opened.end.set()
            with anyio.CancelScope(shield=True):
                await opened.ended.wait()
            raise
        if opened.fault is not None:
            raise opened.fault
        return opened

    async def _close(self, key: Hashable, kept: _Kept) -> None:
        async with kept.lock:
            if kept.users:  # somebody has come meanwhile
                return
            opened, kept.opened = kept.opened, None
            if opened is not None:
                opened.end.set()
                await opened.ended.wait()
            if not kept.users and self._kept.get(key) is kept:
                del self._kept[key]

    async def _hold(self, key: Hashable, opened: _Opened, make: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        """Enter and leave in one task, as task groups inside demand."""
        try:
            with opened.entering:
                async with make() as opened.value:
                    opened.entering.shield = True  # from here on only its end has it left
                    opened.entered.set()
                    await opened.end.wait()
        except Exception as error:
            if not opened.entered.is_set():
                opened.fault = error
                return
            # What fails on its way out takes nothing with it; what dies while it is used must be seen.
            if self._report is None or not opened.end.is_set():
                raise
            fault = RuntimeError(f"what plugins share as {key!r} failed while it was closed: {type(error).__name__}")
            fault.__cause__ = error
            self._report(fault)
        finally:
            opened.entered.set()
            opened.ended.set()
