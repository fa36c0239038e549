"""Clients of every kind before a chain: HTTP/1.0, keep-alive, many at once; and failures only seen from their side."""

from __future__ import annotations

import anyio
import pytest

from fallback_chain import GOOD, STREAM, WHOLE, chain, failing, good
from fault_upstream import OPENAI
from penstock.testing import FakeUpstream, Pause, Reset

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("is_stream", [False, True])
async def test_http10_client_gets_the_next_candidates_answer(is_stream: bool) -> None:
    upstreams = FakeUpstream([[Reset()]]), FakeUpstream([good(is_stream=is_stream)])
    async with chain(*upstreams) as run:
        client = await run.harness.raw()
        request = run.harness.request_bytes("POST", OPENAI.path, body=STREAM if is_stream else WHOLE)
        await client.send(request.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
        reply = await client.receive_reply()
        assert (reply.status, reply.is_complete) == (200, True)
        assert reply.body == (b"".join(OPENAI.events) if is_stream else GOOD)
        assert reply.header("X-Penstock-Fallback-Count") == "1"


async def test_connection_of_a_client_serves_on_after_each_kind_of_end() -> None:
    upstreams = FakeUpstream([failing(), failing(), good(is_stream=False)]), FakeUpstream([failing(1), [Reset()]])
    async with chain(*upstreams, fallback={"max_attempts": 2}) as run:
        client = await run.harness.raw()
        statuses = []
        for _ in range(3):
            await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
            statuses.append((await client.receive_reply()).status)
        assert statuses == [503, 502, 200]


async def test_client_that_leaves_in_the_second_attempt_settles_once_and_leaves_nothing() -> None:
    pause = Pause()
    upstreams = FakeUpstream([failing()]), FakeUpstream([[pause]]), FakeUpstream()
    async with chain(*upstreams, breaker={"failures": 1}) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
        await pause.reached.wait()
        client.close()
        await run.harness.wait_settled(1)
        assert run.dials == [1, 1, 0]
        assert [attempt.reason for attempt in run.last.attempts] == ["status", "client_gone"]
        assert (run.state("a"), run.state("b")) == ("open", "closed")
        pause.release()


async def test_hundred_at_once_open_a_breaker_once_and_all_are_answered() -> None:
    upstreams = FakeUpstream([failing()], repeat=True), FakeUpstream([good(is_stream=False)], repeat=True)
    statuses: list[int] = []
    async with chain(*upstreams) as run:

        async def ask() -> None:
            statuses.append((await run.ask()).status)

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(ask)
        assert statuses == [200] * 100
        assert run.states()["a"].failures == 10
        before = run.dials[0]
        assert 10 <= before <= 100
        await run.ask()
        assert run.dials == [before, 101]
