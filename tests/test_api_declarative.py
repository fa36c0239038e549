"""Documents: exported without secrets, applied twice the same as once, rehearsed without a trace."""

from __future__ import annotations

from typing import Any

import pytest

from management_client import running_api

pytestmark = pytest.mark.anyio

DOCUMENT: dict[str, Any] = {
    "teams": [{"slug": "engineering", "name": "Engineering"}],
    "projects": [{"slug": "search", "team": "engineering"}],
    "users": [{"slug": "ann", "roles": [{"role": "viewer", "scope_id": "default"}]}],
    "groups": [{"slug": "all", "member_ids": ["ann"]}],
    "provider_bindings": [{"name": "m", "type": "mock", "credential": "sk-0123456789abcdef"}],
    "routing_policies": [{"name": "rp", "entries": [{"binding_id": "m", "weight": 2}]}],
    "virtual_keys": [
        {"name": "k", "project": "search", "provider_bindings": ["m"], "external_id": "k-1", "principal": "ann",
         "budget": {"window": "day", "limit_usd": "1.5"}}
    ],
    "budgets": [{"scope": "team", "team": "engineering", "window": "month", "limit_usd": "5000"}],
    "cache_rules": [{"name": "c", "mode": "force", "ttl": 300, "match": {"virtual_key_id": "k"}}],
}  # fmt: skip


async def test_applying_twice_is_applying_once() -> None:
    async with running_api() as api:
        first = (await api.ask("POST", "/config/apply", {"document": DOCUMENT})).body
        assert {change["action"] for change in first["changes"]} == {"create"}
        assert [change["secret"][:11] for change in first["changes"] if "secret" in change] == ["ps_vk_live_"]
        audit = await api.get("/audit?limit=200")
        without = {**DOCUMENT, "provider_bindings": [{"name": "m", "type": "mock"}]}
        second = (await api.ask("POST", "/config/apply", {"document": without})).body
        assert {change["action"] for change in second["changes"]} == {"unchanged"}
        assert await api.get("/audit?limit=200") == audit


async def test_a_dry_run_shows_the_difference_and_changes_nothing() -> None:
    async with running_api() as api:
        await api.ask("POST", "/config/apply", {"document": DOCUMENT})
        audit = await api.get("/audit?limit=200")
        changed = {"teams": [{"slug": "engineering", "name": "Eng"}, {"slug": "new"}]}
        answered = await api.ask("POST", "/config/apply", {"document": changed, "dry_run": True})
        update, create = answered.body["changes"]
        assert (update["action"], update["changes"]) == ("update", {"name": {"before": "Engineering", "after": "Eng"}})
        assert create["action"] == "create"
        assert await api.get("/audit?limit=200") == audit


async def test_what_is_exported_applies_unchanged_and_elsewhere_makes_the_same() -> None:
    async with running_api() as api:
        await api.ask("POST", "/config/apply", {"document": DOCUMENT})
        exported = await api.get("/config/export")
        answered = await api.ask("POST", "/config/apply", {"document": exported})
        assert answered.status == 200, answered.raw
        assert {change["action"] for change in answered.body["changes"]} == {"unchanged"}
    async with running_api() as other:
        answered = await other.ask("POST", "/config/apply", {"document": exported})
        assert answered.status == 200, answered.raw
        assert await other.get("/config/export") == exported


async def test_a_document_with_a_fault_changes_nothing_and_names_the_place() -> None:
    async with running_api() as api:
        audit = await api.get("/audit?limit=200")
        document = {"teams": [{"slug": "a"}], "projects": [{"slug": "p", "team": "none"}]}
        refused = await api.ask("POST", "/config/apply", {"document": document})
        assert (refused.status, refused.error["meta"]["field"]) == (404, "projects[0].team_id")
        assert await api.get("/audit?limit=200") == audit


async def test_applying_needs_the_permissions_of_what_it_does() -> None:
    async with running_api() as api:
        viewer = await api.token_for(role="viewer", scope_id="default")
        refused = await viewer.ask("POST", "/config/apply", {"document": {"teams": [{"slug": "x"}]}})
        assert (refused.status, refused.error["meta"]["permission"]) == (403, "organization:create")
