"""A pair of asyncio transports joined in memory: sockets without sockets, one segment per write.

Invariants: what one side writes in one call arrives in one ``data_received``; nothing arrives while reading
is paused; everything written before an end of stream arrives before it; ``connection_lost`` comes once.
"""

# ruff: noqa: SLF001 - the two ends are halves of one thing

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable

HIGH_WATER = 64 * 1024
"""Bytes the other side has not read above which a writer is asked to pause, as a socket's buffers would."""
LOW_WATER = 16 * 1024


class MemoryTransport(asyncio.Transport):
    """One end of a pair; ``connect`` makes both."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.Protocol, peername: tuple[str, int]) -> None:
        super().__init__({"peername": peername})
        self._loop = loop
        self._protocol = protocol
        self._peer: MemoryTransport = self
        self._inbox: deque[bytes] = deque()
        self._inbox_bytes = 0
        self._is_reading = True
        self._is_scheduled = self._is_writer_held = False
        self._has_ended = self._is_end_told = False
        self._has_written_eof = self._is_closing = self._is_lost = False

    # --- what a protocol calls ------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if data and not self._is_closing and not self._has_written_eof:
            self._peer._arrive(bytes(data))

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not self._has_written_eof:
            self._has_written_eof = True
            self._peer._end()

    def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        self._inbox.clear()
        self._peer._end()
        if self._peer._inbox_bytes <= HIGH_WATER or self._peer._is_lost:
            self._lose(None)

    def abort(self) -> None:
        self.close()
        self._lose(None)

    def reset(self) -> None:
        """Break the connection off: what the other side has not read is lost to it."""
        self._peer._inbox.clear()
        self._peer._lose(ConnectionResetError("connection reset by peer"))
        self._is_closing = True
        self._lose(None)

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True
        self._schedule()

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def get_write_buffer_size(self) -> int:
        return self._peer._inbox_bytes

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: the limits are this module's."""

    def get_protocol(self) -> asyncio.Protocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    # --- what the other end does ----------------------------------------------------------------------------

    def _arrive(self, data: bytes) -> None:
        if self._is_closing:
            return
        self._inbox.append(data)
        self._inbox_bytes += len(data)
        if self._inbox_bytes > HIGH_WATER and not self._is_writer_held:
            self._is_writer_held = True
            self._peer._protocol.pause_writing()
        self._schedule()

    def _end(self) -> None:
        self._has_ended = True
        self._schedule()

    def _schedule(self) -> None:
        has_work = self._inbox or (self._has_ended and not self._is_end_told)
        if has_work and self._is_reading and not self._is_scheduled and not self._is_closing:
            self._is_scheduled = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._is_scheduled = False
        if self._is_closing or not self._is_reading:
            return
        if self._inbox:
            data = self._inbox.popleft()
            self._inbox_bytes -= len(data)
            self._protocol.data_received(data)
            self._relieve()
        elif self._has_ended and not self._is_end_told:
            self._is_end_told = True
            if not self._protocol.eof_received():
                self.close()
        self._schedule()

    def _relieve(self) -> None:
        """Let the writer at the other end go on, or be done, once its bytes have been read."""
        peer = self._peer
        if self._is_writer_held and self._inbox_bytes <= LOW_WATER:
            self._is_writer_held = False
            if not peer._is_lost:
                peer._protocol.resume_writing()
        if peer._is_closing and self._inbox_bytes <= HIGH_WATER:
            peer._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if not self._is_lost:
            self._is_lost = self._is_closing = True
            self._loop.call_soon(self._protocol.connection_lost, error)
            if self._peer._is_closing:
                self._peer._lose(None)


def connect(
    near: asyncio.Protocol, far: asyncio.Protocol, *, near_address: tuple[str, int] = ("192.0.2.1", 1)
) -> MemoryTransport:
    """Join two protocols on the running loop, calling ``connection_made`` of both; returns the near one.

    ``near_address`` is what the far side sees as its peer (RFC 5737 documentation address).
    """
    loop = asyncio.get_running_loop()
    first = MemoryTransport(loop, near, ("192.0.2.2", 2))
    second = MemoryTransport(loop, far, near_address)
    first._peer, second._peer = second, first
    near.connection_made(first)
    far.connection_made(second)
    return first
