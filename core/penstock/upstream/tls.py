"""TLS towards providers: one context per trust setting, sessions resumed per origin."""

from __future__ import annotations

import asyncio.sslproto
import contextlib
import ssl
from collections import deque
from collections.abc import Iterable
from typing import Self

from penstock.providers import Origin

# asyncio gives every TLS connection a read buffer of 256 KiB; an event stream never fills 32.
asyncio.sslproto.SSLProtocol.max_size = 32 * 1024


class _ResumingContext(ssl.SSLContext):
    """Offer the last session of a host on the next handshake, and learn new ones."""

    _recent: dict[str, deque[ssl.SSLObject]]

    def __new__(cls, protocol: int) -> Self:
        context = super().__new__(cls, protocol)
        context._recent = {}
        return context

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        host = server_hostname if isinstance(server_hostname, str) else None
        if host is None:
            return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)
        recent = self._recent.setdefault(host, deque(maxlen=2))
        connection = super().wrap_bio(
            incoming, outgoing, server_side, host, _session_of(recent) if session is None else session
        )
        recent.append(connection)
        return connection


def _session_of(connections: Iterable[ssl.SSLObject]) -> ssl.SSLSession | None:
    # Asked for only when it is needed: TLS 1.3 sends tickets after the handshake.
    session = None
    for connection in connections:
        with contextlib.suppress(ValueError):  # raised in the middle of a handshake
            session = connection.session or session
    return session


class TLSContexts:
    """Build client contexts lazily: loading the trust store takes tens of milliseconds."""

    def __init__(self, *, resumes: bool = True) -> None:
        self._resumes = resumes
        self._context: ssl.SSLContext | None = None
        self.override: ssl.SSLContext | None = None
        """A context given by an embedding program or a test instead of the system's trust store."""

    def context_for(self, origin: Origin) -> ssl.SSLContext:  # noqa: ARG002 - trust per origin comes with bindings
        if self.override is not None:
            return self.override
        if self._context is None:
            self._context = _new_context(resumes=self._resumes)
        return self._context

    def forget(self) -> None:
        """Read the trust store anew for the next connection."""
        self._context = None


def _new_context(*, resumes: bool) -> ssl.SSLContext:
    # anyio wraps with a plain SSLContext only on the loop's thread; any other goes through a worker thread.
    context = (_ResumingContext if resumes else ssl.SSLContext)(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
