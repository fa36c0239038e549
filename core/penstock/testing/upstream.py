"""A provider made of scripted bytes, in memory or on a loopback socket.

A script is a list of steps per request: bytes to send, or one of the steps below. Nothing here sleeps: what
waits is ended by the test. Requests are read by h11: somebody else's code judges what the gateway sends.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.abc
import anyio.lowlevel
import attrs
import h11

from penstock.headers import Headers
from penstock.testing.client import PATIENCE_SECONDS, reset
from penstock.testing.memory import connect

_NUMBERS = itertools.count(1)


@attrs.define(eq=False)
class Pause:
    """Send nothing more until the test calls ``release()``; ``reached`` is set when the script gets here."""

    reached: anyio.Event = attrs.field(factory=anyio.Event)
    """Set when the script gets here."""
    released: anyio.Event = attrs.field(factory=anyio.Event)
    """Set by ``release``."""

    def release(self) -> None:
        """Let the script go on."""
        self.released.set()


@attrs.define(eq=False)
class Stall:
    """Send nothing more until the gateway closes the connection (``gone`` is set then) or the test ends."""

    reached: anyio.Event = attrs.field(factory=anyio.Event)
    """Set when the script gets here."""
    gone: anyio.Event = attrs.field(factory=anyio.Event)
    """Set once the gateway has closed the connection."""


@attrs.frozen
class Close:
    """End the connection after what was sent."""


@attrs.frozen
class Reset:
    """Break the connection off."""


@attrs.frozen
class Expect:
    """Wait for the whole request, which must hold ``part``.

    A script without this step begins after the whole request; one with it begins at the request's first byte.
    """

    part: bytes = b""
    """Bytes anywhere in head or body."""


Step = bytes | Pause | Stall | Close | Reset | Expect
"""What a script is made of."""


@attrs.define(eq=False)
class RecordedRequest:
    """Hold a request as the provider got it; ``body`` has its framing undone."""

    method: bytes = b""
    """Such as ``b"POST"``."""
    target: bytes = b""
    """Path and query as sent, bytes."""
    headers: Headers = attrs.field(factory=Headers)
    """Header fields: ``headers.get(b"x-name")``."""
    head: bytes = attrs.field(default=b"", repr=False)
    """Request line and header fields, the blank line included."""
    body: bytes = attrs.field(default=b"", repr=False)
    """Framing undone, content coding not."""
    raw: bytes = attrs.field(default=b"", repr=False)
    """Every byte of it."""
    is_complete: bool = False
    """Whether all of it has come."""
    closed: anyio.Event = attrs.field(factory=anyio.Event, repr=False)
    """Set once the connection it came on is gone."""


Exchange = Sequence[Step] | Callable[[RecordedRequest], Sequence[Step]]
"""The steps of one request, or a function that decides them when the whole request is there."""


class _RequestReader:
    """Read one request, sans-IO."""

    def __init__(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=1024 * 1024)
        self.request = RecordedRequest()

    def feed(self, data: bytes) -> bytes:
        """Take bytes; returns what lies behind the request. Raises h11.RemoteProtocolError."""
        request = self.request
        request.raw += data
        self._h11.receive_data(data)
        while not request.is_complete:
            event = self._h11.next_event()
            if isinstance(event, h11.Request):
                request.method, request.target = event.method, event.target
                request.headers = Headers(list(event.headers.raw_items()))
                request.head = request.raw[: request.raw.index(b"\r\n\r\n") + 4]
            elif isinstance(event, h11.Data):
                request.body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                request.is_complete = True
            else:
                return b""
        unused = self._h11.trailing_data[0]
        request.raw = request.raw[: len(request.raw) - len(unused)]
        return unused


class _Connection(asyncio.Protocol):
    """Run scripts on one connection, one request after the other."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._transport: Any = None
        self._received: deque[bytes] = deque()
        self._changed = anyio.Event()
        self._gone = anyio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._upstream.connections.add(self)
        self._upstream.connection_count += 1
        self._upstream.tasks.start_soon(self._serve)

    def data_received(self, data: bytes) -> None:
        self._received.append(data)
        self._notify()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - how it went makes no difference
        self._upstream.connections.discard(self)
        self._gone.set()
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    def abort(self) -> None:
        self._transport.abort()

    async def _serve(self) -> None:
        try:
            while await self._has_more():
                await self._serve_one()
        except h11.RemoteProtocolError as error:
            self._upstream.failures.append(f"what the gateway sent is no HTTP request: {error}")
            self.abort()
        except _GoneError:
            self.abort()

    async def _serve_one(self) -> None:
        reader = _RequestReader()
        await self._read_some(reader)
        script = self._upstream.next_script()
        if callable(script) or not any(isinstance(step, Expect) for step in script):
            await self._read_whole(reader)
        steps = script(reader.request) if callable(script) else script
        for step in steps:
            await self._run(step, reader)
        if not self._transport.is_closing():
            await self._read_whole(reader)

    async def _run(self, step: Step, reader: _RequestReader) -> None:
        if isinstance(step, bytes):
            if not self._transport.is_closing():  # uvloop raises where asyncio only warns
                self._transport.write(step)
            await anyio.lowlevel.checkpoint()
        elif isinstance(step, Pause):
            step.reached.set()
            await step.released.wait()
        elif isinstance(step, Stall):
            step.reached.set()
            await self._gone.wait()
            step.gone.set()
        elif isinstance(step, Close):
            self._transport.close()
        elif isinstance(step, Reset):
            reset(self._transport)
        else:
            await self._read_whole(reader)
            if step.part not in reader.request.raw:
                self._upstream.failures.append(f"request {reader.request.target!r} does not hold {step.part!r}")

    async def _has_more(self) -> bool:
        while not self._received:
            if self._gone.is_set():
                return False
            await self._changed.wait()
        return not self._gone.is_set()

    async def _read_some(self, reader: _RequestReader) -> None:
        """Feed what has come. The request counts as received once its head is whole."""
        unused = reader.feed(self._received.popleft())
        if unused:
            self._received.appendleft(unused)
        request = reader.request
        if request.method and request not in self._upstream.requests:
            request.closed = self._gone
            self._upstream.add(request)

    async def _read_whole(self, reader: _RequestReader) -> None:
        while not reader.request.is_complete:
            if not await self._has_more():
                raise _GoneError
            await self._read_some(reader)


class _GoneError(Exception):
    """Say that the gateway closed the connection in the middle of its request."""


class FakeUpstream:
    """Answer the n-th request with the n-th script, whatever connection it comes on.

    Given to a Harness it is reached in memory (on a socket where the harness is on one); entered on its own
    (``async with FakeUpstream([...]) as upstream``) it listens on a loopback socket. Leaving raises
    AssertionError for requests that were no HTTP, had no script left or missed an ``Expect``.
    """

    def __init__(
        self, exchanges: Sequence[Exchange] = (), *, repeat: bool = False, tls: ssl.SSLContext | None = None
    ) -> None:
        """``repeat``: the last script answers every further request."""
        self._exchanges = list(exchanges)
        self._repeat = repeat
        self._tls = tls
        self._next = 0
        self._stack = AsyncExitStack()
        self._arrived = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        self.host: str = f"upstream-{next(_NUMBERS)}.test"
        """The name the gateway finds it by."""
        self.port: int | None = None
        """The loopback port, None in memory."""
        self.is_standalone = False
        self.requests: list[RecordedRequest] = []
        """The requests whose heads have come, in order."""
        self.failures: list[str] = []
        """What went wrong on this side."""
        self.connections: set[_Connection] = set()
        self.connection_count: int = 0
        """Connections ever opened."""

    @property
    def origin(self) -> str:
        """Return scheme and authority; stable from construction on, unless entered on its own."""
        if not self.is_standalone:
            return f"http://{self.host}"
        return f"https://localhost:{self.port}" if self._tls is not None else f"http://127.0.0.1:{self.port}"

    @property
    def base_url(self) -> str:
        """Return the base URL a binding takes: the origin and ``/v1``."""
        return f"{self.origin}/v1"

    @property
    def remaining(self) -> int:
        """Return how many scripts no request has asked for."""
        return max(0, len(self._exchanges) - self._next)

    @property
    def tasks(self) -> anyio.abc.TaskGroup:
        """Return where scripts run."""
        assert self._tasks is not None, "the upstream is not running"
        return self._tasks

    def next_script(self) -> Exchange:
        """Take the script of the next request."""
        number, self._next = self._next, self._next + 1
        if number < len(self._exchanges):
            return self._exchanges[number]
        if self._repeat:
            return self._exchanges[-1]
        self.failures.append(f"request {number + 1} has no script: there are {len(self._exchanges)}")
        return [b"HTTP/1.1 500 No Script Left\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", Close()]

    def add(self, request: RecordedRequest) -> None:
        """Record a request whose head has come."""
        self.requests.append(request)
        arrived, self._arrived = self._arrived, anyio.Event()
        arrived.set()

    async def wait_requests(self, count: int) -> None:
        """Return once ``count`` requests have come. Raises TimeoutError."""
        with anyio.fail_after(PATIENCE_SECONDS):
            while len(self.requests) < count:
                await self._arrived.wait()

    def connect(self, gateway: asyncio.Protocol) -> None:
        """Join one of the gateway's upstream connections to this upstream, in memory."""
        connect(gateway, _Connection(self))

    @asynccontextmanager
    async def running(self, *, socket: bool) -> AsyncIterator[None]:
        """Serve until left; ``socket`` opens a loopback listener."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            listener = None
            if socket:
                loop = asyncio.get_running_loop()
                listener = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, ssl=self._tls)
                self.port = listener.sockets[0].getsockname()[1]
            try:
                yield
            finally:
                if listener is not None:
                    listener.close()
                for connection in list(self.connections):
                    connection.abort()
                tasks.cancel_scope.cancel()

    def check(self) -> None:
        """Raise AssertionError for what went wrong on this side."""
        assert not self.failures, "; ".join(self.failures)

    async def __aenter__(self) -> Self:
        self.is_standalone = True
        await self._stack.enter_async_context(self.running(socket=True))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The test's own exception is not shown to the task group, which would wrap it in a group.
        await self._stack.aclose()
        if error is None:
            self.check()


def http_reply(
    body: bytes = b"{}",
    status: int = 200,
    fields: Sequence[tuple[bytes, bytes]] = ((b"Content-Type", b"application/json"),),
) -> bytes:
    """Return an answer with a Content-Length."""
    head = b"".join([b"%b: %b\r\n" % field for field in fields])
    return b"HTTP/1.1 %d Reply\r\n%bContent-Length: %d\r\n\r\n" % (status, head, len(body)) + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
"""The head of an event stream in chunks."""
LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body."""


def chunk(data: bytes) -> bytes:
    """Return data as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream_reply(*events: bytes) -> list[Step]:
    """Return the steps of a whole event stream: head, a chunk and a segment per event, the last chunk."""
    return [STREAM_HEAD, *[chunk(event) for event in events], LAST_CHUNK]
