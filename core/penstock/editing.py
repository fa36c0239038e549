"""What may change a response body on its way: the request's own filter, then the chunk hooks, in their order.

An edited body is read first: framing and content codings are undone as the bytes come, so that nobody who was to see
a body is passed by because it was compressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from penstock.codings import CodingError, Decoder
from penstock.errors import UpstreamError
from penstock.framing import ChunkedDecoder, FramingError
from penstock.heads import ResponseHead
from penstock.metering import DECODED_LIMIT
from penstock.models import Exchange
from penstock.sse import Event, EventSplitter, SSEError, parse_event

if TYPE_CHECKING:
    from penstock.hooks import Call
    from penstock.providers import ResponseFilter

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""What is held of an event until it is whole, where a chunk hook looks at events."""


class Chunk:
    """A part of a response body as a chunk hook sees it; on event streams one or more whole events."""

    __slots__ = ("_events", "data", "is_end", "is_event_stream")
    data: bytes
    """The bytes, framing and content coding undone; may be empty at the end."""
    is_event_stream: bool
    """Whether the body is an event stream."""
    is_end: bool
    """Whether this is the last call for this body."""

    def __init__(self, data: bytes, *, is_event_stream: bool, is_end: bool = False) -> None:
        self.data = data
        self.is_event_stream = is_event_stream
        self.is_end = is_end
        self._events: list[Event] | None = None

    @property
    def events(self) -> list[Event]:
        """Return the complete events of this chunk, parsed on first use; empty where the body is no event stream."""
        if self._events is None:
            self._events = [parse_event(raw) for raw in self._split()] if self.is_event_stream else []
        return self._events

    def _split(self) -> list[bytes]:
        splitter = EventSplitter(max_event_bytes=len(self.data) + 1)
        return [*splitter.feed(self.data), *splitter.finish()]


@attrs.frozen
class Edits:
    """Say who may change a response: the request's own filter and the chunk hooks that asked for this exchange."""

    filter: ResponseFilter | None = None
    calls: tuple[Call, ...] = ()
    writes_whole_events: bool = False
    """Whether the filter lets whole events of a stream through only."""

    @property
    def has_async(self) -> bool:
        return any(call.is_async for call in self.calls)


NO_EDITS = Edits()


def coding_of(head: ResponseHead) -> bytes | None:
    """Return the content codings of a body, of all its Content-Encoding lines; None where it has none to undo."""
    headers = head.headers
    if b"content-encoding" not in headers.index:
        return None
    value = b",".join(headers.get_all(b"content-encoding"))
    names = {name.strip(b" \t").lower() for name in value.split(b",")}
    return value if names - {b"", b"identity"} else None


def uncoded(head: ResponseHead) -> ResponseHead:
    """Return the head of a body whose content codings were undone."""
    headers = head.headers.without((b"content-encoding",))
    block = b"".join([b"%b: %b\r\n" % field for field in headers])
    return attrs.evolve(head, headers=headers, fields=block)


class PayloadReader:
    """Undo framing and, where ``coding`` names some, content codings as the bytes come.

    Raises UpstreamError ``protocol`` for what cannot be read; when built, for codings unknown here.
    """

    __slots__ = ("_chunks", "_decoder")

    def __init__(self, *, is_chunked: bool, coding: bytes | None) -> None:
        self._chunks = ChunkedDecoder(allow_extensions=True) if is_chunked else None
        try:
            self._decoder = None if coding is None else Decoder(coding, max_output=DECODED_LIMIT)
        except CodingError as error:
            raise _unreadable(error) from None

    def feed(self, data: bytes) -> bytes:
        """Take a read; returns the payload in it."""
        try:
            if self._chunks is not None:
                data = self._chunks.feed(data)
            return data if self._decoder is None else self._decoder.feed(data)
        except (CodingError, FramingError) as error:
            raise _unreadable(error) from None

    def finish(self) -> None:
        """Take the end of the body."""
        try:
            if self._decoder is not None:
                self._decoder.finish()
        except CodingError as error:
            raise _unreadable(error) from None


def _unreadable(error: CodingError | FramingError) -> UpstreamError:
    return UpstreamError("protocol", f"the provider's body cannot be read: {error}")


class Editor:
    """Take one body's payload through its edits. Raises RequestError or PluginError to stop the body."""

    __slots__ = ("_calls", "_exchange", "_filter", "_is_sse", "fault", "lets_whole_events_through", "splitter")

    def __init__(self, exchange: Exchange, edits: Edits, *, is_sse: bool) -> None:
        self._exchange = exchange
        self._filter = edits.filter
        self._calls = edits.calls
        self._is_sse = is_sse
        self.splitter = EventSplitter(max_event_bytes=MAX_EVENT_BYTES) if is_sse and edits.calls else None
        """Cuts an event stream into whole events for the hooks; None where no hook looks."""
        self.lets_whole_events_through = self.splitter is not None or edits.writes_whole_events
        self.fault: UpstreamError | None = None
        """Why nothing can be read behind what was returned last."""

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of this payload."""
        payload = self._filtered(payload)
        for call in self._calls:
            if not payload:
                break
            payload = call.chunk(self._exchange, self._chunk(payload))
        return payload

    def finish(self) -> bytes:
        """Return what is still held back, once the body has ended."""
        payload = self._rest()
        for call in self._calls:
            payload = call.chunk(self._exchange, self._chunk(payload, is_end=True))
        return payload

    async def feed_async(self, payload: bytes) -> bytes:
        """Do what ``feed`` does where a hook awaits."""
        payload = self._filtered(payload)
        for call in self._calls:
            if not payload:
                break
            payload = await call.chunk_async(self._exchange, self._chunk(payload))
        return payload

    async def finish_async(self) -> bytes:
        """Do what ``finish`` does where a hook awaits."""
        payload = self._rest()
        for call in self._calls:
            payload = await call.chunk_async(self._exchange, self._chunk(payload, is_end=True))
        return payload

    def _chunk(self, payload: bytes, *, is_end: bool = False) -> Chunk:
        return Chunk(payload, is_event_stream=self._is_sse, is_end=is_end)

    def _filtered(self, payload: bytes) -> bytes:
        if self._filter is not None:
            payload = self._filter.feed(payload)
        return payload if self.splitter is None else self._whole_events(self.splitter, payload)

    def _whole_events(self, splitter: EventSplitter, payload: bytes) -> bytes:
        try:
            return b"".join(splitter.feed(payload))
        except SSEError as error:
            self.fault = UpstreamError("protocol", f"its event stream cannot be read: {error}")
            return b"".join(error.events)

    def _rest(self) -> bytes:
        payload = b"" if self._filter is None else self._filter.finish()
        if self.splitter is not None:
            payload = self._whole_events(self.splitter, payload)
            if self.fault is None:
                payload += self.splitter.pending
        return payload
