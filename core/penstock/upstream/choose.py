"""Choose the transport of an origin: direct for HTTP/1.1 over TCP or TLS, httpcore for all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.providers import UpstreamRequest, UpstreamResponse
from penstock.upstream.direct import DirectTransport
from penstock.upstream.store import Limits

if TYPE_CHECKING:
    from penstock.upstream.via_httpcore import HttpcoreTransport


class UpstreamTransports:
    """Send requests through the transport their origin needs; the other is loaded on first use."""

    def __init__(self, limits: Limits, namespace: str = "penstock") -> None:
        self._limits = limits
        self.direct = DirectTransport(limits)
        self._via_httpcore: HttpcoreTransport | None = None
        self.namespace = namespace

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the response once its head is there. Raises UpstreamError before that."""
        transport = request.transport
        if transport is not None:
            return await transport.send(request)
        origin = request.origin
        if origin.proxy is None and not origin.http2:
            return await self.direct.send(request)
        return await self.via_httpcore.send(request)

    @property
    def via_httpcore(self) -> HttpcoreTransport:
        if self._via_httpcore is None:
            from penstock.upstream.via_httpcore import HttpcoreTransport  # noqa: PLC0415 - rare, heavy import

            self._via_httpcore = HttpcoreTransport(self._limits)
        return self._via_httpcore

    def sweep(self, now: float) -> None:
        """Enforce deadlines; called a few times a second with the event loop's clock."""
        self.direct.sweep(now)
        if self._via_httpcore is not None:
            self._via_httpcore.sweep(now)

    async def aclose(self) -> None:
        self.direct.close()
        if self._via_httpcore is not None:
            await self._via_httpcore.aclose()
