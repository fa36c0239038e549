"""The policy rules plugin: what keys and routing policies say of the contents and models of requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
import attrs
import msgspec

from penstock import (
    Candidate,
    ConfigurationError,
    Exchange,
    KeyDirectory,
    PolicyRules,
    Principal,
    Request,
    RequestError,
    Services,
    editable_body,
    hookimpl,
)
from penstock.governance import ObjectStore, PolicyDirectory
from penstock.peek import is_multipart
from penstock_plugins.policy_rules.judging import NamedModel, ViolationError, judge_body, judge_model, violation
from penstock_plugins.policy_rules.patterns import PatternError, Refusal, RuleSet, compile_rules, unusable
from penstock_plugins.policy_rules.trail import Trail, entry_of

_NONE = PolicyRules()
_LARGE = 32 * 1024
"""Bytes beyond which a body is judged beside the event loop."""
_MANY_QUOTES = 1_000
"""Beyond which it is, however short its strings are."""


class _Named(msgspec.Struct):
    model: str | None = None


_decode_named = msgspec.json.Decoder(_Named).decode


@attrs.define(eq=False)
class Policies:
    """Refuse requests that hold what the rules of the key, or of its routing policy, do not admit."""

    enforces = ("policy_rules",)

    reads_body = True

    services: Services
    _directory: PolicyDirectory | None = attrs.field(init=False, default=None, repr=False)
    _trail: Trail | None = attrs.field(init=False, default=None, repr=False)
    _revision: int = attrs.field(init=False, default=-1)
    """Of the directory, when what keys come under was found out."""
    _by_key: WeakKeyDictionary[Principal, Sequence[RuleSet]] = attrs.field(
        init=False, factory=WeakKeyDictionary, repr=False
    )
    """What a key comes under; a key that changes is another principal."""

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Find where policies are kept and violations are entered; compile what the configuration file's keys say."""
        self._directory = self.services.find(PolicyDirectory)  # type: ignore[type-abstract]
        keys = self.services.find(KeyDirectory)  # type: ignore[type-abstract]
        for principal in () if keys is None else keys.all_principals():
            if principal.policy_rules != _NONE:
                try:
                    compile_rules(principal.policy_rules, principal.virtual_key_id, "virtual key")
                except PatternError as error:
                    raise ConfigurationError(f"virtual key {principal.key_name!r}: {error}") from None
        store = self.services.find(ObjectStore)  # type: ignore[type-abstract]
        async with AsyncExitStack() as stack:
            if store is not None and not self.services.is_rehearsal:
                self._trail = Trail(store)
                await stack.enter_async_context(self._trail.running())
            yield

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[None] | None:
        """Refuse a body that holds what is not admitted, and keep the request from models that are not."""
        rule_sets = self._rules_of(exchange.principal)
        if not rule_sets:
            return None
        readers = [rule_set for rule_set in rule_sets if rule_set.reads_body]
        body = _body_to_judge(exchange.request) if readers else b""
        if len(body) > _LARGE or body.count(b'"') > _MANY_QUOTES:
            return self._judge_aside(exchange, body, rule_sets, readers)
        if body:
            judge_body(body, readers)
        self._judge_models(exchange, rule_sets)
        return None

    async def _judge_aside(
        self, exchange: Exchange, body: bytes, rule_sets: Sequence[RuleSet], readers: Sequence[RuleSet]
    ) -> None:
        """Judge a large body in a thread, so that nobody waits for it but who sent it."""
        await anyio.to_thread.run_sync(judge_body, body, readers)
        self._judge_models(exchange, rule_sets)

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> RequestError | None:
        """Have a candidate skipped whose model is not admitted, whoever selected it."""
        rule_sets = self._rules_of(exchange.principal)
        if not rule_sets or exchange.candidate is None:
            return None
        return _refusal_of(exchange, exchange.candidate, rule_sets)

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Enter a violation into the audit."""
        error = exchange.error
        if error is None or self._trail is None or not isinstance(error, ViolationError):
            return
        entry = entry_of(exchange, error, self.services.clock())
        if entry is not None:
            self._trail.note(entry)

    # --- whose rules --------------------------------------------------------------------------------------------------

    def _rules_of(self, principal: Principal | None) -> Sequence[RuleSet]:
        """Return what a key comes under. Raises RequestError ``policy_rules_invalid``."""
        if principal is None or (principal.routing_policy_id is None and principal.policy_rules == _NONE):
            return ()
        directory = self._directory
        if directory is not None and directory.revision != self._revision:
            self._by_key.clear()
            self._revision = directory.revision
        found = self._by_key.get(principal)
        if found is None:
            try:
                found = self._by_key[principal] = self._compile(principal, directory)
            except PatternError as error:
                raise unusable(str(error)) from None
        return found

    def _compile(self, principal: Principal, directory: PolicyDirectory | None) -> Sequence[RuleSet]:
        sets = [compile_rules(principal.policy_rules, principal.virtual_key_id, "virtual key")]
        policy_id = principal.routing_policy_id
        if policy_id is not None and directory is not None:
            policy = directory.routing_policy(policy_id)
            if policy is None:
                raise unusable(f"its routing policy {policy_id} is archived or not there")
            sets.append(compile_rules(policy.policy_rules, policy_id, "routing policy"))
        return tuple(rule_set for rule_set in sets if rule_set is not None)

    # --- models -------------------------------------------------------------------------------------------------------

    def _judge_models(self, exchange: Exchange, rule_sets: Sequence[RuleSet]) -> None:
        """Exclude each candidate whose model is refused. Raises the first refusal where no candidate is left."""
        if all(rule_set.models is None for rule_set in rule_sets):
            return
        refusals = [
            (candidate, refusal)
            for candidate in exchange.chain
            if (refusal := _refusal_of(exchange, candidate, rule_sets)) is not None
        ]
        if refusals and len(refusals) == len(exchange.chain):
            raise refusals[0][1]
        for candidate, refusal in refusals:
            exchange.exclude(candidate.binding.id, refusal)


def _refusal_of(exchange: Exchange, candidate: Candidate, rule_sets: Sequence[RuleSet]) -> ViolationError | None:
    model = candidate.model
    refusals = []
    for rule_set in rule_sets:
        if rule_set.models is None:
            continue
        if model is not None:
            names = [model]
            if exchange.request.endpoint.family == "gemini" and ":" in model:
                names.append(model.partition(":")[0])  # a colon that was escaped in the path
            refusals += [judge_model(NamedModel.of(candidate, name), rule_set) for name in names]
        elif exchange.request.endpoint.family == "gemini":
            refusals.append(_refusal_without_model(exchange.request, candidate, rule_set))
    return next((refusal for refusal in refusals if refusal is not None), None)


def _refusal_without_model(request: Request, candidate: Candidate, rule_set: RuleSet) -> ViolationError | None:
    """Judge a Gemini request whose path names no model: by its body, and not at all if the path calls a method."""
    if b":" in request.path or b"%" in request.path:
        path = request.path.decode("latin-1")
        return violation(rule_set, "models", Refusal("policy_rules.models", None, path), None)
    try:
        named = _decode_named(editable_body(request)).model if request.body else None
    except (ValueError, RecursionError):
        raise RequestError("bad_request", "The request body names no model that policy rules can judge.") from None
    return None if named is None else judge_model(NamedModel.of(candidate, named.removeprefix("models/")), rule_set)


def _body_to_judge(request: Request) -> bytes:
    """Return the body where it is JSON, content coding undone; of forms only the model is judged.

    What merely calls itself a form is no exception: there are servers that read JSON whatever its type.
    """
    is_form = request.endpoint.takes_form and is_multipart(request.headers.get(b"content-type"))
    if not request.body or is_form:
        return b""
    return editable_body(request)
