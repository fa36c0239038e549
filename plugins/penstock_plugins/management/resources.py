"""The resources of the API: each kind's path, permissions, and which of its members mean what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs

from penstock.governance import KINDS, Kind, Scope, StoredObject
from penstock_plugins.management.calls import Call
from penstock_plugins.management.permissions import EVERYWHERE

CONTAINERS = ("organization", "team", "project")
PRINCIPALS = ("user", "service_account")


@attrs.define(eq=False)
class Draft:
    """Hold an object on its way into the store."""

    resource: Resource
    id: str
    before: StoredObject | None
    """None where it is new."""
    document: Any
    scope: Scope | None
    """None is the whole installation."""
    extras: dict[str, Any] = attrs.field(repr=False)
    """Members of the body that are no members of the document, credentials among them."""
    once: dict[str, Any] = attrs.field(factory=dict, repr=False)
    """What this answer alone shows: secrets just made."""

    def set(self, **members: Any) -> None:
        """Change members of the document."""
        self.document = attrs.evolve(self.document, **members)


def _nothing(_call: Call, _draft: Draft) -> None:
    """Leave a draft as it is."""


def _no_more(_call: Call, _stored: StoredObject, _view: dict[str, Any]) -> None:
    """Show nothing beside the document."""


@attrs.frozen(eq=False, kw_only=True)
class Resource:
    """Say how one kind is served."""

    kind: Kind
    path: str
    """Below ``/api/v1``."""
    grants: str
    """The part of its permissions before the colon."""
    label: str = "name"
    """The member it may be named by in place of its id."""
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    """Other words for members, which take names as well as ids."""
    references: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict)
    """Members that hold ids, as ``entries[].binding_id``, and of which kinds."""
    locked: frozenset[str] = frozenset()
    """Members given at creation and never changed."""
    readonly: frozenset[str] = frozenset()
    """Members that clients see and never set."""
    extras: Mapping[str, type[Any]] = attrs.field(factory=dict)
    """Members of the body that are none of the document's."""
    derived: Mapping[str, Any] = attrs.field(factory=dict)
    """Members of the view that are none of the document's, with their types."""
    filters: tuple[str, ...] = ()
    """Members a list can be narrowed by."""
    intake: Callable[[Call, dict[str, Any]], None] = lambda _call, _members: None
    """Change a body before it is read."""
    fills: Mapping[str, Callable[[Call, Mapping[str, Any]], Any]] = attrs.field(factory=dict)
    """Members of a new object that are filled in where its body leaves them out."""
    check: Callable[[Call, Draft], None] = _nothing
    """Raise RefusedError for what cannot be, and put normal forms in place."""
    finish: Callable[[Call, Draft], None] = _nothing
    """Do what follows once the draft is in the store."""
    show: Callable[[Call, StoredObject, dict[str, Any]], None] = _no_more
    """Add derived members to a view."""
    archive: Callable[[Call, StoredObject], None] = lambda _call, _stored: None
    """Check, or do, what comes before archiving."""

    @property
    def members(self) -> tuple[str, ...]:
        """Return the members of the document clients may give."""
        hidden = self.readonly | (set(self.kind.secrets) - set(self.extras))
        return tuple(field.name for field in attrs.fields(self.kind.type) if field.name not in hidden)

    @property
    def known(self) -> tuple[str, ...]:
        """Return every member a body may have."""
        money = tuple(name.replace("_nano_usd", "_usd") for name in self.members if name.endswith("_nano_usd"))
        return (*self.members, *self.aliases, *(name for name in self.extras if name not in self.members), *money)

    def permission(self, action: str) -> str:
        """Return the permission an action needs."""
        return f"{self.grants}:{action}"


def owner_of(kind: str, document: Mapping[str, Any]) -> str | None:
    """Return whose own an object is."""
    return document.get("principal_id") if kind == "virtual_key" else None


def reach_of(stored: StoredObject) -> Scope | None:
    """Return the scope an object is judged by; None is the whole installation."""
    return None if stored.document.get("scope_id") == EVERYWHERE else stored.scope


def kind_of_id(object_id: str) -> str | None:
    """Return the kind an id belongs to, by its prefix."""
    for kind in KINDS.values():
        if object_id.startswith(kind.prefix):
            return kind.name
    return None
