"""An upstream's body on its way to the client, and the rule that decides when there is no way back.

States, each left only forwards:

    probing (buffered, nothing at the client) → flowing (committed) → ended

**Commit rule.** Until ``commit()`` the client has seen nothing and the pipeline may try elsewhere; an event stream is
ready for it only once its first complete event is there and is not an error. After ``commit()`` the response is the
client's: no edit of what was sent, no other provider, and a broken upstream ends in one terminal event.

**Two ways through.** Raw: the wire's own bytes, framing included, callback to callback. Content: framing undone, a
filter and the chunk hooks applied, framed anew; taken only when somebody may edit, or the client's HTTP version cannot
carry the upstream's framing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from penstock.codings import CodingError, decode_prefix
from penstock.editing import NO_EDITS, Editor, Edits
from penstock.envelopes import stream_error_payload
from penstock.errors import RequestError, UpstreamError
from penstock.framing import ChunkedDecoder, ChunkedFraming, FramingError, encode_chunk
from penstock.metering import Meter
from penstock.models import Exchange
from penstock.sse import Event, first_event, is_error_event, terminal_event

if TYPE_CHECKING:
    from penstock.providers import UpstreamResponse

PROBE_BYTES = 64 * 1024
"""An event stream without a complete event in its first 64 KiB is committed as it is."""
_FIRST_LOOK = 2048
QUEUED_BYTES = 64 * 1024
_END_OF_CHUNKS = b"0\r\n\r\n"

Verdict = Literal["ready", "error_event", "failed"]


class Client(Protocol):
    """The client's side of an exchange, as far as a relay needs it."""

    is_http10: bool

    def begin(self, exchange: Exchange, relay: Relay, framing: bytes) -> bytes:
        """Return the response head to write first, and remember whom to pause when the client is slow."""
        ...

    def write(self, data: bytes) -> None: ...

    def close_after_write(self) -> None:
        """Close the connection once what was written is out, without a clean end of the body."""
        ...


class Relay:
    """Carry one response body. A Receiver for the transport; driven by the pipeline."""

    __slots__ = (
        "_buffer",
        "_chunks",
        "_client",
        "_editor",
        "_exchange",
        "_frames",
        "_is_async",
        "_is_finished",
        "_is_flowing",
        "_is_held",
        "_meter",
        "_queue",
        "_queued",
        "_upstream_error",
        "_waiter",
        "_write",
        "ended",
        "fault",
        "is_raw",
        "is_sse",
        "response",
        "verdict",
    )

    def __init__(self, exchange: Exchange, response: UpstreamResponse, client: Client, edits: Edits) -> None:
        head = response.head
        self.response = response
        self.verdict: Verdict | None = None
        self.ended = False
        self.fault: Exception | None = None
        """What a plugin raised while it saw or edited this body."""
        self._exchange = exchange
        self._client = client
        self._write: Callable[[bytes], None] = client.write
        content_type = head.headers.get(b"content-type")
        self.is_sse = content_type is not None and content_type.startswith(b"text/event-stream")
        is_chunked = response.is_raw and head.chunked
        edited = edits is not NO_EDITS and head.headers.get(b"content-encoding") is None
        self.is_raw = (
            response.is_raw
            and not edited
            and ((is_chunked and not client.is_http10) or head.content_length is not None or not head.has_body)
        )
        self._is_async = edited and edits.has_async
        self._chunks = ChunkedDecoder(allow_extensions=True) if is_chunked and not self.is_raw else None
        self._frames = False
        framing = response.framing if is_chunked and self.is_raw else None  # type: ignore[attr-defined]
        assert framing is None or isinstance(framing, ChunkedFraming)
        self._meter = Meter(framing, head.headers.get(b"content-encoding"))
        self._editor = Editor(exchange, edits, is_sse=self.is_sse) if edited else None
        self._buffer = b""
        self._is_flowing = self._is_finished = self._is_held = False
        self._upstream_error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._queue: deque[bytes] = deque()
        self._queued = 0

    # --- from the transport ---------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        if not self._is_flowing:
            self._buffer = self._buffer + data if self._buffer else data
            if self.verdict is None:
                self._probe()
        elif self.is_raw:
            self._write(data)
            self._meter.add(data)
            self._exchange.chunks_out += 1
        elif self._is_async:
            self._enqueue(data)
        else:
            self._forward(data)

    def finish(self) -> None:
        self._is_finished = True
        if not self._is_flowing:
            self._decide("ready")
        elif self._is_async:
            self._wake()
        else:
            self._end()

    def fail(self, error: Exception) -> None:
        assert isinstance(error, UpstreamError)
        self._upstream_error = error
        if not self._is_flowing:
            self._decide("failed")
        elif self._is_async:
            self._wake()
        else:
            self._break_off(error)

    # --- before the commit ----------------------------------------------------------------------------------------

    def _decide(self, verdict: Verdict) -> None:
        if self.verdict is None or verdict == "failed":
            self.verdict = verdict
            self._wake()

    def _probe(self) -> None:
        if not self.is_sse or len(self._buffer) > PROBE_BYTES:
            self._decide("ready")
            return
        event = self._first_event(self._buffer[:_FIRST_LOOK])
        if event is None and len(self._buffer) > _FIRST_LOOK:
            event = self._first_event(self._buffer)
        if event is not None:
            self._decide("error_event" if is_error_event(event) else "ready")

    def _first_event(self, wire: bytes) -> Event | None:
        head = self.response.head
        try:
            text = ChunkedDecoder(allow_extensions=True).feed(wire) if self._is_chunked else wire
            coding = head.headers.get(b"content-encoding")
            if coding is not None:
                text = decode_prefix(text, coding, PROBE_BYTES)
        except (FramingError, CodingError):
            return None
        found = first_event(text)
        return None if found is None else found[0]

    @property
    def _is_chunked(self) -> bool:
        return self.response.is_raw and self.response.head.chunked

    async def wait_verdict(self, timeout: float) -> Verdict:
        """Wait until the response may be committed or has failed; no verdict in time is ``failed``."""
        if self.verdict is None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(timeout, self._give_up)
            try:
                await self._wait(loop)
            finally:
                timer.cancel()
        assert self.verdict is not None
        return self.verdict

    def _give_up(self) -> None:
        self._upstream_error = UpstreamError("timeout", "the provider's stream had no first event in time")
        self._decide("failed")

    @property
    def error(self) -> UpstreamError | None:
        return self._upstream_error

    # --- the commit and after -------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Give the response to the client: head and buffered body in one write."""
        exchange, client, buffer = self._exchange, self._client, self._buffer
        self._buffer = b""
        if self._is_finished and self._editor is None and self.is_raw:
            self._commit_whole(buffer)
            return
        head = client.begin(exchange, self, self._framing_field())
        self._is_flowing = True
        if self.is_raw:
            self._write(head + buffer)
            if buffer:
                self._meter.add(buffer)
                exchange.chunks_out += 1
        else:
            self._write(head)
            if buffer:
                self.receive(buffer)
        if self._upstream_error is not None and not self.ended:
            self.fail(self._upstream_error)
        elif self._is_finished and not self.ended:
            self.finish()

    def _commit_whole(self, buffer: bytes) -> None:
        """Take the short way of a body that was complete before the commit."""
        self._is_flowing = True
        if buffer:
            self._meter.add(buffer)
            self._exchange.chunks_out += 1
        if self._exchange.status == 200:
            self._read_usage_early()
        head = self._client.begin(self._exchange, self, self._framing_field())
        self._write(head + buffer)
        self._end()

    def _read_usage_early(self) -> None:
        exchange, candidate = self._exchange, self._exchange.candidate
        if candidate is not None and not self.is_sse:
            exchange.window = self._meter.window()
            with contextlib.suppress(Exception):  # tried again, and reported, at settlement
                exchange.usage = candidate.provider.read_usage(exchange, exchange.window)

    def _framing_field(self) -> bytes:
        head = self.response.head
        if head.status == 204:
            return b""  # RFC 9110 section 8.6 allows no length
        if head.content_length is not None and (self.is_raw or self._editor is None):
            return b"content-length: %d\r\n" % head.content_length
        if not head.has_body:
            return b"" if head.status == 304 else b"content-length: 0\r\n"
        if self._client.is_http10:
            self._client.close_after_write()
            return b""
        self._frames = not self.is_raw
        return b"transfer-encoding: chunked\r\n"

    def _forward(self, data: bytes) -> None:
        """Run one read through filter and synchronous hooks."""
        try:
            payload = data if self._chunks is None else self._chunks.feed(data)
            self._meter.add(payload)
            if payload:
                self._emit(payload if self._editor is None else self._editor.feed(payload))
        except FramingError as error:
            self._break_off(UpstreamError("protocol", str(error)))
        except Exception as error:  # noqa: BLE001 - a plugin's fault must not reach the transport's callback
            self._block(error)

    def _emit(self, payload: bytes) -> None:
        if payload and not self.ended:
            self._write(encode_chunk(payload) if self._frames else payload)
            self._exchange.chunks_out += 1

    def _end(self) -> None:
        if self.ended:
            return
        if self._editor is not None:
            try:
                self._emit(self._editor.finish())
            except Exception as error:  # noqa: BLE001 - a plugin's fault must not reach the transport's callback
                self._block(error)
                return
        self._close("complete")

    def _close(self, end: Literal["complete", "client_gone", "upstream_failed", "blocked"]) -> None:
        if self._frames and end == "complete":
            self._write(_END_OF_CHUNKS)
        exchange = self._exchange
        exchange.stream_end = end
        exchange.bytes_out = self._meter.total_bytes
        self.ended = True
        self._wake()

    def _break_off(self, error: UpstreamError) -> None:
        if self.ended:
            return
        message = f"The provider failed in the middle of its answer: {error.message}."
        self._write_terminal("upstream_mid_stream_failure", "provider_error", message)
        self._client.close_after_write()
        self._close("upstream_failed")

    def _block(self, error: Exception) -> None:
        if isinstance(error, RequestError):
            self._exchange.error = error
            code, message = error.code, error.message
            code = "stream_chunk_blocked" if code == "guardrail_blocked" else code
        else:
            code, message = "plugin_error", "A gateway plugin failed while reading this stream."
            self.fault = error
            self._exchange.error = RequestError("plugin_error", str(error))
        kind = "guardrail_blocked" if code == "stream_chunk_blocked" else code
        self._write_terminal(code, kind, message)
        self.response.close()
        self._client.close_after_write()
        self._close("blocked")

    def _write_terminal(self, code: str, kind: str, message: str) -> None:
        """Append one error event on a frame boundary, where the body is an event stream that can take it."""
        if not self.is_sse or self.response.head.headers.get(b"content-encoding") is not None:
            return
        payload = stream_error_payload(self._exchange.request.endpoint.family, kind, code, message)
        pending = self._meter.window().text[-PROBE_BYTES:]
        if self._editor is not None and self._editor.splitter is not None:
            pending = b""  # hooks let whole events through only
        event = terminal_event("error", payload, pending=pending)
        if self.is_raw and self._is_chunked:
            event = self._meter.follower().continuation(event)
        elif self._frames:
            event = encode_chunk(event)
        self._write(event)

    # --- asynchronous hooks ---------------------------------------------------------------------------------------

    def _enqueue(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued += len(data)
        if self._queued > QUEUED_BYTES:
            self.response.pause()
        self._wake()

    async def pump(self) -> None:
        """Run queued reads through hooks that await, one after the other, until the body has ended."""
        editor = self._editor
        assert editor is not None
        try:
            while not self.ended:
                if self._queue:
                    await self._pump_one(editor, self._queue.popleft())
                elif self._upstream_error is not None:
                    self._break_off(self._upstream_error)
                elif self._is_finished:
                    self._emit(await editor.finish_async())
                    self._close("complete")
                else:
                    await self._wait(asyncio.get_running_loop())
        except FramingError as error:
            self._break_off(UpstreamError("protocol", str(error)))
        except Exception as error:  # noqa: BLE001 - one fault must end the body, not the connection
            self._block(error)

    async def _pump_one(self, editor: Editor, data: bytes) -> None:
        self._queued -= len(data)
        if not self._is_held:
            self.resume()
        payload = data if self._chunks is None else self._chunks.feed(data)
        self._meter.add(payload)
        if payload:
            self._emit(await editor.feed_async(payload))

    # --- the end --------------------------------------------------------------------------------------------------

    async def wait_end(self) -> None:
        """Return once the body has ended at the client, cleanly or not."""
        if self._is_async:
            await self.pump()
        while not self.ended:
            await self._wait(asyncio.get_running_loop())

    def abandon(self) -> None:
        """Stop: the client is gone. What was used is settled from what the meter has."""
        self._exchange.bytes_out = self._meter.total_bytes
        self.ended = True
        self.response.close()
        self._wake()

    def pause(self) -> None:
        """Let the upstream wait: the client is slow."""
        self._is_held = True
        self.response.pause()

    def resume(self) -> None:
        """Let the upstream go on, unless hooks that await are behind."""
        self._is_held = False
        if self._queued <= QUEUED_BYTES // 2:
            self.response.resume()

    def mute(self, on_write: Callable[[bytes], None]) -> None:
        """Send what still comes to ``on_write`` instead of the client (the drain of an abandoned stream)."""
        self._write = on_write

    @property
    def meter(self) -> Meter:
        return self._meter

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
