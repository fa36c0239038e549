"""Virtual keys through the API: shown once, working at once, rotated, revoked; answers kept and lists paged."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from management_client import Answered, Api, running_api
from penstock.governance import ObjectStore
from penstock.testing import Reply

pytestmark = pytest.mark.anyio

CHAT = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hello"}]}).encode()


async def call(api: Api, secret: str) -> Reply:
    fields = [(b"host", b"g"), (b"authorization", b"Bearer " + secret.encode()), (b"content-type", b"application/json")]
    return await api.harness.request("POST", "/v1/chat/completions", fields, CHAT)


async def test_a_key_works_from_the_moment_it_is_made_until_it_is_revoked() -> None:
    async with running_api() as api:
        await api.make("/provider-bindings", {"name": "m", "type": "mock"})
        key = await api.make("/virtual-keys", {"name": "k", "provider_bindings": ["m"]})
        assert key["secret"].startswith("ps_vk_live_")
        assert key["secret"].startswith(key["display_prefix"])
        assert (await call(api, key["secret"])).status == 200
        assert (await api.ask("POST", "/virtual-keys/k/disable", {})).body["status"] == "disabled"
        assert (await call(api, key["secret"])).status == 403
        assert (await api.ask("POST", "/virtual-keys/k/enable", {})).body["status"] == "active"
        assert (await call(api, key["secret"])).status == 200
        assert (await api.ask("POST", "/virtual-keys/k/revoke", {})).body["status"] == "revoked"
        assert (await call(api, key["secret"])).status == 403
        assert (await api.ask("POST", "/virtual-keys/k/enable", {})).status == 409
        assert (await api.ask("POST", "/virtual-keys/k/rotate", {})).status == 409


@pytest.mark.parametrize(("grace", "old"), [(None, 200), (0, 401)])
async def test_rotation_keeps_the_id_and_ends_the_old_secret_after_its_grace(grace: int | None, old: int) -> None:
    async with running_api() as api:
        await api.make("/provider-bindings", {"name": "m", "type": "mock"})
        key = await api.make("/virtual-keys", {"name": "k"})
        body = {} if grace is None else {"grace_seconds": grace}
        rotated = (await api.ask("POST", "/virtual-keys/k/rotate", body)).body
        assert rotated["id"] == key["id"]
        assert rotated["secret"] != key["secret"]
        assert (rotated["previous_expires_at"] is None) == (grace == 0)
        assert (await call(api, rotated["secret"])).status == 200
        assert (await call(api, key["secret"])).status == old


async def test_a_key_whose_time_has_come_shows_as_expired() -> None:
    async with running_api() as api:
        services = api.harness.gateway.generation.services
        now = services.clock()
        made = await api.make("/virtual-keys", {"name": "k", "expires_at": "2999-01-01T00:00:00+01:00"})
        assert (made["status"], made["expires_at"]) == ("active", "2998-12-31T23:00:00Z")
        await api.make("/virtual-keys", {"name": "other"})
        services.clock = lambda: now + 975 * 366 * 86_400
        assert (await api.get("/virtual-keys/k"))["status"] == "expired"
        assert [row["name"] for row in (await api.get("/virtual-keys?status=expired"))["data"]] == ["k"]
        assert [row["name"] for row in (await api.get("/virtual-keys?status=active"))["data"]] == ["other"]


async def test_a_budget_comes_changes_and_goes_with_its_key() -> None:
    async with running_api() as api:
        key = await api.make("/virtual-keys", {"name": "k", "budget": {"window": "month", "limit_usd": "10"}})
        assert (key["budget"]["scope_id"], key["budget"]["limit_usd"]) == (key["id"], "10")
        changed = await api.ask("PATCH", "/virtual-keys/k", {"budget": {"limit_nano_usd": 1}})
        assert changed.body["budget"]["limit_usd"] == "0.000000001"
        assert changed.body["budget"]["id"] == key["budget"]["id"]
        assert (await api.ask("PATCH", "/virtual-keys/k", {"budget": None})).body["budget"] is None
        assert (await api.get(f"/budgets/{key['budget']['id']}"))["archived_at"] is not None
        again = await api.ask("PATCH", "/virtual-keys/k", {"budget": {"window": "day", "limit_usd": 3}})
        assert again.body["budget"]["window"] == "day"
        assert (await api.ask("DELETE", "/virtual-keys/k")).status == 200
        assert (await api.get("/budgets"))["data"] == []


async def test_a_refused_budget_makes_no_key() -> None:
    async with running_api() as api:
        refused = await api.ask("POST", "/virtual-keys", {"name": "k", "budget": {"window": "month"}})
        assert refused.status == 400
        assert (await api.get("/virtual-keys"))["data"] == []


# --- answers kept --------------------------------------------------------------------------------------------


async def test_a_repetition_answers_the_same_bytes_and_makes_nothing() -> None:
    async with running_api() as api:
        first = await api.ask("POST", "/virtual-keys", {"name": "k"}, idempotency_key="one")
        second = await api.ask("POST", "/virtual-keys", {"name": "k"}, idempotency_key="one")
        assert (first.status, first.headers.get(b"idempotent-replay")) == (201, None)
        assert (second.status, second.headers.get(b"idempotent-replay")) == (201, b"true")
        assert second.raw == first.raw
        assert second.headers.get(b"etag") == first.headers.get(b"etag")
        other = await api.ask("POST", "/virtual-keys", {"name": "other"}, idempotency_key="one")
        assert (other.status, other.error["code"]) == (409, "idempotency_mismatch")
        assert len((await api.get("/virtual-keys"))["data"]) == 1


async def test_what_is_kept_is_sealed_and_another_actors_key_is_another() -> None:
    async with running_api() as api:
        made = await api.ask("POST", "/virtual-keys", {"name": "k"}, idempotency_key="one")
        store: ObjectStore = api.harness.gateway.generation.services.get(ObjectStore)  # type: ignore[type-abstract]
        whoami = await api.get("/whoami")
        import hashlib  # noqa: PLC0415

        name = f"{whoami['id']}:{hashlib.sha256(b'one').hexdigest()}"
        kept = await store.read(lambda tx: tx.remembered(name, now_ms=0))
        assert kept is not None
        assert made.body["secret"].encode() not in kept[1]
        other = await api.token_for(role="org_admin", scope_id="default")
        assert (await other.ask("POST", "/virtual-keys", {"name": "k2"}, idempotency_key="one")).status == 201


async def test_of_requests_at_once_with_one_key_one_makes_the_object() -> None:
    async with running_api() as api:
        answers: list[Answered] = []

        async def make() -> None:
            answers.append(await api.ask("POST", "/teams", {"slug": "t"}, idempotency_key="k"))

        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(make)
        assert {answer.status for answer in answers} == {201}
        assert len({answer.raw for answer in answers}) == 1
        assert sum(answer.headers.get(b"idempotent-replay") is None for answer in answers) == 1


async def test_a_refusal_is_not_kept() -> None:
    async with running_api() as api:
        refused = await api.ask("POST", "/projects", {"slug": "p", "team": "t"}, idempotency_key="k")
        assert refused.status == 404
        await api.make("/teams", {"slug": "t"})
        made = await api.ask("POST", "/projects", {"slug": "p", "team": "t"}, idempotency_key="k")
        assert made.status == 201


# --- lists ---------------------------------------------------------------------------------------------------


async def test_pages_are_stable_under_inserts() -> None:
    async with running_api() as api:
        made = [(await api.make("/teams", {"slug": f"t{number}"}))["id"] for number in range(7)]
        seen: list[str] = []
        cursor: Any = ""
        while cursor is not None:
            page = await api.get(f"/teams?limit=3{cursor and f'&cursor={cursor}'}")
            assert len(page["data"]) <= 3
            seen += [row["id"] for row in page["data"]]
            await api.make("/teams", {"slug": f"new{len(seen)}"}) if len(seen) < 7 else None
            cursor = page["next_cursor"]
        assert len(seen) == len(set(seen))
        assert [found for found in seen if found in made] == made


async def test_a_cursor_serves_its_own_list_filter_and_actor_alone() -> None:
    async with running_api() as api:
        for number in range(4):
            await api.make("/teams", {"slug": f"t{number}"})
            await api.make("/users", {"slug": f"u{number}"})
        cursor = (await api.get("/teams?limit=2"))["next_cursor"]
        other = await api.token_for(role="viewer")
        for asker, path in (
            (api, f"/users?limit=2&cursor={cursor}"),
            (api, f"/teams?limit=2&slug=t1&cursor={cursor}"),
            (api, f"/teams?limit=2&include_archived=true&cursor={cursor}"),
            (other, f"/teams?limit=2&cursor={cursor}"),
            (api, f"/teams?limit=2&cursor={cursor[:-2]}xx"),
            (api, "/teams?limit=2&cursor=%00"),
        ):
            answered = await asker.ask("GET", path)
            assert (answered.status, answered.error["code"]) == (400, "bad_request"), path
        assert (await api.get(f"/teams?limit=3&cursor={cursor}"))["data"]


async def test_the_audit_is_paged_newest_first() -> None:
    async with running_api() as api:
        for number in range(5):
            await api.make("/teams", {"slug": f"t{number}"})
        first = await api.get("/audit?kind=team&limit=3")
        second = await api.get(f"/audit?kind=team&limit=3&cursor={first['next_cursor']}")
        slugs = [entry["after"]["slug"] for page in (first, second) for entry in page["data"]]
        assert slugs == ["t4", "t3", "t2", "t1", "t0", "default"]
        assert second["next_cursor"] is None


# --- bindings ------------------------------------------------------------------------------------------------


async def test_testing_a_binding_reports_without_secrets() -> None:
    async with running_api() as api:
        await api.make("/provider-bindings", {"name": "m", "type": "mock"})
        good = (await api.ask("POST", "/provider-bindings/m/test", {})).body
        assert (good["ok"], good["status"]) == (True, 200)
        dead = {
            "name": "d",
            "type": "openai",
            "base_url": "http://127.0.0.1:1/v1",
            "credential": "sk-hidden-0123456789",
        }
        await api.make("/provider-bindings", dead)
        bad = await api.ask("POST", "/provider-bindings/d/test", {})
        assert (bad.status, bad.body["ok"], bad.body["status"]) == (200, False, None)
        assert b"sk-hidden" not in bad.raw


async def test_a_refused_change_leaves_the_binding_in_use_as_it_was() -> None:
    async with running_api() as api:
        await api.make("/provider-bindings", {"name": "m", "type": "mock", "models": ["gpt-5-mini"]})
        key = await api.make("/virtual-keys", {"name": "k", "provider_bindings": ["m"]})
        refused = await api.ask("PATCH", "/provider-bindings/m", {"settings": {"nope": 1}})
        assert refused.status == 400
        assert (await call(api, key["secret"])).status == 200
        assert (await api.ask("PATCH", "/provider-bindings/m", {"enabled": False})).status == 200
        assert (await call(api, key["secret"])).status == 400
