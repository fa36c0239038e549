"""The management API on objects: strict bodies, names for ids, money, versions, audit, secrets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from management_client import Api, running_api
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.rest.routes import Route
from penstock_plugins.management.rest.table import ROUTES

pytestmark = pytest.mark.anyio

CREDENTIAL = "sk-very-secret-credential-9876"


async def refusal(api: Api, method: str, path: str, body: Any) -> tuple[int, str, str]:
    answered = await api.ask(method, path, body)
    assert answered.status >= 400, answered.raw
    return answered.status, answered.error["code"], answered.error["message"]


async def test_an_unknown_member_is_refused_with_the_nearest_known() -> None:
    async with running_api() as api:
        status, code, message = await refusal(api, "POST", "/virtual-keys", {"name": "k", "model_allowed": ["x"]})
        assert (status, code) == (400, "bad_request")
        assert message == 'model_allowed: unknown member; did you mean "models_allowed"?'


async def test_a_wrong_type_names_the_member_and_the_rule() -> None:
    async with running_api() as api:
        answered = await api.ask("POST", "/virtual-keys", {"name": "k", "rate_limits": {"rpm": "10"}, "tags": [1]})
        assert answered.status == 400
        assert "rate_limits.rpm: must be an integer, not a string" in answered.error["message"]
        assert answered.error["meta"]["fields"] == ["rate_limits.rpm", "tags[0]"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        pytest.param("/virtual-keys", {"name": "x" * 201}, "name: has at most 200 characters", id="long"),
        pytest.param("/virtual-keys", {"name": ""}, "name: must not be empty", id="empty"),
        pytest.param("/virtual-keys", {"name": "k", "metadata": {str(n): "v" for n in range(41)}},
                     "metadata: holds at most 40 pairs", id="metadata"),
        pytest.param("/virtual-keys", {"name": "k", "expires_at": "tomorrow"}, "expires_at: must be a time", id="time"),
        pytest.param("/virtual-keys", {"name": "k", "hash": "00"}, "hash: unknown member", id="hash"),
        pytest.param("/virtual-keys", {"name": "k", "status": "active"}, "status: is set by the gateway", id="status"),
        pytest.param("/virtual-keys", {"name": "k", "policy_rules": {"urls": {"deny": ["(?=x)"]}}},
                     "policy_rules.urls.deny[0]: is no pattern RE2 compiles", id="pattern"),
        pytest.param("/teams", {"slug": "No Spaces"}, "slug: must be 1 to 63 lower-case", id="slug"),
        pytest.param("/provider-bindings", {"name": "b", "type": "opnai"}, 'did you mean "openai"?', id="type"),
        pytest.param("/provider-bindings", {"name": "b", "type": "mock", "base_url": "file:///etc/passwd"},
                     "base_url: must be a URL that begins with http://", id="scheme"),
        pytest.param("/provider-bindings", {"name": "b", "type": "mock", "base_url": "http://me:pw@host"},
                     "base_url: must not hold a user or password", id="userinfo"),
        pytest.param("/provider-bindings", {"name": "b", "type": "openai", "settings": {"nope": 1}},
                     "settings.nope: unknown", id="provider-check"),
        pytest.param("/budgets", {"scope": "project", "window": "day", "limit_usd": "0"}, "must be over 0", id="zero"),
        pytest.param("/budgets", {"scope": "project", "window": "day", "limit_usd": "1", "limit_nano_usd": 1},
                     "give either limit_usd or limit_nano_usd, not both", id="money-twice"),
        pytest.param("/budgets", {"scope": "project", "window": "day", "limit_usd": 0.5}, "decimal string", id="float"),
        pytest.param("/budgets", {"scope": "project", "window": "total", "limit_usd": "1",
                                  "cycle_anchor_at": "2026-01-01T00:00:00Z"},
                     "cycle_anchor_at: goes with no", id="anchor"),
        pytest.param("/budgets", {"scope": "project", "window": "day", "limit_usd": "1", "timezone": "Mars/Base"},
                     "timezone: 'Mars/Base' is no time zone", id="zone"),
        pytest.param("/cache-rules", {"name": "c", "mode": "disable", "ttl": 5},
                     'ttl: goes with mode "force"', id="ttl"),
        pytest.param("/webhooks", {"name": "w", "url": "ftp://x"}, "url: must be a URL", id="webhook"),
        pytest.param("/api-tokens", {"name": "t", "permissions": ["virtualKeys:veiw"]},
                     'did you mean "virtualKeys:view"?', id="permission"),
        pytest.param("/api-tokens", {"name": "t"}, "give permissions, a role, or the user", id="no-permissions"),
        pytest.param("/prices/overrides", {"provider": "p", "model": "m", "effective_at": "2026-01-01T00:00:00Z",
                                           "rates": {"inptu": 1}}, 'did you mean "input"?', id="rates"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_and_changes_nothing(path: str, body: dict[str, Any], message: str) -> None:
    async with running_api() as api:
        before = await api.get("/audit?limit=200")
        answered = await api.ask("POST", path, body)
        assert (answered.status, answered.error["code"]) == (400, "bad_request"), answered.raw
        assert message in answered.error["message"]
        assert await api.get("/audit?limit=200") == before


async def test_names_and_slugs_stand_wherever_ids_do() -> None:
    async with running_api() as api:
        await api.make("/teams", {"slug": "engineering"})
        project = await api.make("/projects", {"slug": "search", "team": "engineering"})
        await api.make("/provider-bindings", {"name": "main", "type": "mock", "project": "search"})
        await api.make("/routing-policies", {"name": "rp", "project": "search", "entries": [{"binding_id": "main"}]})
        key = await api.make(
            "/virtual-keys",
            {"name": "k", "project": "engineering/search", "provider_bindings": ["main"], "routing_policy": "rp"},
        )
        assert key["project_id"] == project["id"]
        assert key["provider_bindings"] == [(await api.get("/provider-bindings/main"))["id"]]
        budget = await api.make("/budgets", {"virtual_key": "k", "window": "day", "limit_usd": "2.50"})
        assert (budget["scope"], budget["scope_id"]) == ("virtual_key", key["id"])
        assert (budget["limit_usd"], budget["limit_nano_usd"]) == ("2.5", 2_500_000_000)


async def test_an_ambiguous_name_is_refused_with_the_ids_and_paths() -> None:
    async with running_api() as api:
        await api.make("/teams", {"slug": "engineering"})
        await api.make("/projects", {"slug": "default", "team": "engineering"})
        status, _, message = await refusal(api, "GET", "/projects/default", None)
        assert status == 400
        assert message.count("proj_") == 2
        assert "(default/engineering/default)" in message


async def test_a_path_says_which_where_a_name_alone_does_not() -> None:
    async with running_api() as api:
        for team in ("a", "b"):
            await api.make("/teams", {"slug": team})
            project = await api.make("/projects", {"slug": "p", "team": team})
            bot = await api.make("/service-accounts", {"slug": "bot", "project": f"{team}/p"})
            key = await api.make("/virtual-keys", {"name": "k/1", "project": f"{team}/p", "principal": f"{team}/p/bot"})
            assert (key["project_id"], key["principal_id"]) == (project["id"], bot["id"])
            binding = await api.make("/provider-bindings", {"name": "m", "type": "mock", "scope_id": f"{team}/p"})
            assert binding["scope_id"] == project["id"]
            for path in (f"{team}%2Fp%2Fk%2F1", f"default%2F{team}%2Fp%2Fk%2F1"):
                assert (await api.get(f"/virtual-keys/{path}"))["id"] == key["id"]
            assert (await api.get(f"/service-accounts/{team}%2Fp%2Fbot"))["id"] == bot["id"]
            listed = await api.get(f"/virtual-keys?project_id={team}/p&principal_id={team}/p/bot")
            assert [found["id"] for found in listed["data"]] == [key["id"]]
            budget = await api.make(
                "/budgets",
                {"virtual_key": f"{team}/p/k/1", "window": "day", "limit_usd": "1", "provider": f"{team}/p/m"},
            )
            assert (budget["scope_id"], budget["provider"]) == (key["id"], binding["id"])
            groups = await api.make("/groups", {"slug": f"g{team}", "member_ids": [f"{team}/p/bot"]})
            assert groups["member_ids"] == [bot["id"]]
        status, _, message = await refusal(api, "GET", "/virtual-keys/k%2F1", None)
        assert (status, "(default/a/p/k/1)" in message) == (400, True)
        for path in ("a%2Fp%2Fnone", "none%2Fk%2F1", "x%2Fa%2Fp%2Fbot", "default%2Fdefault%2Fa%2Fp%2Fbot"):
            assert (await api.ask("GET", f"/service-accounts/{path}")).status == 404


async def test_a_binding_of_another_project_cannot_be_named() -> None:
    async with running_api() as api:
        await api.make("/projects", {"slug": "other"})
        await api.make("/provider-bindings", {"name": "b", "type": "mock", "project": "other"})
        status, _, message = await refusal(api, "POST", "/virtual-keys", {"name": "k", "provider_bindings": ["b"]})
        assert status == 400
        assert message.startswith("provider_bindings[0]: ")


async def test_patch_merges_and_null_clears() -> None:
    async with running_api() as api:
        await api.make(
            "/virtual-keys", {"name": "k", "metadata": {"a": "1", "b": "2"}, "rate_limits": {"rpm": 5, "tpm": 9}}
        )
        rules = {"tools": {"deny": ["^shell\\.exec$"], "allow": None}}
        changed = (
            await api.ask(
                "PATCH",
                "/virtual-keys/k",
                {"policy_rules": rules, "metadata": {"a": None, "c": "3"}, "rate_limits": {"rpm": None}},
            )
        ).body
        assert changed["policy_rules"]["tools"] == {"deny": ["^shell\\.exec$"], "allow": None}
        assert changed["metadata"] == {"b": "2", "c": "3"}
        assert (changed["rate_limits"]["rpm"], changed["rate_limits"]["tpm"]) == (None, 9)
        assert (await api.ask("PATCH", "/virtual-keys/k", {"rate_limits": None})).body["rate_limits"]["tpm"] is None
        assert (await api.ask("PATCH", "/virtual-keys/k", {"name": None})).status == 400


async def test_what_is_given_at_creation_cannot_be_moved() -> None:
    async with running_api() as api:
        await api.make("/projects", {"slug": "other"})
        await api.make("/virtual-keys", {"name": "k"})
        status, _, message = await refusal(api, "PATCH", "/virtual-keys/k", {"project": "other"})
        assert (status, message) == (400, "project_id: cannot be changed once the object is there")


async def test_a_version_that_has_passed_is_refused() -> None:
    async with running_api() as api:
        await api.make("/teams", {"slug": "t"})
        read = await api.ask("GET", "/teams/t")
        assert read.headers.get(b"etag") == b'"1"'
        assert (await api.ask("PATCH", "/teams/t", {"name": "one"}, if_match='"1"')).headers.get(b"etag") == b'"2"'
        stale = await api.ask("PATCH", "/teams/t", {"name": "two"}, if_match='"1"')
        assert (stale.status, stale.error["code"]) == (412, "precondition_failed")
        assert (await api.ask("DELETE", "/teams/t", if_match='"1"')).status == 412
        unchanged = await api.ask("PATCH", "/teams/t", {"name": "one"}, if_match='"2"')
        assert unchanged.headers.get(b"etag") == b'"2"'


async def test_archiving_frees_the_name_and_keeps_the_object_readable() -> None:
    async with running_api() as api:
        first = await api.make("/teams", {"slug": "t"})
        assert (await refusal(api, "POST", "/teams", {"slug": "t"}))[:2] == (409, "conflict")
        assert (await api.ask("DELETE", "/teams/t")).body["archived_at"] is not None
        second = await api.make("/teams", {"slug": "t"})
        assert (await api.get(f"/teams/{first['id']}"))["archived_at"] is not None
        listed = {row["id"] for row in (await api.get("/teams"))["data"]}
        assert second["id"] in listed
        assert first["id"] not in listed
        assert first["id"] in {row["id"] for row in (await api.get("/teams?include_archived=true"))["data"]}
        assert (await refusal(api, "PATCH", f"/teams/{first['id']}", {"name": "x"}))[:2] == (409, "conflict")


async def test_a_container_with_children_is_not_archived() -> None:
    async with running_api() as api:
        for path in ("/organizations/default", "/teams/default"):
            assert (await refusal(api, "DELETE", path, None))[:2] == (409, "conflict")


@pytest.mark.parametrize(
    ("method", "path", "headers", "raw", "status"),
    [
        pytest.param("PUT", "/teams", {}, b"{}", 405, id="method"),
        pytest.param("GET", "/team", {}, None, 404, id="path"),
        pytest.param("POST", "/teams", {"content_type": "text/plain"}, b"{}", 415, id="type"),
        pytest.param("POST", "/teams", {}, b"{", 400, id="no-json"),
        pytest.param("POST", "/teams", {}, b"[]", 400, id="no-object"),
        pytest.param("POST", "/teams", {}, b'{"slug":"\\ud800"}', 400, id="surrogate"),
        pytest.param("POST", "/teams", {}, b"[" * 100_000, 400, id="deep"),
        pytest.param("POST", "/teams", {}, b" " * (1024 * 1024 + 1), 413, id="large"),
        pytest.param("GET", "/teams?limt=3", {}, None, 400, id="query"),
        pytest.param("GET", "/teams?limit=201", {}, None, 400, id="limit"),
        pytest.param("PATCH", "/teams/default", {"if_match": 'W/"1"'}, b"{}", 412, id="weak-etag"),
    ],
)
async def test_http_is_read_strictly(method: str, path: str, headers: dict[str, str], raw: bytes, status: int) -> None:
    async with running_api() as api:
        answered = await api.ask(method, path, raw=raw, **headers)
        assert answered.status == status, answered.raw
        assert answered.error["type"] == answered.error["code"]
        if status == 405:
            assert answered.headers.get(b"allow") == b"GET, HEAD, OPTIONS, POST"


async def test_head_and_options_are_answered() -> None:
    async with running_api() as api:
        head = await api.ask("HEAD", "/teams/default")
        assert (head.status, head.raw) == (200, b"")
        options = await api.ask("OPTIONS", "/teams/default")
        assert (options.status, options.headers.get(b"allow")) == (204, b"DELETE, GET, HEAD, OPTIONS, PATCH")


# --- audit and secrets -----------------------------------------------------------------------------------------

_BODIES: dict[str, dict[str, Any]] = {
    "organization": {"slug": "x"},
    "team": {"slug": "x"},
    "project": {"slug": "x"},
    "user": {"slug": "x"},
    "service_account": {"slug": "x"},
    "group": {"slug": "x"},
    "provider_binding": {"name": "x", "type": "mock", "credential": CREDENTIAL},
    "routing_policy": {"name": "x"},
    "evaluator": {"name": "x", "type": "y"},
    "guardrail": {"name": "x", "evaluator": "x"},
    "virtual_key": {"name": "x", "budget": {"window": "day", "limit_usd": "1"}},
    "cache_rule": {"name": "x", "mode": "respect"},
    "budget": {"scope": "project", "window": "day", "limit_usd": "1", "name": "x"},
    "webhook": {"name": "x", "url": "https://example.com/", "secret": "whsec-0123456789abcdef"},
    "price_override": {"provider": "x", "model": "m", "effective_at": "2026-01-01T00:00:00Z",
                       "rates_usd": {"input": "1.25"}, "external_id": "x"},
    "api_token": {"name": "x", "role": "viewer"},
}  # fmt: skip
_CHANGES: dict[str, dict[str, Any]] = {
    "provider_binding": {"credential": CREDENTIAL + "0"},
    "virtual_key": {"tags": ["t"]},
    "budget": {"limit_usd": "2"},
    "price_override": {"model": "n"},
    "api_token": {"role": None, "permissions": ["virtualKeys:view"]},
    "webhook": {"enabled": False},
    "cache_rule": {"priority": 5},
}


async def test_every_change_leaves_its_entry_and_no_secret() -> None:
    async with running_api() as api:
        secrets = [CREDENTIAL, "whsec-0123456789abcdef"]
        for resource in RESOURCES:
            kind = resource.kind.name
            made = await api.make(f"/{resource.path}", _BODIES[kind])
            secrets += [made["secret"]] if "secret" in made else []
            change = _CHANGES.get(
                kind, {"name": "another"} if "slug" in resource.members else {"external_id": "e" + kind}
            )
            changed = await api.ask("PATCH", f"/{resource.path}/{made['id']}", change)
            assert (changed.status, changed.body["version"] > made["version"]) == (200, True), changed.raw
            for route in ROUTES:
                if route.resource is resource and route.method == "POST" and "{id}" in route.path and route.writes:
                    done = await api.ask("POST", route.path.replace("{id}", made["id"]), {})
                    assert done.status in (200, 409), (route.name, done.raw)
                    secrets += [done.body["secret"]] if "secret" in done.body else []
            entries = (await api.get(f"/audit?object_id={made['id']}"))["data"]
            actions = [entry["action"] for entry in entries]
            assert actions[-1] == resource.permission("create")
            assert resource.permission("update") in actions
            assert entries[-1]["before"] is None
            assert entries[-1]["request_id"].startswith("req_")
        await _archive_all(api)
        for secret in secrets:
            for page in ("/audit?limit=200", "/config/export"):
                assert secret not in json.dumps(await api.get(page))


async def _archive_all(api: Api) -> None:
    """Archive what was made, in the reverse order, and see its last entry."""
    for resource in reversed(RESOURCES):
        listed = (await api.get(f"/{resource.path}?limit=200"))["data"]
        for row in listed:
            if (row.get("slug") or row.get("name") or row.get("external_id") or "") in ("x", "another"):
                assert (await api.ask("DELETE", f"/{resource.path}/{row['id']}")).status == 200
                newest = (await api.get(f"/audit?object_id={row['id']}&limit=1"))["data"][0]
                assert (newest["action"], newest["after"]) == (resource.permission("delete"), None)


def test_every_mutation_is_work_in_a_transaction_or_says_why_not() -> None:
    outside: set[str] = {route.name for route in ROUTES if route.takes_body and route.writes is None}
    assert outside == {"refund_spend_event", "verify_ledger", "test_provider_binding", "apply_config"}
    assert all(isinstance(route, Route) for route in ROUTES)


async def test_secrets_are_shown_once_and_stored_sealed_or_hashed() -> None:
    async with running_api() as api:
        binding = await api.make("/provider-bindings", _BODIES["provider_binding"])
        key = await api.make("/virtual-keys", {"name": "k"})
        token = await api.make("/api-tokens", {"name": "t", "role": "viewer"})
        assert binding["credential_last4"] == CREDENTIAL[-4:]
        read = [await api.get(f"/{path}/{name}") for path, name in (
            ("provider-bindings", "x"), ("virtual-keys", "k"), ("api-tokens", "t"))]  # fmt: skip
        text = json.dumps([binding, *read])
        for secret in (CREDENTIAL, key["secret"], token["secret"]):
            assert secret not in text
        assert not {"hash", "previous_hash", "credential", "secret"} & set().union(*read)
