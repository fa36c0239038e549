"""The official openai package and a provider that speaks Anthropic, a gateway and real sockets between them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from chat_grammar import read_chat_stream
from penstock.testing import Close, FakeUpstream, Harness, Reset, Step, http_reply, stream_reply
from penstock.testing.upstream import STREAM_HEAD, chunk
from test_translate_chat_anthropic_answers import block, ending, event, start

pytestmark = pytest.mark.anyio

MODEL = "claude-haiku-4-5"
CLAUDE = {"name": "claude", "type": "anthropic", "models": [MODEL]}
HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
WEATHER: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]
ANSWER = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5-20251001",
    "content": [{"type": "text", "text": "Hello."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 10, "cache_read_input_tokens": 4, "output_tokens": 3},
}
ASKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Look it up.", "signature": "c2ln"},
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}},
    {"type": "tool_use", "id": "toolu_2", "name": "weather", "input": {"city": "Rome"}},
]
SAYS = [
    start(input_tokens=10, output_tokens=1),
    event("ping"),
    *block(
        0, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hel"}, {"type": "text_delta", "text": "lo."}
    ),
    *ending(),
]


def calls_streamed() -> list[bytes]:
    thinking = block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "Look it up."},
        {"type": "signature_delta", "signature": "c2ln"},
    )
    events = [start(input_tokens=10), *thinking]
    for index, call in enumerate(ASKS[1:], 1):
        spelled = json.dumps(call["input"])
        pieces = [{"type": "input_json_delta", "partial_json": piece} for piece in (spelled[:5], spelled[5:])]
        events += block(index, {**call, "input": {}}, *pieces)
    return [*events, *ending("tool_use")]


@asynccontextmanager
async def connected(*scripts: list[Step]) -> AsyncIterator[tuple[openai.AsyncOpenAI, Harness, FakeUpstream]]:
    upstream = FakeUpstream(list(scripts))
    async with Harness(["dialects"], upstream=upstream, bindings=[CLAUDE], socket=True) as harness:
        options: dict[str, Any] = {"_strict_response_validation": True, "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=f"{harness.base_url}/v1", api_key=harness.key, **options) as client:
            yield client, harness, upstream
        assert harness.faults == []


def answer(**members: Any) -> list[Step]:
    return [http_reply(json.dumps({**ANSWER, **members}).encode())]


async def test_answer_is_a_completion_that_is_metered_as_the_provider_counts() -> None:
    async with connected(answer()) as (client, harness, upstream):
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HI, seed=7, temperature=0.5)
        completion = raw.parse()
        await harness.wait_settled(1)
        (exchange,) = harness.exchanges
    assert raw.headers["x-penstock-params-dropped"] == "seed"
    assert raw.headers["content-type"] == "application/json"
    assert (completion.id, completion.model) == ("msg_1", "claude-haiku-4-5-20251001")
    assert completion.choices[0].message.content == "Hello."
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (14, 3)
    assert exchange.usage is not None
    assert (exchange.usage.input, exchange.usage.cache_read, exchange.usage.output) == (10, 4, 3)
    (asked,) = upstream.requests
    assert (asked.target, asked.headers.get(b"anthropic-version")) == (b"/v1/messages", b"2023-06-01")
    assert asked.headers.get(b"x-api-key") is not None
    assert not any(name.lower().startswith(b"x-stainless") for name, _ in asked.headers)
    assert json.loads(asked.body) == {
        "model": MODEL,
        "max_tokens": 8192,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "temperature": 0.5,
    }


async def test_conversation_with_tools_and_thinking_goes_round() -> None:
    async with connected(answer(content=ASKS, stop_reason="tool_use"), answer()) as (client, _, upstream):
        messages = list(HI)
        first = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=WEATHER, reasoning_effort="low"
        )
        (choice,) = first.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        back: Any = choice.message.model_dump()
        results: list[Any] = [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in choice.message.tool_calls
        ]
        messages += [back, *results]
        second = await client.chat.completions.create(
            model=MODEL, messages=messages, tools=WEATHER, reasoning_effort="low"
        )
    assert second.choices[0].message.content == "Hello."
    asked = json.loads(upstream.requests[1].body)
    assert asked["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert asked["messages"][1:] == [
        {"role": "assistant", "content": ASKS},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "toolu_2", "content": "sunny"},
            ],
        },
    ]


async def test_stream_is_put_together_by_the_sdk() -> None:
    async with connected(stream_reply(*SAYS)) as (client, harness, upstream):
        options: Any = {"include_usage": True}
        async with client.chat.completions.stream(model=MODEL, messages=HI, stream_options=options) as stream:
            deltas = [each.delta async for each in stream if each.type == "content.delta"]
            completion = await stream.get_final_completion()
        await harness.wait_settled(1)
        (exchange,) = harness.exchanges
    assert deltas == ["", "Hel", "lo."]
    assert completion.choices[0].message.content == "Hello."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 7)
    assert exchange.usage is not None
    assert (exchange.usage.input, exchange.usage.output, exchange.stream_end) == (10, 7, "complete")
    assert json.loads(upstream.requests[0].body)["stream"] is True


async def test_streamed_calls_are_put_together_by_the_sdk_and_go_back() -> None:
    async with connected(stream_reply(*calls_streamed()), answer()) as (client, _, upstream):
        async with client.chat.completions.stream(model=MODEL, messages=HI, tools=WEATHER) as stream:
            message = (await stream.get_final_completion()).choices[0].message
        calls = message.tool_calls
        assert calls is not None
        assert [(call.id, call.function.arguments) for call in calls] == [
            ("toolu_1", '{"city": "Oslo"}'),
            ("toolu_2", '{"city": "Rome"}'),
        ]
        assert calls[0].function.parsed_arguments == {"city": "Oslo"}
        back: Any = message.model_dump()
        await client.chat.completions.create(model=MODEL, messages=[*HI, back], tools=WEATHER)
    assert json.loads(upstream.requests[1].body)["messages"][1]["content"] == ASKS


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (400, "invalid_request_error", openai.BadRequestError),
        (401, "authentication_error", openai.AuthenticationError),
        (403, "permission_error", openai.PermissionDeniedError),
        (404, "not_found_error", openai.NotFoundError),
        (413, "request_too_large", openai.APIStatusError),
        (429, "rate_limit_error", openai.RateLimitError),
        (500, "api_error", openai.InternalServerError),
        (529, "overloaded_error", openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_error_raises_the_sdks_own_exception(
    status: int, kind: str, raised: type[openai.APIStatusError], is_stream: bool
) -> None:
    body = json.dumps({"type": "error", "error": {"type": kind, "message": "said so"}, "request_id": "req_1"})
    async with connected([http_reply(body.encode(), status)]) as (client, _, _):
        with pytest.raises(raised) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI, stream=is_stream)
    assert caught.value.status_code == status
    assert caught.value.code == kind
    assert "said so" in caught.value.message


async def test_what_cannot_be_translated_is_refused_without_asking_the_provider() -> None:
    async with connected() as (client, harness, upstream):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=HI, n=2)
        assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "n")
        extra = {"drop_tuning_params": False}
        with pytest.raises(openai.BadRequestError, match="seed") as caught:
            await client.chat.completions.create(model=MODEL, messages=HI, seed=1, extra_body=extra)
        assert caught.value.code == "unsupported_parameter"
        await harness.wait_settled(2)
    assert upstream.requests == []


@pytest.mark.parametrize("how", ["cut", "reset", "without end"])
async def test_stream_that_breaks_off_ends_in_an_error_event(how: str) -> None:
    head = [STREAM_HEAD, *[chunk(each) for each in SAYS[:4]]]
    tail: dict[str, list[Step]] = {
        "cut": [chunk(b'event: content_block_delta\ndata: {"type"'), Close()],
        "reset": [Reset()],
        "without end": [b"0\r\n\r\n"],
    }
    async with connected([*head, *tail[how]]) as (client, harness, _):
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        said: list[str | None] = []

        async def listen() -> None:
            async for each in stream:
                said.append(each.choices[0].delta.content)  # noqa: PERF401 - what came before the error counts

        with pytest.raises(openai.APIError) as caught:
            await listen()
        await harness.wait_settled(1)
        assert harness.exchanges[0].stream_end == "upstream_failed"
    assert said == ["", "Hel"]
    assert caught.value.code == "upstream_mid_stream_failure"


async def test_error_event_in_the_stream_reaches_the_sdk() -> None:
    error = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
    async with connected(stream_reply(*SAYS[:4], error)) as (client, harness, _):
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        with pytest.raises(openai.APIError, match="Overloaded") as caught:
            async for _chunk in stream:
                pass
        await harness.wait_settled(1)
    assert caught.value.code == "overloaded_error"


async def test_unreadable_answer_asks_the_next_candidate() -> None:
    first, second = FakeUpstream([[http_reply(b"<html>")]]), FakeUpstream([answer()])
    async with Harness(["dialects"], upstream=[first, second], bindings=[CLAUDE], socket=True) as harness:
        body = json.dumps({"model": MODEL, "messages": HI}).encode()
        reply = await harness.request("POST", "/v1/chat/completions", body=body)
        assert reply.status == 200
        assert json.loads(reply.body)["choices"][0]["message"]["content"] == "Hello."
        assert [attempt.reason for attempt in harness.exchanges[0].attempts] == ["protocol", None]


async def test_first_event_that_is_an_error_asks_the_next_candidate() -> None:
    error = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
    first, second = FakeUpstream([stream_reply(error)]), FakeUpstream([stream_reply(*SAYS)])
    async with Harness(["dialects"], upstream=[first, second], bindings=[CLAUDE], socket=True) as harness:
        body = json.dumps({"model": MODEL, "messages": HI, "stream": True}).encode()
        reply = await harness.request("POST", "/v1/chat/completions", body=body)
        assert reply.headers.get(b"content-type") == b"text/event-stream; charset=utf-8"
        assert read_chat_stream(reply.body).content == "Hello."
        assert [attempt.reason for attempt in harness.exchanges[0].attempts] == ["error_event", None]
