"""One client connection: requests read from transport callbacks, exchanges run one at a time by one task.

States:

    reading (head, then body) → busy (an exchange runs; bytes ahead wait) → reading | lingering | closed

Invariants: a request is handed on only whole, or marked as too large; what cannot be read is answered once and closes
the connection; the end of the client's side cancels the exchange that runs. Deadlines are checked by the server's
sweep, so nothing here sets a timer.
"""

from __future__ import annotations

import asyncio
import re
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel

from penstock.asgi import Bridge, Mount, http_scope
from penstock.endpoints import UNKNOWN, find_endpoint, unknown_endpoint
from penstock.envelopes import error_response
from penstock.errors import RequestError, overloaded
from penstock.framing import ChunkedDecoder, FramingError
from penstock.heads import HeadError, RequestHead, read_request_head
from penstock.ids import new_request_id, new_trace
from penstock.models import Exchange, Request, Response
from penstock.outbox import reset
from penstock.replies import BODILESS_STATUS

if TYPE_CHECKING:
    from penstock.relay import Relay
    from penstock.server import Server

AHEAD_BYTES = 64 * 1024
"""Bytes of pipelined requests read ahead while an exchange runs."""
LINGER_SECONDS = 2.0
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CODE_OF_STATUS = {431: "bad_request", 408: "request_timeout"}


class Connection(asyncio.Protocol):
    """Read requests, run exchanges, write answers."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_buffer",
        "_chunks",
        "_deadline",
        "_drained",
        "_held_bytes",
        "_is_busy",
        "_is_closing",
        "_is_gone",
        "_is_lingering",
        "_is_oversize",
        "_is_ready",
        "_keep_alive",
        "_needed",
        "_outbox",
        "_parsed",
        "_read_paused",
        "_relay",
        "_scope",
        "_server",
        "_transport",
        "_waiter",
        "_write_deadline",
        "_write_paused",
        "client",
        "is_http10",
    )

    def __init__(self, server: Server) -> None:
        self._server = server
        self._outbox = server.outbox
        self._transport: asyncio.Transport | None = None
        self.client: tuple[str, int] | None = None
        self.is_http10 = False
        self._buffer = b""
        self._parsed: RequestHead | None = None
        self._body: list[bytes] = []
        self._body_bytes = self._needed = self._held_bytes = 0
        self._chunks: ChunkedDecoder | None = None
        self._is_ready = self._is_busy = self._is_oversize = False
        self._is_closing = self._is_gone = self._is_lingering = False
        self._keep_alive = True
        self._read_paused = self._write_paused = False
        self._relay: Relay | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._scope: anyio.CancelScope | None = None
        self._deadline = 0.0
        self._write_deadline = 0.0

    # --- what the transport below calls ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        peer = transport.get_extra_info("peername")
        self.client = (peer[0], peer[1]) if isinstance(peer, tuple) else None
        self._server.welcome(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why it went makes no difference
        self._is_gone = self._is_closing = True
        self._server.connections.discard(self)
        self._release()
        if self._scope is not None:
            self._scope.cancel()
        self._wake()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return
        if self._is_busy or self._is_ready:
            self._buffer += data
            if len(self._buffer) > AHEAD_BYTES and self._transport is not None:
                self._read_paused = True
                self._transport.pause_reading()
            return
        try:
            self._read(data)
        except HeadError as error:
            code = _CODE_OF_STATUS.get(error.status, "bad_request")
            self._refuse(RequestError(code, str(error.message), status=error.status))
        except FramingError as error:
            self._refuse(RequestError("bad_request", f"The request body is not framed correctly: {error}."))
        except RequestError as error:
            self._refuse(error)

    def pause_writing(self) -> None:
        self._write_paused = True
        self._write_deadline = self._server.now() + self._server.limits.write_timeout
        if self._relay is not None:
            self._relay.pause()

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._relay is not None:
            self._relay.resume()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    # --- reading one request --------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        if self._parsed is None:
            seen = len(self._buffer)
            buffer = self._buffer + data if seen else data
            end = buffer.find(b"\r\n\r\n", max(0, seen - 3))
            if end < 0:
                self._wait_for_head(buffer, seen)
                return
            self._buffer = b""
            if end + 4 > self._server.limits.max_head_bytes:
                raise HeadError(431, "the request head is larger than this server reads")
            self._parsed = read_request_head(buffer[: end + 4])
            self._begin_body(self._parsed)
            data = buffer[end + 4 :]
        self._read_body(data)

    def _wait_for_head(self, buffer: bytes, seen: int) -> None:
        limits = self._server.limits
        if len(buffer) > limits.max_head_bytes:
            raise HeadError(431, "the request head is larger than this server reads")
        if _BARE_LF.search(buffer, max(0, seen - 1)):
            raise HeadError(400, "the request head holds a line feed without a carriage return")
        if not seen and buffer:
            self._deadline = self._server.now() + limits.head_timeout
        self._buffer = buffer

    def _begin_body(self, head: RequestHead) -> None:
        limits = self._server.limits
        self.is_http10 = head.is_http10
        self._keep_alive = head.keep_alive and not head.is_http10
        length = head.content_length
        if head.chunked:
            self._chunks = ChunkedDecoder(allow_extensions=False)
        elif length is None:
            self._needed = 0
        elif length > limits.max_body_bytes:
            self._is_oversize = True
        else:
            self._needed = length
        if (self._needed or self._chunks is not None) and not self._is_oversize:
            self._deadline = self._server.now() + limits.body_timeout
            if head.expects_continue:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self, data: bytes) -> None:
        if self._is_oversize:
            self._complete(b"")
        elif self._chunks is not None:
            self._read_chunks(self._chunks, data)
        else:
            missing = self._needed - self._body_bytes
            if len(data) <= missing:
                if data:
                    self._body.append(data)
                    self._body_bytes += len(data)
                if len(data) == missing:
                    self._complete(b"")
                else:
                    self._hold()
            else:
                self._body.append(data[:missing])
                self._complete(data[missing:])

    def _read_chunks(self, chunks: ChunkedDecoder, data: bytes) -> None:
        payload = chunks.feed(data)
        if payload:
            self._body.append(payload)
            self._body_bytes += len(payload)
        if self._body_bytes > self._server.limits.max_body_bytes:
            self._is_oversize = True
            self._body.clear()
            self._complete(b"")
        elif chunks.complete:
            self._complete(chunks.unused)
        else:
            self._hold()

    def _hold(self) -> None:
        """Count what is here of a body still arriving. Raises RequestError where all connections hold too much."""
        server, limit = self._server, self._server.limits.max_buffered_bytes
        server.buffered_bytes += self._body_bytes - self._held_bytes
        self._held_bytes = self._body_bytes
        if server.buffered_bytes > limit:
            raise overloaded("bytes of request bodies still arriving", limit)

    def _release(self) -> None:
        self._server.buffered_bytes -= self._held_bytes
        self._held_bytes = 0

    def _complete(self, ahead: bytes) -> None:
        if self._held_bytes:
            self._release()
        self._deadline = 0.0
        self._buffer = ahead
        self._is_ready = True
        self._wake()

    def _refuse(self, error: RequestError) -> None:
        """Answer what could not be read as a request, and close."""
        self._keep_alive = False
        self._server.count_refusal(error.code)
        self._respond(None, self._error_response(error), with_body=True)
        self.linger()

    def _error_response(self, error: RequestError) -> Response:
        """Return a refusal outside of any exchange, in the shape of the endpoint that was asked for, if it is known."""
        endpoint = None
        if self._parsed is not None:
            endpoint = find_endpoint(self._parsed.target.partition(b"?")[0])
        family = (endpoint or UNKNOWN).family
        return error_response(error, family, new_request_id(time_ns()), self._server.namespace)

    # --- one exchange after the other -----------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run exchanges until either side ends the connection."""
        with anyio.CancelScope() as self._scope:
            try:
                while True:
                    if not self._is_ready:
                        await self._wait()
                    if self._is_closing:
                        break
                    await self._serve_one()
                    if not self._keep_alive or self._server.is_draining:
                        break
                    if self._buffer or self._write_paused:
                        await self.drained()
                    self._next()
            except Exception as error:  # noqa: BLE001 - one connection's fault must not end the others
                self._server.report_fault(error)
                self._transport_now.abort()
            finally:
                self._finish()

    async def _serve_one(self) -> None:
        head, body = self._parsed, b"".join(self._body)
        assert head is not None
        self._is_busy, self._is_ready = True, False
        self._parsed, self._chunks = None, None
        self._body.clear()
        self._body_bytes = self._needed = 0
        is_oversize, self._is_oversize = self._is_oversize, False
        if is_oversize:
            self._keep_alive = False
        path, _, query = head.target.partition(b"?")
        endpoint = find_endpoint(path)
        if endpoint is not None or not await self._serve_aside(head, path, query, body, is_oversize=is_oversize):
            now = time_ns()
            exchange = Exchange(
                new_request_id(now),
                Request(head, path, query, endpoint or unknown_endpoint(path, head.headers), body, is_oversize),
                new_trace(head.headers.get(b"traceparent"), head.headers.get(b"tracestate")),
                self._server.namespace,
                monotonic_ns(),
                now,
                self.client,
            )
            await self._server.run(exchange, self)
            self._relay = None
        if is_oversize:
            self.linger()

    async def _serve_aside(
        self, head: RequestHead, path: bytes, query: bytes, body: bytes, *, is_oversize: bool
    ) -> bool:
        """Answer what is no exchange, health checks and mounted applications; False where it is neither."""
        with_body = head.method != b"HEAD"
        answer = self._server.answer_probe(head.method, path)
        if answer is not None:
            self._respond(None, answer, with_body=with_body)
            return True
        mount = self._server.mount_of(path)
        if mount is None:
            return False
        if is_oversize:
            limit = self._server.limits.max_body_bytes
            error = RequestError("payload_too_large", f"The request body is larger than {limit} bytes.")
            self._server.count_refusal(error.code)
            self._respond(None, self._error_response(error), with_body=with_body)
        else:
            await self._serve_mount(mount, head, path, query, body)
        return True

    async def _serve_mount(self, mount: Mount, head: RequestHead, path: bytes, query: bytes, body: bytes) -> None:
        scope = http_scope(mount, head, path, query, self.client, self._server.scheme)
        bridge = Bridge(self, head, body, close=not self._keep_alive)
        try:
            with self._server.kept_generation():
                await bridge.run(mount.app, scope)
        except Exception as error:  # noqa: BLE001 - an application's fault is ours to report
            bridge.close = True
            self._server.report_fault(error)
            if not bridge.started:
                refusal = RequestError("internal_error", "The gateway failed; see its log.")
                self._keep_alive = False
                self._respond(None, self._error_response(refusal), with_body=head.method != b"HEAD")
        self._keep_alive = self._keep_alive and not bridge.close

    def _next(self) -> None:
        """Get ready for the next request, whose first bytes may be here already."""
        self._is_busy = False
        self._deadline = self._server.now() + self._server.limits.keep_alive_timeout
        ahead, self._buffer = self._buffer, b""
        if ahead:
            self.data_received(ahead)
        # What is still ahead of the next request must shrink below the bound before more is read.
        if self._read_paused and (not self._is_ready or len(self._buffer) <= AHEAD_BYTES):
            self._resume_reading()

    def _resume_reading(self) -> None:
        self._read_paused = False
        if not self._is_gone:
            self._transport_now.resume_reading()

    async def _wait(self) -> None:
        if self._is_closing:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _finish(self) -> None:
        if not self._is_lingering:
            self.close()
        if self._drained is not None and not self._drained.done():
            self._drained.cancel()

    # --- writing --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write to the client; bytes for one that has gone are dropped."""
        transport = self._transport
        if transport is not None and not self._is_gone:
            self._outbox.write(transport, data)

    def begin(self, exchange: Exchange, relay: Relay, framing: bytes) -> bytes:
        """Return the head of a relayed answer, and let a slow client slow ``relay`` from now on."""
        self._relay = relay
        if self._write_paused:
            relay.pause()
        close = not self._keep_alive or self._server.is_draining
        return self._server.heads.relayed(exchange, relay.response.head, framing, close=close)

    def respond(self, exchange: Exchange, response: Response) -> None:
        """Write a whole answer authored by the gateway or a plugin."""
        with_body = exchange.request.method != b"HEAD" and response.status not in BODILESS_STATUS
        self._respond(exchange, response, with_body=with_body)

    def _respond(self, exchange: Exchange | None, response: Response, *, with_body: bool) -> None:
        close = not self._keep_alive or self._server.is_draining
        head = self._server.heads.authored(exchange, response, close=close)
        self.write(head + response.body if with_body else head)

    async def drained(self) -> None:
        """Write what waits, then give others their turn, or wait until a slow client has taken enough."""
        self._outbox.flush()
        if self._write_paused:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
        else:
            await anyio.lowlevel.checkpoint()

    def close_after_write(self) -> None:
        self._keep_alive = False

    def cut(self) -> None:
        """Reset the connection: a clean close would pass for the end of a body that nothing else delimits."""
        self._keep_alive = False
        if self._transport is not None and not self._is_gone:
            reset(self._transport)

    def linger(self) -> None:
        """Close, but let the client read the answer first: what it still sends is read and dropped for a moment."""
        transport = self._transport
        if transport is None or self._is_gone:
            return
        self._is_lingering = self._is_closing = True
        self._body.clear()
        self._release()
        self._buffer = b""
        self._deadline = self._server.now() + LINGER_SECONDS
        if self._read_paused:
            self._resume_reading()
        self._outbox.flush()
        if transport.can_write_eof():
            transport.write_eof()
        self._wake()

    # --- from the server ------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        return not self._is_busy and not self._is_ready and self._parsed is None and not self._buffer

    def expect_head(self) -> None:
        """Give a new connection its time to a first request."""
        self._deadline = self._server.now() + self._server.limits.head_timeout

    def turn_away(self) -> None:
        """Answer a connection beyond the limit with 503 and close it."""
        self._keep_alive = False
        error = overloaded("connections", self._server.limits.max_connections)
        self._server.count_refusal(error.code)
        self._respond(None, self._error_response(error), with_body=True)
        self.linger()

    @property
    def _transport_now(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def close(self) -> None:
        """Close once what was written is out; a client that does not take it in time is cut off by the sweep."""
        self._is_closing = True
        if self._transport is not None and not self._is_gone:
            self._is_lingering = True
            self._deadline = self._server.now() + self._server.limits.write_timeout
            self._outbox.flush()
            self._transport.close()

    def abort(self) -> None:
        """Cancel what is under way and close."""
        if self._scope is not None:
            self._scope.cancel()
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """Enforce the deadline of the state the connection is in, and that of a client that takes nothing."""
        if self._write_paused and now >= self._write_deadline:
            self.abort()
            return
        if not self._deadline or now < self._deadline:
            return
        self._deadline = 0.0
        if self._is_lingering:
            self.abort()
        elif self.is_idle:
            self.close()
        else:
            self._refuse(RequestError("request_timeout", "The request did not arrive in time."))
