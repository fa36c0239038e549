"""Routing policies, cache rules and guardrails of the store: found at once, refused where they cannot be read."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import anyio
import pytest

from penstock import ConfigurationError, RequestError
from penstock.config import read_document
from penstock.gateway import Gateway
from penstock.governance import LedgerReader, ObjectStore, PolicyDirectory, Scope, StoredObject
from penstock.testing.conformance.policies import check_policy_directory
from penstock_plugins.store.database import Database
from penstock_plugins.store.following import Objects
from penstock_plugins.store.policies import StoredPolicies
from penstock_plugins.store.schema import migrate
from store_fixtures import found_key, insert_key, objects_of, owners_of, services_of, store_harness

UNREADABLE = """
INSERT INTO objects SELECT 'routing_policy', 'rp_x', id, NULL, NULL, 1, 0, 0, NULL, 1, '{"strategy":"best"}'
FROM objects WHERE kind = 'organization'
"""


def test_stored_policies_conform(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with closing(Database(url)) as database:
        migrate(database)

    @asynccontextmanager
    async def opened() -> AsyncIterator[tuple[ObjectStore, PolicyDirectory]]:
        async with Database(url) as database:
            policies = StoredPolicies()
            objects = Objects(database, time.time, [policies])
            await objects.refresh()
            yield objects, policies

    anyio.run(check_policy_directory, opened)


def test_store_provides_its_policies(tmp_path: Path) -> None:
    async def main() -> None:
        async with store_harness(tmp_path) as harness:
            services = services_of(harness)
            secret, _ = await insert_key(services, await owners_of(objects_of(services)))
            record = found_key(services, secret)
            directory = services.get(PolicyDirectory)  # type: ignore[type-abstract]
            assert record is not None
            assert list(directory.cache_rules_of(record.principal)) == []

    anyio.run(main)


def test_unreadable_policy_is_logged_named_by_check_and_verify(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with store_harness(tmp_path):
            pass
        with closing(sqlite3.connect(tmp_path / "penstock.db")) as database, database:
            database.execute(UNREADABLE)
        async with store_harness(tmp_path) as harness:
            services = services_of(harness)
            directory = services.get(PolicyDirectory)  # type: ignore[type-abstract]
            with pytest.raises(RequestError, match="routing policy rp_x cannot be read"):
                directory.routing_policy("rp_x")
            reader = services.get(LedgerReader)  # type: ignore[type-abstract]
            assert [found.what.partition(" of org_")[0] async for found in reader.verify()] == ["routing policy rp_x"]
        assert "routing policy rp_x of org_" in caplog.text
        assert "whoever depends on it is refused" in caplog.text
        with pytest.raises(ConfigurationError, match=r"\[plugins.store\] routing policy rp_x of org_.* cannot be read"):
            await rehearse(tmp_path)

    anyio.run(main)


async def rehearse(folder: Path) -> None:
    """Do what ``penstock check`` does."""
    table = {"listen": "127.0.0.1:0", "plugins": ["store", "virtual_keys", "routing", "mock"]}
    document = {"gateway": table, "plugins": {"store": {"url": f"sqlite:///{folder}/penstock.db"}}}
    await Gateway(read_document(document, source="test", environment={})).generation.rehearse()


def policy(**document: object) -> StoredObject:
    whole = {"name": "a", "scope_id": "org_1", **document}
    return StoredObject("routing_policy", "rp_1", Scope("org_1"), 1, 0, 0, None, whole)


def test_member_of_a_newer_version_is_passed_over() -> None:
    policies = StoredPolicies()
    policies.plan([policy(strategy="cost", later={"a": 1})])()
    found = policies.routing_policy("rp_1")
    assert found is not None
    assert found.strategy == "cost"


def test_negative_weight_cannot_be_read() -> None:
    policies = StoredPolicies()
    policies.plan([policy(entries=[{"binding_id": "gpc_1", "weight": -1}])])()
    assert [str(each) for each in policies.unreadable] == [
        "routing policy rp_1 of org_1 cannot be read: an entry has a weight below 0"
    ]


def test_plan_changes_nothing_until_it_is_put_in_force() -> None:
    policies = StoredPolicies()
    before, swap = policies.revision, policies.plan([policy()])
    assert (policies.routing_policy("rp_1"), policies.revision) == (None, before)
    swap()
    assert policies.routing_policy("rp_1") is not None
    policies.plan([])()
    assert policies.revision == before + 1
