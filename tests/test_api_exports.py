"""Export and apply are each other's inverse: what is exported makes the same elsewhere, and changes nothing at home."""

from __future__ import annotations

import copy
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from management_client import Api, running_api
from penstock_plugins.management.budgets import BUDGETS
from penstock_plugins.management.declarative import SECTIONS

_RULES = {"deny": ["^shell"], "allow": []}
_POLICY = {"tools": _RULES, "mcp": {"deny": None, "allow": []}, "urls": {"deny": ["x"]}, "models": {"allow": ["gpt"]}}
_FALLBACK = {"on": ["5xx"], "max_attempts": 2, "timeout_ms": 5000, "same_binding_retries": 1}
_LIMITS = {"rpm": 10, "tpm": 1000, "rpd": 100, "concurrency": 2}
_BUDGET = {
    "name": "inline", "window": "month", "limit_usd": "2.5", "on_breach": "warn", "timezone": "Europe/Amsterdam",
    "cycle_anchor_at": "2026-01-31T00:00:00Z", "provider": "main", "reserve": "max", "external_id": "inline-1",
}  # fmt: skip
FULL: dict[str, list[dict[str, Any]]] = {
    "organizations": [{"slug": "default", "name": "All of us"}],
    "teams": [{"slug": "red", "organization_id": "default", "name": "Red"}, {"slug": "blue"}],
    "projects": [{"slug": "p", "team_id": "red", "name": "P"}, {"slug": "p", "team_id": "blue"}],
    "users": [{"slug": "ann", "organization_id": "default", "name": "Ann", "email": "ann@example.com",
               "roles": [{"role": "viewer", "scope_id": "default/red"}]}],
    "service_accounts": [
        {"slug": "bot", "project_id": "red/p", "name": "Bot"},
        {"slug": "bot", "project_id": "blue/p"},
    ],
    "groups": [{"slug": "g", "organization_id": "default", "name": "G", "member_ids": ["ann", "red/p/bot"]}],
    "provider_bindings": [{
        "name": "main", "type": "mock", "scope_id": "default", "base_url": "http://127.0.0.1:9", "handle": "eu",
        "models": ["m"], "model_map": {"m": "n"}, "region": "eu", "api_version": "1", "extra_headers": {"x-a": "b"},
        "rate_limits": _LIMITS, "timeouts": {"connect": 1.5, "first_byte": 2.0, "idle": 3.0}, "fallback_priority": 3,
        "propagate_trace": True, "usage_frame": "strip", "proxy": "http://127.0.0.1:8", "http2": True,
        "settings": {}, "enabled": False, "external_id": "b-1",
    }],
    "routing_policies": [{
        "name": "rp", "scope_id": "default", "strategy": "weighted", "model_aliases": {"a": "b"},
        "entries": [{"binding_id": "main", "weight": 0, "model_map": {"a": "b"}}], "policy_rules": _POLICY,
        "fallback": _FALLBACK, "external_id": "rp-1",
    }],
    "evaluators": [{"name": "ev", "scope_id": "default", "type": "words", "settings": {"a": [None]},
                    "external_id": "e-1"}],
    "guardrails": [{
        "name": "gr", "scope_id": "default", "evaluator_id": "ev", "directions": ["response"], "settings": {"b": {}},
        "fail_open": True, "timeout_ms": 5, "sample_rate": 0.5, "external_id": "g-1",
    }],
    "virtual_keys": [{
        "name": "k", "project_id": "red/p", "principal_id": "red/p/bot", "env": "test", "status": "disabled",
        "expires_at": "2099-01-01T00:00:00Z", "provider_bindings": ["main"], "routing_policy_id": "rp",
        "fallback": _FALLBACK, "model_aliases": {"a": "b"}, "models_allowed": [], "cache_mode": "force",
        "usage_frame": "forward", "guardrails": [{"guardrail_id": "gr", "fail_open": False}], "policy_rules": _POLICY,
        "rate_limits": _LIMITS, "capture_level": "full", "tags": ["t"], "metadata": {"a": "b"}, "external_id": "k-1",
        "budget": _BUDGET,
    }],
    "cache_rules": [{
        "name": "c", "scope_id": "default", "mode": "force", "ttl": 300, "priority": 2, "external_id": "c-1",
        "match": {"virtual_key_id": "k", "key_tags": ["t"], "key_prefix": "ps_", "principal_id": "ann", "model": "m*",
                  "metadata": {"a": "b"}},
    }],
    "budgets": [
        {**_BUDGET, "name": "team", "scope": "team", "scope_id": "red", "external_id": "bud-1"},
        {"scope": "virtual_key", "scope_id": "k", "window": "month", "limit_usd": "1"},
        {"scope": "principal", "scope_id": "blue/p/bot", "window": "day", "limit_usd": "1"},
        {"scope": "project", "scope_id": "red/p", "window": "day", "limit_usd": "1"},
        {"scope": "project", "scope_id": "red/p", "window": "day", "limit_usd": "2"},
        {"scope": "end_user", "scope_id": "k", "window": "total", "limit_usd": "1"},
    ],
    "webhooks": [{"name": "w", "scope_id": "default", "url": "https://example.com/", "events": ["x"], "enabled": False,
                  "external_id": "w-1"}],
    "price_overrides": [
        {"provider": "mock", "model": "m*", "effective_at": "2026-01-01T00:00:00Z",
         "rates": {"input": 1, "output": 2, "request": 0, "cache_read": None}, "external_id": "p-1"},
        {"provider": "mock", "model": "n*", "effective_at": "2026-01-01T00:00:00Z",
         "rates": {"input": 1, "output": 2, "request": 0}},
    ],
}  # fmt: skip
"""One entry of each kind with every member set, and some beside them that have no name, or the same."""
_NEEDED = {
    "organizations": {"slug"},
    "teams": {"slug", "organization_id"},
    "projects": {"slug", "team_id"},
    "users": {"slug"},
    "service_accounts": {"slug", "project_id"},
    "groups": {"slug"},
    "provider_bindings": {"name", "type"},
    "routing_policies": {"name", "scope_id"},
    "evaluators": {"name", "scope_id", "type"},
    "guardrails": {"name", "scope_id", "evaluator_id"},
    "virtual_keys": {"name", "project_id", "principal_id"},
    "cache_rules": {"name", "scope_id", "mode"},
    "budgets": {"name", "scope", "scope_id", "window", "limit_usd"},
    "webhooks": {"name", "scope_id", "url"},
    "price_overrides": {"provider", "model", "effective_at", "rates"},
}
"""What no entry can do without, or is referred to by."""


def test_the_full_document_sets_every_member_there_is() -> None:
    for section, resource in SECTIONS.items():
        wanted = {name.replace("_nano_usd", "_usd") for name in resource.members}
        wanted -= set(resource.kind.secrets)
        assert wanted <= FULL[section][0].keys(), section
    of_budget = {name.replace("_nano_usd", "_usd") for name in BUDGETS.members} - {"scope", "scope_id"}
    assert of_budget == FULL["virtual_keys"][0]["budget"].keys()


async def actions(api: Api, document: Any, **more: Any) -> set[tuple[str, str]]:
    answered = await api.ask("POST", "/config/apply", {"document": document, **more})
    assert answered.status == 200, answered.raw
    return {(change["action"], str(change["changes"])) for change in answered.body["changes"]}


async def round_trip(document: dict[str, Any]) -> dict[str, Any]:
    async with running_api() as api:
        await actions(api, document)
        exported: dict[str, Any] = await api.get("/config/export")
        assert await actions(api, exported, dry_run=True) == {("unchanged", "{}")}
    async with running_api() as other:
        await actions(other, exported)
        assert await other.get("/config/export") == exported
        assert await actions(other, exported) == {("unchanged", "{}")}
    return exported


@pytest.mark.anyio
async def test_every_member_comes_through_export_and_apply() -> None:
    exported = await round_trip(FULL)
    key = exported["virtual_keys"][0]
    assert key["budget"] == FULL["virtual_keys"][0]["budget"]
    assert key["principal_id"] == "default/red/p/bot"
    assert (key["status"], key["models_allowed"]) == ("disabled", [])
    assert len(exported["budgets"]) == len(FULL["budgets"])


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """Leave out any members that an entry can do without."""
    document = copy.deepcopy(FULL)
    for section, entries in document.items():
        for entry in entries:
            spare = sorted(entry.keys() - _NEEDED[section])
            for name in draw(st.sets(st.sampled_from(spare)) if spare else st.just(set())):
                del entry[name]
            if entry.get("ttl") is not None and entry["mode"] != "force":
                del entry["ttl"]
        if section == "virtual_keys" and "budget" in entries[0]:
            budget = entries[0]["budget"]
            for name in draw(st.sets(st.sampled_from(sorted(budget.keys() - {"window", "limit_usd"})))):
                del budget[name]
    return document


@settings(max_examples=8, deadline=None)
@given(documents())
def test_whatever_is_left_out_comes_through_too(document: dict[str, Any]) -> None:
    anyio.run(round_trip, document)


@pytest.mark.anyio
async def test_a_change_of_the_budget_inside_a_key_is_shown() -> None:
    async with running_api() as api:
        document = {"virtual_keys": [{"name": "k", "budget": {"window": "day", "limit_usd": "1"}}]}
        await actions(api, document)
        document["virtual_keys"][0]["budget"] = {"window": "day", "limit_usd": "2"}
        ((action, changes),) = await actions(api, document, dry_run=True)
        assert action == "update"
        assert "'limit_usd': '2'" in changes
        await actions(api, document)
        assert await actions(api, document) == {("unchanged", "{}")}


@pytest.mark.anyio
async def test_keys_that_work_no_more_are_not_made_anew_elsewhere() -> None:
    async with running_api() as api:
        document = {
            "virtual_keys": [{"name": "k"}, {"name": "gone"}],
            "budgets": [{"virtual_key": "gone", "window": "day", "limit_usd": "1"}],
            "cache_rules": [{"name": "c", "mode": "disable", "match": {"virtual_key_id": "gone"}}],
        }
        await actions(api, document)
        await api.ask("POST", "/virtual-keys/gone/revoke", {})
        exported = await api.get("/config/export")
        assert [key["name"] for key in exported["virtual_keys"]] == ["k"]
        assert (exported["budgets"], exported["cache_rules"]) == ([], [])
