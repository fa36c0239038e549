"""Authenticate virtual keys, kept in the configuration file or by a store.

A key is recognised by its checksum, hashed under the pepper, and found by hash in a KeyDirectory: a store's where a
plugin provides one, else the one in this module, which reads the configuration.
"""

from __future__ import annotations

import binascii
import hmac
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import attrs

from penstock import (
    ConfigurationError,
    Exchange,
    Fallback,
    GuardrailAttachment,
    KeyDirectory,
    KeyHasher,
    KeyRecord,
    PolicyRules,
    Principal,
    RequestError,
    Secret,
    Services,
    display_prefix,
    hash_key,
    hookimpl,
    is_well_formed,
)
from penstock.governance import Vault

_MIN_PEPPER = 16


@attrs.frozen(kw_only=True)
class KeyConfig:
    """One ``[[plugins.virtual_keys.keys]]`` table."""

    name: str
    """What the trace calls the key; its id is ``vk_`` and this name."""
    secret: Secret | None = None
    """The key itself, best from the environment; or give ``hash``."""
    hash: str | None = None
    """Hex HMAC-SHA256 of the key under the pepper, as ``penstock hash-key`` prints it."""
    prefix: str | None = None
    """What logs show of a key given by hash."""
    bindings: tuple[str, ...] = ()
    """Names of provider bindings, the first is the primary; empty means every binding."""
    status: Literal["active", "disabled", "revoked"] = "active"
    """Anything but active is 403."""
    expires_at: float | None = None
    """Seconds since the epoch."""
    project: str = "proj_default"
    """The project the key belongs to."""
    principal: str = "user_default"
    """The user or service account on whose behalf calls run."""
    model_aliases: Mapping[str, str] = attrs.field(factory=dict)
    """What clients may ask for, and what they get."""
    models_allowed: tuple[str, ...] | None = None
    """Globs over the resolved model, bare and ``type/model``."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks a chat stream for is taken out again."""
    tags: tuple[str, ...] = ()
    """Words for other plugins to match."""
    metadata: Mapping[str, str] = attrs.field(factory=dict)
    """Names and values for other plugins to match."""
    fallback: Fallback | None = None
    """When the next binding is tried: ``on``, ``max_attempts``, ``timeout_ms``, ``same_binding_retries``."""
    cache_mode: Literal["respect", "disable", "force"] | None = None
    """How prompt caching is passed through: ``respect``, ``disable`` or ``force``."""
    policy_rules: PolicyRules = PolicyRules()
    """What requests may contain: ``tools``, ``mcp``, ``urls``, ``models``, each with patterns to deny, to allow."""
    guardrails: tuple[GuardrailAttachment, ...] = ()
    """Guardrails of the configuration file, by name, in order."""


@attrs.frozen(kw_only=True)
class KeysConfig:
    """The ``[plugins.virtual_keys]`` table."""

    pepper: Secret | None = None
    """At least 16 characters; keys hashed under one pepper are unknown under another. A store brings its own."""
    keys: tuple[KeyConfig, ...] = ()
    """The virtual keys; none where a store keeps them."""


class ConfiguredKeys:
    """Hold the keys of the configuration file by hash."""

    def __init__(self, config: KeysConfig, pepper: bytes, namespace: str) -> None:
        self._by_hash: dict[bytes, KeyRecord] = {}
        for number, key in enumerate(config.keys):
            where = f"keys[{number}] ({key.name})"
            record = _record_of(key, pepper, namespace, where)
            if record.hash in self._by_hash:
                raise ConfigurationError(f"{where}: the same key is listed twice")
            self._by_hash[record.hash] = record

    def find_key(self, key_hash: bytes) -> KeyRecord | None:
        return self._by_hash.get(key_hash)

    def all_principals(self) -> Iterable[Principal]:
        return [record.principal for record in self._by_hash.values()]


def _record_of(key: KeyConfig, pepper: bytes, namespace: str, where: str) -> KeyRecord:
    if (key.secret is None) == (key.hash is None):
        raise ConfigurationError(f"{where}: give either secret or hash")
    if key.secret is not None:
        secret = key.secret.reveal()
        if not is_well_formed(secret.encode(), namespace):
            raise ConfigurationError(f"{where}.secret: is not a virtual key; 'penstock new-key' makes one")
        key_hash, prefix = hash_key(pepper, secret.encode()), display_prefix(secret)
    else:
        key_hash, prefix = _read_hash(key.hash or "", where), key.prefix or key.name
    principal = Principal(
        virtual_key_id=f"vk_{key.name}",
        key_name=key.name,
        display_prefix=prefix,
        bindings=key.bindings,
        principal_id=key.principal,
        project_id=key.project,
        model_aliases=key.model_aliases,
        models_allowed=key.models_allowed,
        usage_frame=key.usage_frame,
        tags=key.tags,
        metadata=key.metadata,
        fallback=key.fallback,
        cache_mode=key.cache_mode,
        policy_rules=key.policy_rules,
        guardrails=key.guardrails,
    )
    return KeyRecord(key_hash, principal, key.status, key.expires_at)


def _read_hash(text: str, where: str) -> bytes:
    try:
        value = binascii.unhexlify(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigurationError(f"{where}.hash: must be 64 hex digits")
    return value


def presented_credential(exchange: Exchange) -> bytes | None:
    """Return the first non-empty credential of the request; the header says nothing about the dialect."""
    get = exchange.request.headers.get
    authorization = get(b"authorization")
    if authorization and authorization[:7].lower() == b"bearer ":
        token = authorization[7:].strip()
        if token:
            return token
    for name in (b"x-api-key", b"api-key", b"x-goog-api-key"):
        value = get(name)
        if value:
            return value
    if exchange.request.endpoint.family == "gemini":
        for pair in exchange.request.query.split(b"&"):
            if pair.startswith(b"key=") and len(pair) > 4:
                return pair[4:]
    return None


@attrs.define(eq=False)
class VirtualKeys:
    """Turn the presented key into a principal."""

    Config = KeysConfig

    config: KeysConfig
    services: Services
    _hasher: KeyHasher = attrs.field(init=False, repr=False)
    _namespace: str = attrs.field(init=False)
    _directory: KeyDirectory = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._namespace = self.services.namespace
        given = self.config.pepper
        if given is None:
            if self.config.keys:
                raise ConfigurationError("pepper: is missing; the keys listed here are hashed under it")
            return  # a store brings keys and pepper, which lifespan sees
        pepper = given.reveal().encode()
        if len(pepper) < _MIN_PEPPER:
            raise ConfigurationError(f"pepper: must be at least {_MIN_PEPPER} characters")
        self._hasher = KeyHasher(pepper)
        self._directory = ConfiguredKeys(self.config, pepper, self._namespace)
        self.services.provide(KeyDirectory, self._directory)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Take keys and pepper from the store where the configuration has none."""
        if self.config.pepper is None:
            directory = self.services.find(KeyDirectory)  # type: ignore[type-abstract]
            vault = self.services.find(Vault)  # type: ignore[type-abstract]
            if directory is None or vault is None:
                raise ConfigurationError('pepper: is missing; set it, or enable "store" to keep the keys')
            self._directory, self._hasher = directory, KeyHasher(vault.pepper)
        yield

    @hookimpl
    def authenticate(self, exchange: Exchange) -> Principal | None:
        """Refuse what is no usable key; a request without any credential is left to the next plugin."""
        secret = presented_credential(exchange)
        if secret is None:
            return None
        if not is_well_formed(secret, self._namespace):
            raise _unknown()
        key_hash = self._hasher.hash(secret)
        record = self._directory.find_key(key_hash)
        if record is None or not hmac.compare_digest(record.hash, key_hash):
            raise _unknown()
        if record.works_until is not None and record.works_until <= self.services.clock():
            raise _unknown()
        if record.status != "active":
            raise RequestError(
                f"virtual_key_{record.status}", f"This virtual key is {record.status}; ask its owner for another."
            )
        if record.expires_at is not None and record.expires_at <= self.services.clock():
            raise RequestError("virtual_key_expired", "This virtual key has expired; ask its owner for another.")
        return record.principal


def _unknown() -> RequestError:
    return RequestError("invalid_api_key", "This virtual key is not known here; check it for typos and its gateway.")
