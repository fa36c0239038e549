"""The official openai package through the gateway: what applications do with answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from openai.types.responses import FunctionToolParam

from sdk.gateway_process import RunningGateway

Connect = Callable[..., openai.OpenAI]

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi there"}]
ANSWER = 'Hello from mock-gpt. You said: "Hi there". The mock provider heard every word.'
ASKED = "Please call get_weather and get_time."
BOTH: list[ChatCompletionMessageParam] = [{"role": "user", "content": ASKED}]
_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = {"city": "mock", "days": 1}
NAMES = ("get_weather", "get_time")
TOOLS: list[ChatCompletionToolParam] = [
    {"type": "function", "function": {"name": name, "parameters": _CITY, "strict": True}} for name in NAMES
]
FUNCTIONS: list[FunctionToolParam] = [
    {"type": "function", "name": name, "parameters": _CITY, "strict": True} for name in NAMES
]


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


@pytest.fixture
def connect(gateway: RunningGateway) -> Iterator[Connect]:
    """Give a function that makes clients; answers that do not fit the SDK's types raise."""
    with ExitStack() as stack:

        def make(key: str = "dev", **options: Any) -> openai.OpenAI:
            options = {"_strict_response_validation": True, "max_retries": 0, **options}
            options["http_client"] = openai.DefaultHttpxClient(verify=False)  # a context for TLS takes long to make
            return stack.enter_context(
                openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.keys[key], **options)
            )

        yield make


# --- chat ---------------------------------------------------------------------------------------------------


def test_chat_answers_with_usage(connect: Connect) -> None:
    completion = connect().chat.completions.create(model="mock-gpt", messages=HELLO)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    usage = completion.usage
    assert usage is not None
    assert usage.prompt_tokens > 0
    assert usage.completion_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_stream_without_usage_has_a_choice_in_every_chunk(connect: Connect) -> None:
    with connect().chat.completions.create(model="mock-gpt", messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert not [chunk for chunk in chunks if "usage" in chunk.model_dump(exclude_unset=True)]


def test_chat_stream_with_usage_ends_with_one_usage_chunk(connect: Connect) -> None:
    stream = connect().chat.completions.create(
        model="mock-gpt", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
    assert all("usage" in chunk.model_dump(exclude_unset=True) for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0


def test_chat_stream_that_declines_usage_has_none(connect: Connect) -> None:
    stream = connect().chat.completions.create(
        model="mock-gpt", messages=HELLO, stream=True, stream_options={"include_usage": False}
    )
    chunks = list(stream)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_chat_stream_helper_assembles_the_completion(connect: Connect) -> None:
    with connect().chat.completions.stream(model="mock-gpt", messages=HELLO) as stream:
        kinds = [event.type for event in stream]
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER
    assert completion.usage is None
    assert "content.delta" in kinds
    assert kinds[-1] == "content.done"


def test_chat_calls_tools_and_takes_their_results(connect: Connect) -> None:
    client = connect()
    completion = client.chat.completions.create(model="mock-gpt", messages=BOTH, tools=TOOLS)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    calls = [call for call in message.tool_calls if call.type == "function"]
    assert [call.function.name for call in calls] == list(NAMES)
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS, ARGUMENTS]
    results: list[ChatCompletionMessageParam] = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls
    ]
    said: ChatCompletionMessageParam = {
        "role": "assistant",
        "tool_calls": [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": "{}"}}
            for call in calls
        ],
    }
    final = client.chat.completions.create(model="mock-gpt", messages=[*BOTH, said, *results], tools=TOOLS)
    assert "sunny" in (final.choices[0].message.content or "")


def test_chat_stream_helper_assembles_parallel_tool_calls(connect: Connect) -> None:
    with connect().chat.completions.stream(model="mock-gpt", messages=BOTH, tools=TOOLS) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        completion = stream.get_final_completion()
    assert [event.name for event in done] == list(NAMES)
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS, ARGUMENTS]
    assert len({call.id for call in calls}) == 2


def test_chat_parses_structured_answers(connect: Connect) -> None:
    completion = connect().chat.completions.parse(model="mock-gpt", messages=HELLO, response_format=Weather)
    assert isinstance(completion.choices[0].message.parsed, Weather)


def test_completions_answer_whole_and_as_a_stream(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    whole = client.completions.create(model="mock-gpt", prompt="Hi there")
    parts = list(client.completions.create(model="mock-gpt", prompt="Hi there", stream=True))
    assert whole.choices[0].text == ANSWER
    assert "".join(part.choices[0].text for part in parts) == ANSWER


# --- responses ----------------------------------------------------------------------------------------------


def test_responses_answer_and_are_found_again_by_id(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    response = client.responses.create(model="mock-gpt", input="Hi there")
    assert response.output_text == ANSWER
    assert response.usage is not None
    assert response.usage.total_tokens > 0
    assert client.responses.retrieve(response.id).output_text == ANSWER
    assert len(list(client.responses.input_items.list(response.id))) == 1
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_responses_stream_events_are_numbered_and_complete(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    events = list(client.responses.create(model="mock-gpt", input="Hi there", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == ANSWER
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER


def test_responses_stream_helper_returns_the_final_response(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    with client.responses.stream(model="mock-gpt", input="Hi there") as stream:
        kinds = {event.type for event in stream}
        response = stream.get_final_response()
    assert response.output_text == ANSWER
    assert {"response.output_item.added", "response.output_text.delta", "response.output_item.done"} <= kinds


def test_responses_stream_helper_assembles_parallel_tool_calls(connect: Connect) -> None:
    client = connect(_strict_response_validation=False)
    with client.responses.stream(model="mock-gpt", input=ASKED, tools=FUNCTIONS) as stream:
        response = stream.get_final_response()
    calls = [item for item in response.output if item.type == "function_call"]
    assert [call.name for call in calls] == list(NAMES)
    assert [json.loads(call.arguments) for call in calls] == [ARGUMENTS, ARGUMENTS]


# --- the rest -----------------------------------------------------------------------------------------------


def test_embeddings_arrive_as_numbers_in_either_encoding(connect: Connect) -> None:
    floats = connect().embeddings.create(
        model="mock-embedding", input=["a", "b"], dimensions=8, encoding_format="float"
    )
    packed = connect(_strict_response_validation=False).embeddings.create(
        model="mock-embedding", input=["a", "b"], dimensions=8
    )
    assert [len(row.embedding) for row in floats.data] == [8, 8]
    for row, other in zip(floats.data, packed.data, strict=True):
        assert other.embedding == pytest.approx(row.embedding, abs=1e-6)


def test_models_are_listed_and_described(connect: Connect) -> None:
    client = connect()
    names = [model.id for model in client.models.list()]
    assert {"mock-gpt", "mock-embedding"} <= set(names)
    assert client.models.retrieve("mock-gpt").id == "mock-gpt"
    assert [model.id for model in connect("declared").models.list()] == ["declared-model"]


def test_moderations_images_and_audio_answer(connect: Connect) -> None:
    client = connect()
    assert not client.moderations.create(model="mock-gpt", input="kind words").results[0].flagged
    images = client.images.generate(model="mock-image", prompt="a gate").data
    assert images is not None
    assert images[0].b64_json
    assert client.audio.speech.create(model="mock-voice", voice="alloy", input="Hello").content
    heard = client.audio.transcriptions.create(model="mock-voice", file=("speech.wav", b"RIFF" * 50))
    assert "heard" in heard.text


def test_raw_responses_show_the_gateways_headers(connect: Connect) -> None:
    raw = connect().chat.completions.with_raw_response.create(model="mock-gpt", messages=HELLO)
    headers = raw.headers
    assert headers["x-penstock-request-id"].startswith("req_")
    assert headers["x-penstock-provider"] == "mock"
    assert headers["x-penstock-model"] == "mock-gpt"
    assert headers["x-penstock-fallback-count"] == "0"
    assert headers["x-penstock-cache"] == "miss"
    assert headers["x-penstock-trace-id"] in headers["traceparent"]
    assert "x-penstock-error" not in headers
    assert raw.parse().choices[0].message.content == ANSWER


def test_streaming_responses_show_the_gateways_headers(connect: Connect) -> None:
    create = connect().chat.completions.with_streaming_response.create
    with create(model="mock-gpt", messages=HELLO, stream=True) as raw:
        assert raw.headers["x-penstock-request-id"].startswith("req_")
        assert raw.headers["x-penstock-cache"] == "unknown"
        assert [line for line in raw.iter_lines() if line][-1] == "data: [DONE]"


# --- asynchronous -------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_async_client_chats_streams_and_embeds(gateway: RunningGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=gateway.key, max_retries=0) as client:
        completion = await client.chat.completions.create(model="mock-gpt", messages=HELLO)
        assert completion.choices[0].message.content == ANSWER
        stream = await client.chat.completions.create(model="mock-gpt", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
        async with client.chat.completions.stream(model="mock-gpt", messages=BOTH, tools=TOOLS) as helper:
            calls = (await helper.get_final_completion()).choices[0].message.tool_calls
        assert calls is not None
        assert [call.function.name for call in calls] == list(NAMES)
        async with client.responses.stream(model="mock-gpt", input="Hi there") as responses:
            assert (await responses.get_final_response()).output_text == ANSWER
        embedded = await client.embeddings.create(model="mock-embedding", input="a", dimensions=8)
        assert len(embedded.data[0].embedding) == 8
        assert "mock-gpt" in [model.id async for model in client.models.list()]
