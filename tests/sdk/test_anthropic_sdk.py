"""The official anthropic package through the gateway: what applications do with answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam, ToolResultBlockParam, ToolUseBlockParam

from sdk.gateway_process import RunningGateway

Connect = Callable[..., anthropic.Anthropic]

HELLO: list[MessageParam] = [{"role": "user", "content": "Hi there"}]
ANSWER = 'Hello from mock-claude. You said: "Hi there". The mock provider heard every word.'
BOTH: list[MessageParam] = [{"role": "user", "content": "Please call get_weather and get_time."}]
ARGUMENTS = {"city": "mock", "days": 1}
NAMES = ("get_weather", "get_time")
TOOLS: list[ToolParam] = [
    {
        "name": name,
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    }
    for name in NAMES
]


@pytest.fixture
def connect(gateway: RunningGateway) -> Iterator[Connect]:
    """Give a function that makes clients; answers that do not fit the SDK's types raise."""
    with ExitStack() as stack:

        def make(key: str = "dev", **options: Any) -> anthropic.Anthropic:
            options = {"_strict_response_validation": True, "max_retries": 0, **options}
            options["http_client"] = anthropic.DefaultHttpxClient(verify=False)  # a context for TLS takes long to make
            return stack.enter_context(anthropic.Anthropic(base_url=gateway.url, api_key=gateway.keys[key], **options))

        yield make


def _text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# --- messages -----------------------------------------------------------------------------------------------


def test_message_answers_with_usage(connect: Connect) -> None:
    message = connect().messages.create(model="mock-claude", max_tokens=100, messages=HELLO)
    assert _text_of(message) == ANSWER
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0


def test_message_stream_has_its_events_in_order(connect: Connect) -> None:
    stream = connect().messages.create(model="mock-claude", max_tokens=100, messages=HELLO, stream=True)
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_message_stream_helper_returns_the_final_message(connect: Connect) -> None:
    with connect().messages.stream(model="mock-claude", max_tokens=100, messages=HELLO) as stream:
        assert "".join(stream.text_stream) == ANSWER
        message = stream.get_final_message()
    assert _text_of(message) == ANSWER
    assert message.stop_reason == "end_turn"
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 1


def test_message_cut_by_max_tokens_says_so(connect: Connect) -> None:
    message = connect().messages.create(model="mock-claude", max_tokens=2, messages=HELLO)
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 2


def test_message_uses_tools_and_takes_their_results(connect: Connect) -> None:
    client = connect()
    message = client.messages.create(model="mock-claude", max_tokens=100, messages=BOTH, tools=TOOLS)
    uses = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use"
    assert [(use.name, use.input) for use in uses] == [(name, ARGUMENTS) for name in NAMES]
    said: list[ToolUseBlockParam] = [
        {"type": "tool_use", "id": use.id, "name": use.name, "input": ARGUMENTS} for use in uses
    ]
    results: list[ToolResultBlockParam] = [
        {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"} for use in uses
    ]
    turns: list[MessageParam] = [
        *BOTH,
        {"role": "assistant", "content": said},
        {"role": "user", "content": results},
    ]
    final = client.messages.create(model="mock-claude", max_tokens=100, messages=turns, tools=TOOLS)
    assert "sunny" in _text_of(final)


def test_message_stream_helper_assembles_parallel_tool_uses(connect: Connect) -> None:
    with connect().messages.stream(model="mock-claude", max_tokens=100, messages=BOTH, tools=TOOLS) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    uses = [block for block in message.content if block.type == "tool_use"]
    assert [(use.name, use.input) for use in uses] == [(name, ARGUMENTS) for name in NAMES]
    assert len({use.id for use in uses}) == 2
    assert len(parts) > 2


def test_cache_marks_reach_the_provider_and_its_counts_come_back(connect: Connect) -> None:
    client = connect()

    def ask() -> anthropic.types.Usage:
        return client.messages.create(
            model="mock-claude",
            max_tokens=10,
            system=[{"type": "text", "text": "A long rule. " * 50, "cache_control": {"type": "ephemeral"}}],
            messages=HELLO,
        ).usage

    written, read = ask(), ask()
    assert written.cache_creation_input_tokens
    assert written.cache_read_input_tokens == 0
    assert read.cache_read_input_tokens == written.cache_creation_input_tokens
    assert read.cache_creation_input_tokens == 0


# --- the rest -----------------------------------------------------------------------------------------------


def test_tokens_are_counted_as_a_message_counts_them(connect: Connect) -> None:
    client = connect()
    counted = client.messages.count_tokens(model="mock-claude", messages=HELLO)
    answered = client.messages.create(model="mock-claude", max_tokens=10, messages=HELLO)
    assert counted.input_tokens == answered.usage.input_tokens


def test_models_are_listed_and_described(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    names = [model.id for model in client.models.list()]
    assert {"mock-claude", "mock-gpt"} <= set(names)
    assert client.models.retrieve("mock-claude").type == "model"
    listed = connect("declared", _strict_response_validation=False).models.list().data
    assert [model.id for model in listed] == ["declared-model"]


@pytest.mark.parametrize("scheme", ["api_key", "auth_token", "x-api-key"])
def test_key_is_taken_wherever_clients_put_it(gateway: RunningGateway, scheme: str) -> None:
    options: dict[str, Any] = {scheme: gateway.key}
    if scheme == "x-api-key":
        headers = {"x-api-key": gateway.key, "Authorization": anthropic.omit}
        options = {"api_key": "unused", "default_headers": headers}
    with anthropic.Anthropic(base_url=gateway.url, max_retries=0, **options) as client:
        assert client.messages.count_tokens(model="mock-claude", messages=HELLO).input_tokens


def test_beta_messages_answer(connect: Connect) -> None:
    message = connect().beta.messages.create(
        model="mock-claude",
        max_tokens=100,
        messages=[{"role": "user", "content": "Hi there"}],
        betas=["own-2025-01-01"],
    )
    assert message.stop_reason == "end_turn"


def test_raw_responses_show_the_gateways_headers(connect: Connect) -> None:
    create = connect().messages.with_raw_response.create
    raw = create(model="mock-claude", max_tokens=100, messages=HELLO)
    headers = raw.headers
    assert headers["x-penstock-request-id"].startswith("req_")
    assert headers["x-penstock-provider"] == "mock"
    assert headers["x-penstock-model"] == "mock-claude"
    assert headers["x-penstock-fallback-count"] == "0"
    assert headers["x-penstock-trace-id"] in headers["traceparent"]
    assert "x-penstock-error" not in headers
    assert _text_of(raw.parse()) == ANSWER


def test_streaming_responses_show_the_gateways_headers(connect: Connect) -> None:
    create = connect().messages.with_streaming_response.create
    with create(model="mock-claude", max_tokens=100, messages=HELLO, stream=True) as raw:
        assert raw.headers["x-penstock-request-id"].startswith("req_")
        assert next(raw.iter_lines()) == "event: message_start"


# --- asynchronous -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_client_answers_streams_and_counts(gateway: RunningGateway) -> None:
    async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=gateway.key, max_retries=0) as client:
        message = await client.messages.create(model="mock-claude", max_tokens=100, messages=HELLO)
        assert _text_of(message) == ANSWER
        async with client.messages.stream(model="mock-claude", max_tokens=100, messages=HELLO) as stream:
            assert "".join([text async for text in stream.text_stream]) == ANSWER
        async with client.messages.stream(model="mock-claude", max_tokens=100, messages=BOTH, tools=TOOLS) as tools:
            final = await tools.get_final_message()
        assert [block.name for block in final.content if block.type == "tool_use"] == list(NAMES)
        counted = await client.messages.count_tokens(model="mock-claude", messages=HELLO)
        assert counted.input_tokens == message.usage.input_tokens
        assert "mock-claude" in [model.id async for model in client.models.list()]
