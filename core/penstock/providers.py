"""What a provider adapter is, and what core gives and takes on its behalf.

A provider is code for one API family. It is pure: it turns an exchange and a candidate into bytes and reads usage out
of bytes; sockets belong to upstream transports.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import attrs

from penstock.errors import ConfigurationError
from penstock.heads import ResponseHead
from penstock.models import Candidate, Exchange, ProviderBinding, Timeouts, Usage

if TYPE_CHECKING:
    from penstock.framing import Framing
    from penstock.metering import BodyWindow
    from penstock.translation import Through


@attrs.frozen(cache_hash=True)
class Origin:
    """Name where connections go: the key of the store of idle connections."""

    scheme: str
    """``http`` or ``https``."""
    host: str
    """Host name or address, IPv6 without brackets."""
    port: int
    """TCP port."""
    proxy: str | None = None
    """URL of a proxy."""
    http2: bool = False
    """Whether to speak HTTP/2."""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"


@attrs.frozen(eq=False)
class UpstreamRequest:
    """Hold a request ready for an upstream transport.

    ``fields`` is the finished header block: lines ending in CRLF without the blank line, Host and the credential
    included, Content-Length and Transfer-Encoding left to the transport.
    """

    origin: Origin
    """Where to connect."""
    method: bytes
    """Such as ``b"POST"``."""
    path: bytes
    """Origin-form request target, query included."""
    fields: bytes = attrs.field(repr=False)
    """The finished header block, see above."""
    body: bytes = attrs.field(repr=False)
    """The whole body, without framing."""
    timeouts: Timeouts = Timeouts()
    """Bounds of the attempt."""
    response_filter: ResponseFilter | None = None
    """What undoes on the response an edit of this request."""
    translation: Through | None = None
    """What turns the response into the client's dialect, where that is another; the gateway's own."""
    transport: Transport | None = None
    """The provider's own transport; None lets the gateway choose by origin."""


class ResponseFilter(Protocol):
    """Undo on the response what an edit of the request added to it (``wire``: the usage frame). Sync and sans-IO."""

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of these de-framed body bytes."""
        ...

    def finish(self) -> bytes:
        """Return what is still held back at the end of the body."""
        ...


class Receiver(Protocol):
    """Take a response body from a transport, callback by callback, on the event loop's thread."""

    def receive(self, data: bytes) -> None:
        """Take the next bytes."""
        ...

    def finish(self) -> None:
        """Take the end of the body."""
        ...

    def fail(self, error: Exception) -> None:
        """Take the news that the body broke off."""
        ...


@runtime_checkable
class UpstreamResponse(Protocol):
    """A response whose head has arrived and whose body waits to be started."""

    head: ResponseHead
    """Status and header fields, as the provider sent them."""
    is_raw: bool
    """True: the receiver gets the wire's bytes, chunk framing included; False: the payload."""

    @property
    def framing(self) -> Framing | None:
        """Return what follows the framing of a raw body: with ``is_raw`` and a chunked head a ``ChunkedFraming``.

        It has seen each byte before ``receive`` gets it, so that whoever reads along need not parse chunks again, and
        knows how to go on where a body was cut. None where the receiver gets the payload.
        """
        ...

    def start(self, receiver: Receiver) -> None:
        """Begin delivery; bytes that came with the head are delivered before this returns."""
        ...

    def pause(self) -> None:
        """Deliver nothing until ``resume``."""
        ...

    def resume(self) -> None:
        """Deliver again."""
        ...

    def close(self) -> None:
        """Abandon the response; a connection that is not at the end of a body is closed, never reused."""
        ...


class Transport(Protocol):
    """Send a request and return the response once its head is there. Raises UpstreamError before that."""

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        """Send the request. Raises UpstreamError."""
        ...


class Provider(Protocol):
    """Speak one or more dialects to one API family.

    ``type`` is the word used in bindings and in ``type/model``; ``model_prefixes`` let routing guess the vendor from
    a bare model name.
    """

    type: str
    """The word bindings use."""
    dialects: frozenset[str]
    """Names of dialects it answers, such as ``openai.chat``."""
    model_prefixes: tuple[str, ...]
    """What the names of its models begin with."""
    default_base_url: str | None
    """Where a binding without base_url goes; None makes it required."""

    def check(self, binding: ProviderBinding) -> None:
        """Raise ConfigurationError where the binding's settings cannot work. Called once, when the binding is made."""
        ...

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        """Turn the client's request into the upstream's. Pure; raises RequestError."""
        ...

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        """Read token counts out of what the meter kept of the body; None when it holds none."""
        ...


_MEMBERS = ("type", "dialects", "model_prefixes", "default_base_url")
_METHODS = ("check", "build", "read_usage")


def missing_members(provider: object) -> list[str]:
    """Return the names of what a provider must have and this object lacks."""
    missing = [name for name in _MEMBERS if not hasattr(provider, name)]
    return missing + [name for name in _METHODS if not callable(getattr(provider, name, None))]


class ProviderRegistry:
    """Find providers by type name."""

    def __init__(self, providers: Iterable[Provider] = ()) -> None:
        self._by_type: dict[str, Provider] = {}
        for provider in providers:
            self.add(provider)

    def add(self, provider: Provider) -> None:
        if provider.type in self._by_type:
            raise ConfigurationError(f"provider type {provider.type!r} is registered by two plugins; enable only one")
        self._by_type[provider.type] = provider

    def get(self, type_name: str) -> Provider | None:
        return self._by_type.get(type_name)

    def __iter__(self) -> Iterator[Provider]:
        return iter(self._by_type.values())

    @property
    def types(self) -> Mapping[str, Provider]:
        return self._by_type
