"""The mock provider through a gateway, asked by the official SDKs."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest

from penstock.testing import Harness

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "hello there"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LONG = "water " * 1200


def mocked(settings: Mapping[str, Any] | None = None) -> Harness:
    binding = {"name": "mock", "type": "mock", "settings": dict(settings or {})}
    return Harness(["mock"], {"routing": {"bindings": [binding]}}, socket=True)


@asynccontextmanager
async def openai_sdk(
    settings: Mapping[str, Any] | None = None,
) -> AsyncIterator[tuple[openai.AsyncOpenAI, Harness]]:
    async with (
        mocked(settings) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key=gateway.key, max_retries=0) as client,
    ):
        yield client, gateway


@asynccontextmanager
async def anthropic_sdk() -> AsyncIterator[tuple[anthropic.AsyncAnthropic, Harness]]:
    async with (
        mocked() as gateway,
        anthropic.AsyncAnthropic(base_url=gateway.base_url, api_key=gateway.key, max_retries=0) as client,
    ):
        yield client, gateway


def function(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": WEATHER}}


# --- OpenAI's SDK -------------------------------------------------------------------------------------------


async def test_chat_echoes_and_settles_with_the_usage_it_reports() -> None:
    async with openai_sdk() as (client, gateway):
        answer = await client.chat.completions.create(model="any-name", messages=HELLO)
        again = await client.chat.completions.create(model="any-name", messages=HELLO)
        assert "hello there" in (answer.choices[0].message.content or "")
        assert (answer.model, answer.choices[0].finish_reason) == ("any-name", "stop")
        assert again.model_dump() == answer.model_dump()
        await gateway.wait_settled(2)
        usage = gateway.exchanges[0].usage
        assert usage is not None
        assert answer.usage is not None
        assert (usage.input, usage.output) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)


async def test_chat_stream_has_the_text_of_the_whole_answer() -> None:
    async with openai_sdk() as (client, gateway):
        whole = await client.chat.completions.create(model="m", messages=HELLO)
        chunks = [one async for one in await client.chat.completions.create(model="m", messages=HELLO, stream=True)]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(one.choices[0].delta.content or "" for one in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert all(one.usage is None for one in chunks)
        await gateway.wait_settled(2)
        assert gateway.exchanges[1].usage == gateway.exchanges[0].usage


async def test_chat_stream_reports_usage_when_asked() -> None:
    async with openai_sdk() as (client, _):
        stream = await client.chat.completions.create(
            model="m", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [one async for one in stream]
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert [one.usage for one in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_named_by_the_user_are_called_in_parallel(stream: bool) -> None:
    async with openai_sdk() as (client, _):
        asked: Any = [{"role": "user", "content": "get_weather and get_time please"}]
        tools = [function("get_weather"), function("get_time"), function("other")]
        if stream:
            async with client.chat.completions.stream(model="m", messages=asked, tools=tools) as events:
                choice: Any = (await events.get_final_completion()).choices[0]
        else:
            choice = (await client.chat.completions.create(model="m", messages=asked, tools=tools)).choices[0]
        calls = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        assert [call.function.name for call in calls] == ["get_weather", "get_time"]
        assert [json.loads(call.function.arguments) for call in calls] == [{"city": "mock"}] * 2
        assert len({call.id for call in calls}) == 2


async def test_a_tools_result_is_answered_with_text() -> None:
    async with openai_sdk() as (client, _):
        asked: Any = [{"role": "user", "content": "use the tool"}]
        first = await client.chat.completions.create(model="m", messages=asked, tools=[function("get_weather")])
        call = (first.choices[0].message.tool_calls or [])[0]
        asked += [first.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        second = await client.chat.completions.create(model="m", messages=asked, tools=[function("get_weather")])
        assert '"rain"' in (second.choices[0].message.content or "")


async def test_structured_answers_fit_the_schema() -> None:
    async with openai_sdk() as (client, _):
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": WEATHER}}
        answer = await client.chat.completions.create(model="m", messages=HELLO, response_format=form)
        assert json.loads(answer.choices[0].message.content or "") == {"city": "mock"}


async def test_max_tokens_cuts_the_answer() -> None:
    async with openai_sdk() as (client, _):
        answer = await client.chat.completions.create(model="m", messages=HELLO, max_completion_tokens=2)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2


async def test_a_long_prompt_seen_before_is_cached() -> None:
    async with openai_sdk() as (client, gateway):
        long: Any = [{"role": "system", "content": LONG}, *HELLO]
        cached = []
        for messages in (long, long, [*long, *HELLO], HELLO, HELLO):
            answer = await client.chat.completions.create(model="m", messages=messages)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
        assert cached[0] == cached[3] == cached[4] == 0
        assert cached[1] >= 1024
        assert cached[2] == cached[1]
        await gateway.wait_settled(5)
        assert [0 if one.usage is None else one.usage.cache_read for one in gateway.exchanges] == cached


async def test_responses_stream_ends_with_the_response_given_whole() -> None:
    async with openai_sdk() as (client, _):
        whole = await client.responses.create(model="m", input="hello there")
        assert "hello there" in whole.output_text
        events = [one async for one in await client.responses.create(model="m", input="hello there", stream=True)]
        kinds = [one.type for one in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-1] == "response.completed"
        assert [one.sequence_number for one in events] == list(range(len(events)))
        last: Any = events[-1]
        assert last.response.output_text == whole.output_text
        deltas = [one.delta for one in events if one.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text


async def test_responses_call_functions_and_go_on_from_the_previous_response() -> None:
    async with openai_sdk() as (client, _):
        tools: Any = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}]
        async with client.responses.stream(model="m", input="use the tool", tools=tools) as stream:
            first = await stream.get_final_response()
        call: Any = first.output[0]
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "get_weather",
            {"city": "mock"},
        )
        result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        second = await client.responses.create(model="m", previous_response_id=first.id, input=result, tools=tools)
        assert '"rain"' in second.output_text


async def test_stored_responses_live_until_deleted() -> None:
    async with openai_sdk() as (client, _):
        made = await client.responses.create(model="m", input="hello there", background=True)
        assert made.status == "queued"
        found = await client.responses.retrieve(made.id)
        assert "hello there" in found.output_text
        items = await client.responses.input_items.list(made.id)
        assert [one.type for one in items.data] == ["message"]
        assert (await client.responses.cancel(made.id)).status == "cancelled"
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


async def test_embeddings_have_length_one_in_either_encoding() -> None:
    async with openai_sdk() as (client, _):
        asked = ["one", "two"]
        by_sdk = await client.embeddings.create(model="m", input=asked, dimensions=8)
        floats = await client.embeddings.create(model="m", input=asked, dimensions=8, encoding_format="float")
        vectors = [one.embedding for one in by_sdk.data]
        assert vectors[0] != vectors[1]
        assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1.0, 1.0], abs=1e-5)
        assert vectors[0] == pytest.approx(floats.data[0].embedding, abs=1e-6)


async def test_the_other_openai_endpoints_answer_in_their_shapes() -> None:
    async with openai_sdk() as (client, _):
        listed = [one.id async for one in client.models.list()]
        assert "mock-gpt" in listed
        completion = await client.completions.create(model="m", prompt="hello there")
        assert "hello there" in completion.choices[0].text
        verdicts = await client.moderations.create(model="m", input=["fine", "mock-flag"])
        assert [one.flagged for one in verdicts.results] == [False, True]
        image = ((await client.images.generate(model="m", prompt="a gate")).data or [])[0]
        assert base64.b64decode(image.b64_json or "").startswith(b"\x89PNG")
        speech = await client.audio.speech.create(model="m", voice="alloy", input="hi", response_format="wav")
        sound = speech.content
        assert sound[:4] == b"RIFF"
        assert struct.unpack("<I", sound[4:8])[0] == len(sound) - 8
        heard = await client.audio.transcriptions.create(model="m", file=("a.wav", sound))
        assert "bytes" in heard.text


# --- Anthropic's SDK ----------------------------------------------------------------------------------------


async def test_messages_stream_has_the_text_of_the_whole_answer() -> None:
    async with anthropic_sdk() as (client, gateway):
        whole = await client.messages.create(model="claude-x", max_tokens=100, messages=HELLO)
        async with client.messages.stream(model="claude-x", max_tokens=100, messages=HELLO) as stream:
            kinds = [one.type async for one in stream]
            final = await stream.get_final_message()
        text: Any = whole.content[0]
        streamed: Any = final.content[0]
        assert "hello there" in text.text
        assert streamed.text == text.text
        assert kinds[0] == "message_start"
        assert kinds[-1] == "message_stop"
        assert final.stop_reason == "end_turn"
        await gateway.wait_settled(2)
        assert gateway.exchanges[0].usage == gateway.exchanges[1].usage
        counted = await client.messages.count_tokens(model="claude-x", messages=HELLO)
        assert counted.input_tokens == whole.usage.input_tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_use_the_tool_they_must(stream: bool) -> None:
    async with anthropic_sdk() as (client, _):
        asked: Any = {
            "model": "m",
            "max_tokens": 100,
            "messages": HELLO,
            "tools": [{"name": "get_weather", "input_schema": WEATHER}],
            "tool_choice": {"type": "any"},
        }
        if stream:
            async with client.messages.stream(**asked) as events:
                message: Any = await events.get_final_message()
        else:
            message = await client.messages.create(**asked)
        block = message.content[0]
        assert message.stop_reason == "tool_use"
        assert (block.type, block.name, block.input) == ("tool_use", "get_weather", {"city": "mock"})


async def test_marked_prefixes_are_written_then_read() -> None:
    async with anthropic_sdk() as (client, gateway):
        system: Any = [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
        asked: Any = {"model": "m", "max_tokens": 100, "system": system, "messages": HELLO}
        first = (await client.messages.create(**asked)).usage
        second = (await client.messages.create(**asked)).usage
        assert first.cache_creation_input_tokens == second.cache_read_input_tokens
        assert (first.cache_read_input_tokens, second.cache_creation_input_tokens) == (0, 0)
        assert first.input_tokens == second.input_tokens
        await gateway.wait_settled(2)
        usages = [one.usage for one in gateway.exchanges]
        assert usages[0] is not None
        assert usages[0].cache_write_1h == first.cache_creation_input_tokens
        assert usages[0].cache_write_5m == 0


async def test_overloaded_is_anthropics_own_status() -> None:
    async with anthropic_sdk() as (client, _):
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.create(model="mock/fault-529", max_tokens=10, messages=HELLO)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["error"]["type"]) == (529, "overloaded_error")
        with pytest.raises(anthropic.APIStatusError, match="reports an error first"):
            async with client.messages.stream(model="mock/error-first", max_tokens=10, messages=HELLO) as stream:
                await stream.get_final_message()


# --- faults and pace ----------------------------------------------------------------------------------------


async def test_fault_status_and_retry_after_reach_the_client() -> None:
    async with openai_sdk() as (client, _):
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="mock/fault-429;retry-after=2", messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "2"
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="mock/fault-503", messages=HELLO)
        assert refused.value.status_code == 503


async def test_reset_is_a_connection_that_broke() -> None:
    async with openai_sdk() as (client, gateway):
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="mock/reset", messages=HELLO)
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].attempts[0].reason == "reset"


async def test_cut_ends_the_stream_after_so_many_events() -> None:
    async with openai_sdk() as (client, gateway):
        seen: list[Any] = []
        stream = await client.chat.completions.create(model="mock/cut;after=2", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError):
            await take(stream, seen)
        assert len(seen) == 2
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "upstream_failed"
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="mock/cut;after=0", messages=HELLO, stream=True)


async def take(stream: Any, seen: list[Any]) -> None:
    async for one in stream:
        seen.append(one)  # noqa: PERF401 - what came before an error counts


async def test_error_first_is_not_committed_while_another_binding_answers() -> None:
    faulty = {"name": "bad", "type": "mock", "settings": {"fault": "error-first"}}
    bindings = [faulty, {"name": "good", "type": "mock"}]
    async with Harness(["mock"], {"routing": {"bindings": bindings}}) as gateway:
        body = json.dumps({"model": "m", "messages": HELLO, "stream": True}).encode()
        reply = await gateway.request("POST", "/v1/chat/completions", body=body)
        assert reply.status == 200
        assert b"hello there" not in reply.body
        assert reply.body.endswith(b"data: [DONE]\n\n")
        assert [attempt.reason for attempt in gateway.exchanges[0].attempts] == ["error_event", None]


async def test_an_unknown_word_is_refused_with_those_there_are() -> None:
    async with openai_sdk() as (client, _):
        with pytest.raises(openai.BadRequestError, match="error-first") as caught:
            await client.chat.completions.create(model="mock/slow;sideways", messages=HELLO)
        assert caught.value.code == "unknown_mock_word"
        assert caught.value.param == "model"


async def test_tokens_of_the_binding_set_the_length_of_the_answer() -> None:
    async with openai_sdk({"tokens": 50, "pace": 0.001}) as (client, _):
        answer = await client.chat.completions.create(model="m", messages=HELLO)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 50
        longer = await client.chat.completions.create(model="m;tokens=20000", messages=HELLO)
        assert longer.usage is not None
        assert longer.usage.completion_tokens == 20_000
