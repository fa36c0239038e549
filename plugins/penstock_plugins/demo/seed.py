"""What the demo puts into its store: its virtual key, a second team, and a binding for each vendor.

A vendor whose key is in the environment is bound for real; the mock stands in for the others, under their names, until
a key comes: with a later start, or by ``penstock providers create``. What its user has changed or archived stays so.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar

import attrs

from penstock import Services, display_prefix, hash_key, hookimpl
from penstock.governance import (
    KINDS,
    AuditEntry,
    LocalAdmin,
    ObjectStore,
    Reading,
    Scope,
    StoredObject,
    Transaction,
    Vault,
    new_id,
    unique_values,
)
from penstock.governance.objects import Binding, Team, VirtualKey
from penstock_plugins.demo.vendors import BASE_URLS, STAND_IN, VENDORS

_LAST = 100
"""Priority of the mock that answers what nobody else does."""


@attrs.define
class Planted:
    """Tell the demo what its store holds, once the gateway runs."""

    virtual_key: str = attrs.field(repr=False)
    types: dict[str, str] = attrs.field(factory=dict)
    """Who answers for each vendor: itself or the mock."""
    outdated: list[str] = attrs.field(factory=list)
    """Vendors for which the environment has another key than the store."""
    admin_token: str | None = attrs.field(default=None, repr=False)


@attrs.define(eq=False)
class Seed:
    """Fill the store before anybody is served."""

    planted: ClassVar[Planted]

    services: Services

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Plant what is missing."""
        store = self.services.get(ObjectStore)  # type: ignore[type-abstract]
        vault = self.services.get(Vault)  # type: ignore[type-abstract]
        local = self.services.find(LocalAdmin)  # type: ignore[type-abstract]
        await store.transact(lambda tx: _Planting(tx, vault, self.planted).plant())
        self.planted.admin_token = None if local is None else local.admin_token
        yield


def seed_for(planted: Planted) -> type[Seed]:
    """Return the plugin that plants this."""
    return type("Seed", (Seed,), {"planted": planted})


@attrs.frozen(eq=False)
class _Planting:
    """One transaction."""

    tx: Transaction
    vault: Vault
    planted: Planted

    def plant(self) -> None:
        organization = self.tx.find("organization", "slug", ["default"])
        if organization is None:
            return  # renamed or archived: the store is its user's now
        scope = Scope(organization.id)
        if not _ever(self.tx, "team", scope, slug="engineering"):
            team_id = new_id("team_")
            team = Team(slug="engineering", name="Engineering", organization_id=organization.id)
            self._insert("team", Scope(organization.id, team_id), team, "organization:create", team_id)
        for name in (*VENDORS, "mock"):
            self._bind(scope, name)
        self._plant_key(organization)

    def _bind(self, scope: Scope, name: str) -> None:
        active = self.tx.find("provider_binding", "name", [scope.organization_id, name])
        if active is None and not _ever(self.tx, "provider_binding", scope, name=name):
            is_vendor = name in VENDORS
            mock = Binding(
                name=name,
                type="mock",
                scope_id=scope.organization_id,
                fallback_priority=0 if is_vendor else _LAST,
                external_id=STAND_IN + name if is_vendor else None,
            )
            active = self._insert("provider_binding", scope, mock, "gatewayProviders:create")
        if active is not None and name in VENDORS:
            active = self._follow_environment(active, name)
            self.planted.types[name] = str(active.document["type"])

    def _follow_environment(self, active: StoredObject, name: str) -> StoredObject:
        """Return the binding, the real one where it was a stand-in and the environment has a key."""
        credential = os.environ.get(VENDORS[name])
        if not credential:
            return active
        if not str(active.document.get("external_id") or "").startswith(STAND_IN):
            sealed = active.document.get("credential")
            stored = self.vault.open(sealed, context=_context(active.id)) if sealed else None
            if stored != credential and active.document["type"] == name:
                self.planted.outdated.append(name)
            return active
        real = {
            **active.document,
            "type": name,
            "external_id": None,
            "credential": self.vault.seal(credential, context=_context(active.id)),
            "credential_last4": credential[-4:] if len(credential) >= 8 else None,
            "base_url": os.environ.get(BASE_URLS[name], ""),
        }
        return self._replace(active, real, "gatewayProviders:update")

    def _plant_key(self, organization: StoredObject) -> None:
        secret = self.planted.virtual_key
        key_hash = hash_key(self.vault.pepper, secret.encode()).hex()
        project, user = self._default_project(organization), self._find_in(organization, "user")
        if project is None or user is None or _ever(self.tx, "virtual_key", Scope(organization.id), hash=key_hash):
            return
        named = self.tx.find("virtual_key", "name", [project.id, "demo"])
        if named is not None:  # the file with its secret was lost
            fresh = {**named.document, "hash": key_hash, "display_prefix": display_prefix(secret)}
            self._replace(named, fresh, "virtualKeys:rotate")
            return
        key = VirtualKey(
            name="demo",
            project_id=project.id,
            principal_id=user.id,
            hash=key_hash,
            display_prefix=display_prefix(secret),
        )
        self._insert("virtual_key", project.scope, key, "virtualKeys:create")

    def _default_project(self, organization: StoredObject) -> StoredObject | None:
        team = self._find_in(organization, "team")
        return None if team is None else self.tx.find("project", "slug", [team.id, "default"])

    def _find_in(self, organization: StoredObject, kind: str) -> StoredObject | None:
        return self.tx.find(kind, "slug", [organization.id, "default"])

    # --- changes, each with its audit entry -------------------------------------------------------------------

    def _insert(self, kind: str, scope: Scope, made: Any, action: str, object_id: str | None = None) -> StoredObject:
        document = attrs.asdict(made)
        object_id = object_id or new_id(KINDS[kind].prefix)
        stored = self.tx.insert(kind, object_id, scope, document, unique_values(KINDS[kind], document, scope))
        self._audit(stored, action, None)
        return stored

    def _replace(self, before: StoredObject, document: Mapping[str, Any], action: str) -> StoredObject:
        stored = self.tx.replace(before, document, unique_values(KINDS[before.kind], document, before.scope))
        self._audit(stored, action, before)
        return stored

    def _audit(self, stored: StoredObject, action: str, before: StoredObject | None) -> None:
        entry = AuditEntry(
            id=new_id("aud_"),
            at_ms=time.time_ns() // 1_000_000,
            actor="system",
            action=action,
            kind=stored.kind,
            object_id=stored.id,
            scope=stored.scope,
            before=None if before is None else _seen(before),
            after=_seen(stored),
            request_id=None,
            source="demo",
        )
        self.tx.audit(entry)


def _ever(tx: Reading, kind: str, scope: Scope, **where: str) -> bool:
    """Say whether there is or was such an object."""
    return bool(tx.list(kind, scope=scope, where=where, include_archived=True, limit=1))


def _seen(stored: StoredObject) -> dict[str, Any]:
    """Return the members of a document that may be seen."""
    secrets = KINDS[stored.kind].secrets
    return {name: value for name, value in stored.document.items() if name not in secrets}


def _context(binding_id: str) -> str:
    return f"provider_binding:{binding_id}"
