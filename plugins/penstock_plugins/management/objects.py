"""Create, read, list, change and archive objects of every kind: the one way, for REST and for declarative files.

Each function checks the permissions at every scope it touches and writes the audit entry in the same transaction.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from penstock.governance import ConflictError, Scope, StoredObject, new_id, unique_values
from penstock_plugins.management import bodies
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import merged, structure, unstructure
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.permissions import missing
from penstock_plugins.management.places import find, spoken
from penstock_plugins.management.resources import Draft, Resource, kind_of_id, owner_of, reach_of
from penstock_plugins.management.rules import check_bounds
from penstock_plugins.management.times import read_time, write_time

_PAGE = 200


def view(call: Call, resource: Resource, stored: StoredObject) -> dict[str, Any]:
    """Return an object as the API shows it, without secrets."""
    shown = {"id": stored.id, **bodies.show_money(_members(resource, stored.document))}
    resource.show(call, stored, shown)
    archived = stored.archived_at_ms
    shown["version"] = stored.version
    shown["created_at"] = write_time(stored.created_at_ms)
    shown["updated_at"] = write_time(stored.updated_at_ms)
    shown["archived_at"] = None if archived is None else write_time(archived)
    return shown


def _members(resource: Resource, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return every member that may be seen, those an older version did not write as their defaults."""
    found = {**defaults_of(resource), **document}
    return {
        field.name: found[field.name]
        for field in attrs.fields(resource.kind.type)
        if field.name not in resource.kind.secrets
    }


@functools.cache
def defaults_of(resource: Resource) -> dict[str, Any]:
    """Return what each member is where nothing is said."""
    found: dict[str, Any] = {}
    for field in attrs.fields(resource.kind.type):
        default: Any = field.default
        if default is attrs.NOTHING:
            default = None
        elif isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = default.factory()
        found[field.name] = unstructure(default) if attrs.has(type(default)) else default
        if isinstance(found[field.name], tuple):
            found[field.name] = list(found[field.name])
    return found


def get(call: Call, resource: Resource, name: str) -> StoredObject:
    """Return an object in sight by id or name. Raises RefusedError."""
    stored = find(call, (resource.kind.name,), name)
    owner = owner_of(stored.kind, stored.document)
    if not call.actor.views(resource.grants, reach_of(stored), owner):
        raise missing(resource.permission("view"), reach_of(stored))
    return stored


def to_change(call: Call, resource: Resource, name: str, action: str, version: int | None = None) -> StoredObject:
    """Return an active object the actor may do ``action`` to, at the version he knows. Raises RefusedError."""
    stored = find(call, (resource.kind.name,), name)
    call.actor.require(resource.permission(action), reach_of(stored), owner_of(stored.kind, stored.document))
    if stored.archived_at_ms is not None:
        raise RefusedError("conflict", f"{spoken(stored.kind)} {stored.id} is archived and cannot be changed.")
    if version is not None and version != stored.version:
        message = f"{spoken(stored.kind)} {stored.id} is at version {stored.version}, not {version}; read it again."
        raise RefusedError("precondition_failed", message, meta={"version": stored.version})
    return stored


def browse(
    call: Call, resource: Resource, filters: Mapping[str, str], *, after: str | None, limit: int, archived: bool = False
) -> tuple[list[dict[str, Any]], str | None]:
    """Return a page of the objects the actor may view, and the id it ends with if there are more."""
    found = list(_pages(call, resource, filters, after, limit + 1, archived=archived))
    shown = [view(call, resource, stored) for stored in found[:limit]]
    return shown, found[limit - 1].id if len(found) > limit else None


def _pages(
    call: Call, resource: Resource, filters: Mapping[str, str], after: str | None, count: int, *, archived: bool
) -> Iterator[StoredObject]:
    kind = resource.kind.name
    home = call.actor.home
    scope = None if home is None else Scope(home.organization_id)
    where = dict(filters)
    if kind == "virtual_key":
        owner = call.actor.owner_for(resource.permission("view"))
        if owner is not None:
            if where.get("principal_id", owner) != owner:
                return
            where["principal_id"] = owner
    wants_expired = kind == "virtual_key" and where.get("status") in ("expired", "active")
    wanted = where.get("status")
    if wants_expired:
        where["status"] = "active"
    while count:
        page = call.tx.list(kind, scope=scope, where=where, after=after, limit=_PAGE, include_archived=archived)
        for stored in page:
            if wants_expired and is_expired(call, stored) != (wanted == "expired"):
                continue
            if call.actor.views(resource.grants, reach_of(stored), owner_of(kind, stored.document)):
                yield stored
                count -= 1
                if not count:
                    return
        if len(page) < _PAGE:
            return
        after = page[-1].id


def is_expired(call: Call, stored: StoredObject) -> bool:
    """Say whether an object's ``expires_at`` has passed."""
    expires_at = stored.document.get("expires_at")
    return expires_at is not None and read_time(expires_at) * 1000 <= call.now_ms


def create(call: Call, resource: Resource, body: Mapping[str, Any]) -> tuple[StoredObject, dict[str, Any]]:
    """Make an object and return it, and what only this answer shows. Raises RefusedError."""
    members = bodies.read_members(call, resource, body)
    members = merged({}, members)  # null clears, here as in a change
    bodies.fill_placement(call, resource, members)
    object_id = new_id(resource.kind.prefix)
    for name, fill in resource.fills.items():
        if name not in members and (found := fill(call, members)) is not None:
            members[name] = found
    scope = bodies.scope_in(call, resource, object_id, members)
    require_create(call, resource, scope, members)
    bodies.read_references(call, resource, members, scope)
    extras = {name: members.pop(name) for name in resource.extras if name in members}
    draft = Draft(resource, object_id, None, structure(members, resource.kind.type, resource.known), scope, extras)
    require_create(call, resource, scope, members)
    check_bounds(draft)
    resource.check(call, draft)
    document = unstructure(draft.document)
    stored_in = scope or Scope(call.actor.organization_id)
    unique = unique_values(resource.kind, document, stored_in)
    with_conflict = functools.partial(call.change.insert, resource.kind.name, object_id, stored_in, document, unique)
    stored = _stored(call, with_conflict)
    after = _members(resource, stored.document)
    call.audit(resource.permission("create"), (resource.kind.name, object_id, stored_in), before=None, after=after)
    resource.finish(call, draft)
    return call.tx.get(resource.kind.name, object_id) or stored, draft.once


def require_create(call: Call, resource: Resource, scope: Scope | None, members: Mapping[str, Any]) -> None:
    """Raise RefusedError unless such an object may be made there; a place out of sight does not exist."""
    owner = owner_of(resource.kind.name, members)
    # An organization is made in the installation, a team in its organization, a project in its team.
    kind = resource.kind.name
    if kind == "organization":
        scope = None
    elif kind in ("team", "project") and scope is not None:
        scope = Scope(scope.organization_id, scope.team_id if kind == "project" else None)
    call.actor.require(resource.permission("create"), scope, owner)


def update(
    call: Call,
    resource: Resource,
    name: str,
    patch: Mapping[str, Any],
    *,
    version: int | None = None,
    action: str = "update",
) -> tuple[StoredObject, dict[str, Any]]:
    """Put a patch (RFC 7396) over an object and return it; one that changes nothing makes no new version."""
    stored = to_change(call, resource, name, action, version)
    members = bodies.read_members(call, resource, patch)
    bodies.read_references(call, resource, members, reach_of(stored))
    extras = {each: members.pop(each) for each in resource.extras if each in members}
    document = structure(merged(stored.document, members), resource.kind.type, resource.known)
    for member in sorted(resource.locked & members.keys()):
        if unstructure(document)[member] != _members(resource, stored.document).get(member):
            raise bad_field(member, "cannot be changed once the object is there")
    draft = Draft(resource, stored.id, stored, document, reach_of(stored), extras)
    check_bounds(draft)
    resource.check(call, draft)
    # Whose own it is after the change counts as well as whose it was.
    call.actor.require(resource.permission(action), draft.scope, owner_of(stored.kind, unstructure(draft.document)))
    return save(call, draft, action), draft.once


def save(call: Call, draft: Draft, action: str) -> StoredObject:
    """Store a draft in place of what was there before, with its audit entry."""
    before = draft.before
    assert before is not None, "a new object is inserted"
    resource = draft.resource
    document = unstructure(draft.document)
    stored = before
    if document != {**defaults_of(resource), **before.document}:
        unique = unique_values(resource.kind, document, before.scope)
        stored = _stored(call, lambda: call.change.replace(before, document, unique))
        call.audit(
            resource.permission(action),
            (resource.kind.name, before.id, before.scope),
            before=_members(resource, before.document),
            after=_members(resource, document),
        )
    resource.finish(call, draft)
    return call.tx.get(resource.kind.name, before.id) or stored


def archive(call: Call, resource: Resource, name: str, *, version: int | None = None) -> StoredObject:
    """Archive an object: it stays readable by id, and its names are free again."""
    return put_away(call, resource, to_change(call, resource, name, "delete", version))


def put_away(call: Call, resource: Resource, stored: StoredObject) -> StoredObject:
    """Archive an object whose archiving is permitted, or follows from one that is."""
    resource.archive(call, stored)
    archived = _stored(call, lambda: call.change.archive(stored))
    before = _members(resource, stored.document)
    place = (resource.kind.name, stored.id, stored.scope)
    call.audit(resource.permission("delete"), place, before=before, after=None)
    return archived


def refuse_with_children(call: Call, stored: StoredObject, kinds: Sequence[str]) -> None:
    """Raise RefusedError where something active still lives in a container."""
    for kind in kinds:
        inside = call.tx.list(kind, where={f"{stored.kind}_id": stored.id}, limit=1)
        if inside:
            message = f"{spoken(stored.kind)} {stored.id} still has {spoken(kind)} {inside[0].id}; archive that first."
            raise RefusedError("conflict", message, meta={"id": inside[0].id})


def _stored(call: Call, write: Callable[[], StoredObject]) -> StoredObject:
    """Return what a write returns. Raises RefusedError for a conflict, without showing what is out of sight."""
    try:
        return write()
    except ConflictError as error:
        if error.field is None:
            raise RefusedError("precondition_failed", "The object changed meanwhile; read it again.") from None
        meta: dict[str, Any] = {"field": error.field}
        if error.other_id is not None and _is_in_sight(call, error.other_id):
            meta["id"] = error.other_id
        other = f" by {meta['id']}" if "id" in meta else ""
        raise RefusedError("conflict", f"{error.field}: is taken{other}", meta=meta) from None


def _is_in_sight(call: Call, object_id: str) -> bool:
    kind = kind_of_id(object_id)
    if kind is None:
        return False
    try:
        return find(call, (kind,), object_id).id == object_id
    except RefusedError:
        return False
