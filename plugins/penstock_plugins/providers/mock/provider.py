"""The provider adapter: the same building of requests as for real providers, another transport."""

from __future__ import annotations

from urllib.parse import quote

import attrs

from penstock import (
    BodyWindow,
    Candidate,
    ConfigurationError,
    Exchange,
    OpenAIProvider,
    ProviderBinding,
    UpstreamRequest,
    Usage,
    forward,
)
from penstock.dialects import anthropic as anthropic_dialect
from penstock.dialects import openai as openai_dialect
from penstock_plugins.providers.mock.behaviour import KNOWN_SETTINGS, Behaviour, WordError, read_settings
from penstock_plugins.providers.mock.gemini import read_usage as read_gemini_usage
from penstock_plugins.providers.mock.memory import Memory
from penstock_plugins.providers.mock.transport import MockTransport

DIALECTS = frozenset(
    {
        *(f"openai.{name}" for name in ("chat", "responses", "completions", "embeddings", "moderations", "images")),
        "openai.audio",
        "openai.models",
        "anthropic.messages",
        "gemini.generate",
    }
)


@attrs.frozen(eq=False)
class Account:
    """Keep what belongs to one binding."""

    behaviour: Behaviour
    memory: Memory


@attrs.define(eq=False, kw_only=True)
class MockProvider(OpenAIProvider):
    """Answer in this process; the client's bytes are forwarded to it as they would be to a provider."""

    dialects: frozenset[str] = DIALECTS
    default_base_url: str | None = "http://mock.invalid/v1"
    known_settings: tuple[str, ...] = KNOWN_SETTINGS
    _accounts: dict[ProviderBinding, Account] = attrs.Factory(dict)

    def check(self, binding: ProviderBinding) -> None:
        """Read the binding's settings. Raises ConfigurationError for words the mock does not know."""
        try:
            behaviour = read_settings(binding.settings)
        except WordError as error:
            raise ConfigurationError(f"binding {binding.name!r}: {error}") from None
        self._accounts[binding] = Account(behaviour, Memory())
        super().check(binding)

    def account(self, binding: ProviderBinding) -> Account:
        if binding not in self._accounts:
            self.check(binding)
        return self._accounts[binding]

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        """Forward the request as it would go to a provider of its dialect, to the mock's transport."""
        account = self.account(candidate.binding)
        endpoint = exchange.request.endpoint
        if endpoint.dialect == "gemini.generate":
            request = self._build_gemini(exchange, candidate)
        elif endpoint.dialect == "openai.chat":
            request = super().build(exchange, candidate)
        else:
            path = exchange.request.path.removeprefix(b"/v1")
            request = forward(exchange, candidate, self.address(candidate.binding), path=path)
        transport = MockTransport(endpoint, candidate.model, account.behaviour, account.memory)
        return attrs.evolve(request, transport=transport)

    def _build_gemini(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        """Put the candidate's model into the path; ``/v1`` of the base and ``beta/…`` make ``/v1beta/…``."""
        path = exchange.request.path
        head, models, rest = path.partition(b"/models/")
        if candidate.model is not None and models and b":" in rest:
            path = b"%b/models/%b:%b" % (
                head,
                quote(candidate.model, safe="/;=").encode(),
                rest.rpartition(b":")[2],
            )
        nameless = attrs.evolve(candidate, model=None)
        return forward(exchange, nameless, self.address(candidate.binding), path=path.removeprefix(b"/v1"))

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        """Read the counts as for a provider of the dialect."""
        endpoint = exchange.request.endpoint
        if endpoint.dialect == "gemini.generate":
            return read_gemini_usage(window)
        if endpoint.dialect == "anthropic.messages":
            is_counted = endpoint.operation == "messages"
            return anthropic_dialect.read_usage(window, is_stream=exchange.is_stream) if is_counted else None
        return openai_dialect.read_usage(window, is_stream=exchange.is_stream)
