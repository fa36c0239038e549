"""The official anthropic package, over sockets, through the gateway, to providers that speak chat completions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

from message_events import check_grammar, final_message, read_events
from penstock.testing import Close, FakeUpstream, Harness, Step
from penstock_plugins.dialects import Dialects

pytestmark = pytest.mark.anyio

MODEL = "gpt-5-mini"
HELLO: list[MessageParam] = [{"role": "user", "content": "Hi"}]
WEATHER: ToolParam = {
    "name": "weather",
    "description": "Look outside.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
_CHAT: tuple[dict[str, Any], ...] = ({"name": "up", "type": "openai_compatible", "models": [MODEL]},)
USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 7,
    "total_tokens": 37,
    "prompt_tokens_details": {"cached_tokens": 20},
}


@asynccontextmanager
async def connected(
    *upstreams: FakeUpstream, **options: Any
) -> AsyncIterator[tuple[anthropic.AsyncAnthropic, Harness]]:
    async with Harness([("dialects", Dialects)], upstream=upstreams, bindings=_CHAT, socket=True, **options) as gateway:
        http = anthropic.DefaultAsyncHttpxClient(verify=False)  # a context for TLS takes long to make
        async with anthropic.AsyncAnthropic(
            base_url=gateway.base_url, api_key=gateway.key, http_client=http, max_retries=0,
            _strict_response_validation=True,
        ) as client:  # fmt: skip
            yield client, gateway


def answer(body: Any, status: bytes = b"200 OK", *fields: bytes) -> list[Step]:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (b"HTTP/1.1 " + status, b"content-type: application/json", b"content-length: %d" % len(text), *fields)
    return [b"\r\n".join((*lines, b"", text))]


def completion(message: dict[str, Any], finish_reason: str = "stop") -> list[Step]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return answer(
        {"id": "chatcmpl-1", "object": "chat.completion", "model": "gpt-x", "choices": [choice], "usage": USAGE}
    )


def stream(*frames: bytes, is_whole: bool = True) -> list[Step]:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames]
    return [head, *pieces, *([b"0\r\n\r\n"] if is_whole else [Close()])]


def frame(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "gpt-x", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(body).encode()


def call(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    ident = {} if name is None else {"id": f"call_{index}", "type": "function"}
    return {"tool_calls": [{"index": index, **ident, "function": {"name": name, "arguments": arguments}}]}


LAST = (
    b'data: {"id":"chatcmpl-1","model":"gpt-x","choices":[],"usage":%b}\n\n' % json.dumps(USAGE).encode(),
    b"data: [DONE]\n\n",
)


def texts(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def read_into(kinds: list[str], client: anthropic.AsyncAnthropic) -> None:
    async for event in await client.messages.create(model=MODEL, max_tokens=9, messages=HELLO, stream=True):
        kinds.append(event.type)  # noqa: PERF401 - it may end with an exception


async def test_message_over_a_chat_provider() -> None:
    upstream = FakeUpstream([completion({"content": "Hello."})])
    async with connected(upstream) as (client, gateway):
        raw = await client.messages.with_raw_response.create(
            model=MODEL, max_tokens=50, system="Be short.", messages=HELLO, speed="fast",
            extra_headers={"anthropic-beta": "of-tomorrow"},
        )  # fmt: skip
        message = await raw.parse()
        assert (texts(message), message.stop_reason, message.model) == ("Hello.", "end_turn", "gpt-x")
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (10, 20)
        assert raw.headers["x-penstock-params-dropped"] == "speed"
        sent = upstream.requests[0]
        assert sent.target == b"/v1/chat/completions"
        assert not [name for name, _ in sent.headers if name.startswith(b"anthropic-")]
        assert json.loads(sent.body) == {
            "model": "gpt-5-mini",
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
            "max_completion_tokens": 50,
        }
        await gateway.wait_settled(1)
        usage = gateway.exchanges[0].usage
        assert usage is not None
        assert (usage.input, usage.cache_read, usage.output, usage.source) == (10, 20, 7, "provider")


async def test_request_of_claude_code_goes_through() -> None:
    hint = {"type": "ephemeral", "ttl": "1h"}
    call_block = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "a"}}
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    body = {
        "model": MODEL,
        "max_tokens": 32000,
        "stream": True,
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": json.dumps({"device_id": "d" * 64, "session_id": "s"})},
        "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": hint}],
        "tools": [{**WEATHER, "eager_input_streaming": True}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "<reminder>"}, {"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": [thinking, {"type": "text", "text": "Reading."}, call_block]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny", "cache_control": hint},
                ],
            },
        ],
    }
    upstream = FakeUpstream([stream(frame({"content": "Hello."}), frame({}, "stop"), *LAST)])
    async with connected(upstream) as (_, gateway):
        headers = [(b"anthropic-version", b"2023-06-01"), (b"anthropic-beta", b"a,b"), (b"user-agent", b"claude-cli/2")]
        answered = await gateway.request("POST", "/v1/messages?beta=true", headers, json.dumps(body).encode())
        events = read_events(answered.body)
        check_grammar(events)
        assert final_message(events).usage.output_tokens == 7
        assert answered.headers.get(b"x-penstock-params-dropped") == (
            b"cache_control, messages[].content[].thinking, context_management, tools[].eager_input_streaming"
        )
        sent = json.loads(upstream.requests[0].body)
        assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "tool"]
        assert (sent["reasoning_effort"], sent["max_completion_tokens"], len(sent["user"])) == ("high", 32000, 64)


async def test_tools_go_round_twice() -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}]
    upstream = FakeUpstream(
        [completion({"content": None, "tool_calls": calls}, "tool_calls"), completion({"content": "Sun."})]
    )
    async with connected(upstream) as (client, _):
        first = await client.messages.create(model=MODEL, max_tokens=50, messages=HELLO, tools=[WEATHER])
        tool = first.content[0]
        assert tool.type == "tool_use"
        assert (first.stop_reason, tool.id, tool.name, tool.input) == (
            "tool_use",
            "call_1",
            "weather",
            {"city": "Rome"},
        )
        turns: list[MessageParam] = [
            *HELLO,
            first.to_param(),
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": tool.id, "content": "22 degrees"}]},
        ]
        second = await client.messages.create(model=MODEL, max_tokens=50, messages=turns, tools=[WEATHER])
        assert texts(second) == "Sun."
        sent = json.loads(upstream.requests[1].body)["messages"]
        assert sent[1:] == [
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"},
        ]


async def test_stream_helper_returns_the_final_message() -> None:
    frames = (
        b": PROCESSING\n\n", frame({"role": "assistant", "content": ""}), frame({"reasoning_content": "Let me see."}),
        frame({"content": "Look"}), frame({"content": "ing."}), frame(call(0, '{"city"', "weather")),
        frame(call(1, "", "weather")), frame(call(1, '{"city":"Oslo"}')), frame(call(0, ':"Rome"}')),
        frame({}, "tool_calls"), *LAST,
    )  # fmt: skip
    async with connected(FakeUpstream([stream(*frames)])) as (client, gateway):
        async with client.messages.stream(
            model=MODEL, max_tokens=50, messages=HELLO, tools=[WEATHER], thinking={"type": "adaptive"}
        ) as events:
            kinds = [event.type async for event in events]
            message = await events.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert [block.input for block in message.content if block.type == "tool_use"] == [
            {"city": "Rome"},
            {"city": "Oslo"},
        ]
        assert (texts(message), message.stop_reason) == ("Looking.", "tool_use")
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (10, 20)
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        await gateway.wait_settled(1)
        exchange = gateway.exchanges[0]
        assert exchange.usage is not None
        assert (exchange.usage.output, exchange.stream_end) == (7, "complete")


async def test_turn_that_a_stream_gave_can_be_sent_back() -> None:
    frames = (frame({"reasoning": "hm"}), frame({"content": "Yes."}), frame({}, "stop"), *LAST)
    upstream = FakeUpstream([stream(*frames), completion({"content": "Fine."})])
    async with connected(upstream) as (client, _):
        async with client.messages.stream(
            model=MODEL, max_tokens=50, messages=HELLO, thinking={"type": "adaptive"}
        ) as events:
            message = await events.get_final_message()
        turns: list[MessageParam] = [*HELLO, message.to_param(), *HELLO]
        raw = await client.messages.with_raw_response.create(model=MODEL, max_tokens=50, messages=turns)
        assert raw.headers["x-penstock-params-dropped"] == "messages[].content[].thinking"
        assert json.loads(upstream.requests[1].body)["messages"][1] == {"role": "assistant", "content": "Yes."}


ERRORS: Sequence[tuple[bytes, type[anthropic.APIStatusError]]] = (
    (b"400 Bad Request", anthropic.BadRequestError),
    (b"401 Unauthorized", anthropic.AuthenticationError),
    (b"403 Forbidden", anthropic.PermissionDeniedError),
    (b"404 Not Found", anthropic.NotFoundError),
    (b"422 Unprocessable", anthropic.UnprocessableEntityError),
    (b"429 Too Many", anthropic.RateLimitError),
    (b"500 Oops", anthropic.InternalServerError),
    (b"503 Overloaded", anthropic.InternalServerError),
)


@pytest.mark.parametrize(("status", "kind"), ERRORS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_error_statuses_raise_the_sdks_own_classes(
    status: bytes, kind: type[anthropic.APIStatusError], is_stream: bool
) -> None:
    error = {"error": {"message": "Because of that.", "type": "some_error", "param": None, "code": "some_code"}}
    async with connected(FakeUpstream([answer(error, status, b"retry-after: 7")])) as (client, _):
        with pytest.raises(kind, match="Because of that") as caught:
            await client.messages.create(model=MODEL, max_tokens=9, messages=HELLO, stream=is_stream)
        assert caught.value.status_code == int(status[:3])
        assert caught.value.response.headers["retry-after"] == "7"
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "error"


async def test_what_cannot_be_translated_is_refused_without_a_dial() -> None:
    upstream = FakeUpstream()
    async with connected(upstream) as (client, _):
        with pytest.raises(anthropic.BadRequestError, match="web_search") as caught:
            await client.messages.create(
                model=MODEL, max_tokens=9, messages=HELLO, tools=[{"type": "web_search_20250305", "name": "web_search"}]
            )
        assert caught.value.response.headers["x-penstock-error"] == "unsupported_parameter"
        with pytest.raises(anthropic.BadRequestError, match="speed"):
            await client.messages.create(
                model=MODEL, max_tokens=9, messages=HELLO, speed="fast", extra_body={"drop_tuning_params": False}
            )
    assert upstream.requests == []


@pytest.mark.parametrize(
    "first",
    [
        answer(b"<html>"),
        completion({"tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": "{"}}]}, "tool_calls"),
        answer({"error": {"message": "no", "code": 502}}),
    ],
    ids=["html", "arguments", "error in a 200"],
)
async def test_unreadable_answer_goes_to_the_next_provider(first: list[Step]) -> None:
    async with connected(FakeUpstream([first]), FakeUpstream([completion({"content": "Hello."})])) as (client, _):
        raw = await client.messages.with_raw_response.create(model=MODEL, max_tokens=9, messages=HELLO)
        assert '"Hello."' in await raw.text()
        assert raw.headers["x-penstock-fallback-count"] == "1"


async def test_error_as_first_event_goes_to_the_next_provider() -> None:
    first = stream(b'data: {"error":{"message":"no","code":502}}\n\n')
    second = stream(frame({"content": "Hello."}), frame({}, "stop"), *LAST)
    async with (
        connected(FakeUpstream([first]), FakeUpstream([second])) as (client, _),
        client.messages.stream(model=MODEL, max_tokens=9, messages=HELLO) as events,
    ):
        assert texts(await events.get_final_message()) == "Hello."


@pytest.mark.parametrize("is_whole", [False, True])
async def test_stream_that_breaks_off_raises_in_the_sdk(is_whole: bool) -> None:
    upstream = FakeUpstream([stream(frame({"content": "Hel"}), frame({"content": "lo"}), is_whole=is_whole)])
    async with connected(upstream) as (client, gateway):
        seen: list[str] = []
        with pytest.raises(anthropic.APIStatusError, match="upstream_mid_stream_failure"):
            await read_into(seen, client)
        assert seen == ["message_start", "content_block_start", "content_block_delta", "content_block_delta"]
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "upstream_failed"


async def test_error_in_the_middle_of_a_stream_keeps_the_providers_words() -> None:
    broken = b'event: error\ndata: {"error":{"message":"Out of capacity.","type":"overloaded_error"}}\n\n'
    async with connected(FakeUpstream([stream(frame({"content": "Hel"}), broken)])) as (client, _):
        with pytest.raises(anthropic.APIStatusError, match="Out of capacity") as caught:
            await read_into([], client)
        assert caught.value.type == "overloaded_error"


async def test_count_of_tokens_is_not_translated() -> None:
    upstream = FakeUpstream()
    async with connected(upstream) as (client, _):
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.count_tokens(model=MODEL, messages=HELLO)
        assert 400 <= caught.value.status_code < 500
    assert upstream.requests == []
