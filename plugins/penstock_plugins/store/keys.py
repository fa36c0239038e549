"""Virtual keys in memory: found by hash, rebuilt one by one as they, their place or their groups change."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from sys import intern
from typing import Any, Literal

import attrs
import msgspec

from penstock import Fallback, GuardrailAttachment, KeyRecord, PolicyRules, Principal, RateLimits
from penstock.governance import StoredObject, read_time

_log = logging.getLogger("penstock.store")


class Tree:
    """Hold the organizations, teams and projects that are not archived."""

    def __init__(self) -> None:
        self._parents: dict[str, str | None] = {}
        self._children: defaultdict[str, set[str]] = defaultdict(set)

    def take(self, stored: StoredObject) -> Set[str]:
        """Learn what became of one of them; returns the projects whose place may be another now."""
        parent_id = self._parents.pop(stored.id, None)
        if parent_id is not None:
            self._children[parent_id].discard(stored.id)
        if stored.archived_at_ms is None:
            member = {"organization": None, "team": "organization_id", "project": "team_id"}[stored.kind]
            parent_id = self._parents[stored.id] = None if member is None else str(stored.document[member])
            if parent_id is not None:
                self._children[parent_id].add(stored.id)
        if stored.kind == "project":
            return {stored.id}
        children = self._children[stored.id]
        return children if stored.kind == "team" else {found for team in children for found in self._children[team]}

    def place_of(self, project_id: str) -> tuple[str, str] | None:
        """Return organization and team of a project; None where one of the three is archived."""
        team_id = self._parents.get(project_id)
        organization_id = None if team_id is None else self._parents.get(team_id)
        if team_id is None or organization_id is None or organization_id not in self._parents:
            return None
        return intern(organization_id), intern(team_id)


class StoredKeys:
    """Find keys by hash: a KeyDirectory and a Follower.

    What ``plan`` keeps is only read by the next ``plan``; answers come from one table, which changes in one step.
    """

    kinds = ("organization", "team", "project", "user", "service_account", "group", "virtual_key")

    def __init__(self) -> None:
        self._tree = Tree()
        self._keys: dict[str, tuple[Principal, tuple[KeyRecord, ...]]] = {}
        self._principals: set[str] = set()
        """Users and service accounts that are not archived: keys of others are found no longer."""
        self._members: dict[str, frozenset[str]] = {}
        self._groups: defaultdict[str, set[str]] = defaultdict(set)
        self._keys_of: defaultdict[str, set[str]] = defaultdict(set)
        """By project and by principal."""
        self._by_hash: dict[bytes, KeyRecord] = {}
        self._shown: dict[str, tuple[bytes, ...]] = {}
        """The hashes of each key that are in the table."""

    def find_key(self, key_hash: bytes) -> KeyRecord | None:
        return self._by_hash.get(key_hash)

    def all_principals(self) -> Iterable[Principal]:
        return ()

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        touched: set[str] = set()
        for stored in changed:
            if stored.kind == "virtual_key":
                self._take_key(stored)
                touched.add(stored.id)
        for stored in changed:
            if stored.kind != "virtual_key":
                owners = self._take_owner(stored)
                touched.update(*(self._keys_of[owner] for owner in owners if owner in self._keys_of))
        following = {key_id: self._place(key_id) for key_id in touched}
        return lambda: self._show({key_id: found for key_id, found in following.items() if found is not None})

    def _take_key(self, stored: StoredObject) -> None:
        before = self._keys.pop(stored.id, None)
        if before is not None:
            for owner in (before[0].project_id, before[0].principal_id):
                self._keys_of[owner].discard(stored.id)
        if stored.archived_at_ms is not None:
            return
        try:
            principal, records = _key_of(stored)
        except (KeyError, TypeError, ValueError) as error:
            _log.error("virtual key %s cannot be used: %r", stored.id, error)
            return
        self._keys[stored.id] = principal, records
        for owner in (principal.project_id, principal.principal_id):
            self._keys_of[owner].add(stored.id)

    def _take_owner(self, stored: StoredObject) -> Set[str]:
        """Return the projects and principals whose keys are to be looked at again."""
        if stored.kind == "group":
            return self._take_group(stored)
        if stored.kind not in {"user", "service_account"}:
            return self._tree.take(stored)
        was_there = stored.id in self._principals
        if stored.archived_at_ms is not None:
            self._principals.discard(stored.id)
        else:
            self._principals.add(intern(stored.id))
        return {stored.id} if was_there != (stored.id in self._principals) else set()

    def _take_group(self, stored: StoredObject) -> Set[str]:
        """Return the principals that came or went."""
        before = self._members.pop(stored.id, frozenset())
        after: frozenset[str] = frozenset()
        if stored.archived_at_ms is None:
            after = self._members[stored.id] = frozenset(map(intern, stored.document.get("member_ids", ())))
        for member in before - after:
            self._groups[member].discard(stored.id)
        for member in after - before:
            self._groups[member].add(intern(stored.id))
        return before ^ after

    def _place(self, key_id: str) -> tuple[KeyRecord, ...] | None:
        """Return what is found of a key now, or None where that is what was found before."""
        kept = self._keys.get(key_id)
        if kept is None:
            return ()
        principal, records = kept
        place = self._tree.place_of(principal.project_id)
        if place is None or principal.principal_id not in self._principals:
            return ()
        group_ids = tuple(sorted(self._groups.get(principal.principal_id, ())))
        if (principal.organization_id, principal.team_id, principal.group_ids) == (*place, group_ids):
            return None if self._by_hash.get(records[0].hash) is records[0] else records
        principal = attrs.evolve(principal, organization_id=place[0], team_id=place[1], group_ids=group_ids)
        records = tuple(attrs.evolve(record, principal=principal) for record in records)
        self._keys[key_id] = principal, records
        return records

    def _show(self, following: Mapping[str, tuple[KeyRecord, ...]]) -> None:
        """Put records in force: runs in the event loop, where keys are looked up, so nobody sees half of it."""
        for key_id in following:
            for shown in self._shown.pop(key_id, ()):
                self._by_hash.pop(shown, None)
        for key_id, records in following.items():
            for record in records:
                self._by_hash[record.hash] = record
            if records:
                self._shown[key_id] = tuple(record.hash for record in records)


def _key_of(stored: StoredObject) -> tuple[Principal, tuple[KeyRecord, ...]]:
    """Return what a document says, before it is known where its project is."""
    document = stored.document
    principal = Principal(
        virtual_key_id=stored.id,
        key_name=document["name"],
        display_prefix=document.get("display_prefix", ""),
        bindings=tuple(map(intern, document.get("provider_bindings", ()))),
        principal_id=intern(document["principal_id"]),
        project_id=intern(document["project_id"]),
        model_aliases=document.get("model_aliases") or {},
        models_allowed=_optional_tuple(document.get("models_allowed")),
        usage_frame=document.get("usage_frame"),
        tags=tuple(document.get("tags", ())),
        metadata=document.get("metadata") or {},
        rate_limits=limits_of(document),
        revision=stored.version,
        **_policies_of(document),
    )
    status = document.get("status", "active")
    expires_at = _optional_time(document.get("expires_at"))
    records = [KeyRecord(bytes.fromhex(document["hash"]), principal, status, expires_at)]
    previous, works_until = document.get("previous_hash"), _optional_time(document.get("previous_expires_at"))
    if previous and works_until is not None:
        records.append(KeyRecord(bytes.fromhex(previous), principal, status, expires_at, works_until))
    return principal, tuple(records)


@attrs.frozen(kw_only=True)
class _Policies:
    """The members of a key's document that say what becomes of its requests."""

    routing_policy_id: str | None = None
    fallback: Fallback | None = None
    cache_mode: Literal["respect", "disable", "force"] | None = None
    policy_rules: PolicyRules = PolicyRules()
    guardrails: tuple[GuardrailAttachment, ...] = ()


_MEMBERS = tuple(field.name for field in attrs.fields(_Policies))


def _policies_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return these members of a key; raises ValueError for what cannot be read, so that the key is refused."""
    found = {name: document[name] for name in _MEMBERS if document.get(name)}
    if not found:
        return {}
    try:
        policies = msgspec.convert(found, _Policies, strict=True)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    return {name: getattr(policies, name) for name in found}


def limits_of(document: Mapping[str, Any]) -> RateLimits | None:
    """Return the rate limits of a document; None where it has none."""
    limits = {name: bound for name, bound in (document.get("rate_limits") or {}).items() if bound is not None}
    return RateLimits(**limits) if limits else None


def _optional_tuple(value: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(value)


def _optional_time(value: str | None) -> float | None:
    return None if value is None else read_time(value)
