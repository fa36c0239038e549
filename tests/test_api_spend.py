"""What was spent, through the API: rows, sums, budgets, refunds, verification, within what the caller may see."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest

from management_client import Api, running_api
from penstock.governance import Ledger, LedgerReader, write_usd
from penstock_plugins.management import Management

pytestmark = pytest.mark.anyio

PLUGINS = ("store", "prices", "virtual_keys", "routing", "budgets", "mock", ("management", Management))
CHAT = json.dumps({"model": "gpt-5-mini", "messages": [{"role": "user", "content": "hello"}]}).encode()


async def spend(api: Api, secret: str) -> None:
    fields = [(b"host", b"g"), (b"authorization", b"Bearer " + secret.encode()), (b"content-type", b"application/json")]
    reply = await api.harness.request("POST", "/v1/chat/completions", fields, CHAT)
    assert reply.status == 200, reply.body
    await api.harness.gateway.generation.services.get(Ledger).flush()  # type: ignore[type-abstract]


async def prepared(api: Api) -> dict[str, Any]:
    """Make a key and spend with it twice."""
    await api.make("/provider-bindings", {"name": "m", "type": "mock"})
    key: dict[str, Any] = await api.make(
        "/virtual-keys", {"name": "k", "budget": {"window": "month", "limit_usd": "1"}}
    )
    assert key["last_used_at"] is None
    for _ in range(2):
        await spend(api, key["secret"])
    return key


async def test_rows_sums_and_budgets_agree() -> None:
    async with running_api(plugins=PLUGINS) as api:
        key = await prepared(api)
        rows = (await api.get("/spend-events"))["data"]
        assert [row["virtual_key_id"] for row in rows] == [key["id"]] * 2
        total = sum(row["cost_nano_usd"] for row in rows)
        assert total > 0
        assert (await api.get(f"/spend-events/{rows[0]['request_id']}"))["usage"]["output"] > 0
        usage = (await api.get("/usage?group_by=key,model&bucket=day&timezone=Europe/Amsterdam"))["data"]
        assert [(row["requests"], row["cost_nano_usd"]) for row in usage] == [(2, total)]
        of_key = await api.get("/virtual-keys/k/spend")
        assert (of_key["requests"], of_key["cost_nano_usd"]) == (2, total)
        of_budget = await api.get(f"/budgets/{key['budget']['id']}/spend")
        assert (of_budget["spent_nano_usd"], of_budget["remaining_nano_usd"]) == (total, 10**9 - total)
        assert (await api.get("/virtual-keys/k"))["last_used_at"] is not None
        assert (await api.ask("PATCH", "/virtual-keys/k", {"tags": ["t"]})).body["last_used_at"] is not None


async def test_budget_made_later_shows_what_its_window_has_seen_before_any_request() -> None:
    async with running_api(plugins=PLUGINS) as api:
        key = await prepared(api)
        spent = (await api.get("/virtual-keys/k/spend"))["cost_nano_usd"]
        late = {"scope": "virtual_key", "scope_id": key["id"], "window": "month", "limit_usd": "1"}
        budget = await api.make("/budgets", late)
        assert (await api.get(f"/budgets/{budget['id']}/spend"))["spent_nano_usd"] == spent
        other = await api.make("/budgets", {**late, "scope": "end_user", "window": "day"})
        assert (await api.get(f"/budgets/{other['id']}/spend?subject=ada"))["spent_nano_usd"] == 0


async def test_rows_are_paged() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        first = await api.get("/spend-events?limit=1")
        second = await api.get(f"/spend-events?limit=1&cursor={first['next_cursor']}")
        assert first["data"] != second["data"]
        assert second["next_cursor"] is None


async def test_a_refund_gives_back_once_and_is_audited() -> None:
    async with running_api(plugins=PLUGINS) as api:
        key = await prepared(api)
        row = (await api.get("/spend-events"))["data"][0]
        place = f"/spend-events/{row['request_id']}/refund"
        too_much = await api.ask("POST", place, {"amount_nano_usd": row["cost_nano_usd"] + 1})
        assert too_much.status == 400
        first = await api.ask("POST", place, {"reason": "wrong"}, idempotency_key="r")
        assert (first.status, first.body["cost_nano_usd"]) == (201, -row["cost_nano_usd"]), first.raw
        second = await api.ask("POST", place, {"reason": "wrong"}, idempotency_key="r")
        assert (second.raw, second.headers.get(b"idempotent-replay")) == (first.raw, b"true")
        assert (await api.ask("POST", place, {})).status == 409
        of_budget = await api.get(f"/budgets/{key['budget']['id']}/spend")
        assert of_budget["spent_nano_usd"] == row["cost_nano_usd"]
        entry = (await api.get("/audit?kind=spend_event"))["data"]
        assert [found["after"]["reason"] for found in entry] == ["wrong"]
        verified = await api.ask("POST", "/ledger/verify", {})
        assert verified.body == {"ok": True, "discrepancies": []}


async def test_a_refund_without_amount_gives_back_what_is_left_until_nothing_is() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        row = (await api.get("/spend-events"))["data"][0]
        cost, place = row["cost_nano_usd"], f"/spend-events/{row['request_id']}/refund"
        await api.make(place, {"amount_nano_usd": 1})
        more = await api.ask("POST", place, {"amount_nano_usd": cost})
        assert (more.status, more.error["meta"]["left_nano_usd"]) == (409, cost - 1)
        assert more.error["message"].endswith(f"of which {write_usd(cost - 1)} is left to give back")
        first = await api.ask("POST", place, {}, idempotency_key="rest")
        assert (first.status, first.body["cost_nano_usd"]) == (201, 1 - cost), first.raw
        assert (await api.ask("POST", place, {}, idempotency_key="rest")).raw == first.raw
        for body in ({}, {"amount_nano_usd": 1}, {"amount_usd": None}):
            refused = await api.ask("POST", place, body)
            assert refused.status == 409, refused.raw
            assert refused.error["message"].endswith("USD, and all of it is given back already.")
        verified = await api.ask("POST", "/ledger/verify", {})
        assert verified.body == {"ok": True, "discrepancies": []}


async def test_a_reset_begins_the_period_anew() -> None:
    async with running_api(plugins=PLUGINS) as api:
        key = await prepared(api)
        services = api.harness.gateway.generation.services
        now = services.clock()
        services.clock = lambda: now + 2
        path = f"/budgets/{key['budget']['id']}"
        assert (await api.ask("POST", f"{path}/reset", {})).body["period_reset_at"] is not None
        assert (await api.get(f"{path}/spend"))["spent_nano_usd"] == 0


async def test_others_see_nothing_of_it() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        row = (await api.get("/spend-events"))["data"][0]
        await api.make("/organizations", {"slug": "other"})
        foreign = await api.token_for(role="org_admin", scope_id="other")
        assert (await foreign.get("/spend-events"))["data"] == []
        assert (await foreign.get("/usage"))["data"] == [] or (await foreign.get("/usage"))["data"][0]["requests"] == 0
        assert (await foreign.ask("GET", f"/spend-events/{row['request_id']}")).status == 404
        assert (await foreign.ask("POST", f"/spend-events/{row['request_id']}/refund", {})).status == 404
        assert (await foreign.ask("POST", "/ledger/verify", {})).status == 403
        assert (await foreign.ask("GET", f"/spend-events?project_id={row['project_id']}")).status == 404
        assert (await foreign.ask("GET", "/virtual-keys/k/spend")).status == 404
        user = await api.make("/users", {"slug": "dev"})
        dev = await api.token_for(role="developer", scope_id=row["project_id"], user_id=user["id"])
        assert (await dev.get("/spend-events"))["data"] == []
        assert (await dev.ask("GET", f"/spend-events?principal_id={row['principal_id']}")).status == 403


async def test_the_price_in_force_is_shown_and_overridden() -> None:
    async with running_api(plugins=PLUGINS) as api:
        before = (await api.get("/prices?provider=openai&model=gpt-5-mini"))["data"]
        assert before[0]["rates"]["input"] > 0
        override = {"provider": "openai", "model": "gpt-5*", "effective_at": "2026-01-01T00:00:00Z",
                    "rates_usd": {"input": "7", "output": "8"}}  # fmt: skip
        made = await api.make("/prices/overrides", override)
        assert made["rates"] == {"input": 7_000_000_000, "output": 8_000_000_000}
        with anyio.fail_after(2):  # in which every change is seen
            while (after := (await api.get("/prices?provider=openai&model=gpt-5-mini"))["data"]) == before:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert (after[0]["rates_usd"]["input"], after[0]["version"]) == ("7", f"override {made['id']}")
        assert [row["id"] for row in (await api.get("/prices"))["data"]] == [made["id"]]


async def test_sums_are_paged_in_their_order() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        second = await api.make("/virtual-keys", {"name": "k2"})
        await spend(api, second["secret"])
        everything = await api.get("/usage?group_by=key&bucket=day")
        assert ([row["requests"] for row in everything["data"]], everything["next_cursor"]) == ([2, 1], None)
        place = "/usage?group_by=key&bucket=day&limit=1"
        first = await api.get(place)
        rest = await api.get(f"{place}&cursor={first['next_cursor']}")
        assert first["data"] + rest["data"] == everything["data"]
        assert rest["next_cursor"] is None
        assert (await api.ask("GET", f"/usage?group_by=model&cursor={first['next_cursor']}")).status == 400
        for limit in ("0", "1001", "x"):
            assert (await api.ask("GET", f"/usage?limit={limit}")).status == 400


async def test_key_of_a_refund_is_free_again_after_a_day() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        row = (await api.get("/spend-events"))["data"][0]
        place = f"/spend-events/{row['request_id']}/refund"
        first = await api.ask("POST", place, {"amount_nano_usd": 1}, idempotency_key="r")
        assert (first.status, first.body["cost_nano_usd"]) == (201, -1), first.raw
        assert (await api.ask("POST", place, {"amount_nano_usd": 7}, idempotency_key="r")).status == 409
        services: Any = api.harness.gateway.generation.services
        now = services.clock()
        services.clock = lambda: now + 2 * 86_400
        second = await api.ask("POST", place, {"amount_nano_usd": 7}, idempotency_key="r")
        assert (second.status, second.body["cost_nano_usd"]) == (201, -7), second.raw
        services.clock = lambda: now + 4 * 86_400
        again = await api.ask("POST", place, {"amount_nano_usd": 7}, idempotency_key="r")  # what it asks is done
        assert (again.status, again.body["request_id"]) == (201, second.body["request_id"])
        assert await services.get(LedgerReader).left(row["request_id"]) == row["cost_nano_usd"] - 8


async def test_correction_entered_under_the_same_id_that_differs_is_a_conflict() -> None:
    async with running_api(plugins=PLUGINS) as api:
        await prepared(api)
        row = (await api.get("/spend-events"))["data"][0]
        place = f"/spend-events/{row['request_id']}/refund"
        assert (await api.ask("POST", place, {"amount_nano_usd": 5}, idempotency_key="r")).status == 201
        services: Any = api.harness.gateway.generation.services
        changed = "UPDATE ledger SET cost_nano_usd = -4 WHERE adjusts IS NOT NULL"
        await services.get(LedgerReader)._database.write(lambda connection: connection.exec_driver_sql(changed))
        now = services.clock()
        services.clock = lambda: now + 2 * 86_400
        again = await api.ask("POST", place, {"amount_nano_usd": 5}, idempotency_key="r")
        assert (again.status, again.error["code"]) == (409, "conflict"), again.raw
