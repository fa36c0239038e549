"""Everything the direct transport does not speak, on httpcore: HTTP/2, forward proxies, SOCKS.

httpcore's connections are used without its pool, whose cost per request grows faster than the number of open
connections. A connection carries one exchange at a time, or on HTTP/2 as many streams as the provider
allows; it goes back to the store only after complete bodies. Bodies are pulled by tasks of one task group
that the transport owns.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Mapping
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import anyio
import anyio.abc
import httpcore

from penstock.errors import UpstreamError
from penstock.framing import FramingError
from penstock.heads import HeadError, ResponseHead, read_response_head
from penstock.providers import Origin, Receiver, UpstreamRequest
from penstock.upstream.store import REPEATABLE_METHODS, ConnectionStore, Limits
from penstock.upstream.tls import TLSContexts
from penstock.upstream.watched import ExchangeWatch, Wire

_CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
_MAX_STREAMS = 100
"""httpcore's own bound of concurrent streams on an HTTP/2 connection."""
_SETTINGS_MAX_CONCURRENT_STREAMS = 3
_RST_STREAM_CANCEL = b"\x00\x00\x04\x03\x00%b\x00\x00\x00\x08"
"""RFC 9113 section 6.4, error code CANCEL."""
_HTTP2_WRITE_SECONDS = 10.0
_CLOSE_SECONDS = 1.0


class _Connection:
    """Hold one of httpcore's connections and what the store needs to know of it."""

    def __init__(self, transport: HttpcoreTransport, origin: Origin) -> None:
        self.origin = origin
        self.idle_since = 0.0
        self.wire = Wire()
        self.http = _new_connection(origin, self.wire, transport.tls)
        self.active = 0
        self.max_streams = 1  # until the settings of an HTTP/2 peer allow more
        self.is_retired = False
        self._transport = transport

    def has_room(self) -> bool:
        is_leaving = self.is_retired or self.wire.goaway.was_seen
        return self.active < self.max_streams and not is_leaving and self.http.is_available()

    def is_usable(self) -> bool:
        return self.has_room() and not self.wire.is_readable

    def abort(self) -> None:
        """Close from the store; takes effect on the next turns of the loop."""
        self.is_retired = True
        self._transport.close_soon(self)

    async def reset_stream(self, stream_id: int) -> None:
        """Tell an HTTP/2 peer to stop sending, which httpcore does not."""
        if self.wire.stream is not None:
            with contextlib.suppress(httpcore.NetworkError, httpcore.TimeoutException):
                frame = _RST_STREAM_CANCEL % stream_id.to_bytes(4, "big")
                await self.wire.stream.write(frame, _CLOSE_SECONDS)


class _Exchange:
    """Send one request on a connection; knows afterwards whether it may be sent again."""

    def __init__(self, transport: HttpcoreTransport, connection: _Connection, request: UpstreamRequest) -> None:
        self.connection = connection
        self.watch: ExchangeWatch | None = None
        self.may_repeat = False
        self._transport = transport
        self._request = request
        self._stream_id = 0
        self._started = anyio.current_time()
        self._is_connected = connection.wire.stream is not None
        self.timeouts = timeouts = request.timeouts
        allowed = timeouts.first_byte if self._is_connected else timeouts.connect
        self._scope = anyio.CancelScope(deadline=self._started + allowed)

    async def send(self) -> HttpcoreResponse:
        """Return the response once its head is there. Raises UpstreamError."""
        with self._scope:
            try:
                response = await self.connection.http.handle_async_request(self._http_request())
                head = self._read_head(response)
                return HttpcoreResponse(self._transport, self, response, head)
            except Exception as error:
                await self.drop()
                self.may_repeat = self._is_safe_to_repeat(error)
                raise self.fault_of(error, in_body=False) from error
            except BaseException:
                await self.drop()
                raise
        if self._is_connected:
            raise UpstreamError("timeout", "the provider did not answer in time")
        raise UpstreamError("timeout", f"no connection to the provider within {self.timeouts.connect:g} s")

    def _http_request(self) -> httpcore.Request:
        request, origin = self._request, self._request.origin
        fields = []
        for line in request.fields.split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            if not origin.http2 or name.lower() not in _CONNECTION_FIELDS:
                fields.append((name, value.strip()))
        if request.body or request.method not in REPEATABLE_METHODS:
            fields.append((b"content-length", b"%d" % len(request.body)))
        return httpcore.Request(
            request.method,
            httpcore.URL(scheme=origin.scheme, host=origin.host, port=origin.port, target=request.path),
            headers=fields,
            content=request.body,
            extensions={
                "trace": self._trace,
                "timeout": {"write": _HTTP2_WRITE_SECONDS if origin.http2 else None},
            },
        )

    async def _trace(self, event: str, facts: Mapping[str, Any]) -> None:
        """Follow httpcore's progress (its documented trace extension)."""
        if event == "http11.send_request_headers.started" and facts["request"].method != b"CONNECT":
            assert self.connection.wire.stream is not None
            self.watch = ExchangeWatch(self._request.method, self._transport.limits.max_head_bytes)
            self.connection.wire.stream.watch = self.watch
            self._note_connected()
        elif event in ("http2.send_connection_init.started", "http2.send_request_headers.started"):
            self.connection.wire.is_http2 = True
            self._begin_stream(facts.get("stream_id", 0))
            self._note_connected()
        elif event == "http2.receive_remote_settings.complete":
            changed = facts["return_value"].changed_settings.get(_SETTINGS_MAX_CONCURRENT_STREAMS)
            if changed is not None:
                self.connection.max_streams = max(1, min(changed.new_value, _MAX_STREAMS))

    def _begin_stream(self, stream_id: int) -> None:
        goaway = self.connection.wire.goaway
        if goaway.was_seen:
            raise httpcore.ConnectionNotAvailable  # what the provider announced to ignore is not even sent
        self._stream_id = goaway.last_stream_id = stream_id

    def _note_connected(self) -> None:
        if not self._is_connected:
            self._is_connected = True
            self._scope.deadline = self._started + self.timeouts.first_byte

    def _read_head(self, response: httpcore.Response) -> ResponseHead:
        """Have the head judged by our own rules: nobody has looked at the fields of HTTP/2."""
        fields = [field for field in response.headers if field[0].lower() != b"transfer-encoding"]
        block = b"".join([b"%b: %b\r\n" % field for field in fields])
        if len(block) > self._transport.limits.max_head_bytes:
            raise HeadError(502, "it is too large")
        reason: bytes = response.extensions.get("reason_phrase", b"")
        head = read_response_head(b"HTTP/1.1 %d %b\r\n%b\r\n" % (response.status, reason, block))
        if len(head.headers) != len(fields):
            raise HeadError(502, "a field holds a line end")
        return head

    def _is_safe_to_repeat(self, error: Exception) -> bool:
        if isinstance(error, httpcore.ConnectionNotAvailable):
            return True  # the provider closed an HTTP/2 connection and said it had not looked at this request
        was_answered = self.watch is not None and self.watch.has_bytes
        return (
            self.fault_of(error, in_body=False).fault == "reset"
            and not was_answered
            and self._request.method in REPEATABLE_METHODS
        )

    def fault_of(self, error: Exception, *, in_body: bool) -> UpstreamError:
        """Return what an exception of httpcore means to the pipeline."""
        cause = error.__cause__
        if isinstance(error, HeadError) or isinstance(cause, HeadError):
            message = error.message if isinstance(error, HeadError) else str(cause)
            return UpstreamError("protocol", f"the provider's response head is not valid HTTP: {message}")
        if isinstance(cause, FramingError):
            return UpstreamError("protocol", f"the provider's body is not framed correctly: {cause}")
        if not self._is_connected:
            return _connect_fault(error, self._request.origin)
        wire = self.connection.wire
        is_broken = isinstance(
            error, httpcore.NetworkError | httpcore.TimeoutException | httpcore.ConnectionNotAvailable
        ) or (isinstance(error, httpcore.RemoteProtocolError) and (wire.has_ended or wire.is_http2))
        if not is_broken:
            return UpstreamError("protocol", "the provider's answer is not valid HTTP")
        if in_body:
            return UpstreamError("truncated", "the provider's connection broke off in the middle of the body")
        return UpstreamError("reset", "the provider closed the connection before answering")

    async def drop(self) -> None:
        """Leave the connection before the end of the body: it is not used again."""
        connection = self.connection
        connection.is_retired = True
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            if connection.active > 1 and self._stream_id:
                await connection.reset_stream(self._stream_id)
            await self._transport.leave(connection)

    async def complete(self) -> None:
        """Leave the connection after the end of the body: it may be used again."""
        connection, watch = self.connection, self.watch
        if watch is not None:
            assert connection.wire.stream is not None
            connection.wire.stream.watch = None
            connection.is_retired |= watch.has_surplus or watch.head is None or not watch.head.keep_alive
        with anyio.CancelScope(shield=True):
            await self._transport.leave(connection)


class HttpcoreResponse:
    """Hold a response whose body a task pulls, one read at a time, once it is started."""

    is_raw = False
    framing = None

    def __init__(
        self,
        transport: HttpcoreTransport,
        exchange: _Exchange,
        response: httpcore.Response,
        head: ResponseHead,
    ) -> None:
        self.head = head
        self._transport = transport
        self._exchange = exchange
        self._response = response
        self._scope: anyio.CancelScope | None = None
        self._resumed: anyio.Event | None = None
        self._is_closed = False

    def start(self, receiver: Receiver) -> None:
        """Begin delivery; the first bytes come on one of the next turns of the loop."""
        self._scope = anyio.CancelScope()
        self._transport.spawn(self._pull, receiver, self._scope)

    def pause(self) -> None:
        if self._resumed is None:
            self._resumed = anyio.Event()

    def resume(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resumed.set()

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self._scope is None:
            self._transport.spawn(self._leave, False)
        else:
            self._scope.cancel()

    async def _pull(self, receiver: Receiver, scope: anyio.CancelScope) -> None:
        fault: UpstreamError | None = _abandoned()
        try:
            with scope:
                fault = await self._deliver(receiver)
        except Exception as error:  # noqa: BLE001 - a receiver's, and no reason to break off other responses
            _report(error)
        finally:
            was_closed, self._is_closed = self._is_closed, True
            await self._leave(fault is None)
            if not was_closed:
                _conclude(receiver, fault)

    async def _deliver(self, receiver: Receiver) -> UpstreamError | None:
        """Hand over read after read; returns what ended the body too early, None when it is whole."""
        idle = self._exchange.timeouts.idle
        # An async generator in truth, which must not be left to the garbage collector.
        reads = cast("AsyncGenerator[bytes]", aiter(cast("AsyncIterable[bytes]", self._response.stream)))
        try:
            while not self._is_closed:
                try:
                    with anyio.fail_after(idle):
                        data = await anext(reads, None)
                except TimeoutError:
                    return UpstreamError("timeout", "the provider sent nothing for too long")
                except Exception as error:  # noqa: BLE001 - h2's own errors come through httpcore as they are
                    return self._exchange.fault_of(error, in_body=True)
                if data is None:
                    return None
                while self._resumed is not None:
                    await self._resumed.wait()
                if data and not self._is_closed:  # what had already been read is not stopped by a cancellation
                    receiver.receive(data)
            return _abandoned()
        finally:
            with anyio.CancelScope(shield=True):
                await reads.aclose()

    async def _leave(self, is_complete: bool) -> None:
        with anyio.CancelScope(shield=True), contextlib.suppress(httpcore.NetworkError):
            await self._response.aclose()
        if is_complete:
            await self._exchange.complete()
        else:
            await self._exchange.drop()


def _abandoned() -> UpstreamError:
    return UpstreamError("truncated", "the gateway closed its connection to the provider")


def _conclude(receiver: Receiver, fault: UpstreamError | None) -> None:
    try:
        if fault is None:
            receiver.finish()
        else:
            receiver.fail(fault)
    except Exception as error:  # noqa: BLE001 - as above
        _report(error)


def _report(error: Exception) -> None:
    """Report what a receiver raised as the loop reports what a callback raised."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": "receiving a response body failed", "exception": error}
    )


class HttpcoreTransport:
    """Open, share, reuse and bound httpcore's connections on the running event loop.

    ``tls`` must not hold a context that is used elsewhere: httpcore sets its protocols (ALPN).
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tls = TLSContexts(resumes=False)
        self.idle: ConnectionStore[_Connection] = ConnectionStore(limits)
        self.opened: set[_Connection] = set()
        self._shared: dict[Origin, list[_Connection]] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._owner: asyncio.Task[None] | None = None
        self._is_ready = anyio.Event()

    async def send(self, request: UpstreamRequest) -> HttpcoreResponse:
        """Return the response once its head is there. Raises UpstreamError."""
        if self._owner is None:
            self._owner = asyncio.get_running_loop().create_task(self._own_tasks(), name="httpcore transport")
        await self._is_ready.wait()
        reused = self._take(request.origin)
        if reused is not None:
            exchange = _Exchange(self, reused, request)
            try:
                return await exchange.send()
            except UpstreamError:
                if not exchange.may_repeat:
                    raise
        return await _Exchange(self, self._open(request.origin), request).send()

    def spawn(self, function: Callable[..., Coroutine[Any, Any, None]], *args: object) -> None:
        """Start a task of the transport's; after ``aclose`` there is nothing left to do for one."""
        assert self._tasks is not None
        if not self._tasks.cancel_scope.cancel_called:
            self._tasks.start_soon(function, *args)

    async def _own_tasks(self) -> None:
        """Keep the task group open from the first request to ``aclose``, outside of any request's scope."""
        async with anyio.create_task_group() as self._tasks:
            self._is_ready.set()
            await anyio.sleep_forever()

    def _take(self, origin: Origin) -> _Connection | None:
        for connection in self._shared.get(origin, ()):
            if connection.has_room():
                connection.active += 1
                return connection
        idle = self.idle.take(origin)
        if idle is not None:
            self._enter(idle)
        return idle

    def _open(self, origin: Origin) -> _Connection:
        if len(self.opened) >= self.limits.max_connections and not self.idle.evict():
            raise UpstreamError("connect", f"all {self.limits.max_connections} upstream connections are in use")
        connection = _Connection(self, origin)
        self.opened.add(connection)
        self._enter(connection)
        return connection

    def _enter(self, connection: _Connection) -> None:
        connection.active = 1
        if connection.origin.http2:
            self._shared.setdefault(connection.origin, []).append(connection)

    async def leave(self, connection: _Connection) -> None:
        """End one exchange on a connection; the last one decides whether it is kept."""
        connection.active -= 1
        if connection.active:
            return
        shared = self._shared.get(connection.origin)
        if shared is not None and connection in shared:
            shared.remove(connection)
            if not shared:
                del self._shared[connection.origin]
        if connection.is_usable() and connection.http.is_idle():
            connection.idle_since = asyncio.get_running_loop().time()
            self.idle.put(connection)
        else:
            await self._close(connection)

    def close_soon(self, connection: _Connection) -> None:
        self.opened.discard(connection)
        self.spawn(self._close, connection)

    async def _close(self, connection: _Connection) -> None:
        self.opened.discard(connection)
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await connection.wire.aclose()

    def sweep(self, now: float) -> None:
        """Close what has been idle too long; deadlines are kept by the exchanges themselves."""
        self.idle.expire(now)

    async def aclose(self) -> None:
        """Break off what is under way and close everything."""
        if self._owner is None or self._tasks is None:
            return
        self._tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait([self._owner])
        opened = list(self.opened)
        self.idle.close()
        for connection in opened:
            await self._close(connection)


def _new_connection(origin: Origin, wire: Wire, tls: TLSContexts) -> httpcore.AsyncConnectionInterface:
    """Return an unopened connection. The pool is made for its choice of connection class, and holds none."""
    pool = httpcore.AsyncConnectionPool(
        ssl_context=tls.context_for(origin) if origin.scheme == "https" else None,
        proxy=None if origin.proxy is None else _proxy(origin.proxy, origin, tls),
        http1=origin.scheme == "https" or not origin.http2,
        http2=origin.http2,
        network_backend=wire,
    )
    try:
        return pool.create_connection(httpcore.Origin(origin.scheme.encode(), origin.host.encode(), origin.port))
    except ImportError:
        message = 'a SOCKS proxy needs the extra "socks": pip install "penstock[socks]"'
        raise UpstreamError("connect", message) from None


def _proxy(url: str, origin: Origin, tls: TLSContexts) -> httpcore.Proxy:
    parts = urlsplit(url)
    auth = None if parts.username is None else (unquote(parts.username), unquote(parts.password or ""))
    context = tls.context_for(origin) if parts.scheme == "https" else None
    default_port = {"http": 80, "https": 443}.get(parts.scheme, 1080)
    address = httpcore.URL(scheme=parts.scheme, host=parts.hostname or "", port=parts.port or default_port, target="/")
    return httpcore.Proxy(address, auth=auth, ssl_context=context)


def _connect_fault(error: Exception, origin: Origin) -> UpstreamError:
    if isinstance(error, httpcore.ProxyError):
        return UpstreamError("connect", f"the proxy did not connect to the provider: {error}")
    cause: BaseException | None = error
    reason = "refused"
    while cause is not None:
        if isinstance(cause, socket.gaierror | UnicodeError):
            return UpstreamError("dns", f"the provider's host name {origin.host!r} does not resolve")
        if isinstance(cause, ssl.SSLError):
            return UpstreamError("tls", f"TLS with the provider failed: {cause.reason or 'handshake'}")
        if isinstance(cause, OSError):
            reason = cause.strerror or reason
        cause = cause.__cause__
    return UpstreamError("connect", f"cannot connect to the provider: {reason}")
