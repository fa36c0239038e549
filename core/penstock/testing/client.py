"""A client made of bytes: sends what a test writes, keeps what comes back, and lets h11 judge it as HTTP."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import h11

from penstock.headers import Headers
from penstock.testing.memory import MemoryTransport

PATIENCE_SECONDS = 10.0
"""A wait that would last longer fails the test instead of hanging it."""

Fields = Mapping[str, str] | Iterable[tuple[bytes, bytes]]
Body = bytes | Mapping[str, Any]


@attrs.frozen
class Reply:
    """Hold a whole answer; ``body`` has its framing undone, its content coding not."""

    status: int
    """HTTP status."""
    headers: Headers
    """Header fields: ``headers.get(b"x-name")`` or ``header("X-Name")``."""
    body: bytes = attrs.field(repr=False)
    """What the client reads."""
    raw: bytes = attrs.field(repr=False)
    """Every byte that came, head and framing included."""
    is_complete: bool = True
    """False where the connection ended before the body did."""

    def json(self) -> Any:
        """Return the body, parsed."""
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """Return a header field's first value, by its name in any case."""
        value = self.headers.get(name.lower().encode())
        return None if value is None else value.decode("latin-1")


class ReplyReader:
    """Read one answer out of bytes, sans-IO."""

    def __init__(self, method: bytes = b"GET") -> None:
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=1024 * 1024)
        self._h11.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"gateway")]))
        self._h11.send(h11.EndOfMessage())
        self.status: int | None = None
        self.headers = Headers()
        self.body: list[bytes] = []
        self.raw: list[bytes] = []
        self.has_ended = self.is_complete = False

    def feed(self, data: bytes) -> list[bytes]:
        """Return the pieces of body in these bytes; b"" stands for the end of the connection.

        Raises h11.RemoteProtocolError for what is no HTTP; one that breaks off leaves ``is_complete`` False.
        """
        self.raw.append(data)
        pieces: list[bytes] = []
        try:
            self._h11.receive_data(data)
            while not self.has_ended:
                event = self._h11.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self._take(event, pieces)
        except h11.RemoteProtocolError:
            if data or self.status is None:
                raise
            self.has_ended = True
        self.body += pieces
        return pieces

    def _take(self, event: object, pieces: list[bytes]) -> None:
        if isinstance(event, h11.Response):
            self.status = event.status_code
            self.headers = Headers(list(event.headers.raw_items()))
        elif isinstance(event, h11.Data):
            pieces.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self.has_ended = self.is_complete = True

    @property
    def unused(self) -> bytes:
        """Return what came behind the answer."""
        return self._h11.trailing_data[0]

    def reply(self) -> Reply:
        """Return what was read. Raises AssertionError where no head came."""
        assert self.status is not None, "the connection ended before an answer came"
        raw = b"".join(self.raw)
        unused = self.unused if self.is_complete else b""
        raw = raw[: len(raw) - len(unused)]
        return Reply(self.status, self.headers, b"".join(self.body), raw, self.is_complete)


class RawClient(asyncio.Protocol):
    """Send and receive bytes on one connection to the gateway, in memory or on a socket."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._pieces: deque[bytes] = deque()
        self._changed = anyio.Event()
        self._error: Exception | None = None
        self._has_ended = False
        self._unused = b""
        self.closed: anyio.Event = anyio.Event()
        """Set once the connection is gone, from whichever side."""
        self.received: bytearray = bytearray()
        """Everything that has come so far."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pieces.append(data)
        self.received += data
        self._notify()

    def eof_received(self) -> bool:
        self._has_ended = True
        self._notify()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended = True
        self._error = exc
        self.closed.set()
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def send(self, *segments: bytes) -> None:
        """Write each segment on its own: one read each in memory; on a socket TCP may join them."""
        for segment in segments:
            self._transport.write(segment)
            await anyio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        """Return the next bytes, b"" at the end. Raises ConnectionResetError, TimeoutError."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while not self._pieces:
                if self._error is not None:
                    raise ConnectionResetError(*self._error.args)
                if self._has_ended:
                    return b""
                await self._changed.wait()
        return self._pieces.popleft()

    async def receive_until(self, marker: bytes) -> bytes:
        """Return everything up to and with ``marker``. Raises AssertionError at an earlier end."""
        seen = b""
        while marker not in seen:
            data = await self.receive()
            assert data, f"the connection ended before {marker!r}, after {seen[-200:]!r}"
            seen += data
        end = seen.index(marker) + len(marker)
        if seen[end:]:
            self._pieces.appendleft(seen[end:])
        return seen[:end]

    async def receive_all(self) -> bytes:
        """Return everything up to the end of the connection."""
        parts = []
        while data := await self.receive():
            parts.append(data)
        return b"".join(parts)

    async def receive_reply(self, method: bytes = b"POST") -> Reply:
        """Return the next whole answer; ``method`` is its request's. What follows is kept for the next."""
        reader = ReplyReader(method)
        while not reader.has_ended:
            reader.feed(await self.receive())
        if reader.is_complete and reader.unused:
            self._pieces.appendleft(reader.unused)
        return reader.reply()

    def pause(self) -> None:
        """Take nothing more, as a slow client does, until ``resume``."""
        self._transport.pause_reading()

    def resume(self) -> None:
        """Take what comes again."""
        self._transport.resume_reading()

    def half_close(self) -> None:
        """End the sending side and go on receiving."""
        self._transport.write_eof()

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def reset(self) -> None:
        """Break the connection off (TCP RST)."""
        reset(self._transport)


def reset(transport: asyncio.Transport) -> None:
    """Break a connection off, in memory or on a socket, so that the other side sees a reset."""
    if isinstance(transport, MemoryTransport):
        transport.reset()
        return
    sock = transport.get_extra_info("socket")
    if sock is not None and not transport.is_closing():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class ReplyStream:
    """An answer whose body is read as it arrives: ``async for piece in stream``."""

    def __init__(self, client: RawClient, method: bytes) -> None:
        self.client: RawClient = client
        """The connection it comes on."""
        self._reader = ReplyReader(method)
        self._ready: deque[bytes] = deque()

    async def wait_head(self) -> None:
        """Return once the head is there. Raises AssertionError where the connection ends before."""
        while self._reader.status is None:
            data = await self.client.receive()
            assert data, "the connection ended before an answer came"
            self._ready += self._reader.feed(data)

    @property
    def status(self) -> int:
        """Return the status."""
        assert self._reader.status is not None
        return self._reader.status

    @property
    def headers(self) -> Headers:
        """Return the header fields."""
        return self._reader.headers

    @property
    def is_complete(self) -> bool:
        """Say whether the body has ended as its framing wants."""
        return self._reader.is_complete

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._ready:
                yield self._ready.popleft()
            if self._reader.has_ended:
                return
            self._ready += self._reader.feed(await self.client.receive())

    async def read(self) -> Reply:
        """Read on to the end; returns everything from the start."""
        while not self._reader.has_ended:
            self._reader.feed(await self.client.receive())
        return self._reader.reply()


def request_bytes(method: str, path: str, headers: Fields = (), body: Body = b"", *, key: str | None = None) -> bytes:
    """Return a request as it goes over the wire.

    Host, Content-Length, Content-Type and, from ``key``, the credential are added where ``headers`` has none;
    a body that is a mapping becomes JSON.
    """
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    pairs = (
        [(name.encode(), value.encode()) for name, value in headers.items()]
        if isinstance(headers, Mapping)
        else [*headers]
    )
    given = {name.lower() for name, _ in pairs}
    own: list[tuple[bytes, bytes]] = [(b"Host", b"gateway.test")]
    if key is not None and not given & {b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key"}:
        own.append((b"Authorization", b"Bearer " + key.encode()))
    if payload:
        own.append((b"Content-Type", b"application/json"))
    if (payload or method == "POST") and b"transfer-encoding" not in given:
        own.append((b"Content-Length", b"%d" % len(payload)))
    fields = [field for field in own if field[0].lower() not in given] + pairs
    head = b"%b %b HTTP/1.1\r\n" % (method.encode(), path.encode())
    return head + b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n" + payload
