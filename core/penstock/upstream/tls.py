"""TLS towards providers: one context per trust setting, sessions resumed per origin."""

from __future__ import annotations

import asyncio.sslproto
import ssl
from typing import Any

from penstock.providers import Origin

# asyncio gives every TLS connection a read buffer of 256 KiB; an event stream never fills 32.
asyncio.sslproto.SSLProtocol.max_size = 32 * 1024


class _ResumingContext(ssl.SSLContext):
    """Offer the last session of a host on the next handshake, and learn new ones."""

    _last: dict[str, ssl.SSLObject]

    def wrap_bio(self, incoming: Any, outgoing: Any, server_side: bool = False, **options: Any) -> ssl.SSLObject:  # noqa: FBT001, FBT002
        host = options.get("server_hostname")
        last = self._last.get(host) if host is not None else None
        if last is not None and options.get("session") is None:
            options["session"] = last.session
        connection = super().wrap_bio(incoming, outgoing, server_side, **options)
        if host is not None:
            self._last[host] = connection
        return connection


class TLSContexts:
    """Build client contexts lazily: loading the trust store takes tens of milliseconds."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext | None = None
        self.override: ssl.SSLContext | None = None
        """A context given by an embedding program or a test instead of the system's trust store."""

    def context_for(self, origin: Origin) -> ssl.SSLContext:  # noqa: ARG002 - trust per origin comes with bindings
        if self.override is not None:
            return self.override
        if self._context is None:
            self._context = _new_context()
        return self._context


def _new_context() -> ssl.SSLContext:
    context = _ResumingContext(ssl.PROTOCOL_TLS_CLIENT)
    context._last = {}  # noqa: SLF001 - SSLContext cannot take it in __init__
    context.load_default_certs()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
