"""From what a client sends to members of a document: aliases, money, names in place of ids, defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.governance import Scope, read_usd, write_usd
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import refuse_unknown
from penstock_plugins.management.faults import bad_field
from penstock_plugins.management.permissions import EVERYWHERE, place_of
from penstock_plugins.management.places import find, find_default, resolve, scope_of
from penstock_plugins.management.resources import CONTAINERS, Resource, kind_of_id

PLACEMENT = ("organization_id", "team_id", "project_id", "scope_id")
"""Members that say where an object is."""


def read_members(call: Call, resource: Resource, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body under the names of the document's members, placed, without resolving other references."""
    members = dict(body)
    for name in body:
        if name in resource.readonly and name not in resource.extras:
            raise bad_field(name, "is set by the gateway and cannot be given")
    refuse_unknown(members, resource.known)
    resource.intake(call, members)
    for alias, member in resource.aliases.items():
        if alias in members:
            if member in members:
                raise bad_field(alias, f"give either {alias} or {member}, not both")
            members[member] = _by_alias(call, alias, member, members.pop(alias))
    read_money(members, resource.members)
    _resolve_placement(call, resource, members)
    return members


def _by_alias(call: Call, alias: str, member: str, value: Any) -> Any:
    if member == "scope_id" and alias in CONTAINERS and isinstance(value, str):
        return find(call, (alias,), value).id
    return value


def read_money(members: dict[str, Any], known: tuple[str, ...]) -> None:
    """Put nano-USD in place of decimal strings: ``limit_usd`` becomes ``limit_nano_usd``."""
    for name in known:
        if not name.endswith("_nano_usd"):
            continue
        short = name.replace("_nano_usd", "_usd")
        if short not in members:
            continue
        if name in members:
            raise bad_field(short, f"give either {short} or {name}, not both")
        value = members.pop(short)
        try:
            members[name] = None if value is None else read_usd(value)
        except ValueError as error:
            raise bad_field(short, str(error)) from None


def show_money(view: dict[str, Any]) -> dict[str, Any]:
    """Return a view with a decimal string before each amount in nano-USD."""
    result: dict[str, Any] = {}
    for name, value in view.items():
        if name.endswith("_nano_usd"):
            result[name.replace("_nano_usd", "_usd")] = None if value is None else write_usd(value)
        result[name] = value
    return result


def _resolve_placement(call: Call, resource: Resource, members: dict[str, Any]) -> None:
    placed = {name: kinds for name, kinds in resource.references.items() if name in PLACEMENT and kinds}
    if members.get("scope_id") == EVERYWHERE and "scope_id" in placed:
        if resource.kind.name != "api_token":
            raise bad_field("scope_id", f"must be an {', '.join(CONTAINERS[:-1])} or {CONTAINERS[-1]}")
        del placed["scope_id"]
    resolve(call, placed, members)


def read_references(call: Call, resource: Resource, members: dict[str, Any], near: Scope | None) -> None:
    """Put ids in place of the names in all other members."""
    others = {name: kinds for name, kinds in resource.references.items() if name not in PLACEMENT}
    resolve(call, others, members, near)


def fill_placement(call: Call, resource: Resource, members: dict[str, Any]) -> None:
    """Say where a new object goes, as far as its body does not. Raises RefusedError where that is not clear."""
    home = call.actor.home
    for name in PLACEMENT:
        if name not in resource.references or members.get(name) is not None:
            continue
        if name == "organization_id":
            members[name] = call.actor.organization_id
        elif name == "scope_id":
            if resource.kind.name == "price_override":
                members[name] = EVERYWHERE
            elif resource.kind.name != "budget":
                members[name] = call.actor.organization_id if home is None else place_of(home)
        else:
            kind = name.removesuffix("_id")
            default = find_default(call, kind, home)
            if default is None:
                raise bad_field(name, f"is required: there is no {kind} that is meant without it")
            members[name] = default.id


def scope_in(call: Call, resource: Resource, object_id: str, members: Mapping[str, Any]) -> Scope | None:
    """Return the scope that an object with these members is in; None is the whole installation."""
    kind = resource.kind.name
    if kind == "organization":
        return Scope(object_id)
    for name in PLACEMENT:
        value = members.get(name) if name in resource.references else None
        if value is None:
            continue
        if value == EVERYWHERE and name == "scope_id":
            return None
        if not isinstance(value, str):
            raise bad_field(name, "must be a string")
        outer = scope_of(call, value) if kind_of_id(value) in CONTAINERS else _scope_of_subject(call, value)
        if kind == "team":
            return Scope(outer.organization_id, object_id)
        return Scope(outer.organization_id, outer.team_id, object_id) if kind == "project" else outer
    raise bad_field("scope_id", "is required")


def _scope_of_subject(call: Call, object_id: str) -> Scope:
    kind = kind_of_id(object_id)
    stored = None if kind is None else call.tx.get(kind, object_id)
    if stored is None:
        raise bad_field("scope_id", f"there is no {object_id[:80]!r}")
    return stored.scope
