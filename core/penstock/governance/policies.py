"""Routing policies, cache rules and guardrails as the data plane sees them: found from memory for each key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs

from penstock.governance.objects import CacheRule, Guardrail, RoutingPolicy
from penstock.models import Principal


@attrs.frozen(eq=False)
class StoredCacheRule:
    """Hold one cache rule with its id."""

    id: str
    rule: CacheRule


@attrs.frozen(eq=False)
class GuardrailRule:
    """Hold one guardrail with what it runs."""

    id: str
    guardrail: Guardrail
    evaluator: str
    """Type of the evaluator."""
    settings: Mapping[str, Any]
    """The evaluator's, with the guardrail's own over them."""


class PolicyDirectory(Protocol):
    """Find what keys refer to, from memory. What cannot be read raises RequestError ``policy_rules_invalid``."""

    def routing_policy(self, policy_id: str) -> RoutingPolicy | None:
        """Return a routing policy that is not archived."""
        ...

    def cache_rules_of(self, principal: Principal) -> Sequence[StoredCacheRule]:
        """Return the cache rules of a key's project, team and organization, highest priority first."""
        ...

    def guardrail(self, guardrail_id: str, principal: Principal) -> GuardrailRule | None:
        """Return a guardrail by id, or by name within sight of a key, that is not archived."""
        ...

    @property
    def revision(self) -> int:
        """Return a number that changes whenever an answer of this directory may."""
        ...
