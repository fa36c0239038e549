"""What a key may reach: its bindings or those of its routing policy, natively or by translation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs

from penstock import (
    BindingDirectory,
    Endpoint,
    Fallback,
    PolicyRules,
    Principal,
    Provider,
    ProviderBinding,
    RequestError,
    Services,
)
from penstock.governance import PolicyDirectory
from penstock.governance.objects import RoutingPolicy
from penstock_plugins.routing.resolve import Reachable

NO_MAP: Mapping[str, str] = {}


@attrs.frozen(eq=False)
class Sight:
    """Hold what a key may reach at an endpoint."""

    reachable: Sequence[Reachable]
    """In the order of the key or of its policy."""
    elsewhere: frozenset[str]
    """Types and handles of its bindings that do not serve the endpoint."""
    aliases: Mapping[str, str]
    """The key's, and beneath them the policy's."""
    policy: RoutingPolicy | None
    fallback: Fallback | None
    """The key's, else the policy's."""

    @property
    def native(self) -> list[Reachable]:
        """Return those that speak the endpoint's dialect themselves."""
        return [found for found in self.reachable if not found.is_translated]


@attrs.frozen(eq=False)
class Lookout:
    """Find what keys may reach, for one generation of plugins."""

    services: Services
    directory: BindingDirectory
    policies: PolicyDirectory | None

    def policy_of(self, principal: Principal) -> RoutingPolicy | None:
        """Return the policy of a key. Raises RequestError where it names one that is not there or cannot be read."""
        policy_id = principal.routing_policy_id
        if policy_id is None:
            return None
        policy = None if self.policies is None else self.policies.routing_policy(policy_id)
        if policy is None:
            raise RequestError(
                "policy_rules_invalid",
                f"The routing policy {policy_id[:80]} of this virtual key is not there, so nothing is let through; an "
                "administrator has to give the key another, or none.",
                meta={"routing_policy": policy_id[:80]},
            )
        if policy.policy_rules != PolicyRules() and "policy_rules" not in self.services.enforced:
            raise RequestError(
                "policy_rules_invalid",
                f"The routing policy {policy_id[:80]} of this virtual key has policy rules, and no enabled plugin "
                'enforces them; the operator must add "policy_rules" to [gateway] plugins, or take them from it.',
                meta={"routing_policy": policy_id[:80]},
            )
        return policy

    def look(self, principal: Principal, endpoint: Endpoint, listed_for: str | None = None) -> Sight:
        """Return what a key may reach at an endpoint.

        ``listed_for`` is the dialect a listing of models is for: bindings translation gets to from there count.
        Raises RequestError ``policy_rules_invalid``.
        """
        policy = self.policy_of(principal)
        reachable, elsewhere = [], set()
        for binding, entry_map, is_by_name_only in self._bound(principal, policy):
            provider = self.services.provider_of(binding)
            is_native = endpoint.dialect in provider.dialects
            if is_native or self._is_translated(endpoint, provider, listed_for):
                reachable.append(Reachable(binding, provider, entry_map, not is_native, is_by_name_only))
            else:
                elsewhere |= {binding.type, binding.handle or binding.type}
        aliases, fallback = principal.model_aliases, principal.fallback
        if policy is not None:
            aliases = {**policy.model_aliases, **aliases}
            fallback = fallback or policy.fallback
        return Sight(reachable, frozenset(elsewhere), aliases, policy, fallback)

    def names(self, principal: Principal) -> frozenset[str]:
        """Return every type, and every handle of the key's organization, reachable or not."""
        homes = (None, principal.organization_id)
        bindings = [binding for binding in self.directory.all_bindings() if binding.organization_id in homes]
        handles = [binding.handle for binding in bindings if binding.handle]
        return frozenset([*self.services.providers.types, *handles])

    def _bound(
        self, principal: Principal, policy: RoutingPolicy | None
    ) -> Iterator[tuple[ProviderBinding, Mapping[str, str], bool]]:
        """Yield bindings in order, what the policy calls models there, and whether they are outside of it."""
        own = self.directory.bindings_of(principal)
        if policy is None or not policy.entries:
            yield from ((binding, NO_MAP, False) for binding in own)
            return
        maps = {entry.binding_id: entry.model_map for entry in policy.entries}
        # Asked as a key would be that lists them: what is out of sight of this key's project is left out.
        listing = attrs.evolve(principal, bindings=tuple(maps))
        entries = [binding for binding in self.directory.bindings_of(listing) if binding.id in maps]
        yield from ((binding, maps[binding.id], False) for binding in entries)
        yield from ((binding, NO_MAP, True) for binding in own if binding.id not in maps)

    def _is_translated(self, endpoint: Endpoint, provider: Provider, listed_for: str | None) -> bool:
        translators = self.services.translators
        if listed_for is None:
            return bool(translators) and translators.between(endpoint, provider) is not None
        return any(each.source == listed_for and each.target in provider.dialects for each in translators)
