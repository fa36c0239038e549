"""The routing plugin: hooks around ``resolve`` and ``models``."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager

import attrs

from penstock import (
    BindingDirectory,
    Candidate,
    ConfigurationError,
    Exchange,
    Fetch,
    Principal,
    RequestError,
    Response,
    Services,
    StateKey,
    hookimpl,
)
from penstock_plugins.routing.bindings import ConfiguredBindings, RoutingConfig
from penstock_plugins.routing.models import ModelLists
from penstock_plugins.routing.resolve import Reachable, resolve

_CHAIN: StateKey[Sequence[Candidate]] = StateKey("routing.chain")
_REMEMBERED_CHAINS = 10_000
_REMEMBERED_MODEL = 256
"""Characters at most: a client chooses the name, and must not choose how much is kept."""
_REMEMBERED_RESPONSES = 100_000
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[0-9A-Za-z_-]{1,128})"')
_NOBODY = Principal("vk_anonymous", "anonymous", "anonymous")


@attrs.define(eq=False)
class Routing:
    """Select the key's bindings one after the other; answer model listings."""

    Config = RoutingConfig

    config: RoutingConfig
    services: Services
    _directory: BindingDirectory = attrs.field(init=False)
    _lists: ModelLists = attrs.field(init=False)
    _chains: dict[tuple[Principal, str | None, str], Sequence[Candidate]] = attrs.field(init=False, factory=dict)
    _responses: OrderedDict[bytes, str] = attrs.field(init=False, factory=OrderedDict)
    """Which binding made a stored response: its id works nowhere else."""

    def __attrs_post_init__(self) -> None:
        self._directory = ConfiguredBindings(self.config)
        self.services.provide(BindingDirectory, self._directory)  # type: ignore[type-abstract]
        self._lists = ModelLists(self.services.get(Fetch), self.services.namespace)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Check every binding against its provider before traffic comes."""
        for binding in self._directory.all_bindings():
            provider = self.services.provider_of(binding)
            try:
                provider.check(binding)
            except ConfigurationError:
                raise
            except Exception as error:
                raise ConfigurationError(
                    f"binding {binding.name!r}: its provider type {binding.type!r} failed to check it: {error!r}"
                ) from error
        yield

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[Response] | None:
        """Answer model listings; everything else passes."""
        if exchange.request.endpoint.has_model or exchange.request.endpoint.operation not in ("models", "model"):
            return None
        principal = exchange.principal or _NOBODY
        return self._lists.answer(exchange, principal, self._reachable(principal, "openai.models"), self._names())

    @hookimpl
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        """Return the next binding of the chain that has not been tried."""
        tried = len(exchange.attempts)
        if tried:
            chain = exchange.state[_CHAIN]
        else:
            chain = exchange.state[_CHAIN] = self._chain(exchange)
        return chain[tried] if tried < len(chain) else None

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Remember which binding made a stored response."""
        if exchange.request.endpoint.operation != "responses" or exchange.window is None:
            return
        found = _RESPONSE_ID.search(exchange.window.head)
        if found is None or exchange.candidate is None:
            return
        self._responses[found[1]] = exchange.candidate.binding.name
        if len(self._responses) > _REMEMBERED_RESPONSES:
            self._responses.popitem(last=False)

    def _chain(self, exchange: Exchange) -> Sequence[Candidate]:
        principal = exchange.principal or _NOBODY
        endpoint = exchange.request.endpoint
        if not endpoint.has_model:
            return self._chain_of_stored(exchange, principal)
        model = exchange.peek.model
        if not model:
            raise RequestError("missing_model", 'The request body names no model; add a "model".', param="model")
        key = (principal, model, endpoint.dialect)
        chain = self._chains.get(key)
        if chain is None:
            reachable = self._reachable(principal, endpoint.dialect)
            chain = tuple(resolve(model, principal, reachable, self._names()))
            if len(self._chains) >= _REMEMBERED_CHAINS:
                self._chains.clear()
            if len(model) <= _REMEMBERED_MODEL:
                self._chains[key] = chain
        return chain

    def _chain_of_stored(self, exchange: Exchange, principal: Principal) -> Sequence[Candidate]:
        """Return where a stored response lives; one that is not remembered can only be the primary's.

        Raises RequestError ``not_found`` where that is a binding this key may not use.
        """
        identifier = exchange.request.path.removeprefix(b"/v1/responses/").partition(b"/")[0]
        maker = self._responses.get(identifier)
        reachable = self._reachable(principal, exchange.request.endpoint.dialect)
        chosen = reachable[:1] if maker is None else [found for found in reachable if found.binding.name == maker]
        if maker is not None and not chosen:
            raise RequestError("not_found", "There is no stored response of this id for this virtual key.")
        if not chosen:
            raise RequestError("provider_not_bound", "This virtual key has no provider binding for this endpoint.")
        return [found.candidate(None, "stored") for found in chosen]

    def _names(self) -> frozenset[str]:
        """Return every type and handle there is, reachable or not."""
        handles = [binding.handle for binding in self._directory.all_bindings() if binding.handle]
        return frozenset([*self.services.providers.types, *handles])

    def _reachable(self, principal: Principal, dialect: str) -> list[Reachable]:
        """Return the bindings a key may use whose provider speaks the dialect."""
        if principal.bindings:
            found = [self._directory.find_binding(name) for name in principal.bindings]
        else:
            found = list(self._directory.all_bindings())
        reachable = []
        for binding in found:
            if binding is not None:
                provider = self.services.provider_of(binding)
                if dialect in provider.dialects:
                    reachable.append(Reachable(binding, provider))
        return reachable
