"""The caching plugin: which mode a request runs in, and the edits of modes ``disable`` and ``force``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

import anyio.to_thread
import attrs

from penstock import (
    ConfigurationError,
    Exchange,
    Principal,
    Request,
    RequestError,
    Services,
    editable_body,
    header_stem,
    hookimpl,
    with_headers,
)
from penstock.governance import PolicyDirectory, StoredCacheRule
from penstock.peek import is_multipart
from penstock.splice import SpliceError
from penstock_plugins.caching.markers import with_markers, without_markers
from penstock_plugins.caching.rules import (
    RESPECT,
    Choice,
    RuleConfig,
    first_match,
    metadata_of,
    read_override,
    rules_for,
    spellings,
)

_LARGE = 128 * 1024
"""Bytes beyond which a body is edited beside the event loop."""


@attrs.frozen(kw_only=True)
class CachingConfig:
    """The ``[plugins.caching]`` table."""

    rules: tuple[RuleConfig, ...] = ()
    """Cache rules of a gateway without a store."""


@attrs.define(eq=False)
class Caching:
    """Choose the cache mode of each request: its header, then the first matching rule, then its key."""

    Config = CachingConfig
    reads_body = True
    edits_body = True

    config: CachingConfig
    services: Services
    _override_field: bytes = attrs.field(init=False, repr=False)
    _metadata_field: bytes = attrs.field(init=False, repr=False)
    _configured: tuple[StoredCacheRule, ...] = attrs.field(init=False, repr=False)
    _of_nobody: tuple[StoredCacheRule, ...] = attrs.field(init=False, repr=False)
    """What applies where nobody authenticates."""
    _directory: PolicyDirectory | None = attrs.field(init=False, default=None, repr=False)
    _revision: int = attrs.field(init=False, default=-1)
    """Of the directory, when the rules were sorted."""
    _by_key: WeakKeyDictionary[Principal, tuple[StoredCacheRule, ...]] = attrs.field(
        init=False, factory=WeakKeyDictionary, repr=False
    )
    """The rules that are for a key."""

    def __attrs_post_init__(self) -> None:
        stem = b"x-%b-" % header_stem(self.services.namespace).lower()
        self._override_field, self._metadata_field = stem + b"cache", stem + b"metadata"
        self._configured = tuple(rule.stored() for rule in self.config.rules)
        names = [rule.name for rule in self.config.rules]
        if len(set(names)) != len(names):
            raise ConfigurationError("rules: two have the same name; give each its own")
        self._of_nobody = rules_for(None, self._configured)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Find the rules of the store."""
        self._directory = self.services.find(PolicyDirectory)  # type: ignore[type-abstract]
        if self._directory is not None and self.config.rules:
            raise ConfigurationError("rules: the store keeps them; make them there ('penstock cache-rules create')")
        yield

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[None] | None:
        """Choose the mode, and edit the request where that asks for it."""
        principal = exchange.principal
        rules = self._rules_of(principal)
        mode = None if principal is None else principal.cache_mode
        if not rules and mode is None and self._override_field not in exchange.request.headers.index:
            return None
        choice = self._choose(exchange, rules) or (RESPECT if mode is None else Choice(mode))
        exchange.cache_mode, exchange.cache_rule_id = choice.mode, choice.rule_id
        if choice.mode == "respect" or not exchange.request.body:
            return None
        return self._edit(exchange, choice)

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _rules_of(self, principal: Principal | None) -> Sequence[StoredCacheRule]:
        directory = self._directory
        if principal is None or (directory is None and not self._configured):
            return self._of_nobody
        if directory is not None and directory.revision != self._revision:
            self._by_key.clear()
            self._revision = directory.revision
        found = self._by_key.get(principal)
        if found is None:
            all_rules = self._configured if directory is None else directory.cache_rules_of(principal)
            found = self._by_key[principal] = rules_for(principal, all_rules)
        return found

    def _choose(self, exchange: Exchange, rules: Sequence[StoredCacheRule]) -> Choice | None:
        """Return what header or rule say, the header first. Raises RequestError ``cache_override_invalid``."""
        given = exchange.request.headers.get_all(self._override_field)
        if given:
            return read_override(given, self._override_field)
        return first_match(rules, lambda: _models(exchange), lambda: self._metadata(exchange)) if rules else None

    def _metadata(self, exchange: Exchange) -> Mapping[str, str]:
        request = exchange.request
        header = request.headers.get(self._metadata_field)
        is_readable = request.endpoint.has_model and request.endpoint.family != "gemini"
        return metadata_of(header, bytes(exchange.peek.metadata) if is_readable else b"")

    # --- editing ------------------------------------------------------------------------------------------------------

    def _edit(self, exchange: Exchange, choice: Choice) -> Awaitable[None] | None:
        request = exchange.request
        endpoint = request.endpoint
        is_marked = choice.mode == "force" and endpoint.dialect == "anthropic.messages"
        if is_multipart(request.headers.get(b"content-type")) or not (is_marked or choice.mode == "disable"):
            return None
        before = editable_body(request)
        is_long = choice.is_long if is_marked else None
        if len(before) > _LARGE:
            return _edit_aside(exchange, before, is_long)
        _put(exchange, before, _edited(before, endpoint.family, is_long))
        return None


async def _edit_aside(exchange: Exchange, before: bytes, is_long: bool | None) -> None:
    """Edit a large body in a thread, so that nobody waits for it but who sent it."""
    after = await anyio.to_thread.run_sync(_edited, before, exchange.request.endpoint.family, is_long)
    _put(exchange, before, after)


def _edited(body: bytes, family: str, is_long: bool | None) -> bytes:
    """Return a body with markers of a duration, None for a body without any. Raises RequestError."""
    try:
        return without_markers(body, family) if is_long is None else with_markers(body, is_long=is_long)
    except SpliceError:
        raise RequestError("bad_request", "The request body is no JSON object.") from None


def _put(exchange: Exchange, before: bytes, after: bytes) -> None:
    if after is not before and after != before:
        exchange.request = _around(exchange.request, after)


def _models(exchange: Exchange) -> set[str]:
    asked = exchange.peek.model if exchange.request.endpoint.has_model else None
    return spellings(asked, exchange.chain[0] if exchange.chain else None)


def _around(request: Request, body: bytes) -> Request:
    """Return the request around another body, without content coding."""
    if b"content-encoding" not in request.headers.index:
        return request.with_body(body)
    head = with_headers(request.head, request.headers.without([b"content-encoding"]))
    return attrs.evolve(request, head=head, body=body)
