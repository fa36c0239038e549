"""Answers that begin like good ones: event streams without an event, errors that call themselves event streams."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from fallback_chain import STREAM, chain, good
from penstock import RequestError
from penstock.testing import FakeUpstream, http_reply, stream_reply
from penstock.testing.upstream import Close, Step
from penstock_plugins.dialects.anthropic_to_openai_chat import AnthropicToOpenAIChat
from penstock_plugins.dialects.openai_chat_to_anthropic import OpenAIChatToAnthropic
from test_migration_story import CLAUDE_STREAM, GPT_STREAM, USER, vendors

pytestmark = pytest.mark.anyio


def sse_reply(body: bytes, status: int = 200) -> list[Step]:
    """Return the steps of an answer that calls itself an event stream, whatever its body is."""
    head = b"HTTP/1.1 %d X\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    return [head + body]


WITHOUT_AN_EVENT: dict[str, list[Step]] = {
    "empty": sse_reply(b""),
    "only a comment": sse_reply(b": keep-alive\n\n"),
    "half an event": sse_reply(b'data: {"choices":'),
    "no chunk": [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"],
    "closed": [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n", Close()],
}


@pytest.mark.parametrize("script", WITHOUT_AN_EVENT.values(), ids=WITHOUT_AN_EVENT)
async def test_stream_that_ends_without_an_event_falls_back(script: Sequence[Step]) -> None:
    async with chain(FakeUpstream([script]), FakeUpstream([good(is_stream=True)])) as running:
        reply = await running.ask(STREAM)
        assert (reply.status, reply.header("X-Penstock-Fallback-Count")) == (200, "1")
        assert [attempt.outcome for attempt in running.last.attempts] == ["truncated", "answered"]
        assert running.states()["a"].failures == 1


@pytest.mark.parametrize("script", WITHOUT_AN_EVENT.values(), ids=WITHOUT_AN_EVENT)
async def test_last_stream_without_an_event_is_relayed_as_it_came(script: Sequence[Step]) -> None:
    async with chain(FakeUpstream([script])) as running:
        reply = await running.ask(STREAM)
        assert (reply.status, reply.header("X-Penstock-Error")) == (200, None)
        body = b"".join(step for step in script if isinstance(step, bytes)).partition(b"\r\n\r\n")[2]
        assert reply.body == (b"" if body == b"0\r\n\r\n" else body)
        assert len(running.upstreams[0].requests) == 1


@pytest.mark.parametrize("script", WITHOUT_AN_EVENT.values(), ids=WITHOUT_AN_EVENT)
async def test_translated_stream_without_an_event_is_no_answer(script: list[Step]) -> None:
    down = sse_reply(b"")
    body: dict[str, Any] = {"max_tokens": 9, "messages": [USER], "stream": True}
    for first, path, model in (
        ("openai", "/v1/chat/completions", "gpt-5-mini"),
        ("anthropic", "/v1/messages", "claude-haiku-4-5"),
    ):
        gpt, claude = ([down], [script]) if first == "openai" else ([script], [down])
        async with vendors(first, gpt, claude) as both:
            reply = await both.harness.request("POST", path, body={"model": model, **body})
            assert (reply.status, reply.header("X-Penstock-Error")) == (502, "provider_error")
        gpt, claude = ([down], [CLAUDE_STREAM]) if first == "openai" else ([GPT_STREAM], [down])
        async with vendors(first, gpt, claude) as both:
            reply = await both.harness.request("POST", path, body={"model": model, **body})
            assert (reply.status, reply.header("X-Penstock-Fallback-Count")) == (200, "1")


ERROR = b'data: {"error":{"message":"no","type":"invalid_request_error"}}\n\n'


@pytest.mark.parametrize("status", [400, 401, 422])
@pytest.mark.parametrize("body", [ERROR, ERROR.strip(), b'{"error":{"message":"no"}}'])
async def test_refusal_that_calls_itself_a_stream_is_relayed_and_no_failure(status: int, body: bytes) -> None:
    async with chain(FakeUpstream([sse_reply(body, status)]), FakeUpstream([good(is_stream=True)])) as running:
        reply = await running.ask(STREAM)
        assert (reply.status, reply.body) == (status, body)
        assert (running.dials, running.states()) == ([1, 0], {})


async def test_rate_limit_that_calls_itself_a_stream_says_nothing_to_the_breaker() -> None:
    async with chain(FakeUpstream([sse_reply(ERROR, 429)]), FakeUpstream([good(is_stream=True)])) as running:
        assert (await running.ask(STREAM)).status == 200
        assert running.states() == {}
    only = {"on": ["5xx"]}
    upstreams = FakeUpstream([sse_reply(ERROR, 429)]), FakeUpstream([good(is_stream=True)])
    async with chain(*upstreams, fallback=only) as running:
        assert (await running.ask(STREAM)).status == 429


@pytest.mark.parametrize("status", [400, 503])
async def test_translated_error_that_calls_itself_a_stream_is_one_envelope(status: int) -> None:
    down = sse_reply(b"")
    said = b'{"type":"error","error":{"type":"api_error","message":"broken"}}'
    async with vendors("openai", [down], [sse_reply(said, status)]) as both:
        body = {"model": "gpt-5-mini", "messages": [USER], "stream": True}
        reply = await both.harness.request("POST", "/v1/chat/completions", body=body)
        assert (reply.status, reply.header("content-type")) == (status, "application/json")
        assert json.loads(reply.body)["error"]["message"] == "broken"


# --- requests -------------------------------------------------------------------------------------------------------


def test_schema_nested_deeply_is_translated_whatever_its_depth() -> None:
    for depth in (10, 400, 900):
        schema = b'{"a":' * depth + b"{}" + b"}" * depth
        form = b'"output_format":{"type":"json_schema","schema":%b}' % schema
        body = b'{"max_tokens":9,"messages":[{"role":"user","content":"Hi"}],%b}' % form
        assert schema in AnthropicToOpenAIChat().translate(body, "gpt-5-mini").body


def test_message_says_what_is_wrong_with_a_number() -> None:
    body = b'{"max_tokens":"many","messages":[{"role":"user","content":"Hi"}]}'
    with pytest.raises(RequestError, match=r"max_tokens cannot be read: Expected `int"):
        OpenAIChatToAnthropic().translate(body, "claude-haiku-4-5")


# --- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
async def test_calls_have_ids_that_anthropic_takes_in_the_next_turn(is_stream: bool) -> None:
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"index": n, "id": f"functions.weather:{n}", "type": "function", "function": function} for n in (0, 1)]
    members = {"role": "assistant", "content": None, "tool_calls": calls}
    choice = {"index": 0, "finish_reason": "tool_calls", ("delta" if is_stream else "message"): members}
    answer = json.dumps({"id": "x", "model": "kimi", "choices": [choice]}).encode()
    parts = [b"data: %b\n\n" % answer, b"data: [DONE]\n\n"]
    script: list[Step] = stream_reply(*parts) if is_stream else [http_reply(answer)]
    async with vendors("anthropic", [script], [sse_reply(b"", 503)]) as both, both.messages() as client:
        question: dict[str, Any] = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [USER]}
        if is_stream:
            async with client.messages.stream(**question) as stream:
                message: Any = await stream.get_final_message()
        else:
            message = await client.messages.create(**question)
        ids = [block.id for block in message.content if block.type == "tool_use"]
        assert ids == ["functions_weather_0", "functions_weather_1"]


async def test_conversation_with_claude_holds_no_thinking_that_claude_has_not_signed() -> None:
    thoughts = {"role": "assistant", "content": "Rain.", "reasoning_content": "hm"}
    answer = {"id": "x", "model": "gpt", "choices": [{"index": 0, "finish_reason": "stop", "message": thoughts}]}
    script: list[Step] = [http_reply(json.dumps(answer).encode())]
    async with vendors("anthropic", [script], [sse_reply(b"", 503)]) as both, both.messages() as client:
        message = await client.messages.create(
            model="claude-haiku-4-5",
            max_tokens=2000,
            messages=[USER],
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        assert [block.type for block in message.content] == ["text"]
