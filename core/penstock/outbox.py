"""Writes of one turn of the event loop, made together at its end.

Waking a sleeping receiver costs more than the write itself, and a receiver woken by the first of several writes is
still awake for the others. So under load connections leave their writes here and all are made in one go, in the order
they came, on the loop's next turn. With hardly anything under way there is nothing to gather and every microsecond is
somebody's latency: then each write is made at once.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

_COPIED_BYTES = 16 * 1024
_GATHERED_FROM = 2
"""Exchanges under way up to which a write is made at once."""


class Outbox:
    """Gather writes; belongs to one event loop."""

    __slots__ = ("_loop", "_pending", "active")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: list[tuple[asyncio.WriteTransport, Any]] = []
        self.active = 0
        """Exchanges under way, kept by the server."""

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        if not self._pending:
            if self.active <= _GATHERED_FROM:
                _write(self._loop, transport, data)
                return
            self._loop.call_soon(self.flush)
        self._pending.append((transport, data))

    def write_all(self, transport: asyncio.WriteTransport, head: bytes, body: bytes) -> None:
        """Write two pieces; large ones are not copied together."""
        if len(body) <= _COPIED_BYTES:
            self.write(transport, head + body)
        else:
            self.write(transport, head)
            self.write(transport, body)

    def flush(self) -> None:
        """Make every write that waits. Call before closing a transport, so that its last words get out."""
        pending, self._pending = self._pending, []
        for transport, data in pending:
            _write(self._loop, transport, data)


def _write(loop: asyncio.AbstractEventLoop, transport: asyncio.WriteTransport, data: bytes) -> None:
    try:
        if not transport.is_closing():
            transport.write(data)
    except Exception as error:  # noqa: BLE001 - a write that fails must not take those of others with it
        transport.abort()
        loop.call_exception_handler({"message": "a write failed", "exception": error})


def reset(transport: asyncio.WriteTransport) -> None:
    """Close a connection with a TCP reset; what was not sent yet is lost."""
    sock = transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
