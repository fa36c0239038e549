"""Servers that say exactly what a test scripts, on loopback sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import anyio.lowlevel
import attrs
import h2.config
import h2.connection
import h2.events
import h2.settings

HEAD_END = b"\r\n\r\n"


@attrs.frozen
class ReceivedRequest:
    line: bytes
    fields: bytes
    body: bytes


class Peer:
    """One accepted connection."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self.sent_bytes = 0
        self.ending = anyio.Event()
        """Our side has been closed."""
        self.closed = anyio.Event()
        """The other side has been closed too."""

    async def read_head(self) -> tuple[bytes, bytes]:
        """Return request line and header lines."""
        head = await self.reader.readuntil(HEAD_END)
        line, _, fields = head[:-2].partition(b"\r\n")
        return line, fields

    async def read_request(self) -> ReceivedRequest:
        line, fields = await self.read_head()
        length = 0
        for field in fields.split(b"\r\n"):
            name, _, value = field.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return ReceivedRequest(line, fields, await self.reader.readexactly(length))

    async def send(self, *pieces: bytes) -> None:
        """Write each piece by itself; the reader sees them apart or together."""
        for piece in pieces:
            self.writer.write(piece)
            await self.writer.drain()
            self.sent_bytes += len(piece)
            await turns(2)

    async def wait_closed(self) -> None:
        """Wait until the other side has closed, discarding what it sends."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.closed.set()

    def reset(self) -> None:
        """Close with a TCP reset."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class ScriptedServer:
    """Run a script per connection; counts connections and keeps the peers."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.peers: list[Peer] = []
        self.port = 0

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(len(self.peers), reader, writer)
        self.peers.append(peer)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.script(peer)
                writer.close()
                peer.ending.set()
                await writer.wait_closed()
        finally:
            with contextlib.suppress(AttributeError):  # asyncio's TLS before Python 3.11.4, once closed
                writer.transport.abort()
            peer.closed.set()


@contextlib.asynccontextmanager
async def serve(script: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedServer]:
    """Serve a script on a free loopback port."""
    server = ScriptedServer(script)
    async with anyio.create_task_group() as tasks:
        listener = await asyncio.start_server(
            lambda reader, writer: tasks.start_soon(server.run, reader, writer), "127.0.0.1", 0, ssl=tls
        )
        server.port = listener.sockets[0].getsockname()[1]
        try:
            yield server
        finally:
            listener.close()
            tasks.cancel_scope.cancel()
    await turns(20)


async def turns(count: int) -> None:
    """Let the loop go round: loopback sockets deliver within it."""
    for _ in range(count):
        await anyio.lowlevel.checkpoint()


async def settle(measure: Callable[[], int]) -> int:
    """Return a figure once it has stood still for 200 turns of the loop."""
    last, still = measure(), 0
    while still < 200:
        await anyio.lowlevel.checkpoint()
        now = measure()
        still = still + 1 if now == last else 0
        last = now
    return last


# --- proxies ------------------------------------------------------------------------------------------------


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
    except ConnectionError:
        writer.transport.abort()


async def _tunnel(peer: Peer, host: str, port: int) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_pipe, peer.reader, writer)
            tasks.start_soon(_pipe, reader, peer.writer)
    finally:
        writer.transport.abort()


def connect_proxy(heads: list[bytes]) -> Script:
    """Tunnel what is asked for with CONNECT; the heads of requests are kept in `heads`."""

    async def script(peer: Peer) -> None:
        line, fields = await peer.read_head()
        heads.append(line + b"\r\n" + fields)
        host, _, port = line.split(b" ")[1].decode().rpartition(":")
        await peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await _tunnel(peer, host, int(port))

    return script


def socks_proxy(logins: list[tuple[bytes, bytes]]) -> Script:
    """Tunnel what is asked for with SOCKS 5 (RFC 1928, RFC 1929); `logins` keeps names and passwords."""

    async def script(peer: Peer) -> None:
        read = peer.reader.readexactly
        _, count = await read(2)
        methods = await read(count)
        assert methods == b"\x02"
        await peer.send(b"\x05\x02")
        _, size = await read(2)
        user = await read(size)
        (size,) = await read(1)
        logins.append((user, await read(size)))
        await peer.send(b"\x01\x00")
        _, _, _, kind = await read(4)
        if kind == 1:
            host = socket.inet_ntoa(await read(4))
        else:
            (size,) = await read(1)
            host = (await read(size)).decode()
        port = int.from_bytes(await read(2), "big")
        await peer.send(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
        await _tunnel(peer, host, port)

    return script


# --- HTTP/2 -------------------------------------------------------------------------------------------------


class H2Stream:
    """One request on an HTTP/2 connection, and the means to answer it."""

    def __init__(self, peer: H2Peer, stream_id: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.peer = peer
        self.id = stream_id
        self.headers = headers
        self.body = b""
        self.was_reset = anyio.Event()

    async def head(self, status: int, *fields: tuple[bytes, bytes], end: bool = False) -> None:
        self.peer.h2.send_headers(self.id, [(b":status", b"%d" % status), *fields], end_stream=end)
        await self.peer.flush()

    async def data(self, data: bytes, *, end: bool = False) -> None:
        """Send within the peer's flow control."""
        while data:
            window = min(self.peer.h2.local_flow_control_window(self.id), 16384)
            if not window:
                await self.peer.window_grew()
                continue
            self.peer.h2.send_data(self.id, data[:window])
            data = data[window:]
            await self.peer.flush()
        if end:
            self.peer.h2.end_stream(self.id)
            await self.peer.flush()


Respond = Callable[[H2Stream], Awaitable[None]]


class H2Peer:
    """One accepted HTTP/2 connection."""

    def __init__(self, peer: Peer, respond: Respond, max_streams: int | None) -> None:
        self.peer = peer
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False
            )
        )
        codes = h2.settings.SettingCodes
        values = {} if max_streams is None else {codes.MAX_CONCURRENT_STREAMS: max_streams}
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.streams: dict[int, H2Stream] = {}
        self._respond = respond
        self._grown = anyio.Event()

    async def flush(self) -> None:
        self.peer.writer.write(self.h2.data_to_send())
        await self.peer.writer.drain()

    async def window_grew(self) -> None:
        await self._grown.wait()

    async def run(self) -> None:
        self.h2.initiate_connection()
        await self.flush()
        async with anyio.create_task_group() as tasks:
            with contextlib.suppress(ConnectionError):
                while data := await self.peer.reader.read(65536):
                    for event in self.h2.receive_data(data):
                        self._see(event, tasks.start_soon)
                    await self.flush()
            tasks.cancel_scope.cancel()

    def _see(self, event: h2.events.Event, spawn: Callable[..., object]) -> None:
        if isinstance(event, h2.events.RequestReceived):
            self.streams[event.stream_id] = H2Stream(self, event.stream_id, list(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            self.streams[event.stream_id].body += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            spawn(self._respond, self.streams[event.stream_id])
        elif isinstance(event, h2.events.StreamReset):
            self.streams[event.stream_id].was_reset.set()
        elif isinstance(event, h2.events.WindowUpdated):
            grown, self._grown = self._grown, anyio.Event()
            grown.set()


def h2_script(respond: Respond, *, max_streams: int | None = 100) -> Script:
    """Return a script that speaks HTTP/2 and answers every request with `respond`."""

    async def script(peer: Peer) -> None:
        await H2Peer(peer, respond, max_streams).run()
        peer.closed.set()

    return script
