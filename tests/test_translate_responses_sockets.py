"""Clients of the Responses API, the official SDK among them, at providers of other dialects, over sockets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs
import openai
import pytest
from openai.types.responses import ResponseCompletedEvent, ResponseFunctionToolCall, ResponseTextDeltaEvent

from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Harness, chunk, http_reply, stream_reply
from penstock.testing.upstream import RecordedRequest, Step
from responses_grammar import accumulated, check_events, events_of, said

LOOK: Any = {"type": "function", "name": "look", "description": "Look.", "strict": False,
             "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}  # fmt: skip
PATCH: Any = {"type": "custom", "name": "patch", "description": "Edit files."}
ARGUMENTS = '{"at": "Bern", "n": 1.50}'


def sse(*payloads: Any) -> list[bytes]:
    return [b"data: %b\n\n" % json.dumps(payload).encode() for payload in payloads]


def chat_chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "up-1",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}  # fmt: skip


CHAT_USAGE = {"prompt_tokens": 12, "completion_tokens": 9, "total_tokens": 21,
              "prompt_tokens_details": {"cached_tokens": 4}}  # fmt: skip
_FUNCTION = {"name": "look", "arguments": ARGUMENTS}
_CHAT_CALL = {"index": 0, "id": "call_1", "type": "function", "function": _FUNCTION}
_CHAT_MESSAGE = {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm.", "tool_calls": [_CHAT_CALL]}
CHAT_WHOLE = {"id": "c", "object": "chat.completion", "created": 7, "model": "up-1", "usage": CHAT_USAGE,
              "choices": [{"index": 0, "finish_reason": "tool_calls", "message": _CHAT_MESSAGE}]}  # fmt: skip
CHAT_STREAM = [
    *sse(
        chat_chunk({"role": "assistant", "content": ""}),
        chat_chunk({"reasoning_content": "Hm."}),
        chat_chunk({"content": "Hel"}),
        chat_chunk({"content": "lo."}),
        chat_chunk({"tool_calls": [{**_CHAT_CALL, "function": {"name": "look", "arguments": ""}}]}),
        chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": ARGUMENTS}}]}),
        chat_chunk({}, "tool_calls"),
        {"id": "c", "choices": [], "usage": CHAT_USAGE},
    ),
    b"data: [DONE]\n\n",
]
_BLOCKS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Hm.", "signature": "sig"},
    {"type": "text", "text": "Hello."},
    {"type": "tool_use", "id": "call_1", "name": "look", "input": {"at": "Bern", "n": 1.5}},
]
MESSAGES_USAGE = {"input_tokens": 8, "cache_read_input_tokens": 4, "output_tokens": 9}
MESSAGES_WHOLE = json.dumps({
    "id": "msg_1", "type": "message", "role": "assistant", "model": "up-1", "content": _BLOCKS,
    "stop_reason": "tool_use", "usage": MESSAGES_USAGE,
}).replace('{"at": "Bern", "n": 1.5}', ARGUMENTS)  # fmt: skip
MESSAGES_STREAM = sse(
    {"type": "message_start", "message": {"id": "msg_1", "model": "up-1", "usage": MESSAGES_USAGE}},
    {"type": "content_block_start", "index": 0, "content_block": {**_BLOCKS[0], "thinking": "", "signature": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "sig"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hel"}},
    {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "lo."}},
    {"type": "content_block_stop", "index": 1},
    {"type": "content_block_start", "index": 2, "content_block": {**_BLOCKS[2], "input": {}}},
    {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ARGUMENTS}},
    {"type": "content_block_stop", "index": 2},
    {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
    {"type": "message_stop"},
)


@attrs.frozen
class Vendor:
    """Say how a provider is reached, and how it answers in its own dialect."""

    name: str
    binding: dict[str, Any]
    path: bytes
    whole: bytes
    stream: Sequence[bytes]
    error: bytes


VENDORS = [
    Vendor(
        "chat", {"name": "chat", "type": "openai_chat", "models": ["up"]}, b"/chat/completions",
        json.dumps(CHAT_WHOLE).encode(), CHAT_STREAM, b'{"error":{"message":"slow down","type":"x","code":"y"}}',
    ),
    Vendor(
        "claude", {"name": "claude", "type": "anthropic", "models": ["up"]}, b"/v1/messages",
        MESSAGES_WHOLE.encode(), MESSAGES_STREAM,
        b'{"type":"error","error":{"type":"rate_limit_error","message":"slow down"}}',
    ),
]  # fmt: skip
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("vendor", VENDORS, ids=[each.name for each in VENDORS])]


def gateway(vendor: Vendor, *upstreams: FakeUpstream) -> Harness:
    return Harness(["dialects"], upstream=upstreams, bindings=[vendor.binding], socket=True)


def client_of(harness: Harness, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{harness.base_url}/v1", api_key=harness.key, **options)


def body_of(**members: Any) -> bytes:
    return json.dumps({"model": "up", "input": "hi", **members}).encode()


EXPECTED = {"text": "Hello.", "reasoning": "Hm.", "calls": [("call_1", "look", ARGUMENTS)], "refusal": ""}


async def test_sdk_gets_a_response_with_its_tool_calls(vendor: Vendor) -> None:
    upstream = FakeUpstream([[http_reply(vendor.whole)]])
    async with gateway(vendor, upstream) as harness, client_of(harness) as client:
        response = await client.responses.create(model="up", input="hi", tools=[LOOK], instructions="Be brief.")
        assert said(response.to_dict()) == EXPECTED
        assert (response.status, response.model, response.output_text) == ("completed", "up-1", "Hello.")
        assert response.usage is not None
        assert (response.usage.input_tokens, response.usage.output_tokens) == (12, 9)
        assert response.usage.input_tokens_details.cached_tokens == 4
        exchange = harness.exchanges[0]
        assert exchange.usage is not None
        assert (exchange.usage.all_input, exchange.usage.output) == (12, 9)
        request = upstream.requests[0]
        assert request.target.endswith(vendor.path)
        assert request.headers.get(b"openai-organization") is None


async def test_sdk_accumulates_the_stream_to_the_same_response(vendor: Vendor) -> None:
    upstream = FakeUpstream([stream_reply(*vendor.stream)])
    async with gateway(vendor, upstream) as harness, client_of(harness) as client:
        async with client.responses.stream(model="up", input="hi", tools=[LOOK]) as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            final = await stream.get_final_response()
        assert deltas == ["Hel", "lo."]
        assert said(final.to_dict()) == EXPECTED
        assert final.usage is not None
        assert (final.usage.input_tokens, final.usage.output_tokens) == (12, 9)
        exchange = harness.exchanges[0]
        assert exchange.usage is not None
        assert (exchange.usage.all_input, exchange.usage.output, exchange.is_stream) == (12, 9, True)


async def test_stream_over_the_socket_is_well_formed(vendor: Vendor) -> None:
    async with gateway(vendor, FakeUpstream([stream_reply(*vendor.stream)])) as harness:
        body = body_of(stream=True, tools=[LOOK], prompt_cache_key="k")
        reply = await harness.request("POST", "/v1/responses", body=body)
        assert reply.is_complete
        assert (reply.header("Content-Type") or "").startswith("text/event-stream")
        assert reply.header("X-Penstock-Params-Dropped") == "prompt_cache_key"
        events = events_of(reply.body)
        assert said(check_events(events)) == EXPECTED
        assert said(accumulated(events).to_dict()) == EXPECTED


async def test_tool_loop_gives_the_provider_its_own_turn_back(vendor: Vendor) -> None:
    """Two turns of an agent: what the first answered is in front of the tool's result in the second."""
    upstream = FakeUpstream([stream_reply(*vendor.stream), [http_reply(vendor.whole)]])
    async with gateway(vendor, upstream) as harness, client_of(harness) as client:
        items: list[Any] = [{"role": "user", "content": "hi"}]
        completed: Any = None
        async for event in await client.responses.create(model="up", input=items, tools=[LOOK, PATCH], stream=True):
            assert not isinstance(event, ResponseTextDeltaEvent) or event.delta
            completed = event
        assert isinstance(completed, ResponseCompletedEvent)
        items += [item.to_dict() for item in completed.response.output]
        call = completed.response.output[-1]
        assert isinstance(call, ResponseFunctionToolCall)
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
        await client.responses.create(model="up", input=items, tools=[LOOK, PATCH])
        messages = json.loads(upstream.requests[1].body)["messages"]
        assert b"1.50" in upstream.requests[1].body
        if vendor.name == "chat":
            expected = {**_CHAT_MESSAGE, "tool_calls": [{"id": "call_1", "type": "function", "function": _FUNCTION}]}
            assert messages[1:] == [expected, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
        else:
            assert messages[1] == {"role": "assistant", "content": _BLOCKS}
            result = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "sunny"}]}
            assert messages[2] == {"role": "user", "content": [result]}


@pytest.mark.parametrize(("status", "kind"), [
    (400, openai.BadRequestError), (401, openai.AuthenticationError), (404, openai.NotFoundError),
    (429, openai.RateLimitError), (500, openai.InternalServerError), (529, openai.InternalServerError),
])  # fmt: skip
async def test_errors_raise_the_sdks_own_exceptions(
    vendor: Vendor, status: int, kind: type[openai.APIStatusError]
) -> None:
    steps: list[Step] = [http_reply(vendor.error, status)]
    async with gateway(vendor, FakeUpstream([steps])) as harness, client_of(harness, max_retries=0) as client:
        with pytest.raises(kind, match="slow down") as caught:
            await client.responses.create(model="up", input="hi", stream=True)
        assert caught.value.status_code == status
        assert caught.value.code in ("y", "rate_limit_exceeded")


async def test_what_cannot_be_asked_is_refused_without_a_dial(vendor: Vendor) -> None:
    upstream = FakeUpstream([])
    async with gateway(vendor, upstream) as harness, client_of(harness) as client:
        refused: list[dict[str, Any]] = [
            {"previous_response_id": "resp_1"},
            {"tools": [{"type": "web_search"}]},
            {"background": True},
        ]
        for members in refused:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model="up", input="hi", **members)
            assert caught.value.code == "unsupported_parameter"
        assert upstream.requests == []


async def test_stream_that_breaks_off_ends_in_an_error_event(vendor: Vendor) -> None:
    for end in (LAST_CHUNK, Close()):
        steps: list[Step] = [STREAM_HEAD, *[chunk(event) for event in vendor.stream[:4]], end]
        async with gateway(vendor, FakeUpstream([steps])) as harness:
            reply = await harness.request("POST", "/v1/responses", body=body_of(stream=True))
            assert reply.status == 200
            *events, last = reply.body.rstrip(b"\n").split(b"\n\n")
            assert last.startswith(b"event: error\n")
            assert b"upstream_mid_stream_failure" in last
            check_events(events_of(b"\n\n".join(events) + b"\n\n"), is_cut=True)
            assert not reply.is_complete


async def test_stream_that_fails_in_the_middle_ends_in_a_failed_response(vendor: Vendor) -> None:
    (error,) = sse({"type": "error", "error": {"type": "overloaded_error", "message": "too much"}})
    async with gateway(vendor, FakeUpstream([stream_reply(*vendor.stream[:4], error)])) as harness:
        reply = await harness.request("POST", "/v1/responses", body=body_of(stream=True))
        last = events_of(reply.body)[-1]
        assert (last["type"], last["response"]["error"]["message"]) == ("response.failed", "too much")


@pytest.mark.parametrize("first", ["error_event", "garbage", "cut", "status"])
async def test_fault_before_the_commit_is_a_case_for_the_next_candidate(vendor: Vendor, first: str) -> None:
    (error,) = sse({"type": "error", "error": {"type": "overloaded_error", "message": "too much"}})
    steps: dict[str, list[Step]] = {
        "error_event": stream_reply(error),
        "garbage": stream_reply(b"data: {\n\n"),
        "cut": [STREAM_HEAD, Close()],
        "status": [http_reply(vendor.error, 503)],
    }
    upstreams = FakeUpstream([steps[first]]), FakeUpstream([stream_reply(*vendor.stream)])
    async with gateway(vendor, *upstreams) as harness:
        reply = await harness.request("POST", "/v1/responses", body=body_of(stream=True, tools=[LOOK]))
        assert said(check_events(events_of(reply.body))) == EXPECTED
        assert reply.header("X-Penstock-Fallback-Count") == "1"


async def test_whole_answer_that_cannot_be_read_is_a_case_for_the_next_candidate(vendor: Vendor) -> None:
    upstreams = FakeUpstream([[http_reply(b'{"odd": 1}')]]), FakeUpstream([[http_reply(vendor.whole)]])
    async with gateway(vendor, *upstreams) as harness:
        reply = await harness.request("POST", "/v1/responses", body=body_of(tools=[LOOK]))
        assert said(reply.json()) == EXPECTED
        assert (reply.header("X-Penstock-Fallback-Count"), reply.header("X-Penstock-Error")) == ("1", None)


async def test_what_codex_sends_is_answered_with_what_codex_needs(vendor: Vendor) -> None:
    """A turn of Codex: developer messages, a freeform tool with a grammar, encrypted reasoning asked for."""
    patch = {"type": "custom", "name": "apply_patch", "description": "Edit files.",
             "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch"}}  # fmt: skip
    body = body_of(
        instructions="You are a coding agent.", stream=True, store=False, tools=[LOOK, patch], tool_choice="auto",
        parallel_tool_calls=False, reasoning={"effort": "low", "summary": "auto"}, prompt_cache_key="session",
        include=["reasoning.encrypted_content"], text={"verbosity": "low"},
        input=[{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<rules/>"}]},
               {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Fix it."}]}],
    )  # fmt: skip

    def answer(request: RecordedRequest) -> Sequence[Step]:
        assert json.loads(request.body)["stream"] is True
        stream = b"".join(vendor.stream).replace(b'"look"', b'"apply_patch"')
        return stream_reply(stream.replace(json.dumps(ARGUMENTS).encode(), json.dumps('{"input":"*** x"}').encode()))

    async with gateway(vendor, FakeUpstream([answer])) as harness:
        headers = ((b"OpenAI-Beta", b"responses=experimental"), (b"Content-Type", b"application/json"))
        reply = await harness.request("POST", "/v1/responses", headers, body)
        kinds = [event["type"] for event in events_of(reply.body)]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert kinds.count("response.output_item.done") == 3
        response = check_events(events_of(reply.body))
        call = response["output"][-1]
        assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "apply_patch", "*** x")
        assert response["output"][0]["encrypted_content"]
        assert reply.header("X-Penstock-Params-Dropped") == "prompt_cache_key, tools[].format, text.verbosity"
