"""The listener: admits connections, sweeps deadlines, answers probes, drains."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
import anyio.abc
import attrs
import sniffio

from penstock.asgi import Mount
from penstock.connection import Connection
from penstock.errors import overloaded
from penstock.models import Exchange, Response
from penstock.outbox import Outbox
from penstock.pipeline import SETTLE_SECONDS, Pipeline
from penstock.replies import ReplyHeads

SWEEP_SECONDS = 0.1
SWEEP_ROUND = 10
"""Sweeps in which many connections are looked at once each."""
SWEEP_ALL = 500
"""Connections up to which every sweep looks at all."""
_PROBE_FIELDS = ((b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"))


@attrs.frozen
class ServerLimits:
    """Bound what clients may take; sizes in bytes, times in seconds."""

    max_head_bytes: int = 64 * 1024
    """Largest request head; more is 431."""
    max_body_bytes: int = 32 * 1024 * 1024
    """Largest request body; more is 413."""
    max_connections: int = 10_000
    """Client connections; one more is answered 503 ``overloaded`` and closed."""
    max_in_flight: int = 5_000
    """Exchanges running at once; one more is 503 ``overloaded``."""
    head_timeout: float = 15.0
    """From the first byte of a request to its complete head; also to the first byte of a new connection."""
    body_timeout: float = 120.0
    """To a complete request body."""
    keep_alive_timeout: float = 75.0
    """How long a connection may wait for its next request."""
    write_timeout: float = 120.0
    """A client that takes nothing for so long is cut off."""
    drain_timeout: float = 30.0
    """How long exchanges may run on after SIGTERM; after a reload they end in their own time."""
    max_buffered_bytes: int = 1024 * 1024 * 1024
    """Request bodies still arriving, over all connections of a process; one more byte is 503 ``overloaded``."""


class Generation(Protocol):
    """One loaded configuration: what runs exchanges until the next one replaces it."""

    pipeline: Pipeline
    mounts: tuple[Mount, ...]
    in_flight: int


class Server:
    """Own the client connections of one process."""

    def __init__(self, limits: ServerLimits, namespace: str, *, scheme: str = "http") -> None:
        self.limits = limits
        self.namespace = namespace
        self.scheme = scheme
        self.heads = ReplyHeads(namespace)
        self.connections: set[Connection] = set()
        self.generation: Generation | None = None
        self.in_flight = 0
        self.buffered_bytes = 0
        """Bytes of request bodies that have not arrived whole."""
        self.is_draining = False
        self.is_started = False
        self.refusals: dict[str, int] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: Outbox | None = None
        self._listeners: list[asyncio.Server] = []
        self._sweepables: list[Any] = []
        self._unswept: list[Connection] = []

    @property
    def outbox(self) -> Outbox:
        assert self._outbox is not None
        return self._outbox

    def now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    # --- life -----------------------------------------------------------------------------------------------------

    async def run_until_drained(self, tasks: anyio.abc.TaskGroup, sweepables: list[Any]) -> None:
        """Sweep deadlines until ``tasks`` is cancelled."""
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop)
        self._tasks = tasks
        self._sweepables = sweepables
        tasks.start_soon(self._sweep)

    async def listen(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None, reuse_port: bool = False, sock: Any = None
    ) -> int:
        """Open a listener; returns its port. Raises OSError."""
        assert self._loop is not None
        options: dict[str, Any] = {"ssl": tls, "backlog": 4096}
        if tls is not None:
            # Before its handshake ends a connection is not ours yet: neither counted nor swept.
            options["ssl_handshake_timeout"] = self.limits.head_timeout
        if sock is not None:
            options["sock"] = sock
        else:
            options |= {"host": host, "port": port, "reuse_port": reuse_port or None}
        # Connections begin in the listener's callbacks, outside of any task, where anyio cannot tell by itself on
        # which library it runs; only under anyio.run was it told. The callbacks run in a copy of this context.
        token = sniffio.current_async_library_cvar.set("asyncio")
        try:
            listener = await self._loop.create_server(lambda: Connection(self), **options)
        finally:
            sniffio.current_async_library_cvar.reset(token)
        self._listeners.append(listener)
        self.is_started = True
        return int(listener.sockets[0].getsockname()[1])

    async def _sweep(self) -> None:
        while True:
            await anyio.sleep(SWEEP_SECONDS)
            now = self.now()
            for connection in self._due_for_sweep():
                connection.sweep(now)
            for sweepable in self._sweepables:
                sweepable.sweep(now)

    def _due_for_sweep(self) -> list[Connection]:
        """Return all connections while they are few; of many a part, so that a round does not hold up traffic."""
        connections = self.connections
        if len(connections) <= SWEEP_ALL:
            self._unswept.clear()
            return list(connections)
        if not self._unswept:
            self._unswept = list(connections)
        count = -(-len(connections) // SWEEP_ROUND)
        due = self._unswept[-count:]
        del self._unswept[-count:]
        return [connection for connection in due if connection in connections]

    async def drain(self, settle_seconds: float = SETTLE_SECONDS) -> None:
        """Stop accepting, let exchanges finish within the bound, cut the rest and give it time to settle."""
        self.is_draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            if connection.is_idle:
                connection.close()
        # Not only exchanges: a request on its way in is still served, and what was answered is still read.
        with anyio.move_on_after(self.limits.drain_timeout):
            while self.in_flight or self.connections:  # noqa: ASYNC110 - an event would cost every exchange
                await anyio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()
        with anyio.move_on_after(settle_seconds):
            while self.in_flight:  # noqa: ASYNC110 - as above
                await anyio.sleep(0.01)

    # --- from connections -----------------------------------------------------------------------------------------

    def welcome(self, connection: Connection) -> None:
        """Admit a connection and start its task, or turn it away."""
        tasks = self._tasks
        if tasks is None or self.is_draining:
            connection.abort()
            return
        self.connections.add(connection)
        if len(self.connections) > self.limits.max_connections:
            connection.turn_away()
            return
        connection.expect_head()
        tasks.start_soon(connection.serve)

    async def run(self, exchange: Exchange, connection: Connection) -> None:
        """Run an exchange through the current generation of plugins."""
        generation = self.generation
        assert generation is not None
        if self.in_flight >= self.limits.max_in_flight:
            exchange.error = overloaded("exchanges", self.limits.max_in_flight)
        self.in_flight += 1
        self.outbox.active = self.in_flight
        generation.in_flight += 1
        try:
            await generation.pipeline.handle(exchange, connection)
        finally:
            self.in_flight -= 1
            self.outbox.active = self.in_flight
            generation.in_flight -= 1

    @contextmanager
    def kept_generation(self) -> Iterator[None]:
        """Keep the plugins of now from being stopped by a reload while an application of theirs answers."""
        generation = self.generation
        assert generation is not None
        generation.in_flight += 1
        try:
            yield
        finally:
            generation.in_flight -= 1

    def answer_probe(self, method: bytes, path: bytes) -> Response | None:
        """Answer health checks and clients that look whether somebody is there."""
        if path not in (b"/", b"/healthz", b"/readyz") or method not in (b"GET", b"HEAD"):
            return None
        if path == b"/readyz" and (self.is_draining or not self.is_started):
            return Response(503, b"draining\n" if self.is_draining else b"starting\n", _PROBE_FIELDS)
        return Response(200, b"penstock\n" if path == b"/" else b"ok\n", _PROBE_FIELDS)

    def mount_of(self, path: bytes) -> Mount | None:
        generation = self.generation
        if generation is not None:
            for mount in generation.mounts:
                if mount.covers(path):
                    return mount
        return None

    def count_refusal(self, code: str) -> None:
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def report_fault(self, error: BaseException) -> None:
        if self.generation is not None:
            self.generation.pipeline.telemetry.report_fault(None, error)
