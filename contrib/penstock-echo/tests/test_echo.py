"""The echo provider, tested as any plugin can be: with penstock.testing and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock import Usage
from penstock.testing import Harness, Reply, check_plugin
from penstock_echo import Echo

ECHO = {"bindings": [{"name": "echo", "type": "echo"}]}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def ask(prefix: str = "", **members: object) -> tuple[Reply, Usage | None]:
    messages = [{"role": "user", "content": "Hällo echo"}, {"role": "assistant", "content": "no"}]
    config: dict[str, dict[str, Any]] = {"routing": ECHO, "echo": {"prefix": prefix}}
    async with Harness([Echo], config) as gateway:
        body = {"model": "any", "messages": messages, **members}
        reply = await gateway.request("POST", "/v1/chat/completions", body=body)
        return reply, gateway.exchanges[0].usage


def test_echo_keeps_the_plugin_contract() -> None:
    check_plugin(Echo, config={"prefix": "You said: "})


@pytest.mark.anyio
async def test_answer_is_the_last_user_message() -> None:
    reply, usage = await ask(prefix="You said: ")
    assert reply.json()["choices"][0]["message"]["content"] == "You said: Hällo echo"
    assert usage == Usage(input=4, output=4)


@pytest.mark.anyio
async def test_stream_says_the_same_and_hides_the_usage_nobody_asked_for() -> None:
    reply, usage = await ask(stream=True)
    events = reply.body.decode().split("\n\n")
    assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == "Hällo echo"
    assert events[1:] == ["data: [DONE]", ""]
    assert usage == Usage(input=2, output=2)


@pytest.mark.anyio
async def test_call_without_a_user_message_is_400() -> None:
    reply, _ = await ask(messages=[])
    assert reply.status == 400
