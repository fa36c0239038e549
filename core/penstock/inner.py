"""A plugin's own call of the gateway, as a client would make it: with a virtual key, through every plugin, no socket.

It runs in the same process and configuration as whoever calls, so that listeners, TLS and workers make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Protocol

from penstock.endpoints import find_endpoint
from penstock.errors import UpstreamError
from penstock.headers import Headers
from penstock.heads import RequestHead
from penstock.ids import new_request_id, new_trace
from penstock.models import Exchange, Request, Response, StateKey
from penstock.services import FetchedResponse

if TYPE_CHECKING:
    from penstock.pipeline import Pipeline
    from penstock.relay import Relay

INNER: StateKey[bool] = StateKey("gateway.inner")
"""On an exchange that a plugin asked for: set."""
MOST_BYTES = 4 * 1024 * 1024


class GatewayCall(Protocol):
    """Ask the gateway itself."""

    async def __call__(self, path: bytes, fields: Sequence[tuple[bytes, bytes]], body: bytes) -> FetchedResponse:
        """Return the whole answer of a POST; ``fields`` hold the virtual key. Raises UpstreamError."""
        ...


class _Gathering:
    """Be the client of an inner exchange."""

    is_http10 = True  # bodies come without framing

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.response: Response | None = None
        self.is_cut = False

    def begin(self, exchange: Exchange, relay: Relay, framing: bytes) -> bytes:  # noqa: ARG002
        return b""

    def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size <= MOST_BYTES:
            self.parts.append(data)

    def close_after_write(self) -> None:
        """Nothing to close."""

    def cut(self) -> None:
        self.is_cut = True

    def respond(self, exchange: Exchange, response: Response) -> None:  # noqa: ARG002
        self.response = response


class InnerCalls:
    """Implement GatewayCall on a pipeline that is built later."""

    def __init__(self, namespace: str, find: Callable[[], Pipeline]) -> None:
        self._namespace = namespace
        self._find = find

    async def __call__(self, path: bytes, fields: Sequence[tuple[bytes, bytes]], body: bytes) -> FetchedResponse:
        """Run one exchange."""
        endpoint = find_endpoint(path)
        if endpoint is None:
            raise UpstreamError("protocol", "there is no such endpoint")
        now = time_ns()
        head = _head_of(path, fields)
        exchange = Exchange(
            new_request_id(now),
            Request(head, path, b"", endpoint, body),
            new_trace(None, None),
            self._namespace,
            monotonic_ns(),
            now,
        )
        exchange.state[INNER] = True
        client = _Gathering()
        await self._find().handle(exchange, client)
        if client.response is not None:
            return FetchedResponse(client.response.status, client.response.body)
        if client.is_cut or client.size > MOST_BYTES or exchange.stream_end != "complete":
            raise UpstreamError("truncated", "the gateway's own answer broke off, or is too large")
        return FetchedResponse(exchange.status or 0, b"".join(client.parts))


def _head_of(path: bytes, fields: Sequence[tuple[bytes, bytes]]) -> RequestHead:
    headers = Headers(list(fields))
    block = b"".join([b"%b: %b\r\n" % field for field in fields])
    return RequestHead(b"POST", path, headers, None, False, False, False, False, block)
