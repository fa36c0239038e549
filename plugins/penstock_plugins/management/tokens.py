"""Api tokens: made, revoked, and turned into the actor that presents one. Nobody grants more than he holds."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from penstock import hash_key
from penstock.governance import (
    KINDS,
    Reading,
    Scope,
    StoredObject,
    is_token,
    new_token,
    token_prefix,
)
from penstock.governance.objects import ApiToken, RoleGrant
from penstock_plugins.management import objects
from penstock_plugins.management.calls import Call, Means
from penstock_plugins.management.documents import refuse_unknown, structure
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.permissions import (
    ALL,
    EVERYWHERE,
    ROLES,
    Actor,
    Grant,
    covers,
    expanded,
    fault_of,
    place_of,
)
from penstock_plugins.management.places import scope_of
from penstock_plugins.management.resources import CONTAINERS, Draft, Resource, kind_of_id, reach_of
from penstock_plugins.management.rules import check_unique
from penstock_plugins.management.times import read_time

_UNKNOWN = "The api token is missing or not known here: send Authorization: Bearer and a token that is in force."


def identify(tx: Reading, means: Means, secret: bytes | None) -> Actor:
    """Return who presents a token. Raises RefusedError for one that is unknown, revoked, expired or orphaned."""
    unknown = RefusedError("invalid_api_token", _UNKNOWN)
    if secret is None or not is_token(secret, means.services.namespace):
        raise unknown
    presented = hash_key(means.vault.pepper, secret).hex()
    stored = tx.find("api_token", "hash", [presented])
    if stored is None or stored.archived_at_ms is not None:
        raise unknown
    token: ApiToken = structure(stored.document, ApiToken)
    if not hmac.compare_digest(token.hash.encode(), presented.encode()) or token.revoked:
        raise unknown
    if token.expires_at is not None and read_time(token.expires_at) <= means.services.clock():
        raise unknown
    try:
        return _actor_of(tx, means, stored, token)
    except RefusedError:
        raise unknown from None  # its scope or its user is there no longer


def _actor_of(tx: Reading, means: Means, stored: StoredObject, token: ApiToken) -> Actor:
    nobody = Actor(stored.id, token.name, token.user_id, stored.scope.organization_id, stored.scope, ())
    call = Call(nobody, tx, means, means.now_ms())
    home = _active_scope(call, token.scope_id)
    grants = [_grant(call, token.role, token.permissions, token.scope_id)]
    if token.user_id is not None:
        user = tx.get("user", token.user_id)
        if user is None or user.archived_at_ms is not None:
            raise RefusedError("invalid_api_token", _UNKNOWN)
        if token.role is None and not token.permissions:
            roles = structure({"roles": user.document.get("roles", [])}, _Roles).roles
            held = [_within(_grant(call, role.role, (), role.scope_id), home) for role in roles]
            grants = [grant for grant in held if grant is not None]
    return attrs.evolve(nobody, home=home, grants=tuple(grants), expires_at=token.expires_at)


def _within(grant: Grant, home: Scope | None) -> Grant | None:
    """Return what a token for ``home`` has of a grant to its user."""
    if covers(home, grant.scope):
        return grant
    return attrs.evolve(grant, scope=home, place=place_of(home)) if covers(grant.scope, home) else None


@attrs.frozen
class _Roles:
    roles: tuple[RoleGrant, ...] = ()


def _active_scope(call: Call, scope_id: str) -> Scope | None:
    """Return the scope a token is for. Raises RefusedError where it is archived."""
    if scope_id == EVERYWHERE:
        return None
    stored = call.tx.get(kind_of_id(scope_id) or "organization", scope_id)
    if stored is None or stored.archived_at_ms is not None:
        raise RefusedError("not_found", "The scope is there no longer.")
    return scope_of(call, scope_id)


def _grant(call: Call, role: str | None, permissions: Iterable[str], scope_id: str) -> Grant:
    all_of, own = (frozenset[str](), frozenset[str]()) if role is None else ROLES[role]
    scope = None if scope_id == EVERYWHERE else scope_of(call, scope_id)
    return Grant(all_of | expanded(permissions), own, scope, scope_id)


def _require_held(call: Call, grant: Grant, owner: str | None, where: str) -> None:
    """Raise RefusedError unless the actor holds all of a grant himself."""
    lacking = sorted(name for name in grant.permissions if not call.actor.may(name, grant.scope))
    lacking += sorted(name for name in grant.own if not call.actor.may(name, grant.scope, owner))
    if lacking:
        raise RefusedError(
            "permission_denied",
            f"{where}: nobody grants more than he holds; the token lacks {', '.join(lacking[:5])} on {grant.place}.",
            meta={"permission": lacking[0], "scope_id": grant.place, "field": where},
        )


def _check_role(role: str | None, scope_id: str, where: str) -> None:
    kind = EVERYWHERE if scope_id == EVERYWHERE else kind_of_id(scope_id)
    if role == "org_admin" and kind not in ("organization", EVERYWHERE):
        raise bad_field(where, "org_admin is a role on an organization")
    if role == "project_admin" and kind not in ("project", "team"):
        raise bad_field(where, "project_admin is a role on a project or team")


def check_roles(call: Call, draft: Draft) -> None:
    """Raise RefusedError for a role of a user that the actor could not give."""
    before = [] if draft.before is None else draft.before.document.get("roles", [])
    for number, role in enumerate(draft.document.roles):
        where = f"roles[{number}]"
        if {"role": role.role, "scope_id": role.scope_id} in before:
            continue
        scope = scope_of(call, role.scope_id)
        if draft.scope is None or scope.organization_id != draft.scope.organization_id:
            raise bad_field(f"{where}.scope_id", "must be in the user's organization")
        _check_role(role.role, role.scope_id, f"{where}.role")
        _require_held(call, _grant(call, role.role, (), role.scope_id), draft.id, where)


def _check(call: Call, draft: Draft) -> None:
    token: ApiToken = draft.document
    check_unique("permissions", token.permissions)
    for number, permission in enumerate(token.permissions):
        fault = fault_of(permission)
        if fault is not None:
            raise bad_field(f"permissions[{number}]", fault)
    _check_role(token.role, token.scope_id, "role")
    _check_reach(call, draft)
    _check_end(call, draft)
    if draft.before is None:
        if token.expires_at is not None and read_time(token.expires_at) * 1000 <= call.now_ms:
            raise bad_field("expires_at", "lies in the past")
        secret = new_token(call.means.services.namespace)
        draft.once["secret"] = secret
        draft.set(hash=hash_key(call.means.vault.pepper, secret.encode()).hex(), display_prefix=token_prefix(secret))


def _check_end(call: Call, draft: Draft) -> None:
    """Raise RefusedError for a token that would outlive the one it is made with."""
    end, given = call.actor.expires_at, draft.document.expires_at
    if draft.before is not None and draft.before.document.get("expires_at") == given:
        return
    if end is not None and (given is None or read_time(given) > read_time(end)):
        message = f"expires_at: nobody grants for longer than he holds; the token ends at {end}."
        raise RefusedError("permission_denied", message, meta={"field": "expires_at"})


def _check_reach(call: Call, draft: Draft) -> None:
    """Raise RefusedError unless the actor holds everything the token would."""
    token: ApiToken = draft.document
    user = None if token.user_id is None else call.tx.get("user", token.user_id)
    if token.user_id is not None and (user is None or user.archived_at_ms is not None):
        raise bad_field("user_id", "must be a user who is not archived")
    if user is not None and draft.scope is not None and user.scope.organization_id != draft.scope.organization_id:
        raise bad_field("user_id", "must be a user of the same organization")
    if token.role is None and not token.permissions:
        if user is None:
            raise bad_field("permissions", "give permissions, a role, or the user whose roles the token has")
        # His roles may grow, and the token with them: up to everything within its scope.
        _require_held(call, Grant(ALL, frozenset(), draft.scope, token.scope_id), token.user_id, "user_id")
    else:
        grant = _grant(call, token.role, token.permissions, token.scope_id)
        _require_held(call, grant, token.user_id, "role" if token.role is not None else "permissions")


def _show(_call: Call, stored: StoredObject, view: dict[str, Any]) -> None:
    view["revoked"] = view["revoked"] or stored.archived_at_ms is not None


API_TOKENS = Resource(
    kind=KINDS["api_token"],
    path="api-tokens",
    grants="apiTokens",
    aliases={**dict.fromkeys(CONTAINERS, "scope_id"), "user": "user_id"},
    references={"scope_id": CONTAINERS, "user_id": ("user",)},
    locked=frozenset(("scope_id", "user_id")),
    readonly=frozenset(("display_prefix", "revoked")),
    filters=("name", "scope_id", "user_id", "role"),
    check=_check,
    show=_show,
)


def revoke(
    call: Call, name: str, body: Mapping[str, Any], *, version: int | None = None
) -> tuple[StoredObject, dict[str, Any]]:
    """End a token for good."""
    refuse_unknown(body, ())
    stored = objects.to_change(call, API_TOKENS, name, "delete", version)
    document = attrs.evolve(structure(stored.document, ApiToken), revoked=True)
    return objects.save(call, Draft(API_TOKENS, stored.id, stored, document, reach_of(stored), {}), "delete"), {}
