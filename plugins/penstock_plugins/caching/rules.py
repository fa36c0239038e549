"""Which cache mode a request runs in: what the header says, and which rule matches; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import attrs

from penstock import Candidate, ConfigurationError, Principal, RequestError
from penstock.governance import StoredCacheRule
from penstock.governance.objects import CacheMatch, CacheRule

CacheMode = Literal["respect", "disable", "force"]
MAX_TTL = 86_400
SHORT_TTL = 300
"""Seconds up to which a forced marker is for five minutes; beyond it is for an hour."""
_override = re.compile(rb"(?:(respect|disable)|(force)(?:[ \t]*;[ \t]*ttl=([0-9]{1,5}))?)").fullmatch


@attrs.frozen(kw_only=True)
class MatchConfig:
    """Which requests a rule of the configuration file is for; all that is given must hold."""

    key: str | None = None
    """Id of the key: ``vk_`` and its name."""
    key_tags: tuple[str, ...] = ()
    """Tags the key has, all of them."""
    key_prefix: str | None = None
    """What the key's display prefix begins with."""
    principal: str | None = None
    """The user or service account on whose behalf the key calls."""
    model: str | None = None
    """Glob over the model, as asked for and as resolved, bare and ``type/model``."""
    metadata: Mapping[str, str] = attrs.field(factory=dict)
    """What the request's metadata holds, all of it: its header or the member ``metadata`` of its body."""


@attrs.frozen(kw_only=True)
class RuleConfig:
    """One ``[[plugins.caching.rules]]`` table."""

    name: str
    """What the trace calls the rule."""
    mode: CacheMode
    """``respect``, ``disable`` or ``force``."""
    ttl: int | None = None
    """Seconds, with mode ``force``: up to 300 is five minutes, more is an hour."""
    priority: int = 0
    """The highest that matches wins."""
    match: MatchConfig = MatchConfig()
    """Which requests it is for; empty is all."""

    def stored(self) -> StoredCacheRule:
        """Return the rule as a store keeps it. Raises ConfigurationError."""
        if self.ttl is not None and (self.mode != "force" or not 0 < self.ttl <= MAX_TTL):
            raise ConfigurationError(
                f'rules ({self.name}).ttl: goes with mode "force", from 1 to {MAX_TTL}; leave it out or change it'
            )
        given = self.match
        match = CacheMatch(
            virtual_key_id=given.key,
            key_tags=given.key_tags,
            key_prefix=given.key_prefix,
            principal_id=given.principal,
            model=given.model,
            metadata=given.metadata,
        )
        rule = CacheRule(name=self.name, scope_id="", mode=self.mode, ttl=self.ttl, priority=self.priority, match=match)
        return StoredCacheRule(self.name, rule)


@attrs.frozen
class Choice:
    """Hold the mode of a request and where it comes from."""

    mode: CacheMode
    ttl: int | None = None
    rule_id: str | None = None
    """Of the cache rule that chose it."""

    @property
    def is_long(self) -> bool:
        """Say whether forced markers are for an hour."""
        return self.ttl is not None and self.ttl > SHORT_TTL


RESPECT = Choice("respect")


def read_override(values: list[bytes], field: bytes) -> Choice:
    """Return what the request's header says. Raises RequestError ``cache_override_invalid``."""
    found = _override(values[0].strip(b" \t")) if len(values) == 1 else None
    ttl = None if found is None or found[3] is None else int(found[3])
    if found is None or (ttl is not None and not 0 < ttl <= MAX_TTL):
        raise RequestError(
            "cache_override_invalid",
            f"The header {field.decode()} must be respect, disable, force or force;ttl=N (seconds, 1 to {MAX_TTL}), "
            "given once.",
            param=field.decode(),
        )
    mode: CacheMode = "force" if found[2] else "disable" if found[1] == b"disable" else "respect"
    return Choice(mode, ttl)


def rules_for(principal: Principal | None, rules: Iterable[StoredCacheRule]) -> tuple[StoredCacheRule, ...]:
    """Return those rules that are for a key, highest priority first; those of one priority keep their order."""
    mine = [stored for stored in rules if _is_for(principal, stored.rule.match)]
    return tuple(sorted(mine, key=lambda stored: -stored.rule.priority))


def _is_for(principal: Principal | None, match: CacheMatch) -> bool:
    if principal is None:
        return match == CacheMatch(model=match.model, metadata=match.metadata)
    return (
        match.virtual_key_id in (None, principal.virtual_key_id)
        and match.principal_id in (None, principal.principal_id)
        and set(match.key_tags) <= set(principal.tags)
        and (match.key_prefix is None or principal.display_prefix.startswith(match.key_prefix))
    )


def first_match(
    rules: Iterable[StoredCacheRule], models: Callable[[], set[str]], metadata: Callable[[], Mapping[str, str]]
) -> Choice | None:
    """Return what the first rule says that matches a request of a key they are all for."""
    for stored in rules:
        match = stored.rule.match
        if match.model is not None and not any(fnmatchcase(model, match.model) for model in models()):
            continue
        if match.metadata and not match.metadata.items() <= metadata().items():
            continue
        return Choice(stored.rule.mode, stored.rule.ttl, stored.id)
    return None


def spellings(asked: str | None, candidate: Candidate | None) -> set[str]:
    """Return the names a model goes by: as asked for, and as the first candidate is asked for it."""
    found = set() if asked is None else {asked}
    if candidate is not None and candidate.model is not None:
        found |= {candidate.model, f"{candidate.binding.type}/{candidate.model}"}
    return found


def metadata_of(header: bytes | None, member: bytes) -> dict[str, str]:
    """Return the metadata of a request, the header's over the body's; what is no JSON object says nothing."""
    return {**_pairs(member), **_pairs(header or b"")}


def _pairs(text: bytes) -> dict[str, str]:
    try:
        found: Any = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
