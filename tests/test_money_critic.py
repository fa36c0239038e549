"""Ways by which money could get lost, be spent twice, or be spent without being counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from accounting_process import COUNTER, START, accounting, money, reserved
from governed_gateway import ANSWERED, BODY, CHAT, RATES, TOKEN, always, answer, governed
from penstock import BindingDirectory, Candidate, Exchange, Principal, hookimpl
from penstock.governance import Exceeded, StoreUnavailableError
from penstock.testing import FakeUpstream, http_reply, stream_reply
from penstock_plugins.store.budgets import StoredBudgets
from penstock_plugins.store.counters import MemoryCounters

pytestmark = pytest.mark.anyio
OUTPUT_ONLY: dict[str, int | None] = {"input": 0, "output": TOKEN * 1_000_000}


@attrs.define(eq=False)
class SecondFirst:
    """Ask the last binding of its kind after the chain's first, past routing."""

    services: Any

    @hookimpl(tryfirst=True)
    def select_provider(self, exchange: Exchange) -> Candidate | None:
        name = exchange.request.headers.get(b"x-binding")
        if exchange.attempts or name is None:
            return None
        binding = self.services.get(BindingDirectory).find_binding(name.decode())
        return Candidate(binding, self.services.provider_of(binding), "another")


async def test_budget_of_a_late_candidate_counts_what_it_cost(tmp_path: Path) -> None:
    upstreams = [FakeUpstream([answer], repeat=True), FakeUpstream([answer], repeat=True)]
    async with governed(tmp_path, upstreams, plugins=[("chooser", SecondFirst)]) as gateway:
        secondary = gateway.bindings[2]
        await gateway.change("virtual_key", gateway.key_id, provider_bindings=[gateway.bindings[0]])
        whole = await gateway.budget(1_000 * ANSWERED)
        its_own = await gateway.budget(2 * ANSWERED, "project", provider=secondary, reserve="none")
        elsewhere = {"X-Binding": secondary}
        replies = [await gateway.ask(headers=elsewhere) for _ in range(3)]
        assert [reply.header("X-Penstock-Fallback-Count") for reply in replies] == ["0", "0", "1"]
        assert await gateway.total(its_own) == 2 * ANSWERED
        assert await gateway.total(whole) == 3 * ANSWERED


async def test_store_that_cannot_say_what_is_left_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = FakeUpstream([answer], repeat=True)
    async with governed(tmp_path, upstream) as gateway:
        budget_id = await gateway.budget(ANSWERED, reserve="none")

        async def unavailable(*_: Any) -> Any:
            raise StoreUnavailableError("the disk is gone")

        with monkeypatch.context() as store:
            store.setattr(MemoryCounters, "_asked", unavailable)
            reply = await gateway.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "overloaded")
        assert reply.header("Retry-After") == "1"
        assert upstream.requests == []
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        assert await gateway.total(budget_id) == ANSWERED


async def test_bound_the_provider_does_not_know_bounds_nothing(tmp_path: Path) -> None:
    async with governed(tmp_path, rates=OUTPUT_ONLY) as gateway:
        await gateway.budget(100 * TOKEN, reserve="max")
        assert (await gateway.ask({**BODY, "max_output_tokens": 1})).status == 402
        assert (await gateway.ask({**BODY, "max_tokens": 1})).status == 200


@pytest.mark.parametrize(
    "members",
    [b'"max_tokens":100000,"max_tokens":1', b'"MAX_TOKENS":100000,"max_tokens":1', b'"n":128,"max_tokens":2,"n":1'],
)
async def test_bound_given_twice_counts_by_its_largest(tmp_path: Path, members: bytes) -> None:
    async with governed(tmp_path, rates=OUTPUT_ONLY) as gateway:
        await gateway.budget(100 * TOKEN, reserve="max")
        assert (await gateway.ask(b'{"model":"gpt-4o-mini","messages":[],%b}' % members)).status == 402


@pytest.mark.parametrize("is_stream", [False, True])
async def test_estimate_is_never_over_what_was_possible(tmp_path: Path, is_stream: bool) -> None:
    text = "word " * 400
    if is_stream:
        event = b'data: {"choices":[{"delta":{"content":%b}}]}\n\n' % json.dumps(text).encode()
        upstream = always(*stream_reply(event, b"data: [DONE]\n\n"))
    else:
        upstream = always(http_reply(json.dumps({"choices": [{"message": {"content": text}}]}).encode()))
    async with governed(tmp_path, upstream, rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(10 * TOKEN, reserve="max")
        assert (await gateway.ask({**BODY, "max_tokens": 10, "stream": is_stream})).status == 200
        (row,) = await gateway.rows()
        assert (row.cost_nano_usd, row.cost_source) == (10 * TOKEN, "estimated")
        assert await gateway.total(budget_id) == 10 * TOKEN


async def test_background_response_is_charged_what_was_reserved(tmp_path: Path) -> None:
    queued = http_reply(b'{"id":"resp_1","object":"response","status":"queued","output":[],"usage":null}')
    async with governed(tmp_path, always(queued), rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        body = {"model": "gpt-4o-mini", "input": "Hi", "background": True, "max_output_tokens": 60}
        assert [(await gateway.ask(body, "/v1/responses")).status for _ in range(2)] == [200, 402]
        first, _ = await gateway.rows()
        assert (first.cost_nano_usd, first.cost_source) == (60 * TOKEN, "estimated")
        assert await gateway.total(budget_id) == 60 * TOKEN


@pytest.mark.parametrize("member", [
    b'"background":true', b'"b\\u0061ckground":true', b'"background" : true', b'"background":true,"background":false',
    b'"background":false,"b\\u0061ckground":true', b'"background":1', b'"background":false', b'"metadata":{}',
])  # fmt: skip
async def test_answer_that_is_queued_is_charged_whatever_was_asked(tmp_path: Path, member: bytes) -> None:
    queued = http_reply(b'{"id":"resp_1","object":"response","status":"queued","output":[],"usage":null}')
    async with governed(tmp_path, always(queued), rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        body = b'{"model":"gpt-4o-mini","input":"Hi",%b,"max_output_tokens":60}' % member
        assert [(await gateway.ask(body, "/v1/responses")).status for _ in range(3)] == [200, 402, 402]
        assert await gateway.total(budget_id) == 60 * TOKEN


@pytest.mark.parametrize(("member", "is_charged"), [
    (b'"background":true', True), (b'"b\\u0061ckground":true', True), (b'"BACKGROUND":true', True),
    (b'"background":true,"background":false', True), (b'"background":false', False), (b'"background":null', False),
    (b'"metadata":{"background":"true"}', False), (b'"instructions":"\\u0061"', False),
])  # fmt: skip
async def test_background_counts_as_asked_for_in_any_spelling(tmp_path: Path, member: bytes, is_charged: bool) -> None:
    """An answer without status and usage says nothing, so that what was asked decides."""
    async with governed(tmp_path, always(http_reply(b'{"id":"resp_1"}')), rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        body = b'{"model":"gpt-4o-mini","input":"Hi",%b,"max_output_tokens":60}' % member
        assert (await gateway.ask(body, "/v1/responses")).status == 200
        assert await gateway.total(budget_id) == (60 * TOKEN if is_charged else 0)


@pytest.mark.parametrize(("status", "is_charged"), [("queued", True), ("in_progress", True), ("incomplete", False)])
@pytest.mark.parametrize("padding", [0, 100_000])
async def test_answer_that_is_not_done_goes_on(tmp_path: Path, status: str, is_charged: bool, padding: int) -> None:
    reply = {"id": "resp_1", "object": "response", "status": status, "instructions": "x" * padding, "usage": None}
    async with governed(tmp_path, always(http_reply(json.dumps(reply).encode())), rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        body = {"model": "gpt-4o-mini", "input": "Hi", "max_output_tokens": 60}
        assert (await gateway.ask(body, "/v1/responses")).status == 200
        assert await gateway.total(budget_id) == (60 * TOKEN if is_charged else 0)


@pytest.mark.parametrize("is_background", [False, True])
async def test_stream_in_the_background_goes_on_after_its_end(tmp_path: Path, is_background: bool) -> None:
    made = {"id": "resp_1", "status": "in_progress", "background": is_background, "usage": None}
    event = json.dumps({"type": "response.created", "response": made}).encode()
    upstream = always(*stream_reply(b"event: response.created\ndata: %b\n\n" % event))
    async with governed(tmp_path, upstream, rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        body = {"model": "gpt-4o-mini", "input": "Hi", "stream": True, "max_output_tokens": 60}
        assert (await gateway.ask(body, "/v1/responses")).status == 200
        assert await gateway.total(budget_id) == (60 * TOKEN if is_background else 0)


@attrs.define(eq=False)
class Judging:
    """Judge an answer for ever, or fail at it."""

    reached: anyio.Event | None

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.watch_response("judging")

    @hookimpl
    async def on_response(self, exchange: Exchange, body: bytes) -> bytes | None:
        if self.reached is None:
            raise ZeroDivisionError
        self.reached.set()
        await anyio.sleep_forever()
        return None


@pytest.mark.parametrize("leaves", [False, True])
async def test_background_response_the_client_never_got_is_charged(tmp_path: Path, leaves: bool) -> None:
    queued = http_reply(b'{"id":"resp_1","object":"response","status":"queued","output":[],"usage":null}')
    judging = anyio.Event()
    body = b'{"model":"gpt-4o-mini","input":"Hi","background":true,"max_output_tokens":60}'
    plugins = [("judging", Judging(judging if leaves else None))]
    async with governed(tmp_path, always(queued), plugins=plugins, rates=OUTPUT_ONLY, socket=True) as gateway:
        budget_id = await gateway.budget(100 * TOKEN, reserve="max")
        if leaves:
            client = await gateway.harness.raw()
            await client.send(gateway.harness.request_bytes("POST", "/v1/responses", body=body))
            with anyio.fail_after(5):
                await judging.wait()
            client.close()
        else:
            assert (await gateway.ask(body, "/v1/responses")).status == 500
        await gateway.harness.wait_settled(1)
        assert await gateway.total(budget_id) == 60 * TOKEN


async def test_absurd_usage_is_the_same_in_memory_and_ledger(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 10**12, "completion_tokens": 10**12}
    rates: dict[str, int | None] = {"input": 10**12, "output": 10**12}
    absurd = http_reply(json.dumps({"id": "x", "choices": [], "usage": usage}).encode())
    async with governed(tmp_path, always(absurd), rates=rates) as gateway:
        budget_id = await gateway.budget(10**15, reserve="none")
        assert [(await gateway.ask()).status for _ in range(2)] == [200, 402]
        assert await gateway.total(budget_id) == 10**16
        assert await gateway.discrepancies() == []


async def test_negative_usage_gives_nothing_back(tmp_path: Path) -> None:
    usage = {"prompt_tokens": -5, "completion_tokens": -1_000, "prompt_tokens_details": {"cached_tokens": -9}}
    negative = http_reply(json.dumps({"id": "x", "choices": [], "usage": usage}).encode())
    async with governed(tmp_path, always(negative)) as gateway:
        budget_id = await gateway.budget(1_000 * ANSWERED)
        assert (await gateway.ask()).status == 200
        assert await gateway.total(budget_id) >= 0


async def test_settlement_that_fails_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with governed(tmp_path, rates=RATES) as gateway:
        await gateway.budget(1_000_000 * ANSWERED, reserve="max")
        await gateway.ask({**BODY, "max_tokens": 5})

        def broken(*_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

        with monkeypatch.context() as plugin:
            plugin.setattr("penstock_plugins.budgets.plugin.entry_of", broken)
            for _ in range(5):
                assert (await gateway.ask({**BODY, "max_tokens": 5})).status == 200
        assert all(not account.reserved for account in gateway.counters.accounts.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("failures", [1, 3])
async def test_price_override_counts_after_the_store_failed_to_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    async with governed(tmp_path) as gateway:
        left = [failures]
        read = type(gateway.store).read

        async def failing(store: Any, work: Any) -> Any:
            if work.__name__ == "_overrides_in" and left[0]:
                left[0] -= 1
                raise StoreUnavailableError("busy")
            return await read(store, work)

        monkeypatch.setattr(type(gateway.store), "read", failing)
        await gateway.price("openai_compatible", "gpt-4o-*", {"input": 0, "output": 0})
        assert left == [0]
        assert (await gateway.ask(BODY, CHAT)).status == 200
        assert [row.cost_nano_usd for row in await gateway.rows()] == [0]


async def test_account_forgotten_while_others_want_it_back_harms_nobody(tmp_path: Path) -> None:
    async with accounting(tmp_path / "penstock.db") as one, accounting(tmp_path / "penstock.db") as other:
        counters = one.counters
        held = await reserved(counters, money(5, 100))
        assert not isinstance(held, Exceeded)
        counters.settle(held)
        account = counters.accounts[COUNTER, START]
        while account.lease:
            one.turns.give_back([account])
            await anyio.lowlevel.checkpoint()
        for _ in range(20):
            counters.look_for_idle()
            one.turns.answer([(account.name, True, account.id or 0, 1)])
            counters.look_for_idle()
            if account.name not in counters.accounts:
                break
        theirs, mine = [await reserved(each.counters, money(50, 100)) for each in (other, one)]
        assert not isinstance(mine, Exceeded)
        assert not isinstance(theirs, Exceeded)
        assert isinstance(await reserved(counters, money(1, 100)), Exceeded)


def test_answers_for_keys_long_gone_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_plugins.store.budgets.REMEMBERED_KEYS", 10)
    budgets = StoredBudgets()
    for number in range(100):
        principal = Principal(f"vk_{number}", "name", "prefix")
        assert budgets.budgets_of(principal) is budgets.budgets_of(principal)
    assert len(budgets._answers) <= 10


@pytest.mark.parametrize(
    "members",
    [
        {"limit_nano_usd": "1"}, {"limit_nano_usd": None}, {"scope": "galaxy"}, {"scope_id": 7}, {"on_breach": "stop"},
        {"window": "fortnight"}, {"window": "day", "timezone": "Mars/Olympus"}, {"period_reset_at": "soon"},
        {"provider": 5},
    ],
    ids=str,
)  # fmt: skip
async def test_budget_that_cannot_be_read_lets_nothing_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, members: dict[str, Any]
) -> None:
    upstream = FakeUpstream([answer], repeat=True)
    async with governed(tmp_path, upstream) as gateway:
        budget_id = await gateway.budget(1_000 * ANSWERED)
        assert (await gateway.ask()).status == 200
        await gateway.change("budget", budget_id, **members)
        reply = await gateway.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "policy_rules_invalid")
        assert budget_id in json.loads(reply.body)["error"]["message"]
        assert reply.header("x-should-retry") == "false"
        assert len(upstream.requests) == 1
        assert [record.getMessage() for record in caplog.records if budget_id in record.getMessage()] == [
            found.what + "; whoever it is for is refused" for found in await gateway.discrepancies()
        ]
        refused, _ = sorted(await gateway.rows(), key=lambda row: row.status != 503)
        assert (refused.outcome, refused.error, refused.cost_nano_usd) == ("refused", "policy_rules_invalid", 0)
        await gateway.archive("budget", budget_id)
        assert (await gateway.ask()).status == 200


async def test_budget_that_cannot_be_read_is_nobody_elses_concern(tmp_path: Path) -> None:
    async with governed(tmp_path, FakeUpstream([answer], repeat=True)) as gateway:
        budget_id = await gateway.budget(ANSWERED, "principal", scope_id="user_of_somebody_else")
        await gateway.change("budget", budget_id, window="fortnight")
        assert (await gateway.ask()).status == 200
