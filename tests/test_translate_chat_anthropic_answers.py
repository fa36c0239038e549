"""Answers of Anthropic as chat completions: whole bodies, errors, and streams under any segmentation and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from chat_grammar import ChatStream, read_chat_stream
from penstock import ReplyTranslation, UpstreamError
from penstock.testing import segmentations
from penstock_plugins.dialects.openai_chat_to_anthropic import OpenAIChatToAnthropic

CREATED = 1_700_000_000
HI = {"role": "user", "content": "Hi"}
OWN = {"text", "thinking", "redacted_thinking", "tool_use"}


def reply_to(*, include_usage: bool = False) -> ReplyTranslation:
    request = {"messages": [HI], "stream": True, "stream_options": {"include_usage": include_usage}}
    translator = OpenAIChatToAnthropic(clock=lambda: CREATED + 0.5)
    return translator.translate(json.dumps(request).encode(), "claude-haiku-4-5").reply


def whole(body: dict[str, Any] | bytes, status: int = 200) -> Any:
    reply = reply_to()
    reply.begin(status, is_event_stream=False)
    assert reply.feed(body if isinstance(body, bytes) else json.dumps(body).encode()) == b""
    return json.loads(reply.finish())


def streamed(pieces: list[bytes], *, include_usage: bool = False) -> ChatStream:
    reply = reply_to(include_usage=include_usage)
    reply.begin(200, is_event_stream=True)
    return read_chat_stream(b"".join([*map(reply.feed, pieces), reply.finish()]), include_usage=include_usage)


def event(kind: str, **members: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json.dumps({"type": kind, **members}).encode())


def start(**usage: int) -> bytes:
    return event("message_start", message={"id": "msg_1", "model": "claude-x", "content": [], "usage": usage})


def ending(stop_reason: str = "end_turn", **members: Any) -> list[bytes]:
    delta = {"stop_reason": stop_reason, **members}
    return [event("message_delta", delta=delta, usage={"output_tokens": 7}), event("message_stop")]


def block(index: int, opening: dict[str, Any], *deltas: dict[str, Any]) -> list[bytes]:
    return [
        event("content_block_start", index=index, content_block=opening),
        *[event("content_block_delta", index=index, delta=delta) for delta in deltas],
        event("content_block_stop", index=index),
    ]


MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "model": "claude-x",
    "content": [{"type": "text", "text": "4"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 10, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 5, "output_tokens": 3},
}


# --- whole --------------------------------------------------------------------------------------------------


def test_message_becomes_a_completion() -> None:
    found = whole(MESSAGE)
    ChatCompletion.model_validate(found, strict=True)
    message = {"role": "assistant", "content": "4", "refusal": None}
    assert found == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": CREATED,
        "model": "claude-x",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 35,
            "completion_tokens": 3,
            "total_tokens": 38,
            "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 5},
        },
    }


def test_calls_keep_their_spelling_and_thinking_its_signature() -> None:
    thinking = {"type": "thinking", "thinking": "h\n", "signature": "c2ln"}
    calls = b'{"type":"tool_use","id":"t1","name":"f","input":{"a": 1.50, "b": 1e400}},{"type":"tool_use","id":"t2","name":"g","input":{}}'  # fmt: skip # noqa: E501
    body = b'{"content":[%b,{"type":"hologram"},%b],"stop_reason":"tool_use"}' % (json.dumps(thinking).encode(), calls)
    (choice,) = whole(body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "h\n")
    assert message["thinking_blocks"] == [thinking]
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == ['{"a": 1.50, "b": 1e400}', "{}"]


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("pause_turn", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("refusal", "content_filter"),
        ("tool_use", "tool_calls"),
        ("something_new", "stop"),
        (None, "stop"),
    ],
)
def test_stop_reason_becomes_a_finish_reason(stop_reason: str | None, finish_reason: str) -> None:
    assert whole({**MESSAGE, "stop_reason": stop_reason})["choices"][0]["finish_reason"] == finish_reason
    events = [start(), event("message_delta", delta={"stop_reason": stop_reason}), event("message_stop")]
    assert streamed(events).finish_reason == finish_reason


def test_refusal_says_why() -> None:
    details = {"type": "refusal", "category": None, "explanation": "No."}
    found = whole({**MESSAGE, "content": [], "stop_reason": "refusal", "stop_details": details})
    assert found["choices"][0]["message"] == {"role": "assistant", "content": "", "refusal": "No."}
    assert streamed([start(), *ending("refusal", stop_details=details)]).refusal == "No."


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"{}", b'{"content":5}', b'{"content":[5]}'])
def test_answer_that_cannot_be_read_is_the_providers_fault(body: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        whole(body)
    assert caught.value.fault == "protocol"


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (
            400,
            b'{"type":"error","error":{"type":"invalid_request_error","message":"no"},"request_id":"r"}',
            {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_request_error"},
        ),
        (
            529,
            b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
            {"message": "Overloaded", "type": "server_error", "param": None, "code": "overloaded_error"},
        ),
        (
            429,
            b'{"type":"error","error":{"type":"rate_limit_error","message":"slow"}}',
            {"message": "slow", "type": "rate_limit_exceeded", "param": None, "code": "rate_limit_error"},
        ),
        (
            502,
            b"<html>bad</html>",
            {"message": "<html>bad</html>", "type": "server_error", "param": None, "code": None},
        ),
        (500, b"", {"message": "The provider gave no reason.", "type": "server_error", "param": None, "code": None}),
    ],
)
def test_error_keeps_its_message_in_the_clients_envelope(status: int, body: bytes, error: dict[str, Any]) -> None:
    assert whole(body, status) == {"error": error}


# --- streams ------------------------------------------------------------------------------------------------


def test_stream_becomes_chunks_with_usage_where_it_is_asked_for() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    events = [
        start(input_tokens=10, cache_read_input_tokens=20, output_tokens=1),
        event("ping"),
        *block(0, {"type": "thinking", "thinking": "", "signature": ""}, {"type": "thinking_delta", "thinking": "hm"},
               {"type": "thinking_delta", "thinking": "!"}, {"type": "signature_delta", "signature": "c2ln"}),
        *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Let "},
               {"type": "text_delta", "text": "me \u00e9"}, {"type": "citations_delta", "citation": {}}),
        *block(2, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
               {"type": "input_json_delta", "partial_json": '{"query":'}),
        *block(3, {"type": "hologram", "text": "?"}, {"type": "text_delta", "text": "?"}),
        event("dawn_of_events", index=4),
        *block(4, call, {"type": "input_json_delta", "partial_json": ""},
               {"type": "input_json_delta", "partial_json": '{"a": 1.'},
               {"type": "input_json_delta", "partial_json": "50}"}),
        *block(5, {**call, "id": "t2"}),
        *block(6, {**call, "id": "t3", "input": {"at": "once"}}),
        *ending("tool_use"),
    ]  # fmt: skip
    found = streamed(events, include_usage=True)
    assert (found.content, found.reasoning, found.finish_reason) == ("Let me \u00e9", "hm!", "tool_calls")
    assert found.thinking_blocks == [{"type": "thinking", "thinking": "hm!", "signature": "c2ln"}]
    assert found.calls == [
        {"id": "t1", "name": "f", "arguments": '{"a": 1.50}'},
        {"id": "t2", "name": "f", "arguments": "{}"},
        {"id": "t3", "name": "f", "arguments": '{"at": "once"}'},
    ]
    assert found.usage == {
        "prompt_tokens": 30,
        "completion_tokens": 7,
        "total_tokens": 37,
        "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
    }
    assert streamed(events).usage is None


def test_error_in_the_stream_ends_it() -> None:
    error = event("error", error={"type": "overloaded_error", "message": "Overloaded"})
    events = [start(), *block(0, {"type": "text", "text": "Hel"}), error, *ending()]
    found = streamed(events)
    assert (found.content, found.finish_reason, found.is_done) == ("Hel", None, False)
    assert found.error == {"message": "Overloaded", "type": "server_error", "param": None, "code": "overloaded_error"}


def test_event_that_cannot_be_read_fails_behind_what_came_before_it() -> None:
    reply = reply_to()
    reply.begin(200, is_event_stream=True)
    good = start() + b"".join(block(0, {"type": "text", "text": "Hel"}))
    found = read_chat_stream(reply.feed(good + b"data: {oops\n\n"), is_whole=False)
    assert found.content == "Hel"
    with pytest.raises(UpstreamError, match="cannot be read"):
        reply.feed(event("ping"))


@pytest.mark.parametrize("payload", [b"{oops", b'{"type":"content_block_delta","delta":5}', b'{"type":5}'])
def test_first_event_that_cannot_be_read_fails_at_once(payload: bytes) -> None:
    reply = reply_to()
    reply.begin(200, is_event_stream=True)
    with pytest.raises(UpstreamError) as caught:
        reply.feed(b"data: %b\n\n" % payload)
    assert caught.value.fault == "protocol"


_TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
    "server_tool_use": ("input_json_delta", "partial_json"),
    "hologram": ("light_delta", "text"),
}


@st.composite
def upstream_events(draw: st.DrawFn) -> tuple[list[bytes], ChatStream]:
    """Draw the events of a message, blocks interleaved, and what the chat stream has to say."""
    expected = ChatStream(is_done=True)
    kinds = draw(st.lists(st.sampled_from(sorted(_DELTAS)), max_size=5))
    queues: list[list[tuple[str, bytes]]] = []
    for index, kind in enumerate(kinds):
        opening = {
            "type": kind,
            "id": f"t{index}",
            "name": "f",
            "text": "",
            "thinking": "",
            "signature": "",
            "input": {},
        }
        name, member = _DELTAS[kind]
        texts = draw(st.lists(_TEXT, max_size=4))
        queue = [(f"{index}", event("content_block_start", index=index, content_block=opening))]
        queue += [
            (text, event("content_block_delta", index=index, delta={"type": name, member: text})) for text in texts
        ]
        queues.append([*queue, ("", event("content_block_stop", index=index))])
    events, calls = [start()], {}
    while any(queues):
        index = draw(st.sampled_from([number for number, queue in enumerate(queues) if queue]))
        text, raw = queues[index].pop(0)
        events.append(raw)
        kind, is_opening = kinds[index], b"content_block_start" in raw
        if kind == "tool_use" and is_opening:
            calls[index] = len(expected.calls)
            expected.calls.append({"id": f"t{index}", "name": "f", "arguments": ""})
        elif kind == "tool_use":
            call = expected.calls[calls[index]]
            call["arguments"] += text if queues[index] else "" if call["arguments"] else "{}"
        elif kind == "text" and not is_opening:
            expected.content += text
        elif kind == "thinking" and not is_opening:
            expected.reasoning += text
        if draw(st.integers(0, 7)) == 0:
            events.append(draw(st.sampled_from([event("ping"), event("news", index=index), b": hello\n\n"])))
    reason = draw(st.sampled_from(["end_turn", "tool_use", "max_tokens"]))
    expected.finish_reason = {"end_turn": "stop", "tool_use": "tool_calls", "max_tokens": "length"}[reason]
    return [*events, *ending(reason)], expected


@given(st.data(), upstream_events(), st.booleans())
def test_any_stream_in_any_pieces_becomes_a_well_formed_one(
    data: st.DataObject, drawn: tuple[list[bytes], ChatStream], include_usage: bool
) -> None:
    events, expected = drawn
    pieces = data.draw(segmentations(b"".join(events)))
    found = streamed(pieces, include_usage=include_usage)
    found.thinking_blocks, found.usage = [], None
    assert found == expected


@given(st.data(), upstream_events())
def test_stream_that_ends_too_early_is_well_formed_and_fails(
    data: st.DataObject, drawn: tuple[list[bytes], ChatStream]
) -> None:
    events, expected = drawn
    body = b"".join(events)
    cut = body[: data.draw(st.integers(0, len(body) - 1))]
    reply = reply_to()
    reply.begin(200, is_event_stream=True)
    passed = b"".join(map(reply.feed, data.draw(segmentations(cut))))
    with pytest.raises(UpstreamError) as caught:
        reply.finish()
    assert caught.value.fault == "truncated"
    found = read_chat_stream(passed, is_whole=False)
    assert (found.finish_reason, found.is_done) == (None, False)
    assert expected.content.startswith(found.content)
    assert expected.reasoning.startswith(found.reasoning)


@given(st.binary(max_size=300), st.booleans(), st.sampled_from([200, 400, 500]))
def test_any_bytes_are_translated_or_the_providers_fault(body: bytes, is_event_stream: bool, status: int) -> None:
    reply = reply_to()
    reply.begin(status, is_event_stream=is_event_stream)
    fault = None
    try:
        out = reply.feed(body) + reply.finish()
    except UpstreamError as error:
        fault = error.fault
    assert fault in ("protocol", "truncated") if fault else out


# --- recordings ---------------------------------------------------------------------------------------------


def test_recorded_answers_survive_the_way_there_and_back(recordings: Path) -> None:
    """Send each answer back as the assistant's turn: the provider gets the blocks it made."""
    seen = 0
    for path in sorted(recordings.glob("json/anthropic/messages_*.json")):
        message = json.loads(path.read_bytes())
        if path.name.endswith(".meta.json") or not {each["type"] for each in message["content"]} <= OWN:
            continue
        found = whole(message)
        ChatCompletion.model_validate(found, strict=True)
        assert_comes_back(found["choices"][0]["message"], message["content"])
        seen += 1
    assert seen >= 9


def test_recorded_streams_survive_the_way_there_and_back(recordings: Path) -> None:
    paths = sorted(recordings.glob("streaming/anthropic/*.sse"))
    assert len(paths) >= 30
    for path in paths:
        raw = path.read_bytes()
        found = streamed([raw[at : at + 1000] for at in range(0, len(raw), 1000)], include_usage=True)
        state = ChatCompletionStreamState()
        reply = reply_to(include_usage=True)
        reply.begin(200, is_event_stream=True)
        for line in (reply.feed(raw) + reply.finish()).splitlines():
            if line.startswith(b"data: {"):
                state.handle_chunk(ChatCompletionChunk.model_validate_json(line[6:]))
        message = state.get_final_completion().choices[0].message
        assert message.content == found.content
        assert [call.function.arguments for call in message.tool_calls or ()] == [
            call["arguments"] for call in found.calls
        ]
        blocks = blocks_of(raw)
        assert found.content == "".join(each["text"] for each in blocks if each["type"] == "text")
        if {each["type"] for each in blocks} <= OWN:
            assert_comes_back(message.model_dump(), blocks)


def blocks_of(raw: bytes) -> list[dict[str, Any]]:
    """Return the blocks of a recorded stream, read another way."""
    blocks: dict[int, dict[str, Any]] = {}
    arguments: dict[int, str] = {}
    for line in raw.splitlines():
        said = json.loads(line[5:]) if line.startswith(b"data:") else {}
        if said.get("type") == "content_block_start":
            blocks[said["index"]] = said["content_block"]
        elif said.get("type") == "content_block_delta":
            one, delta = blocks[said["index"]], said["delta"]
            for member in ("text", "thinking", "signature"):
                if member in delta:
                    one[member] += delta[member]
            arguments[said["index"]] = arguments.get(said["index"], "") + delta.get("partial_json", "")
    for index, one in blocks.items():
        if one["type"] == "tool_use" and arguments.get(index):
            one["input"] = json.loads(arguments[index])
    return list(blocks.values())


def assert_comes_back(message: dict[str, Any], blocks: list[dict[str, Any]]) -> None:
    sent = json.loads(OpenAIChatToAnthropic().translate(
        json.dumps({"messages": [HI, {**message, "parsed": None}]}).encode(), "claude-haiku-4-5").body)  # fmt: skip
    found = sent["messages"][1]["content"]
    thinking = [each for each in blocks if each["type"] in ("thinking", "redacted_thinking")]
    assert found[: len(thinking)] == thinking
    texts = [each["text"] for each in blocks if each["type"] == "text"]
    assert [each["text"] for each in found if each["type"] == "text"] == (["".join(texts)] if texts else [])
    calls = [{name: each[name] for name in ("type", "id", "name", "input")}
             for each in blocks if each["type"] == "tool_use"]  # fmt: skip
    assert [each for each in found if each["type"] == "tool_use"] == calls
