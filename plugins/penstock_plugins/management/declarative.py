"""The store's objects as one document, applied in one transaction, twice the same as once.

What is there is found by ``external_id``, else by its name where it lives; what the document leaves out stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from penstock.governance import StoredObject
from penstock_plugins.management import bodies, keys, objects
from penstock_plugins.management.calls import Call
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.documents import refuse_unknown, shown
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.resources import Resource, owner_of, reach_of

VERSION = 1
MAX_OBJECTS = 10_000
_LISTED = tuple(resource for resource in RESOURCES if resource.kind.name != "api_token")
SECTIONS = {resource.path.replace("-", "_").replace("prices/overrides", "price_overrides"): resource
            for resource in _LISTED}  # fmt: skip
"""Name of each list in a document → its resource, in the order they are applied."""


class RehearsedError(Exception):
    """Roll back a transaction that was only to show what it would do."""

    def __init__(self, changes: list[dict[str, Any]]) -> None:
        super().__init__("rehearsed")
        self.changes = changes


@attrs.frozen
class Applied:
    """Hold what applying a document did."""

    changes: list[dict[str, Any]]


def apply(call: Call, document: Any, *, is_rehearsal: bool) -> Applied:
    """Make the store hold what a document says. Raises RefusedError, or RehearsedError at the end of a rehearsal."""
    if not isinstance(document, Mapping):
        raise bad_field("document", f"must be an object, not {shown(document)}")
    refuse_unknown(document, ("version", *SECTIONS))
    if document.get("version", VERSION) != VERSION:
        raise bad_field("version", f"must be {VERSION}")
    changes = []
    seen: set[str] = set()
    for section, resource in SECTIONS.items():
        given = document.get(section, [])
        if not isinstance(given, list):
            raise bad_field(section, f"must be a list, not {shown(given)}")
        if len(given) > MAX_OBJECTS:
            raise bad_field(section, f"holds at most {MAX_OBJECTS}")
        for number, body in enumerate(given):
            changes.append(_applied(call, resource, body, f"{section}[{number}]", seen))
    if is_rehearsal:
        for change in changes:
            change.pop("secret", None)
        raise RehearsedError(changes)
    return Applied(changes)


def _applied(call: Call, resource: Resource, body: Any, where: str, seen: set[str]) -> dict[str, Any]:
    if not isinstance(body, Mapping):
        raise bad_field(where, f"must be an object, not {shown(body)}")
    try:
        before = _existing(call, resource, body, seen)
        old = None if before is None else objects.view(call, resource, before)
        stored, once = _put(call, resource, body, before)
    except RefusedError as error:
        field = error.meta.get("field")
        place = where if field is None else f"{where}.{field}"
        raise RefusedError(error.code, f"{where}: {error.message}", meta={**error.meta, "field": place}) from None
    seen.add(stored.id)
    changes = {} if old is None else _difference(old, objects.view(call, resource, stored))
    is_same = before is not None and before.version == stored.version and not changes
    return {
        "action": "create" if before is None else "unchanged" if is_same else "update",
        "kind": resource.kind.name,
        "id": stored.id,
        "name": name_of(stored),
        "changes": changes,
        **once,
    }


def _put(
    call: Call, resource: Resource, body: Mapping[str, Any], before: StoredObject | None
) -> tuple[StoredObject, dict[str, Any]]:
    """Make or change an object; keys have a status here too, so that one that is disabled is so elsewhere."""
    has_status = resource is keys.VIRTUAL_KEYS and "status" in body
    status = body["status"] if has_status else None
    if has_status and status not in ("active", "disabled"):
        raise bad_field("status", 'must be "active" or "disabled"')
    body = {name: value for name, value in body.items() if name != "status" or not has_status}
    if before is None:
        stored, once = objects.create(call, resource, body)
    else:
        stored, once = objects.update(call, resource, before.id, body)
    if status is not None and status != stored.document.get("status"):
        stored, _ = keys.set_status(call, stored.id, str(status), {})
    return stored, once


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"before": before.get(name), "after": value}
        for name, value in after.items()
        if name not in ("version", "updated_at") and _without_versions(before.get(name)) != _without_versions(value)
    }


def _without_versions(value: Any) -> Any:
    """Return a view that may be inside another, such as a key's budget, without what every change changes."""
    if not isinstance(value, Mapping) or "updated_at" not in value:
        return value
    return {name: each for name, each in value.items() if name not in ("version", "updated_at")}


def name_of(stored: StoredObject) -> str | None:
    """Return what an object is called, if anything."""
    for member in ("slug", "name", "external_id"):
        if stored.document.get(member):
            return str(stored.document[member])
    return None


def _existing(call: Call, resource: Resource, body: Mapping[str, Any], seen: set[str]) -> StoredObject | None:
    """Return the active object that an entry of a document is about, if it is in sight.

    ``seen`` are those that entries before it were about: what has no name is found once.
    """
    has_status = resource is keys.VIRTUAL_KEYS
    given = {name: value for name, value in body.items() if name != "status" or not has_status}
    members = bodies.read_members(call, resource, given)
    found = _by_unique(call, resource, members, "external_id")
    if found is None:
        bodies.fill_placement(call, resource, members)
        for name, fill in resource.fills.items():
            if members.get(name) is None:
                members[name] = fill(call, members)
        found = _by_name(call, resource, members, seen)
    if found is not None and not call.actor.sees(
        resource.grants, reach_of(found), owner_of(found.kind, found.document)
    ):
        raise RefusedError("conflict", "is taken by an object out of sight")
    return found


def _by_unique(call: Call, resource: Resource, members: Mapping[str, Any], constraint: str) -> StoredObject | None:
    """Return the active object that holds what an entry says of a constraint, in the organization it is about."""
    needed = resource.kind.unique.get(constraint, ())
    placed = members
    if "organization_id" in needed and members.get("organization_id") is None:
        placed = {**members, "organization_id": _organization_of(call, resource, members)}
    values = [placed.get(name) for name in needed]
    if not values or not all(isinstance(value, str) and value for value in values):
        return None
    return call.tx.find(resource.kind.name, constraint, [str(value) for value in values])


def _organization_of(call: Call, resource: Resource, members: Mapping[str, Any]) -> str:
    """Return the organization of the place an entry names; the actor's where it names none."""
    if all(members.get(name) is None for name in bodies.PLACEMENT if name in resource.references):
        return call.actor.organization_id
    scope = bodies.scope_in(call, resource, "", members)
    return call.actor.organization_id if scope is None else scope.organization_id


def _by_name(call: Call, resource: Resource, members: Mapping[str, Any], seen: set[str]) -> StoredObject | None:
    for constraint in ("slug", "name"):
        if constraint in resource.kind.unique and members.get(constraint):
            return _by_unique(call, resource, members, constraint)
    if resource.kind.name == "budget":
        bodies.read_references(call, resource, members := dict(members), None)
        return _alike(call, resource, members, ("scope", "scope_id", "window"), ("provider",), seen)
    if resource.kind.name == "price_override":
        return _alike(call, resource, members, ("provider", "model", "effective_at"), (), seen)
    return None


def _alike(  # noqa: PLR0917 - each is another question
    call: Call,
    resource: Resource,
    members: Mapping[str, Any],
    needed: Sequence[str],
    optional: Sequence[str],
    seen: set[str],
) -> StoredObject | None:
    """Return the object without name that says the same of these members; of several the one that says all the same."""
    where = {name: members.get(name) for name in needed}
    if not all(isinstance(value, str) and value for value in where.values()):
        return None
    same = [
        stored
        for stored in call.tx.list(resource.kind.name, where={name: str(value) for name, value in where.items()})
        if stored.id not in seen
        and not stored.document.get("name")
        and not (stored.document.get("external_id") and members.get("external_id"))
        and all(stored.document.get(name) == members.get(name) for name in optional)
        and not _is_inline(call, stored)
    ]
    same = [stored for stored in same if not stored.document.get("external_id")] or same
    if len(same) > 1:
        same = [
            stored
            for stored in same
            if all(stored.document.get(name) == value for name, value in members.items() if value is not None)
        ]
    return same[0] if same else None


def _is_inline(call: Call, stored: StoredObject) -> bool:
    """Say whether a budget was given with a key, and is changed with it."""
    if stored.kind != "budget" or stored.document.get("scope") != "virtual_key":
        return False
    key = call.tx.get("virtual_key", stored.document["scope_id"])
    return key is not None and key.document.get("budget_id") == stored.id
