"""What may change a response body on its way: the request's own filter, then the chunk hooks, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from penstock.errors import RequestError
from penstock.models import Exchange
from penstock.sse import Event, EventSplitter, SSEError, parse_event

if TYPE_CHECKING:
    from penstock.hooks import Call
    from penstock.providers import ResponseFilter


class Chunk:
    """A part of a response body as a chunk hook sees it; on event streams one or more whole events."""

    __slots__ = ("_events", "data", "is_end", "is_event_stream")

    def __init__(self, data: bytes, *, is_event_stream: bool, is_end: bool = False) -> None:
        self.data = data
        self.is_event_stream = is_event_stream
        self.is_end = is_end
        self._events: list[Event] | None = None

    @property
    def events(self) -> list[Event]:
        """Return the complete events of this chunk, parsed on first use; empty where the body is no event stream."""
        if self._events is None:
            self._events = [parse_event(raw) for raw in EventSplitter().feed(self.data)] if self.is_event_stream else []
        return self._events


@attrs.frozen
class Edits:
    """Say who may change a response: the request's own filter and the chunk hooks that asked for this exchange."""

    filter: ResponseFilter | None = None
    calls: tuple[Call, ...] = ()

    @property
    def has_async(self) -> bool:
        return any(call.is_async for call in self.calls)


NO_EDITS = Edits()


class Editor:
    """Take one body's payload through its edits. Raises RequestError or PluginError to stop the body."""

    __slots__ = ("_calls", "_exchange", "_filter", "_is_sse", "splitter")

    def __init__(self, exchange: Exchange, edits: Edits, *, is_sse: bool) -> None:
        self._exchange = exchange
        self._filter = edits.filter
        self._calls = edits.calls
        self._is_sse = is_sse
        self.splitter = EventSplitter() if is_sse and edits.calls else None
        """Cuts an event stream into whole events for the hooks; None where no hook looks."""

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of this payload."""
        payload = self._filtered(payload)
        for call in self._calls if payload else ():
            payload = call.chunk(self._exchange, self._chunk(payload, is_end=False))
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
        for call in self._calls if payload else ():
            payload = await call.chunk_async(self._exchange, self._chunk(payload, is_end=False))
        return payload

    async def finish_async(self) -> bytes:
        """Do what ``finish`` does where a hook awaits."""
        payload = self._rest()
        for call in self._calls:
            payload = await call.chunk_async(self._exchange, self._chunk(payload, is_end=True))
        return payload

    def _chunk(self, payload: bytes, *, is_end: bool) -> Chunk:
        return Chunk(payload, is_event_stream=self._is_sse, is_end=is_end)

    def _filtered(self, payload: bytes) -> bytes:
        if self._filter is not None:
            payload = self._filter.feed(payload)
        if self.splitter is not None:
            try:
                payload = b"".join(self.splitter.feed(payload))
            except SSEError as error:
                raise RequestError("provider_error", f"the provider's event stream cannot be read: {error}") from None
        return payload

    def _rest(self) -> bytes:
        payload = b"" if self._filter is None else self._filter.finish()
        if self.splitter is not None:
            payload = b"".join(self.splitter.feed(payload)) + self.splitter.pending
        return payload
