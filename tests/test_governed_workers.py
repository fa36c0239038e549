"""Two workers behind one port: they share budgets and limits to the last unit, and both see a change within 2 s."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from penstock.testing import (
    LAST_CHUNK,
    STREAM_HEAD,
    FakeUpstream,
    Pause,
    RecordedRequest,
    Reply,
    Step,
    chunk,
    http_reply,
)
from running_gateway import CHAT, COST, TOKEN, Client, RunningGateway, chat, code_of, running, seed, until

pytestmark = pytest.mark.anyio
CLIENTS = 200
WORTH = 10
VISIBLE_SECONDS = 2.0
"""How soon every worker must know of a change."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def answer(request: RecordedRequest) -> list[Step]:
    """Answer with as many tokens of output as the user's name says, ``u-2`` is two."""
    asked = json.loads(request.body)
    tokens = int(asked.get("user", "u-2").rpartition("-")[2])
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
    if asked.get("stream"):
        events = (
            b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"Hi"}}]}\n\n',
            b'data: {"id":"c","choices":[],"usage":%b}\n\n' % json.dumps(usage).encode(),
            b"data: [DONE]\n\n",
        )
        return [STREAM_HEAD, *map(chunk, events), LAST_CHUNK]
    message = {"role": "assistant", "content": "Hi"}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}
    return [http_reply(json.dumps(body).encode())]


@attrs.define(eq=False)
class Gate:
    """Let requests to the provider wait in front of it while it is shut."""

    pause: Pause | None = None

    def shut(self) -> None:
        self.pause = Pause()

    def open(self) -> None:
        if self.pause is not None:
            self.pause.release()
        self.pause = None

    def serve(self, request: RecordedRequest) -> list[Step]:
        return answer(request) if self.pause is None else [self.pause, *answer(request)]


@attrs.define(eq=False)
class Pair:
    """A gateway of two workers, and a connection to each."""

    gateway: RunningGateway
    here: Client
    there: Client
    upstream: FakeUpstream
    gate: Gate
    key: dict[str, Any]

    @property
    def secret(self) -> str:
        return str(self.key["secret"])

    async def budget(self, limit: int, **members: Any) -> str:
        """Make a budget of the key, and wait until both workers know of it."""
        given = {"scope": "virtual_key", "virtual_key": self.key["id"], "window": "total", "limit_nano_usd": limit}
        budget_id = str((await self.here.make("/budgets", {**given, **members}))["id"])
        await self.settle_changes()
        return budget_id

    async def settle_changes(self) -> None:
        """Return once the worker there knows of all that was changed here: it has seen a key made after it."""
        made = await self.here.make("/virtual-keys", {"name": f"mark {anyio.current_time()}"})

        async def is_known() -> bool:
            return (await self.there.request("GET", "/v1/models", key=made["secret"])).status != 401

        await until(is_known, seconds=VISIBLE_SECONDS)

    async def spent(self, budget_id: str) -> int:
        """Return what a budget has spent, once nothing is under way."""
        found = await self.here.api("GET", f"/budgets/{budget_id}/spend")
        return int(found["spent_nano_usd"])

    async def settled(self, budget_id: str, expected: int) -> None:
        """Wait until a budget says it has spent just this."""

        async def is_so() -> bool:
            return await self.spent(budget_id) == expected

        with suppress(TimeoutError):
            await until(is_so, seconds=VISIBLE_SECONDS)
        assert await self.spent(budget_id) == expected

    async def flood(self, refusals: int = 0, **members: Any) -> list[Reply]:
        """Send all requests at once, each on a connection of its own; with a shut gate, open it after ``refusals``."""
        clients = [await self.gateway.client() for _ in range(CLIENTS)]
        replies: list[Reply] = []
        enough = anyio.Event()

        async def ask(number: int, client: Client) -> None:
            replies.append(await client.ask(self.secret, stream=bool(number % 2), **members))
            if len(replies) == refusals:
                enough.set()

        async with anyio.create_task_group() as tasks:
            for number, client in enumerate(clients):
                tasks.start_soon(ask, number, client)
            if refusals:
                with anyio.fail_after(8):
                    await enough.wait()
                assert len(replies) == refusals
                self.gate.open()
        for client in clients:
            client.close()
        return replies

    async def use_up(self, **members: Any) -> int:
        """Ask both in turn until both refuse; returns how many were let in."""
        granted, refused = 0, 0
        while refused < 2:
            for client in (self.here, self.there):
                reply = await client.ask(self.secret, **members)
                assert reply.status in (200, 402), reply.body
                refused = refused + 1 if reply.status == 402 else 0
                granted += reply.status == 200
        return granted

    async def sees(self, found: Callable[[Reply], bool], key: str | None = None, **members: Any) -> None:
        """Have both workers answer as they should, within the time they have."""
        before = anyio.current_time()
        for client in (self.here, self.there):
            left = before + VISIBLE_SECONDS - anyio.current_time()
            await client.until(found, key or self.secret, seconds=left, **members)


@asynccontextmanager
async def pair(home: Path, **members: Any) -> AsyncIterator[Pair]:
    """Run two workers that have met; ``members`` are the key's."""
    gate = Gate()
    async with FakeUpstream([gate.serve], repeat=True) as upstream, running(home, 2) as gateway:
        await gateway.listening()
        here, there = await gateway.client_of_each()
        key = await seed(here, upstream.base_url, **members)
        both = Pair(gateway, here, there, upstream, gate, key)
        await both.settle_changes()
        try:
            yield both
        finally:
            here.close()
            there.close()
            assert await gateway.stop() == 0
        assert [line for line in gateway.events if line.get("level") in ("error", "warning")] == []


def statuses(replies: Sequence[Reply]) -> Counter[int]:
    return Counter(reply.status for reply in replies)


# --- budgets ------------------------------------------------------------------------------------------------------


async def test_max_lets_in_exactly_what_the_budget_is_worth_while_none_has_answered(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        budget_id = await both.budget(WORTH * COST, reserve="max")
        both.gate.shut()
        replies = await both.flood(CLIENTS - WORTH)
        assert statuses(replies) == {200: WORTH, 402: CLIENTS - WORTH}
        assert len(both.upstream.requests) == WORTH
        await both.settled(budget_id, WORTH * COST)


async def test_max_is_never_over_and_what_is_left_after_the_burst_can_be_spent(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        budget_id = await both.budget(WORTH * 2 * COST, reserve="max")
        replies = await both.flood(max_tokens=4)  # each reserves twice what it will cost
        granted = statuses(replies)[200]
        assert set(statuses(replies)) == {200, 402}
        assert WORTH <= granted <= 2 * WORTH
        await both.settled(budget_id, granted * COST)
        granted += await both.use_up(max_tokens=4)
        assert granted == 2 * WORTH - 1  # for one more there is money, and not for what it might cost
        granted += await both.use_up(max_tokens=2)
        assert granted == 2 * WORTH == len(both.upstream.requests)
        await both.settled(budget_id, 2 * WORTH * COST)


async def test_expected_is_over_by_the_error_of_those_in_flight_at_most(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        for client in (both.here, both.there):  # both learn what an exchange costs
            assert (await client.ask(both.secret)).status == 200
        before = len(both.upstream.requests)
        budget_id = await both.budget((WORTH + 2) * COST, reserve="expected")
        both.gate.shut()
        replies = await both.flood(CLIENTS - WORTH, max_tokens=100, user="u-3")
        granted = statuses(replies)[200]
        assert granted == WORTH == len(both.upstream.requests) - before
        error = 3 * TOKEN - COST
        await both.settled(budget_id, (WORTH + 2) * COST + WORTH * error)


async def test_expected_refuses_no_money_that_is_there(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        for client in (both.here, both.there):
            assert (await client.ask(both.secret, user="u-3")).status == 200
        before = 2 * 3 * TOKEN
        budget_id = await both.budget(before + WORTH * COST, reserve="expected")
        granted = statuses(await both.flood(max_tokens=100))[200]  # each is expected to cost more than it does
        granted += await both.use_up(max_tokens=100)
        error = 3 * TOKEN - COST
        assert WORTH * COST - 3 * TOKEN < granted * COST <= WORTH * COST + WORTH * error
        await both.settled(budget_id, before + granted * COST)


# --- rate limits --------------------------------------------------------------------------------------------------


async def test_two_workers_let_in_exactly_the_requests_of_a_minute(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_limits={"rpm": WORTH}) as both:
        replies = await both.flood()
        assert statuses(replies) == {200: WORTH, 429: CLIENTS - WORTH}
        assert {code_of(reply) for reply in replies if reply.status == 429} == {"rate_limit_exceeded"}
        assert {reply.header("X-Penstock-RateLimit-Dimension") for reply in replies} == {None, "rpm"}
        assert all(int(reply.header("Retry-After") or 0) >= 1 for reply in replies if reply.status == 429)
        assert len(both.upstream.requests) == WORTH


async def test_two_workers_share_the_slots_of_a_key_and_free_them_all(tmp_path: Path) -> None:
    async with pair(tmp_path, rate_limits={"concurrency": WORTH}) as both:
        for round_ in (1, 2):
            both.gate.shut()
            replies = await both.flood(CLIENTS - WORTH)
            assert statuses(replies) == {200: WORTH, 429: CLIENTS - WORTH}
            assert len(both.upstream.requests) == round_ * WORTH
        for client in (both.here, both.there):
            assert [(await client.ask(both.secret)).status for _ in range(WORTH)] == [200] * WORTH


# --- changes ------------------------------------------------------------------------------------------------------


async def test_keys_work_and_stop_on_both_workers_in_time(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        made = await both.here.make("/virtual-keys", {"name": "new", "provider_bindings": ["up"]})
        await both.sees(lambda reply: reply.status == 200, made["secret"])
        place = f"/virtual-keys/{made['id']}"
        await both.here.api("POST", f"{place}/disable", {})
        await both.sees(lambda reply: code_of(reply) == "virtual_key_disabled", made["secret"])
        await both.there.api("POST", f"{place}/enable", {})
        await both.sees(lambda reply: reply.status == 200, made["secret"])
        rotated = await both.here.api("POST", f"{place}/rotate", {"grace_seconds": 0})
        await both.sees(lambda reply: reply.status == 200, rotated["secret"])
        await both.sees(lambda reply: reply.status == 401, made["secret"])
        await both.there.api("POST", f"{place}/revoke", {})
        await both.sees(lambda reply: code_of(reply) == "virtual_key_revoked", rotated["secret"])


async def test_budget_is_known_lowered_raised_reset_and_archived_on_both_workers_in_time(tmp_path: Path) -> None:
    async with pair(tmp_path) as both:
        for client in (both.here, both.there):
            assert (await client.ask(both.secret)).status == 200
        budget = {"scope": "virtual_key", "virtual_key": both.key["id"], "window": "manual", "reserve": "max"}
        made = await both.there.make("/budgets", {**budget, "limit_nano_usd": COST - 1})
        place = f"/budgets/{made['id']}"

        def is_refused(reply: Reply) -> bool:
            return code_of(reply) == "budget_exceeded"

        def is_let_in(reply: Reply) -> bool:
            return reply.status == 200

        await both.sees(is_refused)
        await both.here.api("PATCH", place, {"limit_nano_usd": 1000 * COST})
        await both.sees(is_let_in)
        await both.there.api("PATCH", place, {"limit_nano_usd": COST})
        await both.sees(is_refused)
        await both.here.api("POST", f"{place}/reset", {})
        # Worth one again: whichever worker is asked first spends it.
        await both.there.until(is_let_in, both.secret)
        await both.sees(is_refused)
        await both.there.api("POST", f"{place}/reset", {})
        await both.here.until(is_let_in, both.secret)
        await both.sees(is_refused)
        await both.there.api("PATCH", place, {"on_breach": "warn"})
        await both.sees(is_let_in)
        await both.there.api("PATCH", place, {"on_breach": "block"})
        await both.sees(is_refused)
        await both.here.api("DELETE", place, status=200)
        await both.sees(is_let_in)


async def test_changed_binding_is_used_by_both_workers_in_time(tmp_path: Path) -> None:
    async with pair(tmp_path) as both, FakeUpstream([answer], repeat=True) as other:
        await both.here.api("PATCH", "/provider-bindings/up", {"base_url": other.base_url, "credential": "sk-other"})
        for client in (both.here, both.there):
            with anyio.fail_after(VISIBLE_SECONDS):
                count = len(other.requests)
                while len(other.requests) == count:
                    assert (await client.ask(both.secret)).status == 200
        assert {request.headers.get(b"authorization") for request in other.requests} == {b"Bearer sk-other"}
        await both.there.api("PATCH", "/provider-bindings/up", {"rate_limits": {"rpm": 1}})
        await both.sees(lambda reply: reply.status == 429)
        await both.here.api("PATCH", "/provider-bindings/up", {"rate_limits": {"rpm": None}, "enabled": False})
        await both.sees(lambda reply: code_of(reply) == "provider_not_bound")
        reply = await both.here.request("POST", CHAT, chat(), key=both.secret)
        assert reply.status == 400
