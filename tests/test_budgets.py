"""The budgets plugin on a gateway with a real store, real prices and scripted providers."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import attrs
import pytest

from governed_gateway import ANSWERED, BODY, CHAT, NOW, TOKEN, Clock, always, answer, governed
from penstock import Candidate, Exchange, RequestError, hookimpl
from penstock.governance import read_time, write_usd
from penstock.testing import FakeUpstream, http_reply
from penstock.testing.samples import ANSWER

pytestmark = pytest.mark.anyio
MESSAGES = {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
SCOPES = ("organization", "team", "project", "virtual_key", "principal", "end_user")
WARNING = "X-Penstock-Budget-Warning"


@pytest.mark.parametrize("scope", SCOPES)
async def test_budget_refuses_once_it_is_spent(tmp_path: Path, scope: str) -> None:
    async with governed(tmp_path) as gateway:
        budget_id = await gateway.budget(ANSWERED, scope, reserve="none", window="month", name="cap")
        user = {**BODY, "user": "ann"}
        assert (await gateway.ask(user)).status == 200
        refused = await gateway.ask(user)
        assert refused.status == 402
        assert refused.header("X-Penstock-Error") == "budget_exceeded"
        assert refused.header("x-should-retry") == "false"
        assert refused.header(WARNING) == f"{scope}:100"
        error = refused.json()["error"]
        assert "'cap'" in error["message"]
        assert budget_id in error["message"]
        assert error["meta"] == {
            "budget_id": budget_id,
            "budget_scope": scope,
            "budget_window": "month",
            "limit_usd": write_usd(ANSWERED),
            "spent_usd": write_usd(ANSWERED),
            "resets_at": "2026-12-01T00:00:00Z",
        }
        first, second = await gateway.rows()
        assert (first.outcome, first.cost_nano_usd, first.status) == ("success", ANSWERED, 200)
        assert (second.outcome, second.cost_nano_usd, second.error) == ("refused", 0, "budget_exceeded")
        assert second.debits == ()
        assert second.binding_id is None
        assert await gateway.total(budget_id, "ann" if scope == "end_user" else None) == ANSWERED


async def test_every_member_of_a_group_has_the_whole_allowance(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        second = await gateway.user()
        group_id = await gateway.group(gateway.user_id, second)
        budget_id = await gateway.budget(ANSWERED, "group", scope_id=group_id, reserve="none")
        _, secret = await gateway.key(second)
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        theirs = {"Authorization": f"Bearer {secret}"}
        assert [(await gateway.ask(headers=theirs)).status for _ in range(2)] == [200, 402]
        assert await gateway.total(budget_id, gateway.user_id) == await gateway.total(budget_id, second) == ANSWERED


async def test_every_budget_is_checked_and_a_block_wins_over_warns(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(1, "organization", on_breach="warn")
        await gateway.budget(10 * ANSWERED, "project", reserve="none")
        strict = await gateway.budget(2 * ANSWERED, "virtual_key", reserve="none")
        assert [(await gateway.ask()).header(WARNING) for _ in range(2)] == [None, "organization:500000"]
        refused = await gateway.ask()
        assert refused.json()["error"]["meta"]["budget_id"] == strict
        assert refused.header(WARNING) == "organization:1000000,virtual_key:100"


async def test_warning_begins_at_80_percent_and_warn_never_refuses(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(5 * ANSWERED, on_breach="warn", reserve="max")
        replies = [await gateway.ask() for _ in range(8)]
        assert [reply.status for reply in replies] == [200] * 8
        assert [reply.header(WARNING) for reply in replies] == [
            None, None, None, None, "virtual_key:80", "virtual_key:100", "virtual_key:120", "virtual_key:140",
        ]  # fmt: skip


async def test_budget_of_a_binding_takes_it_out_and_refuses_when_none_is_left(tmp_path: Path) -> None:
    upstreams = [FakeUpstream([answer], repeat=True), FakeUpstream([answer], repeat=True)]
    async with governed(tmp_path, upstreams) as gateway:
        primary, _, secondary, _ = gateway.bindings
        first = await gateway.budget(ANSWERED, "project", provider=primary, reserve="none")
        second = await gateway.budget(2 * ANSWERED, "team", provider=secondary, reserve="none")
        replies = [await gateway.ask() for _ in range(4)]
        assert [reply.status for reply in replies] == [200, 200, 200, 402]
        assert [reply.header("X-Penstock-Fallback-Count") for reply in replies[:3]] == ["0", "1", "1"]
        assert [row.binding_id for row in await gateway.rows()] == [primary, secondary, secondary, None]
        assert [reply.header(WARNING) for reply in replies] == [
            None, f"project/{primary}:100", f"project/{primary}:100",
            f"team/{secondary}:100,project/{primary}:100",
        ]  # fmt: skip
        meta = replies[3].json()["error"]["meta"]
        assert (meta["budget_id"], meta["budget_provider"]) == (first, primary)
        assert await gateway.total(first) == ANSWERED
        assert await gateway.total(second) == 2 * ANSWERED
        assert (await gateway.ask(MESSAGES, "/v1/messages")).status == 200


@pytest.mark.parametrize(
    ("members", "headers", "end_user"),
    [
        ({"user": "ann"}, {}, "ann"),
        ({"user": "ann"}, {"X-Penstock-End-User-Id": "bob"}, "bob"),
        ({"metadata": {"user_id": "cid"}}, {}, "cid"),
        ({"safety_identifier": "dan"}, {}, "dan"),
        ({"user": "ann", "metadata": {"user_id": "cid"}, "safety_identifier": "dan"}, {}, "ann"),
        ({"metadata": {"user_id": "cid"}, "safety_identifier": "dan"}, {}, "cid"),
    ],
)
async def test_end_user_is_named_by_header_or_body(
    tmp_path: Path, members: dict[str, Any], headers: dict[str, str], end_user: str
) -> None:
    async with governed(tmp_path) as gateway:
        budget_id = await gateway.budget(10 * ANSWERED, "end_user", scope_id=gateway.project_id)
        assert (await gateway.ask({**BODY, **members}, headers=headers)).status == 200
        assert [row.end_user for row in await gateway.rows()] == [end_user]
        assert await gateway.total(budget_id, end_user) == ANSWERED


async def test_end_users_have_allowances_of_their_own_and_must_be_named(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(ANSWERED, "end_user", reserve="none")
        nameless = await gateway.ask()
        assert (nameless.status, nameless.header("X-Penstock-Error")) == (400, "end_user_required")
        assert (await gateway.ask({**BODY, "user": ""})).status == 400
        for name in ("ann", "bob"):
            assert [(await gateway.ask({**BODY, "user": name})).status for _ in range(2)] == [200, 402]


async def test_end_user_budget_that_warns_refuses_nobody(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(1, "end_user", on_breach="warn")
        assert (await gateway.ask()).status == 200


async def test_long_end_user_is_kept_as_a_digest(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.ask({**BODY, "user": "x" * 257})
        (row,) = await gateway.rows()
        assert row.end_user is not None
        assert row.end_user.startswith("sha256:")
        assert len(row.end_user) == 71


@pytest.mark.parametrize("blank", [b"", b" ", b"\t ", "\u00a0".encode()])
@pytest.mark.parametrize("members", [{"user": "ann"}, {"user": " ", "metadata": {"user_id": "ann"}}])
async def test_blank_header_or_member_hides_no_end_user(tmp_path: Path, blank: bytes, members: dict[str, Any]) -> None:
    async with governed(tmp_path, socket=True) as gateway:
        budget_id = await gateway.budget(ANSWERED, "end_user", reserve="none")
        headers = [(b"X-Penstock-End-User-Id", blank)]
        assert [(await gateway.ask({**BODY, **members}, headers=headers)).status for _ in range(2)] == [200, 402]
        assert await gateway.total(budget_id, "ann") == ANSWERED


@pytest.mark.parametrize("members", [
    b'"user":"\\ud800"', b'"user":"a\xff"', b'"metadata":{"user_id":"\\udfff!"}', b'"safety_identifier":"\\uD800\\n"',
    b'"\\u0075ser":"\\ud800"', b'"user":"\\ud800","metadata":{"user_id":"bob"}',
])  # fmt: skip
async def test_end_user_that_is_no_unicode_counts_as_one(tmp_path: Path, members: bytes) -> None:
    async with governed(tmp_path) as gateway:
        budget_id = await gateway.budget(ANSWERED, "end_user", reserve="none")
        body = b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hi"}],%b}' % members
        assert [(await gateway.ask(body)).status for _ in range(2)] == [200, 402]
        served, _ = await gateway.rows()
        assert served.end_user is not None
        assert served.end_user.startswith("sha256:")
        assert await gateway.total(budget_id, served.end_user) == ANSWERED


async def test_end_users_that_are_no_unicode_are_told_apart_wherever_they_are_named(tmp_path: Path) -> None:
    async with governed(tmp_path, socket=True) as gateway:
        await gateway.budget(ANSWERED, "end_user", reserve="none")
        name = b"X-Penstock-End-User-Id"
        statuses = [(await gateway.ask(headers=[(name, value)])).status for value in (b"\xff", b"\xfe", b"\xff")]
        assert statuses == [200, 200, 402]
        odd = b'{"model":"gpt-4o-mini","messages":[],"user":"\xfe"}'
        assert (await gateway.ask(odd)).status == 402


async def test_next_period_begins_with_nothing_spent(tmp_path: Path) -> None:
    clock = Clock()
    async with governed(tmp_path, clock=clock) as gateway:
        await gateway.budget(ANSWERED, window="day", timezone="Asia/Kathmandu", reserve="none")
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        clock.now = read_time("2026-11-30T23:59:59+05:45")
        assert (await gateway.ask()).status == 402
        clock.now += 1
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]


async def test_reset_gives_the_whole_limit_again_and_changes_no_row(tmp_path: Path) -> None:
    clock = Clock()
    async with governed(tmp_path, clock=clock) as gateway:
        budget_id = await gateway.budget(ANSWERED, reserve="none")
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        before = await gateway.rows()
        clock.now += 0.3
        await gateway.change("budget", budget_id, period_reset_at="2026-11-30T12:00:00.800Z")
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        assert (await gateway.rows())[:2] == before


async def test_budget_made_within_a_period_counts_what_was_spent_before(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        assert (await gateway.ask()).status == 200
        await gateway.budget(ANSWERED, "project", window="month", reserve="none")
        assert (await gateway.ask()).status == 402


async def test_expected_reserves_the_average_of_key_and_model(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(100 * ANSWERED)
        await gateway.ask()
        likely = (len(b'{"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}]}') // 4 + 1) * TOKEN
        await gateway.ask()
        await gateway.ask({**BODY, "model": "other"})
        reserved = [debit.reserved for row in await gateway.rows() for debit in row.debits]
        assert reserved[0] == likely > ANSWERED
        assert reserved[1] == likely


async def test_max_reserves_all_that_is_possible_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    async with governed(tmp_path, rates={"input": 0, "output": TOKEN * 1_000_000}) as gateway:
        await gateway.budget(100 * TOKEN, reserve="max")
        assert (await gateway.ask({**BODY, "max_tokens": 100})).status == 200
        refused = await gateway.ask({**BODY, "max_completion_tokens": 99})
        assert refused.status == 402
        assert "it may cost 0.000099" in refused.json()["error"]["message"]
        assert (await gateway.ask({**BODY, "max_tokens": 98})).status == 200
        assert [debit.reserved for row in await gateway.rows() for debit in row.debits] == [100_000, 98_000]


async def test_max_takes_the_dearest_candidate(tmp_path: Path) -> None:
    upstreams = [always(http_reply(b"{}", 500)), FakeUpstream([answer], repeat=True)]
    async with governed(tmp_path, upstreams, rates=None) as gateway:
        await gateway.change("provider_binding", gateway.bindings[2], model_map={"m": "dear"}, models=["m"])
        await gateway.change("provider_binding", gateway.bindings[0], models=["m"])
        await gateway.price("openai_compatible", "m", {"input": 0, "output": TOKEN * 1_000_000})
        await gateway.price("openai_compatible", "dear", {"input": 0, "output": 10 * TOKEN * 1_000_000})
        await gateway.budget(100 * TOKEN, reserve="max")
        assert (await gateway.ask({**BODY, "model": "m", "max_tokens": 11})).status == 402
        assert (await gateway.ask({**BODY, "model": "m", "max_tokens": 10})).status == 200
        rows = await gateway.rows()
        assert [debit.reserved for debit in rows[1].debits] == [100 * TOKEN]
        assert (rows[1].model_served, rows[1].cost_nano_usd, rows[1].fallback_count) == ("dear", 20 * TOKEN, 1)


@pytest.mark.parametrize(
    ("policy", "status", "cost", "source"),
    [
        ({}, 200, 0, "unpriced"),
        ({"unknown": "refuse"}, 400, 0, "none"),
        ({"unknown": "estimate", "estimate": {"input": "1", "output": "2"}}, 200, 7_000, "estimated"),
    ],
)
async def test_model_without_a_price(
    tmp_path: Path, policy: dict[str, Any], status: int, cost: int, source: str
) -> None:
    async with governed(tmp_path, rates=None, config={"prices": policy}) as gateway:
        budget_id = await gateway.budget(100 * ANSWERED)
        reply = await gateway.ask({**BODY, "model": "nobody-knows-this"})
        assert reply.status == status
        if status == 400:
            assert reply.header("X-Penstock-Error") == "model_not_recognized"
            assert "has no price" in reply.json()["error"]["message"]
        (row,) = await gateway.rows()
        assert (row.cost_nano_usd, row.cost_source) == (cost, source)
        assert await gateway.total(budget_id) == cost


@pytest.mark.parametrize("path", ["/v1/messages/count_tokens", "/v1/models"])
async def test_counting_and_looking_around_is_not_held_against_budgets(tmp_path: Path, path: str) -> None:
    upstream = always(http_reply(b'{"input_tokens":9,"data":[]}'))
    async with governed(tmp_path, upstream) as gateway:
        await gateway.budget(0)
        body = MESSAGES if "count" in path else b""
        reply = await gateway.harness.request("POST" if body else "GET", path, (), body)
        assert reply.status == 200
        assert [(row.cost_nano_usd, row.cost_source, row.debits) for row in await gateway.rows()] == [
            (0, "none", ()) for _ in range(1 if body else 0)
        ]


class Guard:
    """Block what it sees, before or after the provider."""

    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Any) -> None:
        raise RequestError("guardrail_blocked", "No.")


async def test_blocked_response_is_recorded_and_counts_to_no_cap(tmp_path: Path) -> None:
    async with governed(tmp_path, plugins=[Guard]) as gateway:
        budget_id = await gateway.budget(100 * ANSWERED)
        await gateway.ask()
        (row,) = await gateway.rows()
        assert (row.outcome, row.error, row.debits) == ("refused", "guardrail_blocked", ())
        assert row.cost_nano_usd > 0
        assert await gateway.total(budget_id) == 0


@attrs.define(eq=False)
class Chooser:
    """Send everything to the binding and model that headers name, past routing."""

    services: Any

    @hookimpl(tryfirst=True)
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        from penstock import BindingDirectory  # noqa: PLC0415

        if exchange.attempts:
            return None
        binding_id, model = [exchange.request.headers.get(name) or b"" for name in (b"x-binding", b"x-model")]
        binding = self.services.get(BindingDirectory).find_binding(binding_id.decode())
        return Candidate(binding, self.services.provider_of(binding), model.decode() or exchange.peek.model)


async def test_candidate_of_another_plugin_is_admitted_at_its_attempt(tmp_path: Path) -> None:
    async with governed(tmp_path, plugins=[Chooser], rates={"input": 0, "output": TOKEN * 1_000_000}) as gateway:
        budget_id = await gateway.budget(10 * TOKEN, reserve="max")
        elsewhere = {"X-Binding": gateway.bindings[0]}
        assert (await gateway.ask({**BODY, "max_tokens": 11}, headers=elsewhere)).status == 402
        assert (await gateway.ask({**BODY, "max_tokens": 10}, headers=elsewhere)).status == 200
        assert await gateway.total(budget_id) == 2 * TOKEN


async def test_dearer_candidate_of_another_plugin_reserves_the_difference(tmp_path: Path) -> None:
    async with governed(tmp_path, plugins=[Chooser], rates=None) as gateway:
        await gateway.price("openai_compatible", "gpt*", {"input": 0, "output": TOKEN * 1_000_000})
        await gateway.price("openai_compatible", "dear", {"input": 0, "output": 3 * TOKEN * 1_000_000})
        budget_id = await gateway.budget(30 * TOKEN, reserve="max")
        dear = {"X-Binding": gateway.bindings[0], "X-Model": "dear"}
        assert (await gateway.ask({**BODY, "max_tokens": 11}, headers=dear)).status == 402
        assert (await gateway.ask({**BODY, "max_tokens": 10}, headers=dear)).status == 200
        assert await gateway.total(budget_id) == 6 * TOKEN


async def test_late_candidate_whose_own_budget_is_spent_is_skipped(tmp_path: Path) -> None:
    upstreams = [FakeUpstream([answer], repeat=True), FakeUpstream([answer], repeat=True)]
    async with governed(tmp_path, upstreams, plugins=[Chooser]) as gateway:
        primary, _, secondary, _ = gateway.bindings
        await gateway.budget(0, provider=secondary)
        elsewhere = {"X-Binding": secondary, "X-Model": "another"}
        reply = await gateway.ask(headers=elsewhere)
        assert (reply.status, reply.header("X-Penstock-Fallback-Count")) == (200, "1")
        (row,) = await gateway.rows()
        assert (row.binding_id, row.attempts[0]["reason"]) == (primary, "budget_exceeded")


async def test_ledger_row_says_all_about_an_exchange(tmp_path: Path) -> None:
    upstreams = [always(http_reply(b"{}", 503)), always(http_reply(ANSWER))]
    async with governed(tmp_path, upstreams) as gateway:
        await gateway.change("virtual_key", gateway.key_id, tags=["red", "blue"])
        reply = await gateway.ask()
        (row,) = await gateway.rows()
        assert row.request_id == reply.header("X-Penstock-Request-Id")
        assert row.started_at_ns == int(NOW * 1e9)
        assert row.duration_ns > 0
        assert (row.organization_id, row.team_id, row.project_id, row.virtual_key_id, row.principal_id) == (
            gateway.organization_id, gateway.team_id, gateway.project_id, gateway.key_id, gateway.user_id,
        )  # fmt: skip
        assert (row.binding_id, row.provider) == (gateway.bindings[2], "openai_compatible")
        assert (row.model_asked, row.model_served) == ("gpt-4o-mini", "gpt-4o-mini")
        assert row.usage is not None
        assert (row.usage.input, row.usage.output, row.usage.source) == (3, 2, "provider")
        assert (row.cost_nano_usd, row.cost_source, row.status, row.error) == (ANSWERED, "priced", 200, None)
        assert row.price_version is not None
        assert row.price_version.startswith("override pr_")
        assert (row.is_stream, row.fallback_count, tuple(row.tags)) == (False, 1, ("red", "blue"))
        assert [dict(attempt) for attempt in row.attempts] == [
            {"binding": gateway.bindings[0], "model": "gpt-4o-mini", "reason": "status", "status": 503},
            {"binding": gateway.bindings[2], "model": "gpt-4o-mini", "reason": "answered", "status": 200},
        ]


async def test_all_failed_costs_nothing_and_says_why(tmp_path: Path) -> None:
    async with governed(tmp_path, always(http_reply(b'{"no":1}', 500))) as gateway:
        budget_id = await gateway.budget(1_000 * ANSWERED)
        assert (await gateway.ask()).status == 500
        (row,) = await gateway.rows()
        assert (row.outcome, row.error, row.cost_nano_usd, row.status) == ("provider_error", "status", 0, 500)
        assert await gateway.total(budget_id) == 0


async def test_exchange_without_a_key_has_no_row(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        assert (await gateway.ask(headers={"Authorization": "Bearer nothing"})).status == 401
        assert await gateway.rows() == []


async def test_unreadable_body_has_a_row(tmp_path: Path) -> None:
    async with governed(tmp_path) as gateway:
        await gateway.budget(1)
        assert (await gateway.ask(b"not JSON", CHAT)).status == 400
        (row,) = await gateway.rows()
        assert (row.outcome, row.error, row.model_asked) == ("refused", "bad_request", None)


async def test_nothing_is_asked_of_a_provider_while_the_ledger_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = FakeUpstream([answer], repeat=True)
    async with governed(tmp_path, upstream) as gateway:
        budget_id = await gateway.budget(ANSWERED, reserve="none")

        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr("os.posix_fallocate", full)
            reply = await gateway.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "overloaded")
        assert "ledger" in reply.json()["error"]["message"]
        assert reply.header("Retry-After") == "1"
        assert upstream.requests == []
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        assert await gateway.total(budget_id) == ANSWERED
