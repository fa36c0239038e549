"""Choose the transport of an origin: direct wherever HTTP/1.1 over TCP or TLS is meant, httpcore for all else."""

from __future__ import annotations

from penstock.providers import Transport, UpstreamRequest, UpstreamResponse
from penstock.upstream.direct import DirectTransport
from penstock.upstream.store import Limits


class UpstreamTransports:
    """Send requests through the transport their origin needs; the other is loaded on first use."""

    def __init__(self, limits: Limits, namespace: str = "penstock") -> None:
        self._limits = limits
        self.direct = DirectTransport(limits)
        self._via_httpcore: Transport | None = None
        self.namespace = namespace

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Return the response once its head is there. Raises UpstreamError before that."""
        transport = request.transport
        if transport is not None:
            return await transport.send(request)
        origin = request.origin
        if origin.proxy is None and not origin.http2:
            return await self.direct.send(request)
        if self._via_httpcore is None:
            from penstock.upstream.via_httpcore import HttpcoreTransport  # noqa: PLC0415 - rare, heavy import

            self._via_httpcore = HttpcoreTransport(self._limits)
        return await self._via_httpcore.send(request)

    def sweep(self, now: float) -> None:
        """Enforce deadlines; called a few times a second with the event loop's clock."""
        self.direct.sweep(now)

    async def aclose(self) -> None:
        self.direct.close()
        if self._via_httpcore is not None:
            await self._via_httpcore.aclose()  # type: ignore[attr-defined]
