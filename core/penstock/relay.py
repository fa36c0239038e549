"""An upstream's body on its way to the client, and the rule that decides when there is no way back.

States, each left only forwards:

    probing (buffered, nothing at the client) → flowing (committed) → ended

**Commit rule.** Until ``commit()`` the client has seen nothing and the pipeline may try elsewhere; an event stream is
ready for it only once its first complete event is there and is not an error. After ``commit()`` the response is the
client's: no edit of what was sent, no other provider, and a broken upstream ends in one terminal event.

**Two ways through.** Raw: the wire's own bytes, framing included, callback to callback. Content: framing and, where
somebody may edit, content codings undone, a filter and the chunk hooks applied, framed anew; taken only when somebody
may edit, or the client's HTTP version cannot carry the upstream's framing. Hooks that await: ``awaited``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from penstock.editing import NO_EDITS, Editor, Edits, PayloadReader, coding_of, uncoded
from penstock.envelopes import stream_error_payload
from penstock.errors import RequestError, UpstreamError
from penstock.framing import ChunkedFraming, encode_chunk
from penstock.heads import ResponseHead
from penstock.metering import Meter
from penstock.models import Exchange
from penstock.probing import PROBE_BYTES, Verdict, probe_stream
from penstock.sse import terminal_event

if TYPE_CHECKING:
    from penstock.providers import UpstreamResponse
    from penstock.translation import Through

__all__ = ["PROBE_BYTES", "QUEUED_BYTES", "Client", "Relay", "is_stream"]

QUEUED_BYTES = 64 * 1024
"""What is held before the upstream is made to wait: of an answer not committed yet, or for hooks that await."""
_END_OF_CHUNKS = b"0\r\n\r\n"


def is_stream(head: ResponseHead) -> bool:
    """Tell whether a body is an event stream."""
    content_type = head.headers.get(b"content-type")
    return content_type is not None and content_type[:17].lower() == b"text/event-stream"


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

    def cut(self) -> None:
        """Reset the connection: a clean close would pass for the end of a body that nothing else delimits."""
        ...


class Relay:
    """Carry one response body. A Receiver for the transport; driven by the pipeline."""

    __slots__ = ("_buffer", "_client", "_coding", "_editor", "_exchange", "_frames", "_is_close_delimited",
                 "_is_finished", "_is_flowing", "_is_full", "_is_held", "_meter", "_payload",
                 "_upstream_error", "_waiter", "_write", "ended", "fault", "is_raw", "is_sse", "response",
                 "verdict")  # fmt: skip

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
        self.is_sse = is_stream(head)
        self._coding = coding_of(head)
        """The content codings of what the client gets."""
        self._payload: PayloadReader | None = None
        self._editor: Editor | None = None
        self._buffer = b""
        self._is_flowing = self._is_finished = self._is_full = self._is_held = False
        self._frames = self._is_close_delimited = False
        self._upstream_error: UpstreamError | None = None
        self._waiter: asyncio.Future[None] | None = None
        is_chunked = response.is_raw and head.chunked
        edited = edits is not NO_EDITS and head.has_body
        self.is_raw = (
            response.is_raw
            and not edited
            and ((is_chunked and not client.is_http10) or head.content_length is not None or not head.has_body)
        )
        if not self.is_raw:
            self._read_payload(exchange, edits if edited else NO_EDITS, is_chunked=is_chunked)
        framing = response.framing if is_chunked and self.is_raw else None
        assert framing is None or isinstance(framing, ChunkedFraming)
        self._meter = Meter(framing, self._coding)

    def _read_payload(self, exchange: Exchange, edits: Edits, *, is_chunked: bool) -> None:
        """Take the body apart; one that nobody here can read has failed, where somebody was to read it."""
        coding = None
        if edits is not NO_EDITS:
            self._editor = Editor(exchange, edits, is_sse=self.is_sse)
            coding, self._coding = self._coding, None
            if coding is not None:
                self.response.head = uncoded(self.response.head)
        try:
            self._payload = PayloadReader(is_chunked=is_chunked, coding=coding)
        except UpstreamError as error:
            self._upstream_error = error
            self.verdict = "failed"

    # --- from the transport ---------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        if not self._is_flowing:
            self._hold(data)
        elif self.is_raw:
            self._write(data)
            self._meter.add(data)
            self._exchange.chunks_out += 1
        elif self._upstream_error is None and not self.ended:
            assert self._payload is not None
            try:
                payload = self._payload.feed(data)
            except UpstreamError as error:
                self.fail(error)
                return
            if payload:
                self._forward(payload)

    def finish(self) -> None:
        if self._payload is not None and self._upstream_error is None:
            try:
                self._payload.finish()
            except UpstreamError as error:
                self.fail(error)
                return
        self._is_finished = True
        if self._is_flowing:
            self._conclude()
        else:
            self._decide("no_event" if self.is_sse and self.response.head.has_body else "ready")

    def fail(self, error: Exception) -> None:
        assert isinstance(error, UpstreamError)
        self._upstream_error = error
        self.response.close()
        if self._is_flowing:
            self._conclude()
        else:
            self._decide("failed")

    # --- before the commit ----------------------------------------------------------------------------------------

    def _decide(self, verdict: Verdict) -> None:
        if self.verdict is None or verdict == "failed":
            self.verdict = verdict
            self._wake()

    def _hold(self, data: bytes) -> None:
        """Keep a read until the commit; an upstream whose answer nobody takes yet is made to wait."""
        if self._upstream_error is not None:
            return
        if self._payload is not None:
            try:
                data = self._payload.feed(data)
            except UpstreamError as error:
                self.fail(error)
                return
            if not data:
                return
        self._buffer = self._buffer + data if self._buffer else data
        if self.verdict is None:
            self._probe()
        elif len(self._buffer) > QUEUED_BYTES and not self._is_full:
            self._is_full = True
            self.response.pause()

    def _probe(self) -> None:
        if not self.is_sse:
            self._decide("ready")
            return
        is_chunked = self.is_raw and self.response.head.chunked
        verdict = probe_stream(self._buffer, is_chunked=is_chunked, coding=self._coding)
        if verdict is not None:
            self._decide(verdict)

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

    def look_ahead(self, through: Through) -> None:
        """Have what is held of a stream translated before the commit. Raises UpstreamError for what cannot be read."""
        if self.verdict == "no_event":
            raise UpstreamError("truncated", "the provider's stream ended before its first event")
        if self.verdict == "ready" and self.is_sse and self._buffer:
            through.look_ahead(self._buffer)

    @property
    def error(self) -> UpstreamError | None:
        return self._upstream_error

    # --- the commit and after -------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Give the response to the client: head and buffered body in one write."""
        exchange, client, buffer = self._exchange, self._client, self._buffer
        self._buffer = b""
        if self._is_finished and self.is_raw:
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
                self._forward(buffer)
        if self._is_full and not self._is_held:
            self.resume()
        if (self._upstream_error is not None or self._is_finished) and not self.ended:
            self._conclude()

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
            self._is_close_delimited = True
            self._client.close_after_write()
            return b""
        self._frames = not self.is_raw
        return b"transfer-encoding: chunked\r\n"

    def _forward(self, payload: bytes) -> None:
        """Run one payload through filter and hooks."""
        self._meter.add(payload)
        editor = self._editor
        if editor is None:
            self._emit(payload)
            return
        try:
            self._emit(editor.feed(payload))
        except UpstreamError as error:
            self._break_off(error)
        except Exception as error:  # noqa: BLE001 - a plugin's fault must not reach the transport's callback
            self._block(error)
        else:
            if editor.fault is not None:
                self._break_off(editor.fault)

    def _conclude(self) -> None:
        """End a body whose last byte, or failure, has come."""
        if self._upstream_error is None:
            self._end()
        else:
            self._break_off(self._upstream_error)

    def _emit(self, payload: bytes) -> None:
        if payload and not self.ended:
            self._write(encode_chunk(payload) if self._frames else payload)
            self._exchange.chunks_out += 1

    def _end(self) -> None:
        if self.ended:
            return
        editor = self._editor
        if editor is None:
            self._close("complete")
            return
        try:
            self._emit(editor.finish())
        except UpstreamError as error:
            self._break_off(error)
        except Exception as error:  # noqa: BLE001 - a plugin's fault must not reach the transport's callback
            self._block(error)
        else:
            self._close_edited(editor)

    def _close_edited(self, editor: Editor) -> None:
        if editor.fault is None:
            self._close("complete")
        else:
            self._break_off(editor.fault)

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
        self._stop("upstream_failed", "upstream_mid_stream_failure", "provider_error", message)

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
        self._stop("blocked", code, kind, message)

    def _stop(self, end: Literal["upstream_failed", "blocked"], code: str, kind: str, message: str) -> None:
        """End a body too early, and so that the client can tell."""
        has_told = self.is_sse and self._coding is None
        if has_told:
            self._write_terminal(code, kind, message)
        self.response.close()
        self._close(end)
        if self._is_close_delimited and not has_told:
            self._client.cut()
        else:
            self._client.close_after_write()

    def _write_terminal(self, code: str, kind: str, message: str) -> None:
        """Append one error event on a frame boundary."""
        payload = stream_error_payload(self._exchange.request.endpoint.family, kind, code, message)
        pending = self._meter.window().text[-PROBE_BYTES:]
        if self._editor is not None and self._editor.lets_whole_events_through:
            pending = b""
        event = terminal_event("error", payload, pending=pending)
        if self.is_raw and self.response.head.chunked:
            event = self._meter.follower().continuation(event)
        elif self._frames:
            event = encode_chunk(event)
        self._write(event)

    # --- the end --------------------------------------------------------------------------------------------------

    async def wait_end(self) -> None:
        """Return once the body has ended at the client, cleanly or not."""
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
        self._is_held = False
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
