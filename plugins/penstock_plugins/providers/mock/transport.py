"""The mock's own transport: no socket, the same callbacks and the same wire bytes as from a provider.

Invariants: nothing is delivered while paused, nothing at all after ``close``; a stream is made while
it is sent, so a slow client costs no memory; what the head promises is what is framed, cuts aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import attrs

from penstock import Endpoint, Receiver, ResponseHead, UpstreamError, UpstreamRequest
from penstock.framing import LAST_CHUNK, ChunkedFraming, Framing, LengthFraming, encode_chunk
from penstock_plugins.providers.mock.answers import answer
from penstock_plugins.providers.mock.behaviour import Behaviour, WordError, read_model
from penstock_plugins.providers.mock.calls import Call, read_call
from penstock_plugins.providers.mock.memory import Memory
from penstock_plugins.providers.mock.replies import (
    RefusedError,
    Reply,
    encode,
    error_document,
    error_event,
    identifier,
    seed_of,
    stream_reply,
)

_BURST_BYTES = 16 * 1024
"""Delivered in one turn of the event loop at most."""


@attrs.frozen(eq=False)
class MockTransport:
    """Answer one request; ``model`` is the name it is asked for, words included."""

    endpoint: Endpoint
    model: str | None
    binding: Behaviour
    memory: Memory

    async def send(self, request: UpstreamRequest) -> MockResponse:
        """Return the response once its delay is over. Raises UpstreamError for a reset and a late one."""
        behaviour, reply = self._reply(request)
        timeout = request.timeouts.first_byte
        if behaviour.delay > timeout:
            await asyncio.sleep(timeout)
            raise UpstreamError("timeout", "the mock's delay is longer than the time it was given")
        if behaviour.delay:
            await asyncio.sleep(behaviour.delay)
        if behaviour.fault == "reset":
            raise UpstreamError("reset", "the mock closed the connection, as it was asked to")
        head = reply.head(_request_id(request).encode(), self.endpoint.family)
        return MockResponse(head, _cut(reply, behaviour), behaviour.pace, request.timeouts.idle)

    def _reply(self, request: UpstreamRequest) -> tuple[Behaviour, Reply]:
        behaviour = self.binding
        try:
            name, behaviour = read_model(self.model or "mock", self.binding)
            call = attrs.evolve(read_call(request, self.endpoint, self.memory), model=name, behaviour=behaviour)
            return behaviour, self._faulty(call, _request_id(request)) or answer(call)
        except WordError as error:
            refused = RefusedError(400, str(error), param="model", code="unknown_mock_word")
            return Behaviour(), self._error(refused, _request_id(request))
        except RefusedError as error:
            return behaviour, self._error(error, _request_id(request))

    def _faulty(self, call: Call, request_id: str) -> Reply | None:
        """Return the error a fault word asks for."""
        behaviour = call.behaviour
        if behaviour.fault == "error-first":
            message = "The mock reports an error first, as it was asked to."
            if call.is_stream or call.query.get("alt") == "sse":
                return stream_reply(iter([error_event(self.endpoint.dialect, message)]))
            return self._error(RefusedError(503, message, code="server_error"), request_id)
        if behaviour.fault != "status":
            return None
        message = f"The mock answers with status {behaviour.status}, as it was asked to."
        reply = self._error(RefusedError(behaviour.status, message, code="mock_fault"), request_id)
        if behaviour.retry_after is not None:
            reply = attrs.evolve(reply, fields=(*reply.fields, (b"retry-after", b"%d" % behaviour.retry_after)))
        return reply

    def _error(self, error: RefusedError, request_id: str) -> Reply:
        document = error_document(self.endpoint.family, error, request_id)
        return Reply(encode(document), status=error.status)


def _request_id(request: UpstreamRequest) -> str:
    return identifier(seed_of(request.path, request.body), "req_")


@attrs.frozen(eq=False)
class _Wire:
    """Hold the wire bytes of a body, piece by piece, and whether they break off."""

    pieces: Iterator[bytes]
    breaks_off: bool
    length: int | None


def _cut(reply: Reply, behaviour: Behaviour) -> _Wire:
    is_cut = behaviour.fault == "cut" and reply.status == 200
    if reply.events is None:
        body = reply.body[: len(reply.body) // 2] if is_cut else reply.body
        return _Wire(iter([body] if body else []), is_cut, len(reply.body))
    return _Wire(_chunks(reply.events, behaviour.after if is_cut else None), is_cut, None)


def _chunks(events: Iterator[bytes], after: int | None) -> Iterator[bytes]:
    """Yield events as chunks; without a cut the closing chunk is a piece of its own."""
    for number, event in enumerate(events):
        if number == after:
            return
        yield encode_chunk(event)
    if after is None:
        yield LAST_CHUNK


class MockResponse:
    """Deliver a body at its pace on the event loop that started it."""

    __slots__ = (
        "_idle",
        "_loop",
        "_next",
        "_pace",
        "_paused",
        "_receiver",
        "_timer",
        "_wire",
        "framing",
        "head",
    )
    is_raw = True

    def __init__(self, head: ResponseHead, wire: _Wire, pace: float, idle: float) -> None:
        self.head = head
        self.framing: Framing = (
            ChunkedFraming(allow_extensions=True) if wire.length is None else LengthFraming(wire.length)
        )
        self._wire = wire
        self._pace = pace
        self._idle = idle
        self._next: bytes | None = next(wire.pieces, None)
        self._receiver: Receiver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None
        self._paused = False

    def start(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._deliver()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            if self._loop is not None and self._receiver is not None and self._timer is None:
                self._timer = self._loop.call_soon(self._deliver)

    def close(self) -> None:
        self._receiver = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _deliver(self) -> None:
        self._timer = None
        sent = 0
        while self._receiver is not None and not self._paused:
            piece = self._next
            if piece is None:
                self._end()
                return
            self._next = following = next(self._wire.pieces, None)
            self.framing.feed(piece)
            self._receiver.receive(piece)
            sent += len(piece)
            if self._pace and following is not None and following is not LAST_CHUNK:
                self._wait()
                return
            if sent >= _BURST_BYTES or (following is None and self._wire.breaks_off):
                self._schedule(0.0)  # what was sent may be committed before it breaks off
                return

    def _end(self) -> None:
        receiver = self._receiver
        assert receiver is not None
        self.close()
        if self._wire.breaks_off:
            receiver.fail(
                UpstreamError("truncated", "the mock broke off in the middle of the body, as it was asked to")
            )
        else:
            receiver.finish()

    def _wait(self) -> None:
        """Wait for the next event; one that takes too long is given up as a connection would be."""
        if self._pace <= self._idle:
            self._schedule(self._pace)
        elif self._loop is not None and self._receiver is not None:
            self._timer = self._loop.call_later(self._idle, self._expire)

    def _schedule(self, seconds: float) -> None:
        if self._loop is not None and self._receiver is not None:
            self._timer = self._loop.call_later(seconds, self._deliver)

    def _expire(self) -> None:
        receiver = self._receiver
        self.close()
        if receiver is not None:
            receiver.fail(UpstreamError("timeout", "the mock sent nothing for too long"))
