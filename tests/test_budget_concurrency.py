"""Two hundred clients at once against a budget worth ten: nobody spends what another has reserved."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest

from governed_gateway import ANSWERED, BODY, CHAT, TOKEN, Governed, governed
from penstock.testing import FakeUpstream, Pause, RecordedRequest, Step, http_reply
from penstock.testing.samples import ANSWER, SAMPLES

pytestmark = pytest.mark.anyio
IS_FULL = os.environ.get("PENSTOCK_TESTS") == "full"
CLIENTS = 200
WORTH = 10
OUTPUT_ONLY: dict[str, int | None] = {"input": 0, "output": TOKEN * 1_000_000}
COST = 2 * TOKEN
"""Of a sample answer, where only its two tokens of output cost."""


async def flood(gateway: Governed, body: dict[str, object], clients: int = CLIENTS) -> list[int]:
    """Send all requests at once; returns the statuses."""
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await gateway.ask(body)).status)

    async with anyio.create_task_group() as tasks:
        for _ in range(clients):
            tasks.start_soon(ask)
    return statuses


def held(gate: Pause, *, is_stream: bool) -> FakeUpstream:
    """Return an upstream that answers nobody until the gate is opened: all exchanges are in flight together."""
    sample = next(found for found in SAMPLES if found.path == CHAT and found.is_stream == is_stream)

    def serve(request: RecordedRequest) -> list[Step]:
        return [gate, *sample.answer()]

    return FakeUpstream([serve], repeat=True)


async def flood_held(gateway: Governed, body: dict[str, object], gate: Pause) -> list[int]:
    statuses: list[int] = []
    refused = anyio.Event()

    async def ask() -> None:
        reply = await gateway.ask(body)
        statuses.append(reply.status)
        if len(statuses) == CLIENTS - WORTH:
            refused.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(CLIENTS):
            tasks.start_soon(ask)
        with anyio.fail_after(60):
            await refused.wait()
        assert statuses == [402] * (CLIENTS - WORTH)
        gate.release()
    return statuses


@pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
@pytest.mark.parametrize("scope", ["virtual_key", "organization", "end_user"] if IS_FULL else ["virtual_key"])
async def test_max_lets_exactly_as_many_in_as_the_budget_is_worth(tmp_path: Path, is_stream: bool, scope: str) -> None:
    gate = Pause()
    body = {**BODY, "stream": is_stream, "max_tokens": 2, "user": "ann"}
    async with governed(tmp_path, held(gate, is_stream=is_stream), rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(WORTH * COST, scope, reserve="max")
        statuses = await flood_held(gateway, body, gate)
        assert sorted(statuses) == [200] * WORTH + [402] * (CLIENTS - WORTH)
        assert await gateway.total(budget_id, "ann" if scope == "end_user" else None) == WORTH * COST
        rows = await gateway.rows()
        assert sum(row.cost_nano_usd for row in rows) == WORTH * COST
        assert len(rows) == CLIENTS
        assert await gateway.discrepancies() == []


@pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
async def test_max_never_goes_over_whatever_is_really_used(tmp_path: Path, is_stream: bool) -> None:
    sample = next(found for found in SAMPLES if found.path == CHAT and found.is_stream == is_stream)
    body = {**BODY, "stream": is_stream, "max_tokens": 5}
    async with governed(tmp_path, FakeUpstream([sample.answer()], repeat=True), rates=OUTPUT_ONLY) as gateway:
        limit = WORTH * COST + 1
        budget_id = await gateway.budget(limit, reserve="max")
        statuses = await flood(gateway, body)
        spent = await gateway.total(budget_id)
        assert spent == statuses.count(200) * COST <= limit
        # Alone, a request is refused only where what is left is less than it may cost.
        while (await gateway.ask(body)).status == 200:
            spent += COST
        assert limit - spent < 5 * TOKEN
        assert await gateway.total(budget_id) == spent <= limit


@pytest.mark.parametrize("is_stream", [False, True], ids=["json", "stream"])
async def test_expected_goes_over_by_no_more_than_its_error(tmp_path: Path, is_stream: bool) -> None:
    gate = Pause()
    gate.release()
    body = {**BODY, "stream": is_stream}
    async with governed(tmp_path, held(gate, is_stream=is_stream), rates=OUTPUT_ONLY) as gateway:
        await gateway.ask(body)
        gateway.clock.now += 60
        budget_id = await gateway.budget(WORTH * COST, window="minute")
        gate.released = anyio.Event()
        assert sorted(await flood_held(gateway, body, gate)) == [200] * WORTH + [402] * (CLIENTS - WORTH)
        rows = [row for row in await gateway.rows() if row.debits]
        errors = sum(max(0, row.cost_nano_usd - debit.reserved) for row in rows for debit in row.debits)
        spent = await gateway.total(budget_id)
        assert spent <= WORTH * COST + errors


async def test_failures_and_refusals_give_back_what_they_held(tmp_path: Path) -> None:
    answers = [http_reply(b"{}", 400), http_reply(b"{}", 500), http_reply(ANSWER)]
    count = iter(range(10**6))
    upstream = FakeUpstream([lambda _: [answers[next(count) % 3]]], repeat=True)
    body = {**BODY, "max_tokens": 2}
    async with governed(tmp_path, upstream, rates=OUTPUT_ONLY) as gateway:
        budget_id = await gateway.budget(WORTH * COST, reserve="max")
        successes = 0
        while successes < WORTH:
            statuses = await flood(gateway, body, 20)
            successes += statuses.count(200)
        assert successes == WORTH
        assert (await gateway.ask(body)).status == 402
        assert await gateway.total(budget_id) == WORTH * COST
        assert ANSWERED > COST
