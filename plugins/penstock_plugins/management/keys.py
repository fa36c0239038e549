"""Virtual keys: made, rotated, disabled, revoked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from penstock import display_prefix, hash_key, new_key
from penstock.governance import KINDS, Scope, StoredObject
from penstock_plugins.management import budgets, objects
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import refuse_unknown, shown, structure
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.permissions import covers
from penstock_plugins.management.places import find_default
from penstock_plugins.management.resources import PRINCIPALS, Draft, Resource, reach_of
from penstock_plugins.management.rules import check_fallback, check_rules, check_unique
from penstock_plugins.management.times import read_time, write_time

DEFAULT_GRACE_SECONDS = 86_400
MAX_GRACE_SECONDS = 30 * 86_400


def _default_principal(call: Call, members: Mapping[str, Any]) -> str | None:
    """Return the actor's own user where he may only make keys of his own, else the organization's default user."""
    if call.actor.owner_for("virtualKeys:create") is not None and call.actor.user_id is not None:
        return call.actor.user_id
    project = call.tx.get("project", str(members.get("project_id")))
    found = None if project is None else find_default(call, "user", Scope(project.scope.organization_id))
    return None if found is None else found.id


def _check(call: Call, draft: Draft) -> None:
    key = draft.document
    check_fallback(key.fallback)
    check_rules(key.policy_rules)
    check_unique("provider_bindings", key.provider_bindings)
    check_unique("tags", key.tags)
    for number, binding_id in enumerate(key.provider_bindings):
        _check_usable(call, draft, "provider_binding", binding_id, f"provider_bindings[{number}]")
    if key.routing_policy_id is not None:
        _check_usable(call, draft, "routing_policy", key.routing_policy_id, "routing_policy_id")
    for number, attached in enumerate(key.guardrails):
        _check_usable(call, draft, "guardrail", attached.guardrail_id, f"guardrails[{number}].guardrail_id")
    _check_principal(call, draft)
    _check_attachments(call, draft)
    if key.expires_at is not None and draft.before is None and read_time(key.expires_at) * 1000 <= call.now_ms:
        raise bad_field("expires_at", "lies in the past")
    if draft.before is None:
        secret = new_key(call.means.services.namespace, key.env)
        draft.once["secret"] = secret
        draft.set(hash=hash_key(call.means.vault.pepper, secret.encode()).hex(), display_prefix=display_prefix(secret))


def _check_usable(call: Call, draft: Draft, kind: str, object_id: str, where: str) -> None:
    """Raise RefusedError unless an object's scope holds the key's project."""
    stored = call.tx.get(kind, object_id)
    if stored is None or not covers(reach_of(stored), draft.scope):
        raise bad_field(where, f"{object_id} is not there for the key's project")


def _check_principal(call: Call, draft: Draft) -> None:
    stored = call.tx.get(PRINCIPALS[draft.document.principal_id.startswith("svc_")], draft.document.principal_id)
    if stored is None or not covers(stored.scope, draft.scope):
        raise bad_field("principal_id", "must be a user of the organization or a service account of the project")


def _check_attachments(call: Call, draft: Draft) -> None:
    """Raise RefusedError unless the actor may attach what is new and detach what is gone."""
    now = {each.guardrail_id for each in draft.document.guardrails}
    given = [] if draft.before is None else draft.before.document.get("guardrails", [])
    before = {each["guardrail_id"] for each in given}
    if now - before:
        call.actor.require("gatewayGuardrails:attach", draft.scope)
    if before - now:
        call.actor.require("gatewayGuardrails:detach", draft.scope)


def _finish(call: Call, draft: Draft) -> None:
    """Make, change or archive the budget that comes with a key."""
    if "budget" not in draft.extras:
        return
    given = draft.extras["budget"]
    budget_id = draft.document.budget_id
    if given is None:
        if budget_id is not None:
            objects.archive(call, budgets.BUDGETS, budget_id)
        changed = None
    elif not isinstance(given, Mapping):
        raise bad_field("budget", f"must be an object, not {shown(given)}")
    elif budget_id is not None and _is_active(call, budget_id):
        changed = objects.update(call, budgets.BUDGETS, budget_id, given)[0].id
    else:
        for name in ("scope", "scope_id"):
            if name in given:
                raise bad_field(f"budget.{name}", "is the key itself")
        body = {**given, "scope": "virtual_key", "scope_id": draft.id}
        changed = objects.create(call, budgets.BUDGETS, body)[0].id
    if changed != budget_id:
        stored = call.tx.get("virtual_key", draft.id)
        assert stored is not None, "the key was stored just now"
        follow = Draft(
            draft.resource, draft.id, stored, attrs.evolve(draft.document, budget_id=changed), draft.scope, {}
        )
        objects.save(call, follow, "update")


def _is_active(call: Call, budget_id: str) -> bool:
    stored = call.tx.get("budget", budget_id)
    return stored is not None and stored.archived_at_ms is None


def _show(call: Call, stored: StoredObject, view: dict[str, Any]) -> None:
    if view["status"] == "active" and objects.is_expired(call, stored):
        view["status"] = "expired"
    last_used = call.last_used.get(stored.id)
    view["last_used_at"] = None if last_used is None else write_time(last_used)
    budget_id = view.pop("budget_id")
    budget = None if budget_id is None else call.tx.get("budget", budget_id)
    is_there = budget is not None and budget.archived_at_ms is None
    view["budget"] = objects.view(call, budgets.BUDGETS, budget) if is_there and budget is not None else None


def _archive(call: Call, stored: StoredObject) -> None:
    """Archive the budgets of a key with it."""
    for budget in call.tx.list("budget", where={"scope_id": stored.id}, limit=1000):
        objects.put_away(call, budgets.BUDGETS, budget)


VIRTUAL_KEYS = Resource(
    kind=KINDS["virtual_key"],
    path="virtual-keys",
    grants="virtualKeys",
    aliases={"project": "project_id", "principal": "principal_id", "routing_policy": "routing_policy_id"},
    references={
        "project_id": ("project",),
        "principal_id": PRINCIPALS,
        "provider_bindings[]": ("provider_binding",),
        "routing_policy_id": ("routing_policy",),
        "guardrails[].guardrail_id": ("guardrail",),
    },
    locked=frozenset(("project_id", "env")),
    readonly=frozenset(("status", "display_prefix", "previous_expires_at", "budget_id")),
    extras={"budget": dict},
    derived={"last_used_at": str | None, "budget": dict[str, Any] | None},
    filters=("name", "project_id", "principal_id", "env", "status", "external_id"),
    fills={"principal_id": _default_principal},
    check=_check,
    finish=_finish,
    show=_show,
    archive=_archive,
)


@attrs.frozen(kw_only=True)
class Rotation:
    """Say how a key is rotated."""

    grace_seconds: int = DEFAULT_GRACE_SECONDS
    """How long the old secret still works; 0 ends it at once."""


def rotate(
    call: Call, name: str, body: Mapping[str, Any], *, version: int | None = None
) -> tuple[StoredObject, dict[str, Any]]:
    """Give a key a new secret and return it once; the old one works for a grace period."""
    wanted: Rotation = structure(body, Rotation)
    if not 0 <= wanted.grace_seconds <= MAX_GRACE_SECONDS:
        raise bad_field("grace_seconds", f"must be from 0 to {MAX_GRACE_SECONDS}")
    stored = objects.to_change(call, VIRTUAL_KEYS, name, "rotate", version)
    if stored.document.get("status") == "revoked":
        raise RefusedError("conflict", f"virtual key {stored.id} is revoked; make another.")
    document = structure(stored.document, KINDS["virtual_key"].type)
    secret = new_key(call.means.services.namespace, document.env)
    has_grace = wanted.grace_seconds > 0
    document = attrs.evolve(
        document,
        hash=hash_key(call.means.vault.pepper, secret.encode()).hex(),
        display_prefix=display_prefix(secret),
        previous_hash=document.hash if has_grace else None,
        previous_expires_at=write_time(call.now_ms + wanted.grace_seconds * 1000) if has_grace else None,
    )
    draft = Draft(VIRTUAL_KEYS, stored.id, stored, document, reach_of(stored), {})
    return objects.save(call, draft, "rotate"), {"secret": secret}


def set_status(
    call: Call, name: str, status: str, body: Mapping[str, Any], *, version: int | None = None
) -> tuple[StoredObject, dict[str, Any]]:
    """Disable, enable or revoke a key; a revoked one stays so."""
    refuse_unknown(body, ())
    action = "delete" if status == "revoked" else "update"
    stored = objects.to_change(call, VIRTUAL_KEYS, name, action, version)
    if stored.document.get("status") == "revoked" and status != "revoked":
        raise RefusedError("conflict", f"virtual key {stored.id} is revoked, which cannot be undone; make another.")
    document = attrs.evolve(structure(stored.document, KINDS["virtual_key"].type), status=status)
    draft = Draft(VIRTUAL_KEYS, stored.id, stored, document, reach_of(stored), {})
    return objects.save(call, draft, action), {}
