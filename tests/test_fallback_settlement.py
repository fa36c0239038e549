"""What exchanges with a chain cost: reservations of whoever failed or was skipped go back, and the ledger says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from governed_gateway import ANSWERED, BODY, CHAT, TOKEN, always, answer, governed
from penstock import Exchange, RequestError
from penstock.testing import FakeUpstream, Reset, http_reply
from penstock.testing.samples import ANSWER
from penstock_plugins.fallback import FallbackChains
from penstock_plugins.rate_limits import RateLimiting
from scripted_translator import Reviewer, Translating

pytestmark = pytest.mark.anyio

MESSAGES = {"model": "claude-m", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}
OUTPUT_ONLY: dict[str, int | None] = {"input": 0, "output": TOKEN * 1_000_000}
BREAKER = ("fallback", FallbackChains)
LIMITS = ("rate_limits", RateLimiting)
ROUNDS = 4


@pytest.mark.parametrize("failure", ["status", "reset"])
async def test_reservations_of_a_candidate_that_failed_go_back(tmp_path: Path, failure: str) -> None:
    failing = always(http_reply(b"{}", 503) if failure == "status" else Reset())
    upstreams = [failing, always(http_reply(ANSWER))]
    async with governed(tmp_path, upstreams, first=[LIMITS], plugins=[BREAKER], rates=OUTPUT_ONLY) as gateway:
        primary, _, secondary, _ = gateway.bindings
        own = await gateway.budget(10 * TOKEN, provider=primary, reserve="max")
        shared = await gateway.budget(10_000 * TOKEN, reserve="max")
        for binding in (primary, secondary):
            await gateway.change("provider_binding", binding, rate_limits={"concurrency": 1})
        for _ in range(ROUNDS):
            reply = await gateway.ask({**BODY, "max_tokens": 10})
            assert (reply.status, reply.header("X-Penstock-Fallback-Count")) == (200, "1")
        rows = await gateway.rows()
        assert len(failing.requests) == ROUNDS
        assert [[attempt["reason"] for attempt in row.attempts] for row in rows] == [[failure, "answered"]] * ROUNDS
        assert (await gateway.total(own), await gateway.total(shared)) == (0, ROUNDS * 2 * TOKEN)
        assert await gateway.discrepancies() == []


async def test_candidate_behind_an_open_breaker_takes_no_rate_limit_and_no_budget(tmp_path: Path) -> None:
    upstreams = [always(http_reply(b"{}", 503)), FakeUpstream([answer], repeat=True)]
    config = {"fallback": {"failures": 2}}
    async with governed(tmp_path, upstreams, first=[LIMITS], plugins=[BREAKER], config=config) as gateway:
        primary, _, secondary, _ = gateway.bindings
        await gateway.change("provider_binding", primary, rate_limits={"rpm": 2, "concurrency": 1})
        for _ in range(ROUNDS):
            assert (await gateway.ask()).status == 200
        rows = await gateway.rows()
        reasons = [row.attempts[0]["reason"] for row in rows]
        # Both requests a minute are used up by what was sent; were the limit judged first, it would say so.
        assert reasons[:2] == ["status", "status"]
        assert set(reasons[2:]) <= {"circuit_open", "rate_limit_exceeded"}
        assert len(upstreams[0].requests) == 2
        assert [(row.fallback_count, row.binding_id, row.cost_nano_usd) for row in rows] == [
            (1, secondary, ANSWERED)
        ] * ROUNDS


async def test_skip_by_an_open_breaker_gives_its_slot_back(tmp_path: Path) -> None:
    upstreams = [always(http_reply(b"{}", 503)), FakeUpstream([answer], repeat=True)]
    config = {"fallback": {"failures": 1}}
    async with governed(tmp_path, upstreams, first=[LIMITS], plugins=[BREAKER], config=config) as gateway:
        primary = gateway.bindings[0]
        await gateway.change("provider_binding", primary, rate_limits={"rpm": 2, "concurrency": 1})
        for _ in range(ROUNDS):
            assert (await gateway.ask()).status == 200
        reasons = [row.attempts[0]["reason"] for row in await gateway.rows()]
        assert reasons == ["status", *["circuit_open"] * (ROUNDS - 1)]


async def test_row_of_an_exchange_nobody_was_asked_for_costs_nothing(tmp_path: Path) -> None:
    config = {"fallback": {"failures": 1}}
    async with governed(tmp_path, always(http_reply(b"{}", 500)), plugins=[BREAKER], config=config) as gateway:
        budget = await gateway.budget(1_000 * ANSWERED)
        assert (await gateway.ask()).status == 500
        assert (await gateway.ask()).status == 503
        row = (await gateway.rows())[1]
        assert (row.error, row.status, row.cost_nano_usd, row.binding_id) == ("circuit_open", 503, 0, None)
        assert [attempt["reason"] for attempt in row.attempts] == ["circuit_open"]
        assert await gateway.total(budget) == 0


async def test_skip_behind_the_last_answer_is_in_the_row_and_not_in_its_count(tmp_path: Path) -> None:
    upstreams = [always(http_reply(b'{"no":1}', 503)), always(http_reply(b"{}", 503))]
    async with governed(
        tmp_path, upstreams, first=[LIMITS], plugins=[BREAKER], config={"fallback": {"failures": 2}}
    ) as gateway:
        primary, _, secondary, _ = gateway.bindings
        await gateway.change("provider_binding", secondary, rate_limits={"rpm": 1})
        await gateway.ask()
        reply = await gateway.ask()
        assert (reply.status, reply.body, reply.header("X-Penstock-Fallback-Count")) == (503, b'{"no":1}', "0")
        row = (await gateway.rows())[1]
        assert (row.binding_id, row.fallback_count, row.outcome, row.error) == (primary, 0, "provider_error", "status")
        assert [attempt["reason"] for attempt in row.attempts] == ["status", "rate_limit_exceeded"]


async def test_candidate_a_request_cannot_be_translated_for_gives_back_what_it_took(tmp_path: Path) -> None:
    upstreams = [FakeUpstream([answer], repeat=True), FakeUpstream([answer], repeat=True)]
    translating = ("translating", Translating())
    async with governed(tmp_path, upstreams, first=[LIMITS], plugins=[BREAKER, translating]) as gateway:
        chat, native, *_ = gateway.bindings
        await gateway.change("provider_binding", chat, models=["claude-m"], rate_limits={"rpm": 1, "concurrency": 1})
        await gateway.change("provider_binding", native, fallback_priority=5)
        budget = await gateway.budget(10_000 * ANSWERED)
        for _ in range(ROUNDS):
            reply = await gateway.ask({**MESSAGES, "unsupported": 1}, "/v1/messages")
            assert reply.status == 200
        rows = await gateway.rows()
        assert {row.provider for row in rows} == {"anthropic"}
        skipped = {attempt["reason"] for row in rows for attempt in row.attempts if attempt["reason"] != "answered"}
        assert skipped == {"unsupported_parameter"}
        assert await gateway.total(budget) == sum(row.cost_nano_usd for row in rows)


async def test_translated_answer_is_charged_by_what_its_provider_counted(tmp_path: Path) -> None:
    upstreams = [always(http_reply(ANSWER))]
    async with governed(tmp_path, upstreams, plugins=[BREAKER, ("translating", Translating())]) as gateway:
        chat, native = gateway.bindings
        await gateway.change("provider_binding", chat, models=["claude-m"])
        await gateway.archive("provider_binding", native)
        budget = await gateway.budget(10_000 * ANSWERED)
        reply = await gateway.ask(MESSAGES, "/v1/messages")
        assert (reply.status, reply.header("X-Penstock-Provider")) == (200, "openai_compatible")
        (row,) = await gateway.rows()
        assert (row.cost_nano_usd, row.cost_source, row.model_served) == (ANSWERED, "priced", "claude-m")
        assert await gateway.total(budget) == ANSWERED


async def test_answer_refused_as_a_whole_is_recorded_with_its_cost_and_charged_to_nobody(tmp_path: Path) -> None:
    def block(_exchange: Exchange, _body: bytes) -> bytes | None:
        raise RequestError("guardrail_blocked", "Blocked.")

    async with governed(tmp_path, plugins=[BREAKER, ("reviewer", Reviewer(block))]) as gateway:
        budget = await gateway.budget(10_000 * ANSWERED)
        assert (await gateway.ask(BODY, CHAT)).status == 403
        (row,) = await gateway.rows()
        assert (row.cost_nano_usd, row.error, row.outcome, row.status) == (
            ANSWERED,
            "guardrail_blocked",
            "refused",
            403,
        )
        assert await gateway.total(budget) == 0
        assert await gateway.discrepancies() == []
