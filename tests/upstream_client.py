"""The client's side of the transport tests: a transport per kind, and a receiver that remembers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Callable

import anyio
import attrs
import trustme

from penstock.errors import UpstreamError
from penstock.framing import ChunkedDecoder
from penstock.models import Timeouts
from penstock.providers import Origin, UpstreamRequest, UpstreamResponse
from penstock.upstream.direct import DirectTransport
from penstock.upstream.store import Limits
from penstock.upstream.via_httpcore import HttpcoreTransport
from upstream_servers import Peer, Script, ScriptedServer, connect_proxy, serve, turns

KINDS = ("direct", "direct_tls", "httpcore", "httpcore_tls", "httpcore_forward", "httpcore_tunnel")
Connect = Callable[..., contextlib.AbstractAsyncContextManager["Bench"]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SHORT = Timeouts(connect=5.0, first_byte=0.1, idle=0.1)
LONG = Timeouts(connect=5.0, first_byte=20.0, idle=20.0)


class Collector:
    """Receive a body; pauses its response after the first read when told to."""

    def __init__(self, response: UpstreamResponse, *, pauses: bool = False) -> None:
        self.response = response
        self.reads: list[bytes] = []
        self.size = 0
        self.error: UpstreamError | None = None
        self.began = anyio.Event()
        self.ended = anyio.Event()
        self._pauses = pauses

    def receive(self, data: bytes) -> None:
        assert data
        assert not self.ended.is_set()
        self.reads.append(data)
        self.size += len(data)
        self.began.set()
        if self._pauses:
            self._pauses = False
            self.response.pause()

    def finish(self) -> None:
        assert not self.ended.is_set()
        self.ended.set()

    def fail(self, error: Exception) -> None:
        assert isinstance(error, UpstreamError)
        assert not self.ended.is_set()
        self.error = error
        self.ended.set()

    @property
    def payload(self) -> bytes:
        wire = b"".join(self.reads)
        if self.response.is_raw and self.response.head.chunked:
            return ChunkedDecoder(allow_extensions=True).feed(wire)
        return wire


@attrs.define
class Bench:
    """A transport of some kind in front of a scripted server."""

    transport: DirectTransport | HttpcoreTransport
    origin: Origin
    server: ScriptedServer

    def request(
        self,
        method: bytes = b"POST",
        body: bytes = b"{}",
        timeouts: Timeouts = LONG,
        origin: Origin | None = None,
    ) -> UpstreamRequest:
        body = b"" if method == b"GET" else body
        fields = b"Host: localhost\r\nX-Spelled-So: yes\r\n"
        return UpstreamRequest(origin or self.origin, method, b"/v1/x?y=1", fields, body, timeouts)

    async def send(self, method: bytes = b"POST", timeouts: Timeouts = LONG, body: bytes = b"{}") -> UpstreamResponse:
        with anyio.fail_after(30):
            return await self.transport.send(self.request(method, body, timeouts))

    async def fetch(self, method: bytes = b"POST", timeouts: Timeouts = LONG, body: bytes = b"{}") -> Collector:
        """Send and take the whole body, or what there is of it."""
        return await take(await self.send(method, timeouts, body))

    async def fault(self, method: bytes = b"POST", timeouts: Timeouts = LONG, body: bytes = b"{}") -> str:
        """Send what must fail before its head; returns the fault."""
        try:
            await self.send(method, timeouts, body)
        except UpstreamError as error:
            return error.fault
        raise AssertionError("the request was answered")


def answering(*pieces: bytes) -> Script:
    """Answer every request of a connection with the same pieces."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.read_request()
            await peer.send(*pieces)

    return script


def answering_once(*pieces: bytes) -> Script:
    """Answer the first request, then close."""

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(*pieces)

    return script


async def take(response: UpstreamResponse) -> Collector:
    collector = Collector(response)
    response.start(collector)
    with anyio.fail_after(30):
        await collector.ended.wait()
    return collector


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


def server_tls(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("localhost", "127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(list(protocols or ("http/1.1",)))
    return context


def trust(transport: DirectTransport | HttpcoreTransport, scheme: str = "https") -> None:
    """Make a transport trust the tests' own authority."""
    authority().configure_trust(transport.tls.context_for(Origin(scheme, "localhost", 1)))


async def _sweep(transport: DirectTransport | HttpcoreTransport) -> None:
    loop = asyncio.get_running_loop()
    while True:
        transport.sweep(loop.time())
        await anyio.sleep(0.01)


@contextlib.asynccontextmanager
async def swept(transport: DirectTransport | HttpcoreTransport) -> AsyncIterator[None]:
    """Sweep a transport as the gateway does, close it at the end and see that nothing of it is left."""
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_sweep, transport)
            yield
            tasks.cancel_scope.cancel()
    finally:
        if isinstance(transport, DirectTransport):
            transport.close()
        else:
            await transport.aclose()
        await turns(20)
    assert not transport.opened
    assert not len(transport.idle)


@contextlib.asynccontextmanager
async def bench(kind: str, script: Script, limits: Limits | None = None) -> AsyncIterator[Bench]:
    """Put a transport of `kind` in front of `script`."""
    limits = limits or Limits()
    is_tls = kind.endswith(("_tls", "_tunnel"))
    tasks = asyncio.all_tasks()
    transport = DirectTransport(limits) if kind.startswith("direct") else HttpcoreTransport(limits)
    if is_tls:
        trust(transport)
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve(script, server_tls() if is_tls else None))
        origin = Origin("https" if is_tls else "http", "localhost" if is_tls else "127.0.0.1", server.port)
        if kind == "httpcore_forward":
            origin = Origin("http", "provider.test", 80, proxy=f"http://127.0.0.1:{server.port}")
        elif kind == "httpcore_tunnel":
            proxy = await stack.enter_async_context(serve(connect_proxy([])))
            origin = attrs.evolve(origin, proxy=f"http://127.0.0.1:{proxy.port}")
        await stack.enter_async_context(swept(transport))
        yield Bench(transport, origin, server)
    assert asyncio.all_tasks() <= tasks
