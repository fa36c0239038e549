"""Every scope, window and breach with every endpoint, stream and outcome: what is spent is counted once, everywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from governed_gateway import ANSWERED, Governed, always, governed
from penstock import Exchange, RequestError, Response, hookimpl
from penstock.governance.objects import Budget
from penstock.testing import SAMPLES, Close, FakeUpstream, RecordedRequest, Reset, Sample, Stall, Step, http_reply
from penstock.testing.samples import ANSWER
from penstock.testing.upstream import STREAM_HEAD, chunk

pytestmark = pytest.mark.anyio
IS_FULL = os.environ.get("PENSTOCK_TESTS") == "full"
SCOPES = ("organization", "team", "project", "virtual_key", "principal", "group", "end_user")
WINDOWS = ("minute", "hour", "day", "week", "month", "total", "manual")
ENDPOINTS = tuple(
    sample
    for sample in SAMPLES
    if sample.method == "POST" and sample.path.startswith("/v1/") and "count_tokens" not in sample.path
)
MUCH = 10**15
END_USER = (b"X-Penstock-End-User-Id", b"ann")
OUTCOMES = ("success", "provider_error", "exhausted", "refused", "answered", "client_gone", "cut")


class Later:
    """Refuse or answer what a header says, after the budgets."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Response | None:
        wish = exchange.request.headers.get(b"x-wish")
        if wish == b"refused":
            raise RequestError("permission_denied", "No.")
        return Response(200, b"{}") if wish == b"answered" else None


def serve(request: RecordedRequest) -> Sequence[Step]:
    """Answer a sample as its header says."""
    wish = request.headers.get(b"x-wish")
    path = request.target.decode()
    is_stream = b'"stream":true' in request.body
    sample = next(found for found in ENDPOINTS if found.path == path and found.is_stream == is_stream)
    if wish == b"provider_error":
        return [http_reply(b'{"error":{"message":"no"}}', 400)]
    if wish == b"exhausted":
        return [http_reply(b'{"error":{"message":"no"}}', 500)]
    if wish in (b"client_gone", b"cut"):
        begun = [STREAM_HEAD, chunk(sample.events[0])] if is_stream else [http_reply(ANSWER)[:-20]]
        return [*begun, Stall() if wish == b"client_gone" else Reset() if is_stream else Close()]
    return sample.answer()


async def perform(gateway: Governed, sample: Sample, outcome: str) -> None:
    """Send one request and wait until its exchange has settled."""
    fields = [END_USER, (b"X-Wish", outcome.encode()), (b"Content-Type", sample.content_type)]
    if outcome != "client_gone":
        await gateway.send(sample, fields[:2])
        return
    settled = gateway.harness.settled
    async with gateway.harness.stream(sample.method, sample.path, fields, sample.body) as stream:
        async for _ in stream:
            break
    await gateway.harness.wait_settled(settled + 1)


async def budgets_of_all_kinds(gateway: Governed, **members: Any) -> dict[tuple[str, str, str], str]:
    """Add a budget of each scope, window and breach; returns their ids."""
    group_id = await gateway.group(gateway.user_id)
    made = {}
    for scope in SCOPES:
        for window in WINDOWS:
            for breach in ("block", "warn"):
                scope_id = group_id if scope == "group" else gateway.scope_id(scope)
                given = {"scope_id": scope_id, "window": window, "on_breach": breach, **members}
                made[scope, window, breach] = await gateway.budget(MUCH, scope, **given)
    return made


def subject_of(gateway: Governed, scope: str) -> str | None:
    return {"group": gateway.user_id, "end_user": "ann"}.get(scope)


@pytest.mark.parametrize("reserve", ["expected", "max", "none"])
async def test_every_outcome_of_every_endpoint_is_counted_once_by_every_budget(tmp_path: Path, reserve: str) -> None:
    upstream = FakeUpstream([serve], repeat=True)
    async with governed(tmp_path, upstream, plugins=[Later]) as gateway:
        made = await budgets_of_all_kinds(gateway, reserve=reserve)
        known = {name: budget_id for name, budget_id in made.items() if IS_FULL or name[1] in ("day", "total")}
        total = count = 0
        for sample in ENDPOINTS:
            for outcome in OUTCOMES:
                await perform(gateway, sample, outcome)
                count += 1
                total += await check_last_row(gateway, sample, outcome, count, len(made))
                for (scope, window, breach), budget_id in known.items():
                    budget = Budget(
                        scope=scope, scope_id="", window=window, limit_nano_usd=MUCH, on_breach=breach  # type: ignore[arg-type]
                    )  # fmt: skip
                    assert gateway.spent(budget_id, budget, subject_of(gateway, scope)) == total
        for (scope, _, _), budget_id in made.items():
            assert await gateway.total(budget_id, subject_of(gateway, scope)) == total
        assert await gateway.discrepancies() == []


async def check_last_row(gateway: Governed, sample: Sample, outcome: str, count: int, budgets: int) -> int:
    """Hold the ledger to what has just happened; returns what it cost."""
    rows = await gateway.rows()
    assert len(rows) == count, (sample, outcome)
    row = rows[-1]
    expected = {"exhausted": "provider_error", "answered": "success"}.get(outcome, outcome)
    assert row.outcome == expected, (str(sample), outcome, row)
    if outcome == "success":
        assert row.cost_nano_usd == ANSWERED, (str(sample), row)
    elif outcome in ("client_gone", "cut"):
        assert 0 <= row.cost_nano_usd <= 100 * ANSWERED
        if row.cost_nano_usd:
            assert row.cost_source in ("estimated", "priced")
    else:
        assert row.cost_nano_usd == 0, (str(sample), outcome, row)
    if outcome in ("refused", "answered"):
        assert row.binding_id is None
    else:
        assert len(row.debits) == budgets
    return row.cost_nano_usd


async def test_every_kind_of_budget_holds_on_every_endpoint(tmp_path: Path) -> None:
    async with governed(tmp_path, FakeUpstream([serve], repeat=True)) as gateway:
        made = await budgets_of_all_kinds(gateway, reserve="none")
        await perform(gateway, ENDPOINTS[0], "success")
        for number, ((scope, window, breach), budget_id) in enumerate(made.items()):
            await gateway.change("budget", budget_id, limit_nano_usd=1)
            samples = ENDPOINTS if IS_FULL else [ENDPOINTS[number % len(ENDPOINTS)], ENDPOINTS[1]]
            for sample in samples:
                reply = await gateway.send(sample, [END_USER])
                case = (scope, window, breach, str(sample))
                assert reply.status == (402 if breach == "block" else 200), case
                warning = reply.header("X-Penstock-Budget-Warning")
                assert warning is not None, case
                assert warning.startswith(f"{scope}:"), case
                if breach == "block":
                    error = reply.json()["error"]
                    assert error["meta"]["budget_id"] == budget_id, case
                    assert error["meta"]["budget_window"] == window, case
                    assert budget_id in error["message"], case
            await gateway.change("budget", budget_id, limit_nano_usd=MUCH)


async def test_client_that_leaves_before_any_answer_is_charged_an_estimate(tmp_path: Path) -> None:
    stall = Stall()
    async with governed(tmp_path, always(stall)) as gateway:
        budget_id = await gateway.budget(MUCH)
        client = await gateway.harness.raw()
        sample = ENDPOINTS[0]
        await client.send(gateway.harness.request_bytes("POST", sample.path, (), sample.body))
        await stall.reached.wait()
        client.close()
        await gateway.harness.wait_settled(1)
        (row,) = await gateway.rows()
        assert (row.outcome, row.cost_source, row.status) == ("client_gone", "estimated", None)
        assert row.cost_nano_usd == (len(sample.body) // 4 + 1) * 1_000
        assert await gateway.total(budget_id) == row.cost_nano_usd
