"""The mock provider's parts alone: words, schemas, and the transport without a gateway."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from penstock import ConfigurationError, ProviderBinding, Timeouts, UpstreamError, UpstreamRequest
from penstock.endpoints import GEMINI, Endpoint, find_endpoint
from penstock.framing import ChunkedDecoder
from penstock.providers import Origin
from penstock.sse import EventSplitter, parse_event
from penstock_plugins.providers.mock.behaviour import Behaviour, WordError, read_model
from penstock_plugins.providers.mock.memory import Memory
from penstock_plugins.providers.mock.provider import MockProvider
from penstock_plugins.providers.mock.schemas import value_for
from penstock_plugins.providers.mock.transport import MockResponse, MockTransport

pytestmark = pytest.mark.anyio

HELLO: Any = [{"role": "user", "content": "hello there"}]
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"colour": 1},
        {"delay": "1"},
        {"delay": -1},
        {"fault": "later"},
        {"fault": "fault-200"},
        {"tokens": 1.5},
    ],
)
async def test_settings_the_mock_does_not_know_are_refused(settings: dict[str, Any]) -> None:
    binding = ProviderBinding("gpc_mock", "mock", "mock", "", settings=settings)
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        MockProvider(type="mock").check(binding)


@pytest.mark.parametrize(
    ("model", "name", "behaviour"),
    [
        ("gpt-5", "gpt-5", Behaviour()),
        ("mock/gpt-5;pace=0.5", "gpt-5", Behaviour(pace=0.5)),
        ("slow;delay=2", "slow", Behaviour(delay=2, pace=0.1)),
        ("fault-503", "fault-503", Behaviour(fault="status", status=503)),
        ("org/model:free", "org/model:free", Behaviour()),
        ("", "mock", Behaviour()),
    ],
)
async def test_model_names_carry_words(model: str, name: str, behaviour: Behaviour) -> None:
    assert read_model(model, Behaviour()) == (name, behaviour)


@pytest.mark.parametrize(
    "model", ["fault-200", "fault-50x", "m;", "m;pace", "m;pace=nan", "m;tokens=1e9", "m;delay=-1"]
)
async def test_words_that_mean_nothing_are_errors(model: str) -> None:
    with pytest.raises(WordError):
        read_model(model, Behaviour())


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "STRING", "enum": ["b", "a"]}, "b"),
        ({"type": ["null", "integer"], "minimum": 3}, 3),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "string", "format": "date"}}}, "2025-01-01"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, 1),
        ({"allOf": [{"properties": {"a": {"const": 7}}, "required": ["a"]}]}, {"a": 7}),
        (None, {}),
    ],
)
async def test_values_fit_their_schema(schema: Any, value: Any) -> None:
    assert value_for(schema) == value


async def test_a_schema_that_holds_itself_ends() -> None:
    loop = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
    assert "next" in value_for(loop)


# --- the transport alone ------------------------------------------------------------------------------------


@attrs.define
class Body:
    """Take a body, and pause after a number of reads."""

    response: MockResponse | None = None
    pause_after: int | None = None
    reads: list[bytes] = attrs.Factory(list)
    is_finished: bool = False
    error: Exception | None = None

    def receive(self, data: bytes) -> None:
        self.reads.append(data)
        if len(self.reads) == self.pause_after and self.response is not None:
            self.response.pause()

    def finish(self) -> None:
        self.is_finished = True

    def fail(self, error: Exception) -> None:
        self.error = error

    @property
    def payload(self) -> bytes:
        return ChunkedDecoder(allow_extensions=False).feed(b"".join(self.reads))


async def send(
    path: str,
    body: Any,
    *,
    model: str = "m",
    endpoint: Endpoint | None = None,
    memory: Memory | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008 - it is frozen
) -> MockResponse:
    found = endpoint or find_endpoint(path.encode())
    assert found is not None
    transport = MockTransport(found, model, Behaviour(), memory or Memory())
    origin = Origin("http", "mock.invalid", 80)
    fields = b"content-type: application/json\r\n"
    content = json.dumps(body).encode()
    return await transport.send(UpstreamRequest(origin, b"POST", path.encode(), fields, content, timeouts))


CHAT = {"model": "m", "messages": HELLO, "stream": True}


async def test_nothing_comes_while_paused_or_after_close() -> None:
    response = await send("/v1/chat/completions", CHAT)
    body = Body(response, pause_after=2)
    response.start(body)
    assert len(body.reads) == 2
    response.resume()
    response.close()
    with pytest.raises(TimeoutError):
        await finished(body, seconds=0.05)
    assert len(body.reads) == 2


async def test_a_paced_stream_comes_event_by_event() -> None:
    body = Body()
    (await send("/v1/chat/completions", CHAT, model="m;pace=0.001")).start(body)
    assert len(body.reads) == 1
    await finished(body)
    assert all(read.count(b"data: ") == 1 for read in body.reads[:-1])
    assert body.reads[-1] == b"0\r\n\r\n"


async def test_a_resumed_stream_is_complete() -> None:
    response = await send("/v1/chat/completions", CHAT)
    body = Body(response, pause_after=2)
    response.start(body)
    response.resume()
    await finished(body)
    events = [parse_event(raw).payload for raw in EventSplitter().feed(body.payload)]
    assert events[-1] == b"[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["role"] == "assistant"


async def finished(body: Body, seconds: float = 5.0) -> None:
    with anyio.fail_after(seconds):
        while not body.is_finished and body.error is None:
            await anyio.lowlevel.checkpoint()


async def test_what_takes_longer_than_allowed_is_a_timeout() -> None:
    with pytest.raises(UpstreamError) as caught:
        await send("/v1/chat/completions", CHAT, model="m;delay=9", timeouts=Timeouts(first_byte=0.01))
    assert caught.value.fault == "timeout"
    body = Body()
    (await send("/v1/chat/completions", CHAT, model="m;pace=9", timeouts=Timeouts(idle=0.01))).start(body)
    await finished(body)
    assert isinstance(body.error, UpstreamError)
    assert body.error.fault == "timeout"


@pytest.mark.parametrize("body", [[], {"messages": "hi"}, {"messages": [1]}, {"model": "m"}])
async def test_a_request_without_messages_is_refused(body: Any) -> None:
    response = await send("/v1/chat/completions", body)
    assert response.head.status == 400


async def test_gemini_streams_its_answer_and_counts_it() -> None:
    asked = {"contents": [{"role": "user", "parts": [{"text": "hello there"}]}]}
    path = "/v1beta/models/gemini-x:"
    whole, stream, counted = Body(), Body(), Body()
    (await send(path + "generateContent", asked, endpoint=GEMINI)).start(whole)
    (await send(path + "streamGenerateContent?alt=sse", asked, endpoint=GEMINI)).start(stream)
    (await send(path + "countTokens", asked, endpoint=GEMINI)).start(counted)
    await finished(stream)
    answer = json.loads(whole.reads[0])
    events = [json.loads(parse_event(raw).payload) for raw in EventSplitter().feed(stream.payload)]
    texts = [one["candidates"][0]["content"]["parts"][0]["text"] for one in events]
    assert "".join(texts) == answer["candidates"][0]["content"]["parts"][0]["text"]
    assert events[-1]["usageMetadata"] == answer["usageMetadata"]
    assert json.loads(counted.reads[0]) == {"totalTokens": answer["usageMetadata"]["promptTokenCount"]}


async def test_gemini_calls_functions_and_embeds() -> None:
    asked = {
        "contents": [{"role": "user", "parts": [{"text": "get_weather"}]}],
        "tools": [{"functionDeclarations": [{"name": "get_weather", "parameters": WEATHER}]}],
    }
    called, embedded = Body(), Body()
    (await send("/v1beta/models/g:generateContent", asked, endpoint=GEMINI)).start(called)
    content = {"content": {"parts": [{"text": "hi"}]}, "outputDimensionality": 4}
    (await send("/v1beta/models/g:embedContent", content, endpoint=GEMINI)).start(embedded)
    parts = json.loads(called.reads[0])["candidates"][0]["content"]["parts"]
    assert parts == [{"functionCall": {"name": "get_weather", "args": {"city": "mock"}}}]
    assert len(json.loads(embedded.reads[0])["embedding"]["values"]) == 4
