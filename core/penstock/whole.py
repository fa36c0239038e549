"""A response body that is gathered before any of it is committed: to be translated, or judged as a whole.

The client has seen nothing when the whole body is there, so what turns out unreadable is an attempt that failed, and
what is refused is a refusal like any other.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import attrs

from penstock.editing import Edits
from penstock.errors import UpstreamError
from penstock.models import Exchange
from penstock.probing import Verdict
from penstock.relay import Client, Relay

if TYPE_CHECKING:
    from penstock.providers import UpstreamResponse
    from penstock.translation import Through

MOST_BYTES = 64 * 1024 * 1024
"""What is gathered of a body at most, decoded."""


class WholeRelay(Relay):
    """Hold a body that is no event stream until it is complete."""

    __slots__ = ("_first_read", "_gathered", "_gathered_bytes", "_has_begun", "_through", "edits")

    def __init__(
        self, exchange: Exchange, response: UpstreamResponse, client: Client, edits: Edits, through: Through | None
    ) -> None:
        super().__init__(exchange, response, client, edits)
        self.edits = edits
        """Whoever may change the body before it is committed."""
        self._editor = None
        self._through = through
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._has_begun = False
        self._first_read: asyncio.TimerHandle | None = None

    @property
    def body(self) -> bytes:
        """Return the complete body, in the client's dialect, without content coding."""
        return self._buffer

    def replace(self, body: bytes) -> None:
        """Put another body in its place."""
        self._buffer = body
        self.response.head = attrs.evolve(self.response.head, content_length=len(body))

    def _hold(self, data: bytes) -> None:
        self._has_begun = True
        self._stop_timer()
        if self._upstream_error is not None:
            return
        assert self._payload is not None
        try:
            data = self._payload.feed(data)
        except UpstreamError as error:
            self.fail(error)
            return
        self._meter.add(data)  # now: who leaves before the end is charged for what had come
        self._gathered.append(data)
        self._gathered_bytes += len(data)
        if self._gathered_bytes > MOST_BYTES:
            self.fail(UpstreamError("protocol", f"the provider's answer has over {MOST_BYTES} bytes"))

    def finish(self) -> None:
        if self._upstream_error is not None:
            return
        assert self._payload is not None
        body = b"".join(self._gathered)
        self._gathered.clear()
        try:
            self._payload.finish()
            if self._through is not None:
                body = self._through.feed(body) + self._through.finish()
        except UpstreamError as error:
            self.fail(error)
            return
        except Exception as error:  # noqa: BLE001 - a plugin's fault must not reach the transport's callback
            self.fault = error
            self._decide("failed")
            return
        self.replace(body)
        self._is_finished = True
        self._decide("ready")

    async def wait_verdict(self, timeout: float) -> Verdict:
        """Wait until the body is complete or has failed; ``timeout`` bounds its first read only.

        From then on it is the transport that bounds the time between reads, as on a stream.
        """
        if self.verdict is None:
            loop = asyncio.get_running_loop()
            if not self._has_begun:
                self._first_read = loop.call_later(timeout, self._give_up)
            try:
                await self._wait(loop)
            finally:
                self._stop_timer()
        assert self.verdict is not None
        return self.verdict

    def _stop_timer(self) -> None:
        timer, self._first_read = self._first_read, None
        if timer is not None:
            timer.cancel()

    def _give_up(self) -> None:
        self._upstream_error = UpstreamError("timeout", "the provider's answer had no first byte in time")
        self._decide("failed")

    def abandon(self) -> None:
        """Stop: the client is gone, and was sent nothing unless this was committed."""
        super().abandon()
        if not self._is_flowing:
            self._exchange.bytes_out = 0

    def commit(self) -> None:
        """Give the response to the client."""
        if self._exchange.status == 200:
            self._read_usage_early()
        super().commit()

    def _forward(self, payload: bytes) -> None:
        self._emit(payload)  # metered as it came
