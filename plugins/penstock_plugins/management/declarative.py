"""The store's objects as one document: exported without secrets, applied in one transaction, twice the same as once.

What is there is found by ``external_id``, else by its name where it lives; what the document leaves out stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from penstock.governance import Scope, StoredObject
from penstock_plugins.management import bodies, objects
from penstock_plugins.management.calls import Call
from penstock_plugins.management.catalogue import PRICE_OVERRIDES, RESOURCES
from penstock_plugins.management.documents import refuse_unknown, shown
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.permissions import EVERYWHERE
from penstock_plugins.management.places import find, path_of
from penstock_plugins.management.resources import CONTAINERS, Resource, kind_of_id, owner_of, reach_of

VERSION = 1
MAX_OBJECTS = 10_000
_LISTED = tuple(resource for resource in RESOURCES if resource.kind.name != "api_token")
SECTIONS = {resource.path.replace("-", "_").replace("prices/overrides", "price_overrides"): resource
            for resource in _LISTED}  # fmt: skip
"""Name of each list in a document → its resource, in the order they are applied."""


_INSTALLATION = (PRICE_OVERRIDES,)
"""What counts for every organization, in whichever it is kept."""


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
    for section, resource in SECTIONS.items():
        given = document.get(section, [])
        if not isinstance(given, list):
            raise bad_field(section, f"must be a list, not {shown(given)}")
        if len(given) > MAX_OBJECTS:
            raise bad_field(section, f"holds at most {MAX_OBJECTS}")
        for number, body in enumerate(given):
            changes.append(_applied(call, resource, body, f"{section}[{number}]"))
    if is_rehearsal:
        for change in changes:
            change.pop("secret", None)
        raise RehearsedError(changes)
    return Applied(changes)


def _applied(call: Call, resource: Resource, body: Any, where: str) -> dict[str, Any]:
    if not isinstance(body, Mapping):
        raise bad_field(where, f"must be an object, not {shown(body)}")
    try:
        before = _existing(call, resource, body)
        if before is None:
            stored, once = objects.create(call, resource, body)
        else:
            stored, once = objects.update(call, resource, before.id, body)
    except RefusedError as error:
        field = error.meta.get("field")
        place = where if field is None else f"{where}.{field}"
        raise RefusedError(error.code, f"{where}: {error.message}", meta={**error.meta, "field": place}) from None
    action = "create" if before is None else "unchanged" if before.version == stored.version else "update"
    after_view = objects.view(call, resource, stored)
    return {
        "action": action,
        "kind": resource.kind.name,
        "id": stored.id,
        "name": _name_of(stored),
        "changes": {} if before is None else _difference(call, resource, before, after_view),
        **once,
    }


def _difference(call: Call, resource: Resource, before: StoredObject, after: Mapping[str, Any]) -> dict[str, Any]:
    old = objects.view(call, resource, before)
    skipped = ("version", "updated_at")
    return {
        name: {"before": old.get(name), "after": value}
        for name, value in after.items()
        if name not in skipped and old.get(name) != value
    }


def _name_of(stored: StoredObject) -> str | None:
    for member in ("slug", "name", "external_id"):
        if stored.document.get(member):
            return str(stored.document[member])
    return None


def _existing(call: Call, resource: Resource, body: Mapping[str, Any]) -> StoredObject | None:
    """Return the active object that an entry of a document is about, if it is in sight."""
    members = bodies.read_members(call, resource, body)
    found = _by_unique(call, resource, members, "external_id")
    if found is None:
        bodies.fill_placement(call, resource, members)
        for name, fill in resource.fills.items():
            if members.get(name) is None:
                members[name] = fill(call, members)
        found = _by_name(call, resource, members)
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


def _by_name(call: Call, resource: Resource, members: Mapping[str, Any]) -> StoredObject | None:
    for constraint in ("slug", "name"):
        if constraint in resource.kind.unique and members.get(constraint):
            return _by_unique(call, resource, members, constraint)
    if resource.kind.name == "budget":
        where = {name: members.get(name) for name in ("scope", "scope_id", "window")}
        if all(isinstance(value, str) for value in where.values()):
            same = [
                stored
                for stored in call.tx.list("budget", where={name: str(value) for name, value in where.items()})
                if stored.document.get("name") is None and stored.document.get("provider") == members.get("provider")
            ]
            return same[0] if len(same) == 1 else None
    return None


def export(call: Call) -> dict[str, Any]:
    """Return everything the actor may view as a document ``apply`` takes; no secrets are in it."""
    document: dict[str, Any] = {"version": VERSION}
    home = call.actor.home
    scope = None if home is None else Scope(home.organization_id)
    keys = call.tx.list("virtual_key", scope=scope)
    with_keys = {stored.document["budget_id"] for stored in keys if stored.document.get("budget_id")}
    for section, resource in SECTIONS.items():
        found = [
            stored
            for stored in call.tx.list(resource.kind.name, scope=None if resource in _INSTALLATION else scope)
            if call.actor.views(resource.grants, reach_of(stored), owner_of(stored.kind, stored.document))
            and stored.id not in with_keys
        ]
        document[section] = [_exported(call, resource, stored) for stored in found]
    return document


def _exported(call: Call, resource: Resource, stored: StoredObject) -> dict[str, Any]:
    view = objects.view(call, resource, stored)
    entry = {name: value for name, value in view.items() if name in resource.members and value not in (None, {}, [])}
    for name in tuple(entry):
        if name.endswith("_nano_usd"):
            entry[name.replace("_nano_usd", "_usd")] = view[name.replace("_nano_usd", "_usd")]
            del entry[name]
    budget = view.get("budget")
    if budget is not None and resource.kind.name == "virtual_key":
        entry["budget"] = {name: budget[name] for name in ("window", "limit_usd", "on_breach", "timezone", "reserve")}
    entry = {name: value for name, value in entry.items() if not _is_hollow(value)}
    for path in (*resource.references, *(("scope_id",) if resource.kind.name == "budget" else ())):
        _put_names(call, path.split("."), entry)
    return entry


def _is_hollow(value: Any) -> bool:
    return isinstance(value, dict) and all(each is None or _is_hollow(each) for each in value.values())


def _put_names(call: Call, path: list[str], value: Any) -> None:
    """Put names in place of ids, where a name says the same."""
    name, rest = path[0].removesuffix("[]"), path[1:]
    if not isinstance(value, dict) or value.get(name) is None:
        return
    if isinstance(value[name], list):
        items = value[name] = list(value[name])
        for number, item in enumerate(items):
            if rest:
                items[number] = dict(item)
                _put_names(call, rest, items[number])
            else:
                items[number] = _reference(call, item)
    elif rest:
        value[name] = dict(value[name])
        _put_names(call, rest, value[name])
    else:
        value[name] = _reference(call, value[name])


def _reference(call: Call, object_id: str) -> str:
    kind = kind_of_id(object_id)
    stored = None if kind is None or object_id == EVERYWHERE else call.tx.get(kind, object_id)
    if stored is None:
        return object_id
    name = path_of(call, stored) if stored.kind in CONTAINERS else _name_of(stored)
    try:
        return name if name is not None and find(call, (stored.kind,), name).id == object_id else object_id
    except RefusedError:
        return object_id
