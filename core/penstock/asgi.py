"""ASGI applications under a path prefix, served by the same listener: management API, console, metrics.

The bridge is small on purpose: it knows HTTP only, hands the request's body on whole and streams the answer.

Invariant: whatever an application sends, the client sees one well-framed answer, or one that visibly breaks off.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

import anyio
import attrs

from penstock.framing import LAST_CHUNK, encode_chunk
from penstock.heads import RequestHead
from penstock.replies import BODILESS_STATUS, FRAMING_FIELDS, is_safe_field

ASGIApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]
]


@attrs.frozen
class Mount:
    """Serve an ASGI 3 application under ``prefix`` (``/api``), which becomes its ``root_path``."""

    prefix: str
    """Begins with a slash and ends without one."""
    app: ASGIApp
    """The application."""

    def covers(self, path: bytes) -> bool:
        """Say whether a path belongs to the application."""
        prefix = self.prefix.encode()
        return path == prefix or path.startswith(prefix + b"/")


class Peer(Protocol):
    """The client connection as the bridge sees it."""

    def write(self, data: bytes) -> None: ...
    async def drained(self) -> None: ...


def http_scope(  # noqa: PLR0917
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
        self._has_body = head.method != b"HEAD"
        self._frames = False
        self._missing: int | None = None
        """Bytes still to come of the length the application announced."""
        self._ended = anyio.Event()
        self.close = close

    async def run(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        """Call the application; an answer it leaves unfinished closes the connection.

        Raises whatever the application does, and RuntimeError where it breaks the protocol.
        """
        await app(scope, self._receive, self._send)
        if not self.started:
            raise RuntimeError("the application returned without an answer")
        if not self._ended.is_set():
            self.close = True

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is None:
            # A client that goes away cancels the application; here it waits for the end of its own answer.
            await self._ended.wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            if self._start is not None:
                raise RuntimeError("the application started its answer twice")
            self._start = message
        elif message["type"] == "http.response.body":
            if self._start is None or self._ended.is_set():
                raise RuntimeError("the application sent a body before its answer's start or after its end")
            self._write_body(bytes(message.get("body", b"")), more=bool(message.get("more_body", False)))
            await self._peer.drained()

    def _write_body(self, body: bytes, *, more: bool) -> None:
        data = b""
        if not self.started:
            data = self._response_head(None if more else len(body))
            self.started = True
        if self._has_body:
            data += self._framed(body, more=more)
        if data:
            self._peer.write(data)
        if not more:
            self._ended.set()

    def _framed(self, body: bytes, *, more: bool) -> bytes:
        if self._frames:
            return (encode_chunk(body) if body else b"") + (b"" if more else LAST_CHUNK)
        if self._missing is not None:
            # More than announced would be read as the next answer; less leaves the client waiting for it.
            body = body[: self._missing]
            self._missing -= len(body)
            self.close = self.close or (self._missing > 0 and not more)
        return body

    def _response_head(self, length: int | None) -> bytes:
        status = int(self._start["status"])
        fields = [(bytes(name), bytes(value)) for name, value in self._start.get("headers", [])]
        if not 200 <= status <= 599:
            raise ValueError(f"the application answers with status {status}")
        lines = [b"HTTP/1.1 %d \r\n" % status]
        for name, value in fields:
            if not is_safe_field(name, value):
                raise ValueError(f"the application's header field {name!r} is malformed")
            if name.lower() not in FRAMING_FIELDS:
                lines.append(b"%b: %b\r\n" % (name, value))
        if status in BODILESS_STATUS:
            self._has_body = False
        else:
            lines.append(self._framing_field(fields, length))
        if self.close:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _framing_field(self, fields: list[tuple[bytes, bytes]], length: int | None) -> bytes:
        announced = [value for name, value in fields if name.lower() == b"content-length"]
        if announced:
            if len(announced) > 1 or not announced[0].isdigit():
                raise ValueError("the application's content-length is no single number")
            length = int(announced[0])
        elif self._head.method == b"HEAD":
            return b""
        if length is not None:
            self._missing = length
            return b"content-length: %d\r\n" % length
        if self._head.is_http10:
            self.close = True
            return b""
        self._frames = True
        return b"transfer-encoding: chunked\r\n"
