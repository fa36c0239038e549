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
    Endpoint,
    Exchange,
    Fallback,
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
from penstock.governance import PolicyDirectory, PriceTable
from penstock_plugins.routing.bindings import ConfiguredBindings, RoutingConfig, faults_of
from penstock_plugins.routing.models import ModelLists
from penstock_plugins.routing.resolve import not_bound, resolve
from penstock_plugins.routing.sight import Lookout
from penstock_plugins.routing.strategies import Order, Strategies
from penstock_plugins.routing.unnamed import check_named, may_go_without_model

_CHAIN: StateKey[Sequence[Candidate]] = StateKey("routing.chain")
_REFUSED: StateKey[tuple[Principal | None, Request, RequestError]] = StateKey("routing.refused")
"""Who asked for what, and why there is no chain for it."""
_MEASURED: StateKey[bool] = StateKey("routing.measured")
"""Set where the policy learns from how long its candidates take."""
_REMEMBERED_ROUTES = 10_000
_REMEMBERED_MODEL = 256
"""Characters at most: a client chooses the name, and must not choose how much is kept."""
_REMEMBERED_RESPONSES = 100_000
_RESPONSE_ID = re.compile(rb'"id"\s*:\s*"(resp_[0-9A-Za-z_-]{1,128})"')
_NOBODY = Principal("vk_anonymous", "anonymous", "anonymous")


@attrs.frozen(eq=False)
class _Route:
    """Hold what is remembered of who serves a model for a key."""

    candidates: Sequence[Candidate]
    order: Order | None
    """What orders them for each exchange; None leaves them as they are."""
    is_measured: bool
    fallback: Fallback | None
    """The key's or its policy's; None is the default."""
    is_plain: bool = attrs.field(init=False)
    """Whether the candidates are all there is to it."""

    @is_plain.default
    def _is_plain(self) -> bool:
        return self.order is None and self.fallback is None


@attrs.define(eq=False)
class Routing:
    """Select the key's bindings one after the other; answer model listings."""

    Config = RoutingConfig

    config: RoutingConfig
    services: Services
    _directory: BindingDirectory = attrs.field(init=False)
    _policies: PolicyDirectory | None = attrs.field(init=False, default=None)
    _lookout: Lookout = attrs.field(init=False)
    _strategies: Strategies = attrs.field(init=False)
    _revision: int = attrs.field(init=False, default=0)
    """Of the directory of bindings, when the routes were remembered."""
    _policies_revision: int = attrs.field(init=False, default=0)
    _lists: ModelLists = attrs.field(init=False)
    _routes: dict[tuple[Principal, str | None, str], _Route] = attrs.field(init=False, factory=dict)
    _responses: OrderedDict[bytes, str] = attrs.field(init=False, factory=OrderedDict)
    """Which binding made a stored response: its id works nowhere else."""

    def __attrs_post_init__(self) -> None:
        self._directory = ConfiguredBindings(self.config)
        if self.config.bindings:
            self.services.provide(BindingDirectory, self._directory)  # type: ignore[type-abstract]
        self._lists = ModelLists(self.services.get(Fetch), self.services.namespace)  # type: ignore[type-abstract]
        self._look_out()

    def _look_out(self) -> None:
        services = self.services
        self._policies = services.find(PolicyDirectory)  # type: ignore[type-abstract]
        self._lookout = Lookout(services, self._directory, self._policies)
        self._strategies = Strategies(services.find(PriceTable), services.clock)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Check every binding against its provider, and what keys name against the bindings, before traffic comes."""
        stored = self.services.find(BindingDirectory)  # type: ignore[type-abstract]
        if stored is None:
            self.services.provide(BindingDirectory, self._directory)  # type: ignore[type-abstract]
        else:
            self._directory = stored
        self._look_out()
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
        is_anthropic = b"anthropic-version" in exchange.request.headers
        listed_for = "anthropic.messages" if is_anthropic else "openai.chat"
        sight = self._lookout.look(principal, endpoint, listed_for)
        return self._lists.answer(exchange, principal, sight, self._lookout.names(principal))

    def _resolve(self, exchange: Exchange) -> None:
        """Set the chain; a refusal waits for select_provider, as another plugin may know whom to ask.

        One of a policy that nobody can read waits for nobody: what it forbids is not known.
        """
        try:
            chain = self._chain(exchange)
        except RequestError as refusal:
            if refusal.code == "policy_rules_invalid":
                raise
            exchange.state[_REFUSED] = exchange.principal, exchange.request, refusal
            return
        exchange.chain = exchange.state[_CHAIN] = chain

    @hookimpl
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        """Return the first binding of the chain that nobody has tried; the only one as often as its retries say."""
        chain = exchange.state.get(_CHAIN)
        if chain is None:
            chain = exchange.state[_CHAIN] = self._chain_after_others(exchange)
        attempts = exchange.attempts
        if not attempts:
            return chain[0] if chain else None
        tried = [attempt.binding_id for attempt in attempts]
        untried = next((candidate for candidate in chain if candidate.binding.id not in tried), None)
        if untried is not None or len(chain) != 1 or not exchange.fallback.same_binding_retries:
            return untried
        is_skipped = any(attempt.is_skipped for attempt in attempts)
        return None if is_skipped or len(tried) > exchange.fallback.same_binding_retries else chain[0]

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
        """Remember which binding made a stored response, and how long candidates took where a policy goes by that."""
        principal = exchange.principal
        if principal is not None and principal.routing_policy_id is not None and _MEASURED in exchange.state:
            self._strategies.latencies.measure(exchange.attempts)
        if exchange.request.endpoint.operation != "responses" or exchange.window is None:
            return
        if exchange.upstream_endpoint is not None:
            return  # it was translated: nobody stored it
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
            if endpoint.family == "gemini" and may_go_without_model(exchange.request.path, principal):
                chosen = self._chain_of_stored(exchange, principal)
                check_named(exchange.request, principal, chosen[0])
                return chosen
            raise RequestError("missing_model", 'The request body names no model; add a "model".', param="model")
        if self._directory.revision != self._revision:
            self._routes.clear()
            self._revision = self._directory.revision
        if principal.routing_policy_id is not None:
            self._see_policies()
        route = self._routes.get((principal, model, endpoint.operation))
        if route is None:
            route = self._add_route(principal, model, endpoint)
        chain = route.candidates if route.is_plain else self._say(exchange, route)
        previous = exchange.peek.previous_response_id
        return chain if previous is None else self._maker_first(chain, previous, endpoint)

    def _see_policies(self) -> None:
        """Forget the routes where a policy has changed since; keys without one need not ask."""
        revision = 0 if self._policies is None else self._policies.revision
        if revision != self._policies_revision:
            self._routes.clear()
            self._policies_revision = revision

    @staticmethod
    def _say(exchange: Exchange, route: _Route) -> Sequence[Candidate]:
        """Give an exchange its fallback, and return the candidates in its order."""
        if route.fallback is not None:
            exchange.fallback = route.fallback
        if route.is_measured:
            exchange.state[_MEASURED] = True
        return route.candidates if route.order is None else route.order()

    def _add_route(self, principal: Principal, model: str, endpoint: Endpoint) -> _Route:
        """Find who serves a model for a key, and remember it until bindings or policies change."""
        route = self._find_route(principal, model, endpoint)
        if len(self._routes) >= _REMEMBERED_ROUTES:
            self._routes.clear()
        if len(model) <= _REMEMBERED_MODEL:
            self._routes[principal, model, endpoint.operation] = route
        return route

    def _find_route(self, principal: Principal, model: str, endpoint: Endpoint) -> _Route:
        sight = self._lookout.look(principal, endpoint)
        names = self._lookout.names(principal)
        chain = tuple(
            resolve(model, principal, sight.aliases, sight.reachable, known_names=names, elsewhere=sight.elsewhere)
        )
        policy = sight.policy
        order = None if policy is None else self._strategies.order_of(policy, chain)
        is_measured = order is not None and policy is not None and policy.strategy == "least_latency"
        return _Route(chain, order, is_measured, sight.fallback)

    def _maker_first(self, chain: Sequence[Candidate], previous: str, endpoint: Endpoint) -> Sequence[Candidate]:
        """Return the chain with the binding in front that made the response a new one builds on.

        Nobody else's stored response can be translated. Raises RequestError ``unsupported_parameter`` where no binding
        speaks the dialect.
        """
        native = [candidate for candidate in chain if endpoint.dialect in candidate.provider.dialects]
        if not native:
            message = "No provider binding that can serve this model keeps responses; send the whole conversation."
            raise RequestError("unsupported_parameter", message, param="previous_response_id")
        maker = self._responses.get(previous.encode())
        return native if maker is None else sorted(native, key=lambda candidate: candidate.binding.id != maker)

    def _chain_of_stored(self, exchange: Exchange, principal: Principal) -> Sequence[Candidate]:
        """Return where a stored response lives; one that is not remembered can only be the primary's.

        Raises RequestError ``not_found`` where that is a binding this key may not use.
        """
        identifier = exchange.request.path.removeprefix(b"/v1/responses/").partition(b"/")[0]
        maker = self._responses.get(identifier)
        sight = self._lookout.look(principal, exchange.request.endpoint)
        if sight.fallback is not None:
            exchange.fallback = sight.fallback
        if maker is None:
            chosen = [found for found in sight.native if not found.is_by_name_only][:1]
        else:
            chosen = [found for found in sight.native if found.binding.id == maker]
        if maker is not None and not chosen:
            raise RequestError("not_found", "There is no stored response of this id for this virtual key.")
        if not chosen:
            raise not_bound(sight.elsewhere)
        return [found.candidate(None, "stored") for found in chosen]
