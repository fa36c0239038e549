"""ASGI applications under a path prefix, served by the same listener: management API, console, metrics.

The bridge is small on purpose: it buffers nothing, streams both ways and knows HTTP only.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import attrs

from penstock.heads import RequestHead

ASGIApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]


@attrs.frozen
class Mount:
    """Serve an ASGI 3 application under ``prefix`` (``/api``), which becomes its ``root_path``."""

    prefix: str
    app: ASGIApp

    def covers(self, path: bytes) -> bool:
        prefix = self.prefix.encode()
        return path == prefix or path.startswith(prefix + b"/")


class Peer(Protocol):
    """The client connection as the bridge sees it."""

    def write(self, data: bytes) -> None: ...
    async def drained(self) -> None: ...


def http_scope(
    mount: Mount, head: RequestHead, path: bytes, query: bytes, client: tuple[str, int] | None, scheme: str
) -> dict[str, Any]:
    """Return the ASGI HTTP connection scope of a request."""
    from urllib.parse import unquote  # noqa: PLC0415 - only mounted applications need it

    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.0" if head.is_http10 else "1.1",
        "method": head.method.decode(),
        "scheme": scheme,
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": mount.prefix,
        "headers": [(name.lower(), value) for name, value in head.headers],
        "client": client,
        "server": None,
        "extensions": {},
    }


class Bridge:
    """Run one application for one request; ``close`` tells whether the connection must end."""

    def __init__(self, peer: Peer, head: RequestHead, body: bytes, *, close: bool) -> None:
        self._peer = peer
        self._head = head
        self._body: bytes | None = body
        self._start: Any = None
        self.started = False
        self._frames = False
        self.complete = False
        self.close = close

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        """Call the application; an answer it leaves unfinished closes the connection."""
        await app(scope, self._receive, self._send)
        if not self.complete:
            self.close = True

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._write_body(message.get("body", b""), more=bool(message.get("more_body", False)))
            await self._peer.drained()

    def _write_body(self, body: bytes, *, more: bool) -> None:
        data = b""
        if not self.started:
            data = self._response_head(None if more else len(body))
            self.started = True
        if self._head.method != b"HEAD":
            if self._frames:
                data += b"%x\r\n%b\r\n" % (len(body), body) if body else b""
                data += b"" if more else b"0\r\n\r\n"
            else:
                data += body
        if data:
            self._peer.write(data)
        self.complete = not more

    def _response_head(self, length: int | None) -> bytes:
        fields = [(bytes(name), bytes(value)) for name, value in self._start.get("headers", [])]
        names = {name.lower() for name, _ in fields}
        lines = [b"HTTP/1.1 %d \r\n" % self._start["status"]]
        lines += [b"%b: %b\r\n" % field for field in fields if field[0].lower() != b"transfer-encoding"]
        if b"content-length" not in names and self._start["status"] not in (204, 304):
            if length is not None:
                lines.append(b"content-length: %d\r\n" % length)
            elif self._head.is_http10:
                self.close = True
            else:
                self._frames = True
                lines.append(b"transfer-encoding: chunked\r\n")
        if self.close:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)
