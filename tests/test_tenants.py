"""Two organizations on one gateway: neither sees, collides with or is routed by what the other has named."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
from alembic import command
from alembic.config import Config

from management_client import Answered, Api, running_api
from penstock.governance import LocalAdmin
from penstock.testing import Harness
from penstock_plugins.store import schema
from penstock_plugins.store.database import Database

pytestmark = pytest.mark.anyio


@attrs.frozen
class Tenant:
    """Hold an organization, asked by its own administrator."""

    id: str
    project_id: str
    api: Api


async def tenant(api: Api, slug: str) -> Tenant:
    organization = await api.make("/organizations", {"slug": slug})
    team = await api.make("/teams", {"slug": "t", "organization_id": organization["id"]})
    project = await api.make("/projects", {"slug": "p", "team_id": team["id"]})
    await api.make("/users", {"slug": "default", "organization_id": organization["id"]})
    admin = await api.token_for(role="org_admin", scope_id=organization["id"])
    return Tenant(organization["id"], project["id"], admin)


NAMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/users", {"slug": "ann"}),
    ("/groups", {"slug": "g"}),
    ("/provider-bindings", {"name": "b", "type": "mock", "handle": "eu", "external_id": "x"}),
    ("/routing-policies", {"name": "rp", "external_id": "x"}),
    ("/evaluators", {"name": "ev", "type": "words", "external_id": "x"}),
    ("/guardrails", {"name": "gr", "evaluator": "ev", "external_id": "x"}),
    ("/virtual-keys", {"name": "k", "project": "p", "external_id": "x"}),
    ("/cache-rules", {"name": "c", "mode": "disable", "external_id": "x"}),
    ("/budgets", {"name": "cap", "project": "p", "window": "day", "limit_usd": "1", "external_id": "x"}),
    ("/webhooks", {"name": "w", "url": "https://example.com/", "external_id": "x"}),
    ("/api-tokens", {"name": "tok", "role": "viewer"}),
)
"""One of each kind, with everything in it that is unique."""


async def test_tenants_give_the_same_names_handles_and_external_ids() -> None:
    async with running_api() as api:
        one, two = await tenant(api, "one"), await tenant(api, "two")
        for path, body in NAMED:
            made = [await each.api.make(path, body) for each in (one, two)]
            again = await one.api.ask("POST", path, body)
            assert (again.status, again.error["meta"]["id"]) == (409, made[0]["id"]), path
            name = body.get("slug") or body["name"]
            assert (await two.api.get(f"{path}/{name}"))["id"] == made[1]["id"]
            assert (await two.api.ask("GET", f"{path}/{made[0]['id']}")).status == 404


async def test_applying_a_document_finds_the_objects_of_the_organization_that_applies_it() -> None:
    document = {
        "provider_bindings": [{"name": "b", "type": "mock", "handle": "eu", "external_id": "x"}],
        "virtual_keys": [{"name": "k", "project": "p", "external_id": "x", "provider_bindings": ["b"]}],
        "budgets": [{"name": "cap", "project": "p", "window": "day", "limit_usd": "1"}],
    }
    async with running_api() as api:
        one, two = await tenant(api, "one"), await tenant(api, "two")
        for each in (one, two):
            for action in ("create", "unchanged"):
                answered = await each.api.ask("POST", "/config/apply", {"document": document})
                assert answered.status == 200, answered.raw
                assert {change["action"] for change in answered.body["changes"]} == {action}
        renamed = {"provider_bindings": [{"name": "c", "type": "mock", "external_id": "x"}]}
        await two.api.ask("POST", "/config/apply", {"document": renamed})
        assert [each["name"] for each in (await one.api.get("/provider-bindings"))["data"]] == ["b"]
        # An administrator of the installation says by the place whose they are.
        theirs = {"provider_bindings": [{"name": "d", "type": "mock", "scope_id": "two", "external_id": "x"}]}
        answered = await api.ask("POST", "/config/apply", {"document": theirs, "dry_run": True})
        assert [change["action"] for change in answered.body["changes"]] == ["update"]


async def call(each: Tenant, secret: str, model: str) -> Answered:
    fields = [(b"host", b"g"), (b"authorization", b"Bearer " + secret.encode()), (b"content-type", b"application/json")]
    content = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}]}).encode()
    reply = await each.api.harness.request("POST", "/v1/chat/completions", fields, content)
    return Answered(reply.status, reply.headers, reply.body)


async def test_a_handle_leads_to_the_binding_of_the_keys_own_organization() -> None:
    async with running_api() as api:
        one, two = await tenant(api, "one"), await tenant(api, "two")
        for each in (one, two):
            await each.api.make("/provider-bindings", {"name": "other", "type": "mock"})
            body = {"name": "b", "type": "mock", "handle": "eu", "model_map": {"m": f"m of {each.id}"}}
            binding = await each.api.make("/provider-bindings", body)
            key = await each.api.make("/virtual-keys", {"name": "k", "project": "p"})
            answered = await call(each, key["secret"], "eu/m")
            assert (answered.status, answered.body.get("model")) == (200, f"m of {each.id}"), answered.raw
            entries = await each.api.get("/provider-bindings?handle=eu")
            assert [found["id"] for found in entries["data"]] == [binding["id"]]


async def test_the_handle_of_another_organization_is_a_word_like_any_other() -> None:
    async with running_api() as api:
        one, two = await tenant(api, "one"), await tenant(api, "two")
        await two.api.make("/provider-bindings", {"name": "all", "type": "mock"})
        key = await two.api.make("/virtual-keys", {"name": "k", "project": "p"})
        before = await call(two, key["secret"], "house/m")
        await one.api.make("/provider-bindings", {"name": "b", "type": "mock", "handle": "house"})
        after = await call(two, key["secret"], "house/m")
        assert (before.status, after.status) == (200, 200), after.raw


async def test_a_gateway_starts_with_handles_that_several_organizations_gave(tmp_path: Path) -> None:
    config = {"store": {"url": f"sqlite:///{tmp_path}/t.db"}, "virtual_keys": {}, "routing": {}}
    plugins = ("store", "virtual_keys", "routing", "mock", "management")
    for is_first in (True, False):
        async with Harness(plugins, config, bare=True) as harness:
            if is_first:
                local: LocalAdmin = harness.gateway.generation.services.get(LocalAdmin)  # type: ignore[type-abstract]
                api = Api(harness, local.admin_token)
                for slug in ("one", "two"):
                    each = await tenant(api, slug)
                    await each.api.make("/provider-bindings", {"name": "b", "type": "mock", "handle": "eu"})
        assert not harness.faults


def test_names_of_an_older_schema_become_names_of_their_organization(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    database = Database(f"sqlite:///{path}")
    with database.writer.begin() as writing:
        config = Config()
        config.set_main_option("script_location", str(schema._MIGRATIONS))
        config.attributes["connection"] = writing
        command.upgrade(config, "0002")
    values = [
        ("provider_binding", "gpc_1", "handle", '["eu"]'),
        ("provider_binding", "gpc_1", "name", '["org_1","b"]'),
        ("virtual_key", "vk_1", "external_id", '["x"]'),
        ("virtual_key", "vk_1", "hash", '["00"]'),
        ("budget", "bud_1", "name", '["cap"]'),
        ("price_override", "pr_1", "external_id", '["x"]'),
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        for kind, object_id in dict.fromkeys((kind, object_id) for kind, object_id, *_ in values):
            row = (kind, object_id, "org_1", 1, 0, 0, 1, "{}")
            connection.execute(
                "INSERT INTO objects (kind, id, organization_id, version, created_at_ms, updated_at_ms, revision,"
                " document) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        connection.executemany("INSERT INTO unique_values (kind, id, name, value) VALUES (?, ?, ?, ?)", values)
    schema.migrate(database)
    database.close()
    with closing(sqlite3.connect(path)) as connection:
        found = {row[:2]: row[2] for row in connection.execute("SELECT kind, name, value FROM unique_values")}
    assert found == {
        ("provider_binding", "handle"): '["org_1","eu"]',
        ("provider_binding", "name"): '["org_1","b"]',
        ("virtual_key", "external_id"): '["org_1","x"]',
        ("virtual_key", "hash"): '["00"]',
        ("budget", "name"): '["org_1","cap"]',
        ("price_override", "external_id"): '["x"]',
    }
