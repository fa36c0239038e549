"""Providers for APIs that speak a dialect of the data plane natively, to be used as they are or subclassed.

They forward the client's bytes; all they know is where paths, credentials and usage are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from penstock.dialects import anthropic as anthropic_dialect
from penstock.dialects import openai as openai_dialect
from penstock.endpoints import Endpoint
from penstock.errors import ConfigurationError
from penstock.forwarding import Address, address_of, bearer, forward, header_fields, with_headers
from penstock.inspection import editable_body
from penstock.metering import BodyWindow
from penstock.models import Candidate, Exchange, ProviderBinding, Usage
from penstock.providers import UpstreamRequest

if TYPE_CHECKING:
    from penstock.services import Services

OPENAI_DIALECTS = frozenset(
    f"openai.{name}"
    for name in ("chat", "responses", "completions", "embeddings", "moderations", "images", "audio", "models")
)


_ANTHROPIC_VERSION = b"2023-06-01"


def _field_name(name: str | bytes) -> bytes:
    return (name.encode() if isinstance(name, str) else name).lower()


@attrs.define(eq=False, kw_only=True)
class HTTPProvider:
    """Keep the address of each binding; subclasses say how to build and read."""

    type: str
    """The word bindings use."""
    namespace: str = "penstock"
    """The gateway's, from ``services.namespace``."""
    default_base_url: str | None = None
    """Where a binding without base_url goes; None makes it required."""
    model_prefixes: tuple[str, ...] = ()
    """What the names of its models begin with."""
    key_header: bytes = attrs.field(default=b"authorization", converter=_field_name)
    """The field the credential goes into, as str or bytes."""
    dialects: frozenset[str] = frozenset()
    """Names of dialects it answers."""
    known_settings: tuple[str, ...] = ("key_header",)
    """Names a binding's ``settings`` may hold; a subclass adds its own."""
    _addresses: dict[str, Address] = attrs.Factory(dict)
    """By binding id, so that a subclass may check a changed copy of a binding."""
    _joined: list[Services] = attrs.field(factory=list, init=False, repr=False)
    """The gateway it was registered with last, if any."""

    def join(self, services: Services) -> None:
        """Learn what the gateway says for all its providers; called when the provider is registered."""
        self._joined[:] = [services]

    def check(self, binding: ProviderBinding) -> None:
        """Put the binding's address together. Raises ConfigurationError where that cannot work."""
        unknown = [name for name in binding.settings if name not in self.known_settings]
        if unknown:
            known = ", ".join(self.known_settings) or "none"
            where = f"binding {binding.name!r}: settings.{unknown[0]}"
            raise ConfigurationError(f"{where}: unknown; {self.type} knows {known}")
        header = self.key_header
        if "key_header" in binding.settings:
            name = str(binding.settings["key_header"])
            ((given, _),) = header_fields({name: ""}, where=f"binding {binding.name!r}: settings.key_header")
            header = given.lower()
        credential = bearer(binding, header)
        self._addresses[binding.id] = address_of(binding, self.default_base_url, credential, self.namespace)

    def address(self, binding: ProviderBinding) -> Address:
        """Return where a binding's requests go."""
        address = self._addresses.get(binding.id)
        if address is None:
            self.check(binding)
            address = self._addresses[binding.id]
        return address


@attrs.define(eq=False, kw_only=True)
class OpenAIProvider(HTTPProvider):
    """Speak OpenAI's dialects at a base URL that stands for ``/v1``."""

    dialects: frozenset[str] = OPENAI_DIALECTS

    usage_frame: str | None = None
    """What becomes of the usage frame where neither key nor binding says; None is what the gateway says."""

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        """Forward the body as it is; on chat streams ask for the usage the client did not ask for."""
        request = exchange.request
        path = request.path.removeprefix(b"/v1")
        address = self.address(candidate.binding)
        if request.endpoint.dialect != "openai.chat" or not exchange.peek.stream:
            return forward(exchange, candidate, address, path=path)
        if exchange.peek.include_usage is not None:
            return forward(exchange, candidate, address, path=path)
        body = openai_dialect.ask_for_usage(editable_body(request), exchange.peek)
        if body is None:
            return forward(exchange, candidate, address, path=path)
        response_filter = None if self._forwards_frame(exchange, candidate) else openai_dialect.UsageFrameFilter()
        return forward(exchange, candidate, address, path=path, body=body, response_filter=response_filter)

    def _forwards_frame(self, exchange: Exchange, candidate: Candidate) -> bool:
        principal = exchange.principal
        of_key = principal.usage_frame if principal is not None else None
        return (of_key or candidate.binding.usage_frame or self.usage_frame or self._frame_of_gateway()) == "forward"

    def _frame_of_gateway(self) -> str | None:
        return self._joined[0].usage_frame if self._joined else None

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        """Read what the provider reported."""
        return openai_dialect.read_usage(window, is_stream=exchange.is_stream)


@attrs.define(eq=False, kw_only=True)
class AnthropicProvider(HTTPProvider):
    """Speak Anthropic's dialect at a base URL with or without ``/v1``."""

    dialects: frozenset[str] = frozenset({"anthropic.messages", "openai.models"})
    key_header: bytes = attrs.field(default=b"x-api-key", converter=_field_name)

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        """Forward the body as it is."""
        address = self.address(candidate.binding)
        request = exchange.request
        path = request.path
        if request.endpoint.dialect == "openai.models" and b"anthropic-version" not in request.headers:
            exchange = _with_version(exchange)
        if address.base_path.endswith(b"/v1"):
            path = path.removeprefix(b"/v1")
        return forward(exchange, candidate, address, path=path)

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        """Read what the provider reported."""
        endpoint: Endpoint = exchange.upstream_endpoint or exchange.request.endpoint
        if endpoint.operation != "messages":
            return None
        return anthropic_dialect.read_usage(window, is_stream=exchange.is_stream)


def _with_version(exchange: Exchange) -> Exchange:
    """Ask in Anthropic's way for a listing that was asked for in another."""
    request = exchange.request
    headers = request.headers.with_fields([(b"anthropic-version", _ANTHROPIC_VERSION)])
    return attrs.evolve(exchange, request=attrs.evolve(request, head=with_headers(request.head, headers)))
