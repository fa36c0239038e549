"""What the tests of the store share: a harness on a database in a folder, and objects to put into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from penstock import BindingDirectory, KeyDirectory, KeyRecord, Services, hash_key, new_key
from penstock.governance import (
    KINDS,
    BudgetDirectory,
    ObjectStore,
    Scope,
    StoredObject,
    Transaction,
    Vault,
    new_id,
    unique_values,
)
from penstock.governance.objects import Binding, Budget, VirtualKey
from penstock.testing import FakeUpstream, Harness

PLUGINS = ("store", "virtual_keys", "routing", "openai", "anthropic")


def store_harness(folder: Path, *plugins: str, upstream: FakeUpstream | None = None, **store: Any) -> Harness:
    """Return a gateway with the store in ``folder``."""
    table = {"url": f"sqlite:///{folder}/penstock.db", **store}
    names = plugins or PLUGINS
    return Harness(names, {"store": table, "virtual_keys": {}, "routing": {}}, upstream, bare=True)


def services_of(harness: Harness) -> Services:
    return harness.gateway.generation.services


def objects_of(services: Services) -> ObjectStore:
    return services.get(ObjectStore)  # type: ignore[type-abstract]


def keys_of(services: Services) -> KeyDirectory:
    return services.get(KeyDirectory)  # type: ignore[type-abstract]


def bindings_of(services: Services) -> BindingDirectory:
    return services.get(BindingDirectory)  # type: ignore[type-abstract]


def budgets_of(services: Services) -> BudgetDirectory:
    return services.get(BudgetDirectory)  # type: ignore[type-abstract]


def vault_of(services: Services) -> Vault:
    return services.get(Vault)  # type: ignore[type-abstract]


@attrs.frozen
class Owners:
    """What a fresh store begins with."""

    organization: StoredObject
    team: StoredObject
    project: StoredObject
    user: StoredObject


async def owners_of(store: ObjectStore) -> Owners:
    def find(reading: Any) -> Owners:
        organization = reading.find("organization", "slug", ["default"])
        team = reading.find("team", "slug", [organization.id, "default"])
        project = reading.find("project", "slug", [team.id, "default"])
        return Owners(organization, team, project, reading.find("user", "slug", [organization.id, "default"]))

    return await store.read(find)


async def insert(store: ObjectStore, kind: str, scope: Scope, value: Any, object_id: str | None = None) -> StoredObject:
    def work(transaction: Transaction) -> StoredObject:
        document = attrs.asdict(value)
        unique = unique_values(KINDS[kind], document, scope)
        return transaction.insert(kind, object_id or new_id(KINDS[kind].prefix), scope, document, unique)

    return await store.transact(work)


async def change(store: ObjectStore, stored: StoredObject, **members: Any) -> StoredObject:
    document: Mapping[str, Any] = {**stored.document, **members}
    unique = unique_values(KINDS[stored.kind], document, stored.scope)
    return await store.transact(lambda transaction: transaction.replace(stored, document, unique))


async def archive(store: ObjectStore, stored: StoredObject) -> StoredObject:
    return await store.transact(lambda transaction: transaction.archive(stored))


async def insert_key(services: Services, owners: Owners, name: str = "a", **members: Any) -> tuple[str, StoredObject]:
    """Return the secret of a new virtual key, and the key."""
    store, secret = objects_of(services), new_key()
    found = VirtualKey(
        name=name,
        hash=hashed(services, secret),
        **{"project_id": owners.project.id, "principal_id": owners.user.id, **members},
    )
    return secret, await insert(store, "virtual_key", owners.project.scope, found)


async def insert_binding(services: Services, scope: Scope, scope_id: str, name: str, **members: Any) -> StoredObject:
    vault = vault_of(services)
    binding_id = new_id("gpc_")
    credential = vault.seal(f"sk-{name}", context=f"provider_binding:{binding_id}")
    value = Binding(name=name, scope_id=scope_id, credential=credential, **{"type": "openai", **members})
    return await insert(objects_of(services), "provider_binding", scope, value, binding_id)


async def insert_budget(services: Services, owners: Owners, scope: Any, scope_id: str, **members: Any) -> StoredObject:
    budget = Budget(scope=scope, scope_id=scope_id, window="month", limit_nano_usd=1, **members)
    return await insert(objects_of(services), "budget", owners.organization.scope, budget)


def hashed(services: Services, secret: str) -> str:
    return hash_key(vault_of(services).pepper, secret.encode()).hex()


def found_key(services: Services, secret: str) -> KeyRecord | None:
    return keys_of(services).find_key(bytes.fromhex(hashed(services, secret)))
