"""A response body whose chunk hooks await: what is read waits in a bounded queue, and one task takes it through."""

from __future__ import annotations

import asyncio
from collections import deque

import attrs

from penstock.editing import NO_EDITS, Editor, Edits
from penstock.errors import UpstreamError
from penstock.models import Exchange
from penstock.providers import UpstreamResponse
from penstock.relay import QUEUED_BYTES, Client, Relay, is_stream
from penstock.translation import Through, translated_edits
from penstock.whole import WholeRelay


class AwaitingRelay(Relay):
    """Carry a body through hooks that await, one read after the other."""

    __slots__ = ("_queue", "_queued")

    def __init__(self, exchange: Exchange, response: UpstreamResponse, client: Client, edits: Edits) -> None:
        super().__init__(exchange, response, client, edits)
        self._queue: deque[bytes] = deque()
        self._queued = 0

    # --- from the transport ---------------------------------------------------------------------------------------

    def _forward(self, payload: bytes) -> None:
        self._queue.append(payload)
        self._queued += len(payload)
        if self._queued > QUEUED_BYTES:
            self.response.pause()
        self._wake()

    def _conclude(self) -> None:
        self._wake()

    # --- the task -------------------------------------------------------------------------------------------------

    async def wait_end(self) -> None:
        """Run what is queued through the hooks until the body has ended at the client."""
        editor = self._editor
        assert editor is not None
        try:
            while not self.ended:
                if self._queue:
                    await self._pass_one(editor, self._queue.popleft())
                elif self._upstream_error is not None:
                    self._break_off(self._upstream_error)
                elif self._is_finished:
                    self._emit(await editor.finish_async())
                    self._close_edited(editor)
                else:
                    await self._wait(asyncio.get_running_loop())
        except UpstreamError as error:
            self._break_off(error)
        except Exception as error:  # noqa: BLE001 - one fault must end the body, not the connection
            self._block(error)

    async def _pass_one(self, editor: Editor, payload: bytes) -> None:
        self._queued -= len(payload)
        if not self._is_held:
            self.resume()
        self._meter.add(payload)
        self._emit(await editor.feed_async(payload))
        if editor.fault is not None:
            self._break_off(editor.fault)

    # --- a client that is slow ------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Let the upstream go on, unless the hooks are behind."""
        self._is_held = False
        if self._queued <= QUEUED_BYTES // 2:
            self.response.resume()


def open_relay(
    exchange: Exchange, response: UpstreamResponse, client: Client, edits: Edits, through: Through | None = None
) -> Relay:
    """Return the relay that the edits of a response call for; ``through`` translates it."""
    if through is not None or (exchange.response_watchers and response.head.status < 400):
        is_event_stream = is_stream(response.head) and response.head.status < 400  # an error is one body
        if through is not None:
            response.head = through.begin(response.head, is_event_stream=is_event_stream)
            edits = translated_edits(edits, through)
        if not is_event_stream and response.head.has_body:
            return WholeRelay(exchange, response, client, attrs.evolve(edits), through)
    if edits is not NO_EDITS and edits.has_async and response.head.has_body:
        return AwaitingRelay(exchange, response, client, edits)
    return Relay(exchange, response, client, edits)
