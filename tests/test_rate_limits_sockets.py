"""Rate limits under parallel clients on real sockets, and what the official SDKs make of the refusals."""

from __future__ import annotations

import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import anyio
import openai
import pytest

from counting import Setting, setting
from penstock import RateLimits
from penstock.testing import STREAM_HEAD, FakeUpstream, Harness, Pause, RecordedRequest, Stall, chunk, http_reply
from penstock_plugins.rate_limits import RateLimiting

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
CHAT_ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hi"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}
MESSAGE_ANSWER = {
    "id": "m",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [{"type": "text", "text": "Hi"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
HELLO: Any = [{"role": "user", "content": "Hi"}]


@asynccontextmanager
async def listening(key: RateLimits, upstream: FakeUpstream) -> AsyncIterator[tuple[Harness, Setting]]:
    plugin, made = setting(key=key)
    async with Harness([plugin, ("rate_limits", RateLimiting)], upstream=upstream, socket=True) as gateway:
        yield gateway, made[0]
    assert made[0].counters.left == {}


def replies(answer: object) -> FakeUpstream:
    return FakeUpstream([[http_reply(json.dumps(answer).encode())]], repeat=True)


def openai_client(gateway: Harness, **options: Any) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False, event_hooks=options.pop("event_hooks", None))
    return openai.AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key=gateway.key, http_client=http, **options)


def anthropic_client(gateway: Harness) -> anthropic.AsyncAnthropic:
    http = anthropic.DefaultAsyncHttpxClient(trust_env=False)
    return anthropic.AsyncAnthropic(base_url=gateway.base_url, api_key=gateway.key, http_client=http, max_retries=0)


async def test_openai_raises_its_rate_limit_error() -> None:
    async with (
        listening(RateLimits(rpm=1), replies(CHAT_ANSWER)) as (gateway, _),
        openai_client(gateway, max_retries=0) as client,
    ):
        await client.chat.completions.create(model="m", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.chat.completions.create(model="m", messages=HELLO)
        assert raised.value.code == "rate_limit_exceeded"
        assert raised.value.response.headers["x-penstock-ratelimit-dimension"] == "rpm"
        assert "x-should-retry" not in raised.value.response.headers


async def test_anthropic_raises_its_rate_limit_error() -> None:
    async with (
        listening(RateLimits(rpm=1), replies(MESSAGE_ANSWER)) as (gateway, _),
        anthropic_client(gateway) as client,
    ):
        await client.messages.create(model="claude-x", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.RateLimitError) as raised:
            await client.messages.create(model="claude-x", max_tokens=5, messages=HELLO)
        body: Any = raised.value.body
        assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")


async def test_openai_comes_back_after_the_time_it_is_told() -> None:
    hold = Pause()
    answer = http_reply(json.dumps(CHAT_ANSWER).encode())
    upstream = FakeUpstream([[hold, answer], [answer]])
    came: list[float] = []

    async def note(_: object) -> None:
        came.append(time.monotonic())

    async def release(response: Any) -> None:
        if response.status_code == 429:
            hold.released.set()

    hooks = {"request": [note], "response": [release]}
    async with (
        listening(RateLimits(concurrency=1), upstream) as (gateway, _),
        openai_client(gateway, max_retries=1, event_hooks=hooks) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(gateway.request, "POST", CHAT, (), b'{"model":"m","messages":[]}')
        await hold.reached.wait()
        found = await client.chat.completions.create(model="m", messages=HELLO)
        assert found.choices[0].message.content == "Hi"
        assert 1.0 <= came[1] - came[0] < 10.0


async def test_parallel_clients_never_exceed_a_concurrency_limit() -> None:
    busy: list[int] = []
    under_way = 0

    def script(_: RecordedRequest) -> list[Any]:
        nonlocal under_way
        under_way += 1
        busy.append(under_way)
        hold = Pause()
        tasks.start_soon(let_go, hold)
        return [hold, http_reply(json.dumps(CHAT_ANSWER).encode())]

    async def let_go(hold: Pause) -> None:
        nonlocal under_way
        await hold.reached.wait()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        under_way -= 1
        hold.released.set()

    statuses: list[int] = []

    async def ask() -> None:
        reply = await gateway.request("POST", CHAT, body=b'{"model":"m","messages":[]}')
        statuses.append(reply.status)

    upstream = FakeUpstream([script], repeat=True)
    async with listening(RateLimits(concurrency=5), upstream) as (gateway, _), anyio.create_task_group() as tasks:
        for _ in range(4):
            async with anyio.create_task_group() as clients:
                for _ in range(25):
                    clients.start_soon(ask)
    assert max(busy) <= 5
    assert set(statuses) == {200, 429}
    assert len(busy) == statuses.count(200) >= 20


async def test_parallel_clients_get_exactly_the_requests_of_a_minute() -> None:
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await gateway.request("POST", CHAT, body=b'{"model":"m","messages":[]}')).status)

    limits = RateLimits(rpm=17, rpd=100)
    async with listening(limits, replies(CHAT_ANSWER)) as (gateway, _), anyio.create_task_group() as clients:
        for _ in range(60):
            clients.start_soon(ask)
    assert (statuses.count(200), statuses.count(429)) == (17, 43)


async def test_clients_that_vanish_at_any_point_leave_no_lease() -> None:
    chance = random.Random(7)
    stalls = [Stall() for _ in range(30)]
    opening = [STREAM_HEAD, chunk(b'data: {"choices":[{"index":0,"delta":{"content":"H"}}]}\n\n')]
    scripts: list[Any] = [[*opening[: number % 2 * 2], stall] for number, stall in enumerate(stalls)]
    upstream = FakeUpstream(scripts)
    body = b'{"model":"m","stream":true,"messages":[],"max_tokens":5}'
    async with listening(RateLimits(concurrency=3, tpm=5_000), upstream) as (gateway, made):
        for number, stall in enumerate(stalls):
            client = await gateway.raw()
            await client.send(gateway.request_bytes("POST", CHAT, body=body))
            await stall.reached.wait()
            for _ in range(chance.randrange(5)):
                await anyio.lowlevel.checkpoint()
            client.close()
            await gateway.wait_settled(number + 1)
        assert made.counters.left == {}
