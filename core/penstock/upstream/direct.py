"""HTTP/1.1 to a provider over TCP or TLS: bytes go from transport callback to receiver, raw.

States of a connection, each left only forwards until the body has ended:

    idle → waiting (request written) → held (head parsed, body not started) → flowing → idle | closed

Invariants: bytes in state idle close the connection; a connection goes back to the store only after a
complete body on a keep-alive response to a request that was wholly sent; everything else closes it. The
connection tracks framing itself, so nothing past the end of a body ever reaches a receiver.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

import anyio

from penstock.errors import UpstreamError
from penstock.framing import ChunkedFraming, CloseFraming, Framing, FramingError, LengthFraming
from penstock.heads import HeadError, ResponseHead, read_response_head
from penstock.outbox import Outbox
from penstock.providers import Origin, Receiver, UpstreamRequest
from penstock.upstream.store import REPEATABLE_METHODS, ConnectionStore, Limits
from penstock.upstream.tls import TLSContexts

HELD_BYTES = 64 * 1024
"""Body bytes read ahead of a receiver before reading is paused."""
"""RFC 9110 section 9.2.2: methods that may be sent again when a kept-alive connection has died."""


class DirectConnection(asyncio.Protocol):
    """Carry one exchange at a time on one connection."""

    __slots__ = (
        "_activity",
        "_activity_seen",
        "_buffer",
        "_deadline",
        "_framing",
        "_head_waiter",
        "_idle_timeout",
        "_is_flowing",
        "_lost",
        "_lost_cleanly",
        "_method",
        "_paused",
        "_receiver",
        "_response",
        "_transport",
        "_transports",
        "idle_since",
        "origin",
    )

    def __init__(self, transports: DirectTransport, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self._transports = transports
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._head_waiter: asyncio.Future[ResponseHead] | None = None
        self._response: DirectResponse | None = None
        self._receiver: Receiver | None = None
        self._framing: Framing | None = None
        self._lost: UpstreamError | None = None
        self._lost_cleanly = False
        self._method = b""
        self._is_flowing = False
        self._paused = False
        self._activity = self._activity_seen = 0
        self._deadline = 0.0
        self._idle_timeout = 0.0

    # --- what the transport below calls ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a socket's or TLS's, both of them duplex
        self._transports.opened.add(self)

    def data_received(self, data: bytes) -> None:
        if self._is_flowing:
            self._activity += 1
            self._deliver(data)
        elif self._head_waiter is not None:
            self._buffer = self._buffer + data if self._buffer else data
            self._read_head()
        elif self._response is not None:
            self._buffer += data
            if len(self._buffer) > HELD_BYTES:
                self._pause()
        else:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transports.opened.discard(self)
        self._transports.idle.discard(self)
        if self._lost is None:
            self._lost = UpstreamError("reset", "the provider closed the connection before answering")
            self._lost_cleanly = exc is None
        waiter, self._head_waiter = self._head_waiter, None
        if waiter is not None:
            if not waiter.done():
                waiter.set_exception(self._lost)
        elif self._is_flowing:
            self._end_at_eof()

    # --- one exchange ---------------------------------------------------------------------------------------

    def is_usable(self) -> bool:
        return self._lost is None and self._transport is not None and not self._transport.is_closing()

    async def send(self, request: UpstreamRequest, now: float) -> DirectResponse:
        """Write a request and wait for the head; a cancelled wait closes. Raises UpstreamError."""
        transport = self._transport
        assert transport is not None
        timeouts = request.timeouts
        self._method = request.method
        self._deadline = now + timeouts.first_byte
        self._idle_timeout = timeouts.idle
        waiter = self._head_waiter = self._transports.loop.create_future()
        body = request.body
        head = b"%b %b HTTP/1.1\r\n%b" % (request.method, request.path, request.fields)
        if body:
            head += b"content-length: %d\r\n\r\n" % len(body)
            self._transports.outbox.write_all(transport, head, body)
        elif request.method in REPEATABLE_METHODS:
            self._transports.outbox.write(transport, head + b"\r\n")
        else:
            self._transports.outbox.write(transport, head + b"content-length: 0\r\n\r\n")
        try:
            head_read = await waiter
        except BaseException:
            self.abort()
            raise
        response = self._response
        assert response is not None
        assert response.head is head_read
        return response

    def _read_head(self) -> None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        limit = self._transports.limits.max_head_bytes
        if end > limit or (end < 0 and len(buffer) > limit):
            self._refuse_head("the provider's response head is not valid HTTP: it is too large")
            return
        if end < 0:
            return
        try:
            head = read_response_head(buffer[: end + 4])
        except HeadError as error:
            self._refuse_head(f"the provider's response head is not valid HTTP: {error.message}")
            return
        self._buffer = buffer[end + 4 :]
        if head.status < 200:
            if head.status == 101:
                self._refuse_head("the provider switched protocols unasked")
            elif self._buffer:
                self._read_head()
            return
        self._framing = framing_of(head, self._method)
        self._response = DirectResponse(self, head, self._framing)
        waiter, self._head_waiter = self._head_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(head)

    def _refuse_head(self, message: str) -> None:
        self._lost = UpstreamError("protocol", message)
        self.abort()
        waiter, self._head_waiter = self._head_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(self._lost)

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._is_flowing = True
        self._activity += 1
        self._resume()
        framing = self._framing
        assert framing is not None
        data, self._buffer = self._buffer, b""
        if data:
            self._deliver(data)
        elif framing.complete:
            self._finish(0)
        if self._lost is not None and self._is_flowing:
            self._end_at_eof()

    def _deliver(self, data: bytes) -> None:
        framing, receiver = self._framing, self._receiver
        assert framing is not None
        assert receiver is not None
        try:
            taken = framing.feed(data)
        except FramingError as error:
            self._stop(UpstreamError("protocol", f"the provider's body is not framed correctly: {error}"))
            return
        surplus = len(data) - taken
        if surplus:
            data = data[:taken]
        if taken:
            receiver.receive(data)
        if framing.complete and self._is_flowing:
            self._finish(surplus)

    def _finish(self, surplus: int) -> None:
        receiver, response = self._receiver, self._response
        assert receiver is not None
        assert response is not None
        keep_alive = response.head.keep_alive and not surplus
        response.connection = None
        self._forget()
        if keep_alive and self.is_usable() and self._has_sent_all():
            self._deadline = 0.0
            self.idle_since = self._transports.loop.time()
            self._transports.idle.put(self)
        else:
            self.abort()
        receiver.finish()

    def _has_sent_all(self) -> bool:
        """Tell whether the whole request is out: an early answer may come before that."""
        assert self._transport is not None
        return not self._transport.get_write_buffer_size()

    def _end_at_eof(self) -> None:
        framing = self._framing
        assert framing is not None
        if self._lost_cleanly and framing.finish_on_eof():
            self._finish(0)
        else:
            self._stop(UpstreamError("truncated", "the provider's connection broke off in the middle of the body"))

    def _stop(self, error: UpstreamError) -> None:
        receiver, response = self._receiver, self._response
        if response is not None:
            response.connection = None
        self._forget()
        self.abort()
        if receiver is not None:
            receiver.fail(error)

    def _forget(self) -> None:
        self._response = self._receiver = self._framing = None
        self._is_flowing = False
        self._resume()

    def abort(self) -> None:
        """Close at once; whoever waits learns it through connection_lost."""
        self._transports.opened.discard(self)
        if self._transport is not None:
            # A TLS transport of asyncio before Python 3.11.4 cannot be aborted once it is closed.
            with contextlib.suppress(AttributeError):
                self._transport.abort()

    # --- back-pressure and deadlines ------------------------------------------------------------------------

    def _pause(self) -> None:
        if not self._paused and self.is_usable():
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._activity += 1
            if self.is_usable():
                assert self._transport is not None
                self._transport.resume_reading()

    def sweep(self, now: float) -> None:
        """Fail what is overdue: a head, or the next read of a body."""
        if not self._deadline or self._paused:
            return
        if self._is_flowing and self._activity != self._activity_seen:
            self._activity_seen = self._activity
            self._deadline = now + self._idle_timeout
        elif now > self._deadline:
            self._expire()

    def _expire(self) -> None:
        self._deadline = 0.0
        if self._is_flowing:
            self._stop(UpstreamError("timeout", "the provider sent nothing for too long"))
            return
        error = UpstreamError("timeout", "the provider did not answer in time")
        self._lost = error
        waiter, self._head_waiter = self._head_waiter, None
        self.abort()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)


class DirectResponse:
    """Hold a response whose body waits on its connection; ``connection`` is None once that is over."""

    __slots__ = ("connection", "framing", "head")
    is_raw = True

    def __init__(self, connection: DirectConnection, head: ResponseHead, framing: Framing) -> None:
        self.connection: DirectConnection | None = connection
        self.head = head
        self.framing = framing

    def start(self, receiver: Receiver) -> None:
        assert self.connection is not None
        self.connection.start(receiver)

    def pause(self) -> None:
        if self.connection is not None:
            self.connection._pause()  # noqa: SLF001 - two halves of one thing

    def resume(self) -> None:
        if self.connection is not None:
            self.connection._resume()  # noqa: SLF001

    def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection._forget()  # noqa: SLF001
            connection.abort()


def framing_of(head: ResponseHead, method: bytes) -> Framing:
    """Return the follower of the body that comes behind `head` (RFC 9112 section 6.3)."""
    if not head.has_body or method == b"HEAD":
        return LengthFraming(0)
    if head.chunked:
        return ChunkedFraming(allow_extensions=True)
    if head.content_length is not None:
        return LengthFraming(head.content_length)
    return CloseFraming()


class DirectTransport:
    """Open, reuse and bound direct connections on the running event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.idle: ConnectionStore[DirectConnection] = ConnectionStore(limits)
        self.opened: set[DirectConnection] = set()
        self.tls = TLSContexts()
        self._opening = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: Outbox | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    @property
    def outbox(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox(self.loop)
        return self._outbox

    def share_outbox(self, outbox: Outbox) -> None:
        """Write through the server's outbox, so that both sides' writes of a turn are gathered."""
        self._outbox = outbox

    async def send(self, request: UpstreamRequest) -> DirectResponse:
        """Return the response once its head is there. Raises UpstreamError."""
        origin = request.origin
        now = self.loop.time()
        connection = self.idle.take(origin)
        if connection is None:
            connection = await self._open(origin, request.timeouts.connect)
            return await connection.send(request, now)
        try:
            return await connection.send(request, now)
        except UpstreamError as error:
            if error.fault != "reset" or connection._buffer or request.method not in REPEATABLE_METHODS:  # noqa: SLF001
                raise
        connection = await self._open(origin, request.timeouts.connect)
        return await connection.send(request, now)

    async def _open(self, origin: Origin, connect_timeout: float) -> DirectConnection:
        if len(self.opened) + self._opening >= self.limits.max_connections and not self.idle.evict():
            raise UpstreamError("connect", f"all {self.limits.max_connections} upstream connections are in use")
        self._opening += 1
        try:
            return await self._connect(origin, connect_timeout)
        finally:
            self._opening -= 1

    async def _connect(self, origin: Origin, connect_timeout: float) -> DirectConnection:
        connection = DirectConnection(self, origin)
        make: Callable[[], DirectConnection] = lambda: connection  # noqa: E731
        context = self.tls.context_for(origin) if origin.scheme == "https" else None
        try:
            with anyio.fail_after(connect_timeout):
                await self.loop.create_connection(
                    make,
                    origin.host,
                    origin.port,
                    ssl=context,
                    server_hostname=origin.host if context is not None else None,
                )
        except TimeoutError:
            raise UpstreamError("timeout", f"no connection to the provider within {connect_timeout:g} s") from None
        except (socket.gaierror, UnicodeError) as error:
            raise UpstreamError("dns", f"the provider's host name {origin.host!r} does not resolve") from error
        except ssl.SSLError as error:
            raise UpstreamError("tls", f"TLS with the provider failed: {error.reason or 'handshake'}") from error
        except OSError as error:
            raise UpstreamError("connect", f"cannot connect to the provider: {error.strerror or 'refused'}") from error
        return connection

    def sweep(self, now: float) -> None:
        for connection in list(self.opened):
            connection.sweep(now)
        self.idle.expire(now)

    def close(self) -> None:
        self.idle.close()
        for connection in list(self.opened):
            with contextlib.suppress(RuntimeError):
                connection.abort()
