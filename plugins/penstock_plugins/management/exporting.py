"""The store's objects as one document that ``declarative.apply`` takes: names in place of ids, no secrets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.governance import Scope, StoredObject
from penstock_plugins.management import objects
from penstock_plugins.management.budgets import BUDGETS, SUBJECTS
from penstock_plugins.management.calls import Call
from penstock_plugins.management.catalogue import PRICE_OVERRIDES
from penstock_plugins.management.declarative import SECTIONS, VERSION, name_of
from penstock_plugins.management.faults import RefusedError
from penstock_plugins.management.permissions import EVERYWHERE
from penstock_plugins.management.places import find, path_of
from penstock_plugins.management.resources import CONTAINERS, Resource, kind_of_id, owner_of, reach_of

_INSTALLATION = (PRICE_OVERRIDES,)
"""What counts for every organization, in whichever it is kept."""
_OF_THE_KEY = ("scope", "scope_id")
"""Members of a budget that one given with a key does not have."""


def export(call: Call) -> dict[str, Any]:
    """Return everything the actor may view as a document ``apply`` takes; no secrets are in it.

    Keys that work no more, and what is theirs alone, are left out: applied elsewhere they would be new ones that do.
    """
    document: dict[str, Any] = {"version": VERSION}
    home = call.actor.home
    scope = None if home is None else Scope(home.organization_id)
    keys = call.tx.list("virtual_key", scope=scope)
    ended = {stored.id for stored in keys if stored.document.get("status") == "revoked"}
    ended |= {stored.id for stored in keys if objects.is_expired(call, stored)}
    hidden = ended | {stored.document["budget_id"] for stored in keys if stored.document.get("budget_id")}
    for section, resource in SECTIONS.items():
        entries = [
            _exported(call, resource, stored)
            for stored in call.tx.list(resource.kind.name, scope=None if resource in _INSTALLATION else scope)
            if call.actor.views(resource.grants, reach_of(stored), owner_of(stored.kind, stored.document))
            and stored.id not in hidden
            and _named_keys(stored).isdisjoint(ended)
        ]
        document[section] = sorted(entries, key=_order)
    return document


def _named_keys(stored: StoredObject) -> set[str]:
    """Return the keys without which an object has no sense."""
    match = stored.document.get("match") or {}
    named = (stored.document.get("scope_id"), match.get("virtual_key_id"))
    return {object_id for object_id in named if object_id is not None}


def _order(entry: dict[str, Any]) -> tuple[str, bytes]:
    """Order entries by name, so that documents of the same objects are the same."""
    return str(entry.get("slug") or entry.get("name") or ""), msgspec.json.encode(entry, order="deterministic")


def _exported(call: Call, resource: Resource, stored: StoredObject) -> dict[str, Any]:
    view = objects.view(call, resource, stored)
    entry = _members(call, resource, view)
    budget = view.get("budget") if resource.kind.name == "virtual_key" else None
    if budget is not None:
        inline = _members(call, BUDGETS, budget)
        entry["budget"] = {name: value for name, value in inline.items() if name not in _OF_THE_KEY}
    if view.get("status") == "disabled":
        entry["status"] = "disabled"
    return entry


def _members(call: Call, resource: Resource, view: dict[str, Any]) -> dict[str, Any]:
    """Return what a body may hold of a view, with names in place of ids, and without what is so anyhow."""
    usual = objects.defaults_of(resource)
    entry: dict[str, Any] = {}
    for name in resource.members:
        value = view.get(name)
        if value == usual.get(name) and (value in (None, {}, []) or _is_hollow(value)):
            continue
        if name.endswith("_nano_usd"):
            name = name.replace("_nano_usd", "_usd")  # noqa: PLW2901
            value = view[name]
        entry[name] = value
    for path, kinds in resource.references.items():
        _put_names(call, path.split("."), entry, kinds or SUBJECTS.get(str(view.get("scope")), ()))
    return entry


def _is_hollow(value: Any) -> bool:
    return isinstance(value, dict) and all(each is None or _is_hollow(each) for each in value.values())


def _put_names(call: Call, path: list[str], value: Any, kinds: Sequence[str]) -> None:
    """Put names in place of ids, where a name says the same."""
    name, rest = path[0].removesuffix("[]"), path[1:]
    if not isinstance(value, dict) or value.get(name) is None:
        return
    if isinstance(value[name], list):
        items = value[name] = list(value[name])
        for number, item in enumerate(items):
            if rest:
                items[number] = dict(item)
                _put_names(call, rest, items[number], kinds)
            else:
                items[number] = _reference(call, item, kinds)
    elif rest:
        value[name] = dict(value[name])
        _put_names(call, rest, value[name], kinds)
    else:
        value[name] = _reference(call, value[name], kinds)


def _reference(call: Call, object_id: str, kinds: Sequence[str]) -> str:
    """Return the name of an object, its path where others are called the same, its id where that does not help."""
    kind = kind_of_id(object_id)
    stored = None if kind is None or object_id == EVERYWHERE else call.tx.get(kind, object_id)
    if stored is None:
        return object_id
    is_container = stored.kind in CONTAINERS  # whose paths, from the top, say by their length what they name
    if is_container or not kinds:
        kinds = (stored.kind,)
    for name in (None if is_container else name_of(stored), path_of(call, stored)):
        try:
            if name is not None and find(call, kinds, name).id == object_id:
                return name
        except RefusedError:
            continue
    return object_id
