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
    KeyDirectory,
    Principal,
    Request,
    RequestError,
    Response,
    Services,
    StateKey,
    hookimpl,
)
from penstock_plugins.routing.bindings import ConfiguredBindings, RoutingConfig, faults_of
from penstock_plugins.routing.models import ModelLists
from penstock_plugins.routing.resolve import Reachable, not_bound, resolve

_CHAIN: StateKey[Sequence[Candidate]] = StateKey("routing.chain")
_REFUSED: StateKey[tuple[Principal | None, Request, RequestError]] = StateKey("routing.refused")
"""Who asked for what, and why there is no chain for it."""
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
    _revision: int = attrs.field(init=False, default=0)
    """Of the directory, when the chains were remembered."""
    _lists: ModelLists = attrs.field(init=False)
    _chains: dict[tuple[Principal, str | None, str], Sequence[Candidate]] = attrs.field(init=False, factory=dict)
    _responses: OrderedDict[bytes, str] = attrs.field(init=False, factory=OrderedDict)
    """Which binding made a stored response: its id works nowhere else."""

    def __attrs_post_init__(self) -> None:
        self._directory = ConfiguredBindings(self.config)
        if self.config.bindings:
            self.services.provide(BindingDirectory, self._directory)  # type: ignore[type-abstract]
        self._lists = ModelLists(self.services.get(Fetch), self.services.namespace)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Check every binding against its provider, and what keys name against the bindings, before traffic comes."""
        stored = self.services.find(BindingDirectory)  # type: ignore[type-abstract]
        if stored is None:
            self.services.provide(BindingDirectory, self._directory)  # type: ignore[type-abstract]
        else:
            self._directory = stored
        keys = self.services.find(KeyDirectory)  # type: ignore[type-abstract]
        faults = faults_of(list(self._directory.all_bindings()), () if keys is None else keys.all_principals())
        if faults:
            raise ConfigurationError(*faults)
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
        """Resolve the model, for the plugins after this one; answer model listings."""
        endpoint = exchange.request.endpoint
        if endpoint.has_model:
            self._resolve(exchange)
            return None
        if endpoint.operation not in ("models", "model"):
            return None
        principal = exchange.principal or _NOBODY
        return self._lists.answer(
            exchange, principal, self._reachable(principal, "openai.models"), self._names(principal)
        )

    def _resolve(self, exchange: Exchange) -> None:
        """Set the chain; a refusal waits for select_provider, as another plugin may know whom to ask."""
        try:
            chain = self._chain(exchange)
        except RequestError as refusal:
            exchange.state[_REFUSED] = exchange.principal, exchange.request, refusal
            return
        exchange.chain = exchange.state[_CHAIN] = chain

    @hookimpl
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        """Return the first binding of the chain that nobody has tried."""
        chain = exchange.state.get(_CHAIN)
        if chain is None:
            chain = exchange.state[_CHAIN] = self._chain_after_others(exchange)
        attempts = exchange.attempts
        if not attempts:
            return chain[0] if chain else None
        tried = [attempt.binding_id for attempt in attempts]
        return next((candidate for candidate in chain if candidate.binding.id not in tried), None)

    def _chain_after_others(self, exchange: Exchange) -> Sequence[Candidate]:
        principal, request, refusal = exchange.state.get(_REFUSED) or (None, None, None)
        try:
            if refusal is not None and principal is exchange.principal and request is exchange.request:
                raise refusal
            return self._chain(exchange)
        except RequestError:
            if not exchange.attempts:
                raise
            return ()  # what a binding chosen by another plugin answered is better than a refusal

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Remember which binding made a stored response."""
        if exchange.request.endpoint.operation != "responses" or exchange.window is None:
            return
        found = _RESPONSE_ID.search(exchange.window.head)
        if found is None or exchange.candidate is None:
            return
        self._responses[found[1]] = exchange.candidate.binding.id
        if len(self._responses) > _REMEMBERED_RESPONSES:
            self._responses.popitem(last=False)

    def _chain(self, exchange: Exchange) -> Sequence[Candidate]:
        principal = exchange.principal or _NOBODY
        endpoint = exchange.request.endpoint
        if not endpoint.has_model:
            return self._chain_of_stored(exchange, principal)
        model = exchange.peek.model
        if not model:
            if endpoint.family == "gemini" and _may_go_without_model(exchange.request.path, principal):
                return self._chain_of_stored(exchange, principal)
            raise RequestError("missing_model", 'The request body names no model; add a "model".', param="model")
        if self._directory.revision != self._revision:
            self._chains.clear()
            self._revision = self._directory.revision
        key = (principal, model, endpoint.dialect)
        chain = self._chains.get(key)
        if chain is None:
            reachable = self._reachable(principal, endpoint.dialect)
            elsewhere = self._elsewhere(principal, endpoint.dialect)
            chain = tuple(resolve(model, principal, reachable, self._names(principal), elsewhere))
            if len(self._chains) >= _REMEMBERED_CHAINS:
                self._chains.clear()
            if len(model) <= _REMEMBERED_MODEL:
                self._chains[key] = chain
        previous = exchange.peek.previous_response_id
        return chain if previous is None else self._maker_first(chain, previous)

    def _maker_first(self, chain: Sequence[Candidate], previous: str) -> Sequence[Candidate]:
        """Return the chain with the binding in front that made the response a new one builds on."""
        maker = self._responses.get(previous.encode())
        if maker is None:
            return chain
        return sorted(chain, key=lambda candidate: candidate.binding.id != maker)

    def _chain_of_stored(self, exchange: Exchange, principal: Principal) -> Sequence[Candidate]:
        """Return where a stored response lives; one that is not remembered can only be the primary's.

        Raises RequestError ``not_found`` where that is a binding this key may not use.
        """
        identifier = exchange.request.path.removeprefix(b"/v1/responses/").partition(b"/")[0]
        maker = self._responses.get(identifier)
        dialect = exchange.request.endpoint.dialect
        reachable = self._reachable(principal, dialect)
        chosen = reachable[:1] if maker is None else [found for found in reachable if found.binding.id == maker]
        if maker is not None and not chosen:
            raise RequestError("not_found", "There is no stored response of this id for this virtual key.")
        if not chosen:
            raise not_bound(self._elsewhere(principal, dialect))
        return [found.candidate(None, "stored") for found in chosen]

    def _names(self, principal: Principal) -> frozenset[str]:
        """Return every type, and every handle of the key's organization, reachable or not."""
        homes = (None, principal.organization_id)
        bindings = [binding for binding in self._directory.all_bindings() if binding.organization_id in homes]
        handles = [binding.handle for binding in bindings if binding.handle]
        return frozenset([*self.services.providers.types, *handles])

    def _reachable(self, principal: Principal, dialect: str) -> list[Reachable]:
        """Return the bindings a key may use whose provider speaks the dialect."""
        return [found for found in self._bound(principal) if dialect in found.provider.dialects]

    def _elsewhere(self, principal: Principal, dialect: str) -> frozenset[str]:
        """Return the types and handles of a key's bindings whose provider does not speak the dialect."""
        bindings = [found.binding for found in self._bound(principal) if dialect not in found.provider.dialects]
        return frozenset(name for binding in bindings for name in (binding.type, binding.handle) if name)

    def _bound(self, principal: Principal) -> list[Reachable]:
        return [
            Reachable(binding, self.services.provider_of(binding)) for binding in self._directory.bindings_of(principal)
        ]


def _may_go_without_model(path: bytes, principal: Principal) -> bool:
    """Say whether a Gemini path that names no model may go to the first binding: listings, files, cached contents.

    A key that may call some models only gets no path that calls a method or hides something in an escape.
    """
    return principal.models_allowed is None or (b":" not in path and b"%" not in path)
