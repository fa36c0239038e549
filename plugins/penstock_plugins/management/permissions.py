"""Who may do what where: permissions, roles, and the actor that holds them. Deny by default.

A permission is ``resource:action``; ``manage`` holds every action of its resource. A grant holds permissions within a
scope and below it, some of them for the actor's own keys only.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from penstock import suggest
from penstock.governance import Scope
from penstock_plugins.management.faults import RefusedError

EVERYWHERE = "*"
"""In place of a scope's id: the whole installation."""
_CRUD = ("view", "create", "update", "delete")
ACTIONS: dict[str, tuple[str, ...]] = {
    "virtualKeys": (*_CRUD, "rotate", "manage"),
    "gatewayProviders": (*_CRUD, "rotate", "manage"),
    "gatewayBudgets": (*_CRUD, "rotate", "manage"),
    "routingPolicies": (*_CRUD, "rotate", "manage"),
    "gatewayCacheRules": (*_CRUD, "rotate", "manage"),
    "gatewayGuardrails": (*_CRUD, "rotate", "manage", "attach", "detach"),
    "gatewayLogs": (*_CRUD, "rotate", "manage"),
    "gatewayUsage": (*_CRUD, "rotate", "manage"),
    "apiTokens": (*_CRUD, "rotate", "manage"),
    "webhooks": (*_CRUD, "rotate", "manage"),
    "audit": (*_CRUD, "rotate", "manage"),
    "organization": (*_CRUD, "rotate", "manage"),
}
ALL = frozenset(f"{resource}:{action}" for resource, actions in ACTIONS.items() for action in actions)
_VIEWS = frozenset(f"{resource}:view" for resource in ACTIONS)
OWNED = frozenset(("virtualKeys", "gatewayUsage", "gatewayLogs"))
"""Resources whose objects belong to a user or service account."""
_OWN = frozenset(
    ("virtualKeys:view", "virtualKeys:create", "virtualKeys:update", "virtualKeys:rotate", "gatewayUsage:view",
     "gatewayLogs:view")
)  # fmt: skip
_SHARED = frozenset(("gatewayProviders", "routingPolicies", "gatewayCacheRules", "gatewayGuardrails", "organization"))
"""Resources of a wider scope that apply to all within it, and may be seen from there."""
ROLES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "org_admin": (ALL, frozenset()),
    "project_admin": (ALL, frozenset()),
    "developer": (_VIEWS - {f"{resource}:view" for resource in OWNED} - {"audit:view", "apiTokens:view"}, _OWN),
    "viewer": (_VIEWS, frozenset()),
}
"""Each role's permissions, and those it has for the actor's own keys only."""


def expanded(permissions: Iterable[str]) -> frozenset[str]:
    """Return permissions with all that ``manage`` among them holds."""
    found = set(permissions)
    for permission in tuple(found):
        resource, _, action = permission.partition(":")
        if action == "manage":
            found.update(f"{resource}:{each}" for each in ACTIONS.get(resource, ()))
    return frozenset(found)


def fault_of(permission: str) -> str | None:
    """Return what is wrong with a permission's name, or None."""
    return None if permission in ALL else f"{permission[:80]!r} is no permission{suggest(permission, sorted(ALL))}"


def covers(outer: Scope | None, inner: Scope | None) -> bool:
    """Say whether a scope holds another, or is it; None is the whole installation."""
    if outer is None or inner is None:
        return outer is None
    return (
        outer.organization_id == inner.organization_id
        and outer.team_id in (None, inner.team_id)
        and outer.project_id in (None, inner.project_id)
    )


@attrs.frozen
class Grant:
    """Hold permissions within a scope."""

    permissions: frozenset[str]
    own: frozenset[str]
    """Those for the actor's own keys only."""
    scope: Scope | None
    """None is the whole installation."""
    place: str
    """What messages call the scope: its id."""


@attrs.frozen(eq=False)
class Actor:
    """Be who calls."""

    id: str
    """Of the token."""
    name: str
    user_id: str | None
    organization_id: str
    """What names without a place are looked up in."""
    home: Scope | None
    """Where things go that name no place; None is the whole installation."""
    grants: tuple[Grant, ...]
    expires_at: str | None = None
    """When the token ends, RFC 3339."""

    def may(self, permission: str, scope: Scope | None, owner: str | None = None) -> bool:
        """Say whether the actor holds a permission at a scope; ``owner``: whose key it is about."""
        return any(covers(grant.scope, scope) and self._holds(grant, permission, owner) for grant in self.grants)

    def may_somewhere(self, permission: str) -> bool:
        """Say whether there is any scope at which the actor holds a permission, for own keys at least."""
        return any(permission in grant.permissions or permission in grant.own for grant in self.grants)

    def require(self, permission: str, scope: Scope | None, owner: str | None = None) -> None:
        """Raise RefusedError naming the missing grant, unless the actor has it."""
        if not self.may(permission, scope, owner):
            raise missing(permission, scope)

    def views(self, resource: str, scope: Scope | None, owner: str | None = None) -> bool:
        """Say whether the actor may view such an object: where it is, or from where it applies to."""
        permission = f"{resource}:view"
        if self.may(permission, scope, owner):
            return True
        return resource in _SHARED and any(
            permission in grant.permissions and covers(scope, grant.scope) for grant in self.grants
        )

    def sees(self, resource: str, scope: Scope | None, owner: str | None = None) -> bool:
        """Say whether such an object is in the actor's sight, so that a refusal may admit that it exists."""
        if resource in OWNED and any(grant.own for grant in self.grants) and not self.views(resource, scope, owner):
            return False
        return any(
            covers(grant.scope, scope) or (resource in _SHARED and covers(scope, grant.scope)) for grant in self.grants
        )

    def owner_for(self, permission: str) -> str | None:
        """Return the user whose keys alone a permission is held for; None where it is held for others' too."""
        if any(permission in grant.permissions for grant in self.grants):
            return None
        return self.user_id or ""

    def _holds(self, grant: Grant, permission: str, owner: str | None) -> bool:
        if permission in grant.permissions:
            return True
        return permission in grant.own and owner is not None and owner == self.user_id


def missing(permission: str, scope: Scope | None) -> RefusedError:
    """Return the refusal that names a missing grant."""
    place = place_of(scope)
    return RefusedError(
        "permission_denied",
        f"This needs {permission} on {place}, which the token does not hold.",
        meta={"permission": permission, "scope_id": place},
    )


def place_of(scope: Scope | None) -> str:
    """Return the id of the narrowest part of a scope."""
    if scope is None:
        return EVERYWHERE
    return scope.project_id or scope.team_id or scope.organization_id
