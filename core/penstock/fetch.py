"""A plugin's own small requests to a provider, through the same transports as traffic."""

from __future__ import annotations

import asyncio

import anyio

from penstock.codings import CodingError, decode
from penstock.errors import UpstreamError
from penstock.framing import ChunkedDecoder, FramingError
from penstock.providers import Transport, UpstreamRequest, UpstreamResponse
from penstock.services import FetchedResponse


class _Collector:
    """Gather a body within a bound."""

    def __init__(self, response: UpstreamResponse, max_bytes: int) -> None:
        self._response = response
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def receive(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._max_bytes:
            self.fail(UpstreamError("protocol", f"the answer is larger than {self._max_bytes} bytes"))
            self._response.close()
        else:
            self._parts.append(data)

    def finish(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def body(self) -> bytes:
        head = self._response.head
        body = b"".join(self._parts)
        try:
            if self._response.is_raw and head.chunked:
                body = ChunkedDecoder(allow_extensions=True).feed(body)
            coding = head.headers.get(b"content-encoding")
            return body if coding is None else decode(body, coding, self._max_bytes)
        except (FramingError, CodingError) as error:
            raise UpstreamError("protocol", f"the answer cannot be decoded: {error}") from error


class Fetcher:
    """Implement ``penstock.services.Fetch`` on a transport."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def __call__(self, request: UpstreamRequest, *, timeout: float, max_bytes: int) -> FetchedResponse:
        """Return the whole answer. Raises UpstreamError."""
        response: UpstreamResponse | None = None
        try:
            with anyio.fail_after(timeout):
                response = await self._transport.send(request)
                collector = _Collector(response, max_bytes)
                response.start(collector)
                await collector.ended
                return FetchedResponse(response.head.status, collector.body())
        except TimeoutError:
            raise UpstreamError("timeout", f"no whole answer within {timeout:g} s") from None
        finally:
            if response is not None:
                response.close()
