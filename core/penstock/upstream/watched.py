"""httpcore's network under watch: HTTP/1.1 through it is judged as strictly as on a direct connection.

h11 takes a bare LF for a line end, reads a second length generously, and keeps bytes that follow a body for
the next response. So the bytes of every HTTP/1.1 exchange pass an ``ExchangeWatch`` on their way to it;
of HTTP/2, ``GracefulGoaway`` holds back the frame that would make httpcore give up healthy streams.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import anyio
import httpcore

from penstock.framing import Framing, FramingError
from penstock.heads import HeadError, ResponseHead, read_response_head
from penstock.upstream.direct import framing_of


class ExchangeWatch:
    """Follow the response bytes of one HTTP/1.1 exchange; sans-IO."""

    __slots__ = ("_buffer", "_framing", "_max_head_bytes", "_method", "has_bytes", "has_surplus", "head")

    def __init__(self, method: bytes, max_head_bytes: int) -> None:
        self._method = method
        self._max_head_bytes = max_head_bytes
        self._buffer = b""
        self._framing: Framing | None = None
        self.head: ResponseHead | None = None
        self.has_bytes = False
        self.has_surplus = False
        """Bytes came behind the body: nobody asked for them, and the connection cannot be used again."""

    def feed(self, data: bytes) -> None:
        """Judge what was read. Raises HeadError, FramingError."""
        self.has_bytes = True
        if self._framing is None:
            data = self._read_heads(self._buffer + data)
        if data and self._framing is not None and self._framing.feed(data) < len(data):
            self.has_surplus = True

    def _read_heads(self, data: bytes) -> bytes:
        """Take interim heads and the final one off `data`; return what follows."""
        while self._framing is None:
            end = data.find(b"\r\n\r\n")
            if max(end, len(data) if end < 0 else 0) > self._max_head_bytes:
                raise HeadError(502, "it is too large")
            if end < 0:
                self._buffer = data
                return b""
            head = read_response_head(data[: end + 4])
            data = data[end + 4 :]
            if head.status >= 200:
                self.head = head
                self._framing = framing_of(head, self._method)
        return data


class GracefulGoaway:
    """Take GOAWAY frames that spare every stream out of HTTP/2's bytes; sans-IO (RFC 9113 section 6.8).

    httpcore fails all streams at any GOAWAY, while the provider goes on to finish those it has accepted.
    """

    __slots__ = ("_passing", "_pending", "last_stream_id", "was_seen")

    def __init__(self) -> None:
        self._pending = b""
        self._passing = 0
        self.last_stream_id = 0
        """The latest stream of ours that the provider may have seen."""
        self.was_seen = False

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that go on to httpcore."""
        data, position = self._pending + data, 0
        kept = []
        while position < len(data):
            if not self._passing:
                frame = data[position : position + 17]
                size = 9 + int.from_bytes(frame[:3], "big")
                is_goaway = frame[3:4] == b"\x07"
                if len(frame) < 9 or (is_goaway and len(data) - position < size):
                    break
                if is_goaway and self._is_graceful(frame):
                    self.was_seen = True
                    position += size
                    continue
                self._passing = size
            piece = data[position : position + self._passing]
            kept.append(piece)
            self._passing -= len(piece)
            position += len(piece)
        self._pending = data[position:]
        return b"".join(kept)

    def _is_graceful(self, frame: bytes) -> bool:
        last_stream_id = int.from_bytes(frame[9:13], "big") & 0x7FFFFFFF
        return frame[13:17] == b"\0\0\0\0" and last_stream_id >= self.last_stream_id


class WatchedStream(httpcore.AsyncNetworkStream):
    """Pass bytes between httpcore and the network."""

    def __init__(self, wire: Wire, stream: httpcore.AsyncNetworkStream) -> None:
        self._wire = wire
        self._stream = stream
        self._writing = anyio.Lock()
        self.watch: ExchangeWatch | None = None
        self.has_ended = False
        """The other side closed or reset the connection."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._read(max_bytes, timeout)
        while data and self._wire.is_http2:
            kept = self._wire.goaway.feed(data)
            if kept:
                return kept
            data = await self._read(max_bytes, timeout)
        if not data:
            self.has_ended = True
        elif self.watch is not None:
            try:
                self.watch.feed(data)
            except (HeadError, FramingError) as error:
                raise httpcore.RemoteProtocolError(error.message) from error
        return data

    async def _read(self, max_bytes: int, timeout: float | None) -> bytes:
        try:
            return await self._stream.read(max_bytes, timeout)
        except httpcore.ReadError:
            self.has_ended = True
            raise

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # A frame of HTTP/2 lost to a cancellation would put header compression out of step for all streams.
        with anyio.CancelScope(shield=self._wire.is_http2):
            async with self._writing:
                await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            stream = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self.aclose()  # httpcore leaves the socket open when the handshake is cancelled
            raise
        self._wire.stream = WatchedStream(self._wire, stream)
        return self._wire.stream

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class Wire(httpcore.AsyncNetworkBackend):
    """Open the network of one connection and know its outermost stream."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()
        self.stream: WatchedStream | None = None
        self.is_http2 = False
        self.goaway = GracefulGoaway()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        stream = await self._network.connect_tcp(host, port, timeout, local_address, socket_options)
        self.stream = WatchedStream(self, stream)
        return self.stream

    @property
    def has_ended(self) -> bool:
        return self.stream is not None and self.stream.has_ended

    @property
    def is_readable(self) -> bool:
        """Something waits to be read: on an idle connection its end, or bytes nobody asked for."""
        return self.stream is None or bool(self.stream.get_extra_info("is_readable"))

    async def aclose(self) -> None:
        if self.stream is not None:
            await self.stream.aclose()
