"""Idle upstream connections, last in first out, at the same cost for any number of them."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import attrs

from penstock.providers import Origin

REPEATABLE_METHODS = frozenset({b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"})
"""What may be sent again on another connection without doing it twice (RFC 9110 section 9.2.2)."""


@attrs.frozen
class Limits:
    """Bound upstream connections; times in seconds."""

    max_connections: int = 4096
    """Connections to all providers together, busy ones included."""
    max_idle_per_origin: int = 256
    """Idle connections kept per scheme, host and port."""
    idle_timeout: float = 30.0
    """How long an idle connection is kept."""
    max_head_bytes: int = 64 * 1024
    """Largest response head; more is a failed attempt."""


class Idle(Protocol):
    origin: Origin
    idle_since: float

    def is_usable(self) -> bool: ...
    def abort(self) -> None: ...


C = TypeVar("C", bound=Idle)


def _idle_since(connection: Idle) -> float:
    return connection.idle_since


class ConnectionStore(Generic[C]):
    """Keep idle connections per origin. Not thread-safe: it belongs to one event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._idle: dict[Origin, list[C]] = {}

    def take(self, origin: Origin) -> C | None:
        """Return the most recently used idle connection that is still open, or None."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.abort()
        return None

    def put(self, connection: C) -> None:
        """Keep a connection for reuse; beyond the limit the oldest is closed."""
        idle = self._idle.get(connection.origin)
        if idle is None:
            idle = self._idle[connection.origin] = []
        idle.append(connection)
        if len(idle) > self._limits.max_idle_per_origin:
            idle.pop(0).abort()

    def discard(self, connection: C) -> None:
        """Forget an idle connection that the other side has closed."""
        idle = self._idle.get(connection.origin)
        if idle is not None and connection in idle:
            idle.remove(connection)

    def evict(self) -> bool:
        """Close the connection that has been idle longest, to make room; False where none is idle."""
        oldest = min((idle[0] for idle in self._idle.values() if idle), key=_idle_since, default=None)
        if oldest is None:
            return False
        self.discard(oldest)
        oldest.abort()
        return True

    def expire(self, now: float) -> None:
        """Close what has been idle too long."""
        oldest = now - self._limits.idle_timeout
        for origin, idle in list(self._idle.items()):
            stale = [connection for connection in idle if connection.idle_since < oldest]
            del idle[: len(stale)]  # put appends, so the oldest come first
            for connection in stale:
                connection.abort()
            if not idle:
                del self._idle[origin]

    def close(self) -> None:
        closing, self._idle = self._idle, {}
        for idle in closing.values():
            for connection in idle:
                connection.abort()

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))
