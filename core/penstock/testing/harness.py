"""A whole gateway in one ``async with``: real pipeline, real connections, no sockets unless asked for."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import anyio
import attrs

from penstock.config import Configuration, read_document
from penstock.connection import Connection
from penstock.gateway import Gateway
from penstock.hookspecs import hookimpl
from penstock.keys import new_key
from penstock.models import Exchange
from penstock.providers import Origin
from penstock.telemetry import Record, Telemetry
from penstock.testing.client import (
    PATIENCE_SECONDS,
    Body,
    Fields,
    RawClient,
    Reply,
    ReplyStream,
    request_bytes,
)
from penstock.testing.memory import connect
from penstock.testing.upstream import FakeUpstream
from penstock.upstream.direct import DirectConnection, DirectTransport
from penstock.upstream.store import Limits

CREDENTIAL = "sk-upstream"
"""What the default bindings present to the fake upstream."""
BINDINGS = ({"name": "up", "type": "openai_compatible"}, {"name": "anthropic", "type": "anthropic"})
"""What a fake upstream serves as, unless a test says otherwise."""
PEPPER = "a pepper for tests only"
_FIRST = ("virtual_keys",)
_LAST = ("routing", "openai_compatible", "anthropic")


class _Recorder(Telemetry):
    """Keep records and faults instead of writing them, and say when an exchange has settled."""

    def __init__(self) -> None:
        super().__init__([self])
        self.kept: list[Record] = []
        self.settled: list[bytes] = []
        self.faults: list[BaseException] = []
        self._changed = anyio.Event()

    def record(self, exchange: Exchange) -> None:
        super().record(exchange)
        self.settled.append(exchange.request_id)
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def report_fault(self, exchange: Exchange | None, error: BaseException) -> None:  # noqa: ARG002
        self.faults.append(error)

    def start(self) -> None:
        """Start no thread: records are drained when a test asks."""

    def write(self, records: Sequence[Record]) -> None:
        self.kept += records

    def close(self) -> None:
        """Nothing to close."""

    async def wait(self, request_id: bytes | None, count: int) -> None:
        with anyio.fail_after(PATIENCE_SECONDS):
            while len(self.settled) < count or (request_id is not None and request_id not in self.settled):
                await self._changed.wait()


@attrs.define(eq=False)
class _Capture:
    """Keep every exchange as post_response finds it; first in the order, so the last to settle."""

    exchanges: list[Exchange] = attrs.field(factory=list)

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)


class _Dialer(DirectTransport):
    """Reach fake upstreams by name, in memory or on their loopback port, and all else as ever."""

    def __init__(self, limits: Limits, upstreams: Sequence[FakeUpstream]) -> None:
        super().__init__(limits)
        self._by_host = {upstream.host: upstream for upstream in upstreams}

    async def _open(self, origin: Origin, timeout: float) -> DirectConnection:
        upstream = self._by_host.get(origin.host)
        if upstream is None:
            return await super()._open(origin, timeout)
        if upstream.port is not None:
            connection = await super()._open(Origin("http", "127.0.0.1", upstream.port), timeout)
            connection.origin = origin
            return connection
        connection = DirectConnection(self, origin)
        upstream.connect(connection)
        return connection


class Harness:
    """Run a gateway with the plugins under test.

    ``plugins``: names of installed plugins, plugin classes, plugin objects, or (name, class or object) pairs;
    a class is named after itself in snake case. ``config``: their tables by plugin name. ``gateway``: the
    ``[gateway]`` table. ``upstream``: one or more fake upstreams. ``bindings``: tables of bindings made for
    each upstream, its base URL and a credential filled in, its number added to names from the second on
    (``up``, ``up2``); ``config["routing"]`` replaces them all. Before and after the plugins given come those
    that authenticate, route and provide, unless ``bare``. ``socket``: clients come through a listener.
    """

    def __init__(
        self,
        plugins: Sequence[Any] = (),
        config: Mapping[str, Mapping[str, Any]] | None = None,
        upstream: FakeUpstream | Sequence[FakeUpstream] | None = None,
        *,
        gateway: Mapping[str, Any] | None = None,
        bindings: Sequence[Mapping[str, Any]] = BINDINGS,
        socket: bool = False,
        bare: bool = False,
    ) -> None:
        self.key: str = new_key()
        """A virtual key that may use every binding; sent with each request that brings no credential."""
        self.is_socket = socket
        self.upstreams = _listed(upstream)
        self._plugins = tuple(plugins)
        self._config = {name: dict(table) for name, table in (config or {}).items()}
        self._gateway_table = dict(gateway or {})
        self._bindings = tuple(bindings)
        self._is_bare = bare
        self._recorder = _Recorder()
        self._capture = _Capture()
        self._clients: list[RawClient] = []
        self._stack = AsyncExitStack()
        self._gateway: Gateway | None = None
        self.port: int | None = None

    # --- life -----------------------------------------------------------------------------------------------

    def configuration(self) -> Configuration:
        """Return the configuration the gateway is built from. Raises ConfigurationError."""
        given: dict[str, Any] = {"harness_capture": self._capture}
        names = ["harness_capture"]
        for plugin in self._plugins:
            name, kind = _named(plugin)
            names.append(name)
            if kind is not None:
                given[name] = kind
        if not self._is_bare:
            names[1:1] = [name for name in _FIRST if name not in names]
            names += [name for name in _LAST if name not in names]
        limits = {"drain_timeout": 2.0, **self._gateway_table.get("limits", {})}
        table = {"listen": "127.0.0.1:0", "plugins": names, **self._gateway_table, "limits": limits}
        tables = {**self._default_tables(names), **self._config}
        document = {"gateway": table, "plugins": tables}
        configuration = read_document(document, source="harness", environment={})
        return attrs.evolve(configuration, given=given)

    def _default_tables(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        tables: dict[str, dict[str, Any]] = {}
        if "virtual_keys" in names:
            tables["virtual_keys"] = {"pepper": PEPPER, "keys": [{"name": "test", "secret": self.key}]}
        if "routing" in names:
            tables["routing"] = {"bindings": self._bound(names)}
        return tables

    def _bound(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return each binding once per upstream, without those whose provider a test leaves out."""
        bound = []
        for table in self._bindings:
            missing = table in BINDINGS and table["type"] not in names
            for number, upstream in enumerate(() if missing else self.upstreams, 1):
                name = table["name"] if number == 1 else f"{table['name']}{number}"
                bound.append({"base_url": upstream.base_url, "credential": CREDENTIAL, **table, "name": name})
        return bound

    async def __aenter__(self) -> Self:
        try:
            for upstream in self.upstreams:
                if not upstream.is_standalone:
                    await self._stack.enter_async_context(upstream.running(socket=self.is_socket))
            self._gateway = gateway = Gateway(self.configuration(), self._recorder)
            gateway.transports.direct = _Dialer(gateway.configuration.gateway.upstream, self.upstreams)
            await self._stack.enter_async_context(gateway.running())
            if self.is_socket:
                self.port = await gateway.listen()
            gateway.server.is_started = True
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        # The test's own exception is not shown to the task groups, which would wrap it in a group.
        await self._stack.aclose()
        if error is None:
            for upstream in self.upstreams:
                upstream.check()

    # --- what a test asks -----------------------------------------------------------------------------------

    @property
    def gateway(self) -> Gateway:
        """Return the gateway, once the harness is entered."""
        assert self._gateway is not None, "enter the harness first"
        return self._gateway

    @property
    def base_url(self) -> str:
        """Return where an SDK finds the gateway, without ``/v1``; only with ``socket=True``."""
        assert self.port is not None, "only a harness with socket=True has an address"
        return f"http://127.0.0.1:{self.port}"

    @property
    def exchanges(self) -> list[Exchange]:
        """Return the exchanges in the order they settled, as post_response found them."""
        return self._capture.exchanges

    @property
    def records(self) -> list[Record]:
        """Return what telemetry remembers of each settled exchange."""
        self._recorder.drain()
        return self._recorder.kept

    @property
    def faults(self) -> list[BaseException]:
        """Return the unexpected exceptions the gateway would have logged."""
        return self._recorder.faults

    @property
    def settled(self) -> int:
        """Return how many exchanges have settled."""
        return len(self._recorder.settled)

    async def wait_settled(self, count: int) -> None:
        """Return once ``count`` exchanges have settled. Raises TimeoutError."""
        await self._recorder.wait(None, count)

    # --- what a client does ---------------------------------------------------------------------------------

    async def request(self, method: str, path: str, headers: Fields = (), body: Body = b"") -> Reply:
        """Send one request on a connection of its own; returns its answer once the exchange has settled."""
        async with self.stream(method, path, headers, body) as stream:
            reply = await stream.read()
        namespace = self.gateway.configuration.gateway.namespace
        request_id = reply.headers.get(b"x-%b-request-id" % namespace.replace("_", "-").encode())
        if request_id is not None:
            await self._recorder.wait(request_id, 0)
        return reply

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: Fields = (), body: Body = b""
    ) -> AsyncIterator[ReplyStream]:
        """Send one request and enter with the head of its answer; leaving early abandons the answer."""
        client = await self.raw()
        try:
            await client.send(self.request_bytes(method, path, headers, body))
            stream = ReplyStream(client, method.encode())
            await stream.wait_head()
            yield stream
        finally:
            client.close()

    async def raw(self) -> RawClient:
        """Return a client on a new connection; it is closed with the harness."""
        client = RawClient()
        if self.port is not None:
            await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", self.port)
        else:
            connect(client, Connection(self.gateway.server))
        self._clients.append(client)
        return client

    def request_bytes(self, method: str, path: str, headers: Fields = (), body: Body = b"") -> bytes:
        """Return a request as ``request`` would send it, for a raw client."""
        return request_bytes(method, path, headers, body, key=self.key)


def _listed(upstream: FakeUpstream | Sequence[FakeUpstream] | None) -> tuple[FakeUpstream, ...]:
    if upstream is None:
        return ()
    return (upstream,) if isinstance(upstream, FakeUpstream) else tuple(upstream)


def _named(plugin: Any) -> tuple[str, Any]:
    """Return a plugin's name and what it is, None where the name is all there is."""
    if isinstance(plugin, str):
        return plugin, None
    if isinstance(plugin, tuple):
        return plugin[0], plugin[1]
    kind = plugin if isinstance(plugin, type) else type(plugin)
    return snake_case(kind.__name__), plugin


def snake_case(name: str) -> str:
    """Return ``OpenAIGuard`` as ``open_ai_guard``: the name a harness gives a class."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
