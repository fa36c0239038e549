"""Where objects are: names and paths resolved to objects in sight, and the scope of what is made.

Where a slug or name alone is not enough, the slugs of what holds the object may stand before it, as many as are needed:
``team/project``, ``organization/team/project``, ``project/service-account``, ``team/project/key``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from penstock.governance import Scope, StoredObject
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import MAX_ITEMS
from penstock_plugins.management.faults import RefusedError, bad_field, not_found
from penstock_plugins.management.permissions import covers
from penstock_plugins.management.resources import CONTAINERS, kind_of_id, owner_of, reach_of

GRANTS = {
    "organization": "organization",
    "team": "organization",
    "project": "organization",
    "user": "organization",
    "service_account": "organization",
    "group": "organization",
    "provider_binding": "gatewayProviders",
    "virtual_key": "virtualKeys",
    "budget": "gatewayBudgets",
    "routing_policy": "routingPolicies",
    "cache_rule": "gatewayCacheRules",
    "evaluator": "gatewayGuardrails",
    "guardrail": "gatewayGuardrails",
    "webhook": "webhooks",
    "api_token": "apiTokens",
    "price_override": "gatewayProviders",
}
"""The part before the colon of each kind's permissions."""
_DEEPEST = 3
"""How many levels a path may have above what it names."""
_LABELS = {"organization", "team", "project", "user", "service_account", "group"}


def label_of(kind: str) -> str:
    """Return the member a kind's objects are named by."""
    if kind == "price_override":
        return "external_id"
    return "slug" if kind in _LABELS else "name"


def spoken(kind: str) -> str:
    return kind.replace("_", " ")


def find(call: Call, kinds: Sequence[str], text: str, *, near: Scope | None = None) -> StoredObject:
    """Return the object in sight that an id, name, slug or path names.

    Where a name is taken several times, the one nearest around ``near`` is meant. Raises RefusedError.
    """
    kind = kind_of_id(text)
    if kind is not None and kind in kinds:
        stored = call.tx.get(kind, text)
        if stored is not None and _in_sight(call, stored):
            return stored
    found = [stored for kind in kinds for stored in _named(call, kind, text)]
    if near is not None and len(found) > 1:
        around = [stored for stored in found if covers(reach_of(stored), near)]
        most = max((_depth(stored.scope) for stored in around), default=0)
        found = [stored for stored in around if _depth(stored.scope) == most] or found
    if len(found) > 1:
        ids = ", ".join(stored.id for stored in found[:5])
        each = ", ".join(f"{stored.id} ({path_of(call, stored)})" for stored in found[:5])
        message = f"{text[:200]!r} names several: {each}. Give the id, or the path."
        raise RefusedError("bad_request", message, meta={"ids": ids})
    if not found:
        raise not_found(f"{' or '.join(spoken(kind) for kind in kinds)} {text[:200]!r}")
    return found[0]


def _named(call: Call, kind: str, text: str) -> list[StoredObject]:
    scope = None
    if call.actor.home is not None:
        scope = Scope(call.actor.home.organization_id)
    for parents, name in _readings(kind, text):
        found = call.tx.list(kind, scope=scope, where={label_of(kind): name}, limit=1000)
        named = [stored for stored in found if _in_sight(call, stored) and _is_below(call, stored, parents)]
        if named:
            return named
    return []


def _readings(kind: str, text: str) -> Iterator[tuple[Sequence[str], str]]:
    """Yield the ways a text may be read: slugs of parents, and the name; names, unlike slugs, may hold a slash."""
    parts = text.split("/")
    if kind in _LABELS:
        if len(parts) <= _DEEPEST + 1:
            yield parts[:-1], parts[-1]
        return
    for depth in range(min(len(parts), _DEEPEST + 1)):
        yield parts[:depth], "/".join(parts[depth:])


def _is_below(call: Call, stored: StoredObject, parents: Sequence[str]) -> bool:
    """Say whether the slugs of an object's parents end as the path says."""
    for slug in reversed(parents):
        parent = parent_of(call, stored)
        if parent is None or parent.document.get("slug") != slug:
            return False
        stored = parent
    return True


def parent_of(call: Call, stored: StoredObject) -> StoredObject | None:
    """Return the organization, team or project that holds an object; None for an organization."""
    scope, kind = stored.scope, stored.kind
    if kind == "organization":
        return None
    if scope.project_id is not None and kind != "project":
        return call.tx.get("project", scope.project_id)
    if scope.team_id is not None and kind != "team":
        return call.tx.get("team", scope.team_id)
    return call.tx.get("organization", scope.organization_id)


def path_of(call: Call, stored: StoredObject) -> str:
    """Return the path of an object: slugs from the organization down, and its name."""
    parent = parent_of(call, stored)
    name = str(stored.document.get(label_of(stored.kind)))
    return name if parent is None else f"{path_of(call, parent)}/{name}"


def _in_sight(call: Call, stored: StoredObject) -> bool:
    owner = owner_of(stored.kind, stored.document)
    return call.actor.sees(GRANTS[stored.kind], reach_of(stored), owner)


def _depth(scope: Scope) -> int:
    return (scope.team_id is not None) + (scope.project_id is not None)


def resolve(
    call: Call, references: Mapping[str, Sequence[str]], body: dict[str, Any], near: Scope | None = None
) -> None:
    """Put ids in place of names in the members of a body that refer to others. Raises RefusedError naming the member.

    What is not where a reference should be is left for the structuring to refuse.
    """
    for path, kinds in references.items():
        _resolve_at(call, path.split("."), kinds, body, near, "")


def _resolve_at(  # noqa: PLR0917 - it calls itself
    call: Call, path: list[str], kinds: Sequence[str], value: Any, near: Scope | None, where: str
) -> None:
    name, rest = path[0], path[1:]
    many = name.endswith("[]")
    name = name.removesuffix("[]")
    if not isinstance(value, dict) or value.get(name) is None:
        return
    place = f"{where}{name}"
    if many and isinstance(value[name], list):
        if len(value[name]) > MAX_ITEMS:
            raise bad_field(place, f"holds at most {MAX_ITEMS}, not {len(value[name])}")
        items = value[name] = list(value[name])
        for number, item in enumerate(items):
            if rest:
                _resolve_at(call, rest, kinds, item, near, f"{place}[{number}].")
            elif isinstance(item, str):
                items[number] = _id_of(call, kinds, item, near, f"{place}[{number}]")
    elif rest:
        _resolve_at(call, rest, kinds, value[name], near, f"{place}.")
    elif isinstance(value[name], str):
        value[name] = _id_of(call, kinds, value[name], near, place)


def _id_of(call: Call, kinds: Sequence[str], text: str, near: Scope | None, where: str) -> str:
    try:
        stored = _container(call, text) if tuple(kinds) == CONTAINERS else find(call, kinds, text, near=near)
    except RefusedError as error:
        raise RefusedError(error.code, f"{where}: {error.message}", meta={**error.meta, "field": where}) from None
    if stored.archived_at_ms is not None:
        raise bad_field(where, f"{spoken(stored.kind)} {stored.id} is archived")
    return stored.id


def _container(call: Call, text: str) -> StoredObject:
    """Return the organization, team or project that is named; a path from the top is meant before others."""
    if kind_of_id(text) in CONTAINERS:
        return find(call, CONTAINERS, text)
    for kind in CONTAINERS[min(text.count("/"), 2) :]:
        try:
            return find(call, (kind,), text)
        except RefusedError as error:
            if error.code != "not_found":
                raise
    raise not_found(f"organization, team or project {text[:200]!r}")


def scope_of(call: Call, container_id: str) -> Scope:
    """Return the scope that an organization, team or project is. Raises RefusedError."""
    kind = kind_of_id(container_id)
    stored = call.tx.get(kind, container_id) if kind in CONTAINERS else None
    if stored is None:
        raise not_found(f"organization, team or project {container_id[:200]!r}")
    if stored.kind == "organization":
        return Scope(stored.id)
    if stored.kind == "team":
        return Scope(stored.document["organization_id"], stored.id)
    return Scope(scope_of(call, stored.document["team_id"]).organization_id, stored.document["team_id"], stored.id)


def find_default(call: Call, kind: str, scope: Scope | None) -> StoredObject | None:
    """Return the team, project or user that is meant where none is named.

    It is the one the actor's scope names, else the one whose slug is ``default``, else the only one.
    """
    own = None if scope is None else {"organization": scope.organization_id, "team": scope.team_id,
                                      "project": scope.project_id}.get(kind)  # fmt: skip
    if own is not None:
        return call.tx.get(kind, own)
    within = scope or Scope(call.actor.organization_id)
    found = call.tx.list(kind, scope=within, where={"slug": "default"}, limit=10)
    if not found:
        found = call.tx.list(kind, scope=within, limit=2)
        found = found if len(found) == 1 else []
    if len(found) > 1 and kind == "project":
        team = find_default(call, "team", scope)
        found = [stored for stored in found if team is not None and stored.document["team_id"] == team.id]
    return found[0] if found else None
