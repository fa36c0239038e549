"""Answers for clients of the Responses API, by any segmentation and order: the grammar of their events holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ReplyTranslation, Translator, UpstreamError
from penstock_plugins.dialects.openai_responses_to_anthropic import OpenAIResponsesToAnthropic
from penstock_plugins.dialects.openai_responses_to_openai_chat import OpenAIResponsesToOpenAIChat
from responses_grammar import accumulated, check_events, check_response, events_of, said

CHAT = OpenAIResponsesToOpenAIChat()
MESSAGES = OpenAIResponsesToAnthropic()
TOOLS = [
    {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False},
    {"type": "custom", "name": "patch", "description": "Edit files."},
]


def reply_of(translator: Translator, *, stream: bool = True, **members: Any) -> ReplyTranslation:
    body = {"model": "m", "input": "hi", "tools": TOOLS, "stream": stream, **members}
    reply = translator.translate(json.dumps(body).encode(), "m").reply
    reply.begin(200, is_event_stream=stream)
    return reply


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    ends = sorted({min(end, len(data)) for end in at} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def through(translator: Translator, data: bytes, at: Sequence[int] = ()) -> bytes:
    reply = reply_of(translator)
    return b"".join([reply.feed(piece) for piece in cut(data, at)]) + reply.finish()


def sse(*payloads: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(payload).encode() for payload in payloads)


# --- what providers may send ------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)
ARGUMENTS = st.sampled_from(['{"a": 1.50}', '{"input": "x\\ny"}', "{}", "", '{"n": 10000000000000000000000}', '{"cut'])
SLICES = st.lists(st.integers(0, 4000), max_size=12)


def chunk_of(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"id": "c", "created": 7, "model": "up", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


@st.composite
def chat_streams(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw chunks in any order, and what they say; the pieces of calls are interleaved."""
    steps: list[tuple[str, Any]] = [("text", text) for text in draw(st.lists(TEXTS, max_size=4))]
    steps += [("thought", text) for text in draw(st.lists(TEXTS, max_size=3))]
    steps = draw(st.permutations(steps))
    calls = draw(st.lists(st.tuples(st.sampled_from(["look", "patch"]), ARGUMENTS), max_size=3))
    pieces = {index: [*cut(text.encode(), draw(st.lists(st.integers(0, 9), max_size=3)))]
              for index, (_, text) in enumerate(calls)}  # fmt: skip
    order = draw(st.permutations([index for index in pieces for _ in range(len(pieces[index]) + 1)]))
    member = draw(st.sampled_from(["reasoning_content", "reasoning"]))
    chunks = [chunk_of({"role": "assistant", "content": ""})]
    chunks += [chunk_of({"content" if kind == "text" else member: text}) for kind, text in steps]
    begun: set[int] = set()
    for index in order:
        if index not in begun:
            begun.add(index)
            function: dict[str, Any] = {"name": calls[index][0], "arguments": ""}
            chunks.append(chunk_of({"tool_calls": [{"index": index, "id": f"id{index}", "function": function}]}))
        else:
            function = {"arguments": pieces[index].pop(0).decode()}
            chunks.append(chunk_of({"tool_calls": [{"index": index, "function": function}]}))
    finish = draw(st.sampled_from(["stop", "tool_calls", "length", "content_filter", "whatever"]))
    chunks.append(chunk_of({}, finish))
    if draw(st.booleans()):
        chunks.append({"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    expected = {
        "text": "".join(text for kind, text in steps if kind == "text"),
        "reasoning": "".join(text for kind, text in steps if kind == "thought"),
        "calls": {f"id{index}": (name, arguments) for index, (name, arguments) in enumerate(calls)},
        "reason": {"length": "max_output_tokens", "content_filter": "content_filter"}.get(finish),
    }
    return chunks, expected


BLOCKS: st.SearchStrategy[tuple[str, list[str]]] = st.one_of(
    st.tuples(st.just("text"), st.lists(TEXTS, max_size=3)),
    st.tuples(st.just("thinking"), st.lists(TEXTS, max_size=3)),
    st.tuples(st.just("redacted_thinking"), st.just([])),
    st.tuples(st.just("server_tool_use"), st.lists(TEXTS, max_size=1)),
    st.tuples(st.sampled_from(["look", "patch"]), ARGUMENTS.map(lambda text: [text[:3], text[3:]])),
)


def block_events(index: int, kind: str, pieces: list[str]) -> list[dict[str, Any]]:
    """Return the events of one block of a message."""
    starts: dict[str, Any] = {
        "text": {"type": "text", "text": ""},
        "thinking": {"type": "thinking", "thinking": "", "signature": ""},
        "redacted_thinking": {"type": "redacted_thinking", "data": "hidden"},
        "server_tool_use": {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
    }
    start = starts.get(kind, {"type": "tool_use", "id": f"id{index}", "name": kind, "input": {}})
    events: list[dict[str, Any]] = [{"type": "content_block_start", "index": index, "content_block": start}]
    of = {"text": "text", "thinking": "thinking"}.get(kind)
    for piece in pieces:
        delta = (
            {"type": "input_json_delta", "partial_json": piece} if of is None else {"type": f"{of}_delta", of: piece}
        )
        events.append({"type": "content_block_delta", "index": index, "delta": delta})
    if kind == "thinking":
        delta = {"type": "signature_delta", "signature": f"sig{index}"}
        events.append({"type": "content_block_delta", "index": index, "delta": delta})
    return [*events, {"type": "content_block_stop", "index": index}]


@st.composite
def message_streams(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Draw the events of a message with pings and events to come in between, and what they say."""
    blocks = draw(st.lists(BLOCKS, max_size=5))
    usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 5, "output_tokens": 1}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": {"model": "up", "usage": usage}}]
    for index, (kind, pieces) in enumerate(blocks):
        events += block_events(index, kind, pieces)
    stop = draw(st.sampled_from(["end_turn", "tool_use", "max_tokens", "refusal", "pause_turn", "to_come"]))
    events.append({"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 9}})
    for _ in range(draw(st.integers(0, 3))):
        noise: dict[str, Any] = draw(
            st.sampled_from([{"type": "ping"}, {"type": "to_come", "index": 0, "delta": {"type": "x"}}])
        )
        events.insert(draw(st.integers(0, len(events))), noise)
    events.append({"type": "message_stop"})
    calls = {f"id{index}": (kind, "".join(pieces)) for index, (kind, pieces) in enumerate(blocks)
             if kind in ("look", "patch")}  # fmt: skip
    expected = {
        "text": "".join("".join(pieces) for kind, pieces in blocks if kind == "text"),
        "reasoning": "".join("".join(pieces) for kind, pieces in blocks if kind == "thinking"),
        "calls": calls,
        "reason": {"max_tokens": "max_output_tokens", "refusal": "content_filter"}.get(stop),
    }
    return events, expected


def assert_says(response: dict[str, Any], expected: dict[str, Any]) -> None:
    found = said(response)
    assert (found["text"], found["reasoning"]) == (expected["text"], expected["reasoning"])
    reason = expected["reason"]
    assert response["incomplete_details"] == (reason and {"reason": reason})
    assert response["status"] == ("completed" if reason is None else "incomplete")
    assert len(found["calls"]) == len(expected["calls"])
    for call_id, name, arguments in found["calls"]:
        sent_name, sent = expected["calls"][call_id]
        assert name == sent_name
        if name == "patch":
            assert arguments == {'{"input": "x\\ny"}': "x\ny", "{}": ""}.get(sent, sent)
        else:
            assert arguments in ({"{}"} if reason is None else {"", "{}"}) if sent == "" else arguments == sent


# --- the grammar ------------------------------------------------------------------------------------------------------


@given(chat_streams(), SLICES)
def test_chat_chunks_become_a_well_formed_stream(drawn: Any, at: list[int]) -> None:
    chunks, expected = drawn
    data = sse(*chunks) + b"data: [DONE]\n\n"
    events = events_of(through(CHAT, data, at))
    response = check_events(events)
    assert_says(response, expected)
    if response["status"] == "completed":
        final: dict[str, Any] = accumulated(events).to_dict()
        assert said(final) == said(response)
        assert [item["id"] for item in final["output"]] == [item["id"] for item in response["output"]]


@given(message_streams(), SLICES)
def test_message_events_become_a_well_formed_stream(drawn: Any, at: list[int]) -> None:
    sent, expected = drawn
    data = b"".join(b"event: %b\n" % event["type"].encode() + sse(event) for event in sent)
    events = events_of(through(MESSAGES, data, at))
    response = check_events(events)
    assert_says(response, expected)
    assert response["usage"]["input_tokens_details"] == {"cached_tokens": 4, "cache_write_tokens": 5}
    assert (response["usage"]["input_tokens"], response["usage"]["output_tokens"]) == (12, 9)


@given(chat_streams(), SLICES, st.integers(0, 10_000))
def test_chat_stream_that_ends_abruptly_is_truncated(drawn: Any, at: list[int], where: int) -> None:
    chunks, _ = drawn
    whole = sse(*chunks[: next(i for i, chunk in enumerate(chunks) if chunk["choices"][0]["finish_reason"])])
    check_cut(CHAT, whole[: where % (len(whole) + 1)], at)


@given(message_streams(), SLICES, st.integers(0, 10_000))
def test_message_stream_that_ends_abruptly_is_truncated(drawn: Any, at: list[int], where: int) -> None:
    whole = sse(*drawn[0][:-1])
    check_cut(MESSAGES, whole[: where % (len(whole) + 1)], at)


def check_cut(translator: Translator, data: bytes, at: list[int]) -> None:
    reply = reply_of(translator)
    written = b"".join([reply.feed(piece) for piece in cut(data, at)])
    with pytest.raises(UpstreamError) as caught:
        reply.finish()
    assert caught.value.fault == "truncated"
    events = events_of(written)
    if events:
        check_events(events, is_cut=True)


@pytest.mark.parametrize("chunks", [[], [chunk_of({"role": "assistant", "content": ""})], [{"type": "to_come"}]])
def test_chat_stream_that_says_nothing_but_done_is_a_fault(chunks: list[Any]) -> None:
    with pytest.raises(UpstreamError):
        through(CHAT, sse(*chunks) + b"data: [DONE]\n\n")


@given(chat_streams(), SLICES)
def test_chat_stream_without_done_is_complete_once_it_has_finished(drawn: Any, at: list[int]) -> None:
    assert_says(check_events(events_of(through(CHAT, sse(*drawn[0]), at))), drawn[1])


@pytest.mark.parametrize(("translator", "stream"), [
    (CHAT, sse(chunk_of({"content": "hi"}), chunk_of({}, "stop"))),
    (MESSAGES, sse({"type": "message_start"}, *block_events(0, "text", ["hi"]), {"type": "message_stop"})),
])  # fmt: skip
def test_stream_that_nobody_asked_for_is_a_stream_all_the_same(translator: Translator, stream: bytes) -> None:
    reply = reply_of(translator, stream=False)
    reply.begin(200, is_event_stream=True)
    assert said(check_events(events_of(reply.feed(stream) + reply.finish())))["text"] == "hi"


# --- errors and faults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("translator", "first", "code"), [
    (CHAT, {"error": {"message": "busy", "type": "rate_limit_error", "code": 429}}, "429"),
    (MESSAGES, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, "overloaded_error"),
])  # fmt: skip
def test_error_before_anything_else_is_an_error_event(translator: Translator, first: Any, code: str) -> None:
    (event,) = events_of(through(translator, sse(first)))
    assert (event["type"], event["message"], event["code"]) == ("error", "busy", code)


@pytest.mark.parametrize(("translator", "start", "error", "code"), [
    (CHAT, chunk_of({"content": "Hel"}), {"error": {"message": "no", "code": "server_error"}}, "server_error"),
    (CHAT, chunk_of({"content": "Hel"}), {"error": {"message": "no", "type": "rate_limit_error"}},
     "rate_limit_exceeded"),
    (MESSAGES, {"type": "message_start", "message": {"model": "up"}},
     {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, "server_error"),
    (MESSAGES, {"type": "message_start", "message": {"model": "up"}},
     {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"}},
     "context_length_exceeded"),
])  # fmt: skip
def test_error_after_the_beginning_is_a_failed_response(
    translator: Translator, start: Any, error: Any, code: str
) -> None:
    events = events_of(through(translator, sse(start, error, start)))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == code
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("translator", [CHAT, MESSAGES])
@pytest.mark.parametrize("payload", [b"data: {\n\n", b"data: []\n\n", b'data: {"choices": 3, "message": 3}\n\n'])
def test_stream_that_is_no_json_is_a_protocol_fault(translator: Translator, payload: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        reply_of(translator).feed(payload)
    assert caught.value.fault == "protocol"


@pytest.mark.parametrize("translator", [CHAT, MESSAGES])
@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"content": 3}', b'{"error": {}}'])
def test_whole_answer_that_cannot_be_read_is_a_protocol_fault(translator: Translator, body: bytes) -> None:
    reply = reply_of(translator, stream=False)
    with pytest.raises(UpstreamError) as caught:
        reply.feed(body) + reply.finish()
    assert caught.value.fault == "protocol"


@pytest.mark.parametrize(("translator", "status", "body", "expected"), [
    (CHAT, 404, {"error": {"message": "no m", "type": "invalid_request_error", "code": "model_not_found"}},
     {"message": "no m", "type": "invalid_request_error", "param": None, "code": "model_not_found"}),
    (CHAT, 422, {"object": "error", "message": "bad", "type": "BadRequest"},
     {"message": "bad", "type": "invalid_request_error", "param": None, "code": "BadRequest"}),
    (MESSAGES, 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}},
     {"message": "slow", "type": "rate_limit_exceeded", "param": None, "code": "rate_limit_exceeded"}),
    (MESSAGES, 400, {"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long"}},
     {"message": "prompt is too long", "type": "invalid_request_error", "param": None,
      "code": "context_length_exceeded"}),
])  # fmt: skip
def test_error_body_is_in_the_envelope_of_openai(translator: Translator, status: int, body: Any, expected: Any) -> None:
    reply = reply_of(translator, stream=False)
    reply.begin(status, is_event_stream=False)
    reply.feed(json.dumps(body).encode())
    assert json.loads(reply.finish()) == {"error": expected}


# --- recorded answers -------------------------------------------------------------------------------------------------

_TRANSLATORS: dict[str | None, Translator] = {"openai.chat": CHAT, "anthropic.messages": MESSAGES}


def recorded(folder: Path, kind: str, suffix: str) -> list[tuple[Path, Translator]]:
    """Return recordings with who translates them."""
    found = []
    for meta_file in sorted(folder.glob(f"{kind}/*/*.meta.json")):
        body = meta_file.with_name(meta_file.name.removesuffix(".meta.json") + suffix)
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        dialect = {"chat": "openai.chat", "messages": "anthropic.messages"}.get(body.name.partition("_")[0])
        if dialect in _TRANSLATORS and meta_file.parent.name != "cohere" and body.is_file() and meta["status"] == 200:
            found.append((body, _TRANSLATORS[dialect]))
    return found


def test_recorded_streams_become_well_formed_streams(recordings: Path) -> None:
    counts = {"openai.chat": 0, "anthropic.messages": 0}
    for path, translator in recorded(recordings, "streaming", ".sse"):
        data = path.read_bytes()
        events = events_of(through(translator, data))
        assert events_of(through(translator, data, range(0, len(data), 17)))[-1]["type"] == events[-1]["type"]
        if events[-1]["type"] not in ("response.failed", "error"):
            response = check_events(events)
            assert response["status"] in ("completed", "incomplete")
            counts[translator.target] += 1
    assert counts["openai.chat"] >= 10
    assert counts["anthropic.messages"] >= 10


def test_recorded_answers_become_responses(recordings: Path) -> None:
    counts = {"openai.chat": 0, "anthropic.messages": 0}
    for path, translator in recorded(recordings, "json", ".json"):
        reply = reply_of(translator, stream=False)
        reply.feed(path.read_bytes())
        check_response(json.loads(reply.finish()))
        counts[translator.target] += 1
    assert counts["openai.chat"] >= 10
    assert counts["anthropic.messages"] >= 10
