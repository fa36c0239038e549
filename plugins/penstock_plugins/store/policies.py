"""Routing policies, cache rules and guardrails in memory, found by id or by the scopes of a key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection

from penstock import Principal, RequestError
from penstock.governance import KINDS, Discrepancy, GuardrailRule, StoredCacheRule, StoredObject
from penstock.governance.objects import CacheRule, Evaluator, Guardrail, RoutingPolicy
from penstock_plugins.store.objects import SQLReading

REMEMBERED_KEYS = 50_000
"""For how many keys an answer is kept at hand; keys come and go."""
_KINDS = ("routing_policy", "cache_rule", "guardrail", "evaluator")
_NEAREST_FIRST = ("project_id", "team_id", "organization_id")
_PAGE = 500
_log = logging.getLogger("penstock.store")


@attrs.frozen
class Unreadable:
    """Stand for an object of which nobody knows what it says: whoever depends on it is refused."""

    id: str
    kind: str
    scope_id: str
    """Whose it is."""
    fault: str

    def refusal(self) -> RequestError:
        """Return what is answered to whoever depends on it."""
        return RequestError(
            "policy_rules_invalid",
            f"The {self.kind.replace('_', ' ')} {self.id} cannot be read, so nothing is let through under it; an "
            "administrator has to give it anew, or to archive it.",
            meta={self.kind: self.id},
        )

    def __str__(self) -> str:
        return f"{self.kind.replace('_', ' ')} {self.id} of {self.scope_id} cannot be read: {self.fault}"


Read = RoutingPolicy | StoredCacheRule | Guardrail | Evaluator | Unreadable
"""What a document says."""


class StoredPolicies:
    """Find what keys refer to: a PolicyDirectory and a Follower."""

    kinds = _KINDS

    def __init__(self) -> None:
        self._found: dict[str, Mapping[str, Read]] = {kind: {} for kind in _KINDS}
        """By kind and id: those that are not archived."""
        self._names: dict[tuple[str, str], str] = {}
        """Ids of guardrails by scope and name."""
        self._rules: dict[str, tuple[StoredCacheRule | Unreadable, ...]] = {}
        """By scope."""
        self._answers: dict[str, tuple[Principal, tuple[StoredCacheRule, ...]]] = {}
        self._revision = 0

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        found: dict[str, dict[str, Read]] = {kind: dict(self._found[kind]) for kind in {each.kind for each in changed}}
        for stored in changed:
            read = _read(stored)
            found[stored.kind].pop(stored.id, None)
            if read is not None:
                found[stored.kind][stored.id] = read
            if isinstance(read, Unreadable):
                _log.error("%s; whoever depends on it is refused", read)
        rules = _by_scope(found["cache_rule"]) if "cache_rule" in found else self._rules
        names = _by_name(found["guardrail"]) if "guardrail" in found else self._names

        def swap() -> None:
            if found:
                self._found |= found
                self._rules, self._names = rules, names
                self._answers = {}
                self._revision += 1

        return swap

    @property
    def revision(self) -> int:
        return self._revision

    def routing_policy(self, policy_id: str) -> RoutingPolicy | None:
        """Return a routing policy. Raises RequestError where it cannot be read."""
        policy: RoutingPolicy | None = _sure(self._found["routing_policy"].get(policy_id))
        return policy

    def cache_rules_of(self, principal: Principal) -> Sequence[StoredCacheRule]:
        """Return every cache rule in sight of a key. Raises RequestError where one of them cannot be read."""
        known = self._answers.get(principal.virtual_key_id)
        if known is not None and known[0] is principal:
            return known[1]
        rules: list[StoredCacheRule] = []
        for scope in _NEAREST_FIRST:
            rules += map(_sure, self._rules.get(getattr(principal, scope), ()))
        rules.sort(key=lambda each: -each.rule.priority)  # of one priority the nearest scope first, then the oldest
        found = tuple(rules)
        if len(self._answers) >= REMEMBERED_KEYS:
            self._answers.clear()
        self._answers[principal.virtual_key_id] = principal, found
        return found

    def guardrail(self, guardrail_id: str, principal: Principal) -> GuardrailRule | None:
        """Return a guardrail by id, or by name, of the nearest scope. Raises RequestError where it cannot be read."""
        found = self._found["guardrail"].get(guardrail_id)
        for scope in () if found is not None else _NEAREST_FIRST:
            named = self._names.get((getattr(principal, scope), guardrail_id))
            if named is not None:
                guardrail_id, found = named, self._found["guardrail"][named]
                break
        rule: GuardrailRule | None = None if found is None else _sure(self._resolved(guardrail_id, found))
        return rule

    def _resolved(self, guardrail_id: str, found: Read) -> GuardrailRule | Unreadable:
        """Return a guardrail with what it runs."""
        if not isinstance(found, Guardrail):
            assert isinstance(found, Unreadable), "it is among the guardrails"
            return found
        evaluator = self._found["evaluator"].get(found.evaluator_id)
        if isinstance(evaluator, Evaluator):
            return GuardrailRule(guardrail_id, found, evaluator.type, {**evaluator.settings, **found.settings})
        why = "cannot be read" if isinstance(evaluator, Unreadable) else "is not there"
        return Unreadable(guardrail_id, "guardrail", found.scope_id, f"its evaluator {found.evaluator_id} {why}")

    @property
    def unreadable(self) -> list[Unreadable]:
        """Return what cannot be read, guardrails without what they run among them."""
        guardrails = [self._resolved(*item) for item in self._found["guardrail"].items()]
        others = [read for kind in _KINDS if kind != "guardrail" for read in self._found[kind].values()]
        return [read for read in (*others, *guardrails) if isinstance(read, Unreadable)]


def unreadable_policies(connection: Connection) -> Iterator[Discrepancy]:
    """Yield what of a database keys refer to and nobody can read."""
    policies, reading = StoredPolicies(), SQLReading(connection)
    for kind in _KINDS:
        after = None
        while page := reading.list(kind, after=after, limit=_PAGE):
            policies.plan(page)()
            after = page[-1].id
    for each in policies.unreadable:
        yield Discrepancy(what=str(each), period=0, recorded=0, derived=0)


def _sure(read: Any) -> Any:
    """Return what was read. Raises RequestError for what cannot be."""
    if isinstance(read, Unreadable):
        raise read.refusal()
    return read


def _by_scope(rules: Mapping[str, Read]) -> dict[str, tuple[StoredCacheRule | Unreadable, ...]]:
    found: dict[str, list[StoredCacheRule | Unreadable]] = {}
    for _, rule in sorted(rules.items()):
        if isinstance(rule, StoredCacheRule):
            found.setdefault(rule.rule.scope_id, []).append(rule)
        elif isinstance(rule, Unreadable):
            found.setdefault(rule.scope_id, []).append(rule)
    return {scope_id: tuple(each) for scope_id, each in found.items()}


def _by_name(guardrails: Mapping[str, Read]) -> dict[tuple[str, str], str]:
    return {
        (read.scope_id, read.name): guardrail_id
        for guardrail_id, read in guardrails.items()
        if isinstance(read, Guardrail)
    }


def _read(stored: StoredObject) -> Read | None:
    """Return what a document says; None where it is archived. What a newer version knows besides is passed over."""
    if stored.archived_at_ms is not None:
        return None
    try:
        value: Any = msgspec.convert(stored.document, KINDS[stored.kind].type)
        if isinstance(value, RoutingPolicy) and any(entry.weight < 0 for entry in value.entries):
            return Unreadable(stored.id, stored.kind, value.scope_id, "an entry has a weight below 0")
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        return Unreadable(stored.id, stored.kind, _scope_in(stored), str(error))
    if isinstance(value, CacheRule):
        return StoredCacheRule(stored.id, value)
    found: Read = value
    return found


def _scope_in(stored: StoredObject) -> str:
    """Return whose an object is by its document, or where not even that can be read by where it is kept."""
    scope_id = stored.document.get("scope_id")
    owner = stored.scope
    return scope_id if isinstance(scope_id, str) else owner.project_id or owner.team_id or owner.organization_id
