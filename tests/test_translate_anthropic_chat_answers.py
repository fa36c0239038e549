"""Answers of chat completions as Anthropic's: whole, streamed in any order and cut anywhere, recorded, and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import ErrorResponse, Message
from hypothesis import given
from hypothesis import strategies as st

from message_events import check_grammar, final_message, read_events
from penstock import ReplyTranslation, UpstreamError
from penstock_plugins.dialects.anthropic_to_openai_chat import AnthropicToOpenAIChat

RECORDINGS = Path(__file__).parents[2] / "shared" / "recordings"
_VENDORS = ("openai", "azure-openai", "openrouter", "groq", "deepseek", "mistral", "huggingface", "cerebras", "ollama",
            "gemini", "together", "bedrock")  # fmt: skip


def recorded(kind: str) -> list[Path]:
    found = [path for vendor in _VENDORS for path in sorted((RECORDINGS / kind / vendor).glob("chat_*"))]
    return [path for path in found if ".meta" not in path.name]


STREAMS, WHOLES, ERRORS = recorded("streaming"), recorded("json"), recorded("errors")
needs_recordings = pytest.mark.skipif(not RECORDINGS.is_dir(), reason=f"there are no recordings in {RECORDINGS}")


def reply(**members: Any) -> ReplyTranslation:
    request = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    request |= {"thinking": {"type": "adaptive"}, **members}
    return AnthropicToOpenAIChat().translate(json.dumps(request).encode(), "m").reply


def whole(body: bytes | dict[str, Any], status: int = 200, **members: Any) -> dict[str, Any]:
    translation = reply(**members)
    translation.begin(status, is_event_stream=False)
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert translation.feed(text[:7]) + translation.feed(text[7:]) == b""
    found: dict[str, Any] = json.loads(translation.finish())
    return found


def completion(message: dict[str, Any], finish_reason: str | None = "stop", **members: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 30, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 20}}
    return {"id": "chatcmpl-1", "model": "gpt-5-mini-2025", "choices": [choice], "usage": usage, **members}


def tool_call(arguments: Any, ident: str = "call_1", name: str = "weather") -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}


# --- whole --------------------------------------------------------------------------------------------------------


def test_whole_answer_becomes_a_message() -> None:
    found = whole(completion({"content": "Hello.", "reasoning_content": "hm"}))
    Message.model_validate(found)
    assert found == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "gpt-5-mini-2025",
        "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Hello."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 20,
            "output_tokens": 7,
        },
    }


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, {"type": "adaptive", "display": "omitted"}])
def test_thinking_is_kept_from_clients_that_want_none(thinking: dict[str, Any] | None) -> None:
    found = whole(completion({"content": "Hello.", "reasoning": "hm"}), thinking=thinking)
    assert [block["type"] for block in found["content"]] == ["text"]


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({"content": "a"}, "stop", "end_turn"),
        ({"content": "a"}, "length", "max_tokens"),
        ({"content": ""}, "content_filter", "refusal"),
        ({"content": None, "refusal": "No."}, "stop", "refusal"),
        ({"content": None, "tool_calls": [tool_call("{}")]}, "tool_calls", "tool_use"),
        ({"content": None, "tool_calls": [tool_call("{}")]}, "stop", "tool_use"),
        ({"content": "a"}, "tool_calls", "end_turn"),
        ({"content": "a"}, "of_tomorrow", "end_turn"),
        ({"content": "a"}, None, "end_turn"),
    ],
)
def test_stop_reason(message: dict[str, Any], finish: str | None, reason: str) -> None:
    assert whole(completion(message, finish))["stop_reason"] == reason


def test_stop_sequence_is_named_where_the_provider_names_it() -> None:
    body = completion({"content": "a"})
    body["choices"][0]["stop_reason"] = "END"
    found = whole(body, stop_sequences=["END"])
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "END")
    assert whole(body)["stop_reason"] == "end_turn"


def test_arguments_become_input_with_their_numbers_as_written() -> None:
    translation = reply()
    translation.begin(200, is_event_stream=False)
    calls = [tool_call('{"n": 1.50, "m": 1e400}'), tool_call("", ident="", name="now"), tool_call({"a": 1})]
    translation.feed(json.dumps(completion({"content": None, "tool_calls": calls}, "tool_calls")).encode())
    found = translation.finish()
    assert b'"input":{"n": 1.50, "m": 1e400}' in found
    inputs = [block["input"] for block in json.loads(found)["content"]]
    assert inputs[1:] == [{}, {"a": 1}]
    assert json.loads(found)["content"][1]["id"].startswith("toolu_")


@pytest.mark.parametrize("arguments", ['{"a":', "[1]", "no", '"{}"', '{"a":1} x'])
def test_arguments_that_are_no_object_are_an_unreadable_answer(arguments: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        whole(completion({"content": None, "tool_calls": [tool_call(arguments)]}, "tool_calls"))
    assert caught.value.fault == "protocol"


def test_call_cut_short_by_the_bound_is_left_out() -> None:
    found = whole(completion({"content": "Well.", "tool_calls": [tool_call('{"a":')]}, "length"))
    assert [block["type"] for block in found["content"]] == ["text"]
    assert found["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{}]}', b'{"error":{"message":"no"}}']
)
def test_unreadable_answer_is_the_provider_s_fault(body: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        whole(body)
    assert caught.value.fault == "protocol"


@pytest.mark.parametrize("is_asked", [True, False])
def test_stream_instead_of_a_body_or_the_other_way_is_the_providers_fault(is_asked: bool) -> None:
    translation = reply(stream=is_asked)
    translation.begin(200, is_event_stream=not is_asked)
    body = json.dumps(completion({"content": "a"})).encode() if is_asked else chunk({"content": "a"})
    with pytest.raises(UpstreamError, match="asked for"):
        assert translation.feed(body) + translation.finish() == b""


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_error_comes_in_anthropics_envelope(status: int, kind: str) -> None:
    found = whole({"error": {"message": "Because.", "type": "x", "code": "y", "param": None}}, status)
    ErrorResponse.model_validate({"request_id": None, **found})
    assert found == {"type": "error", "error": {"type": kind, "message": "Because."}}


@pytest.mark.parametrize("body", [b"", b"<html>Bad Gateway</html>", b'{"detail":"no"}', b'{"error":"no"}', b"\xff\xfe"])
def test_error_of_any_shape_has_a_message(body: bytes) -> None:
    assert whole(body, 502)["error"]["message"]


def test_too_long_a_prompt_is_told_in_the_words_assistants_look_for() -> None:
    error = {"message": "This model's maximum context length is 8192.", "code": "context_length_exceeded"}
    assert whole({"error": error}, 400)["error"]["message"].startswith("prompt is too long: This model")


@needs_recordings
@pytest.mark.parametrize("path", ERRORS, ids=lambda path: path.stem[-40:])
def test_recorded_error_keeps_its_message(path: Path) -> None:
    body = path.read_bytes()
    assert whole(body, 400)["error"]["message"] == json.loads(body)["error"]["message"]


# --- streams ------------------------------------------------------------------------------------------------------


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **members: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice], **members}
    return b"data: %b\n\n" % json.dumps(body).encode()


def call_delta(index: int | None, arguments: str | None = None, **function: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"function": {"arguments": arguments, "name": function.get("name")}}
    found.update({"id": function.get("id")} if "id" in function else {})
    return {"tool_calls": [found if index is None else {"index": index, **found}]}


USAGE_CHUNK = b'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


def streamed(*pieces: bytes, **members: Any) -> list[dict[str, Any]]:
    translation = reply(stream=True, **members)
    translation.begin(200, is_event_stream=True)
    return read_events(b"".join([translation.feed(piece) for piece in pieces]) + translation.finish())


def test_stream_becomes_events() -> None:
    events = streamed(
        b": hello\n\n" + chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "hm"}) + chunk({"content": "Hel"}) + chunk({"content": "lo."}),
        chunk(call_delta(0, "", id="call_1", name="weather")) + chunk(call_delta(0, '{"n": 1')),
        chunk(call_delta(0, ".50}")) + chunk({}, "tool_calls") + USAGE_CHUNK + DONE,
    )
    check_grammar(events)
    message = final_message(events)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    call = message.content[2]
    assert call.type == "tool_use"
    assert (call.id, call.name, call.input) == ("call_1", "weather", {"n": 1.5})
    deltas = [event["delta"]["partial_json"] for event in events if "partial_json" in event.get("delta", {})]
    assert deltas == ['{"n": 1', ".50}"]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 9, 4)
    assert (message.id, message.model) == ("msg_1", "m-1")


def test_deltas_pass_as_they_come() -> None:
    translation = reply(stream=True)
    translation.begin(200, is_event_stream=True)
    for word in ("a", "b"):
        kinds = [event["type"] for event in read_events(translation.feed(chunk({"content": word})))]
        assert kinds[-1] == "content_block_delta"


def test_parallel_calls_sent_in_turn_pass_as_they_come() -> None:
    translation = reply(stream=True)
    translation.begin(200, is_event_stream=True)
    translation.feed(chunk(call_delta(0, '{"a": {"b": 1}}', id="1", name="x")))
    seen = read_events(translation.feed(chunk(call_delta(1, '{"c"', id="2", name="y"))))
    assert [event["type"] for event in seen] == ["content_block_stop", "content_block_start", "content_block_delta"]


def test_interleaved_calls_are_sorted_into_blocks() -> None:
    events = streamed(
        chunk(call_delta(0, '{"a"', id="1", name="x")),
        chunk(call_delta(1, '{"b"', id="2", name="y")),
        chunk({"content": "said between"}),
        chunk(call_delta(0, ": 1}")) + chunk(call_delta(1, ": 2}")) + chunk({}, "tool_calls") + DONE,
    )
    check_grammar(events)
    blocks = [block.to_dict() for block in final_message(events).content]
    assert [block.get("input", block.get("text")) for block in blocks] == [{"a": 1}, {"b": 2}, "said between"]


def test_calls_in_turn_however_long_are_complete_at_the_end() -> None:
    pieces = [call_delta(0, '{"a": "', id="1", name="x"), call_delta(1, "{}", id="2", name="y")]
    pieces += [call_delta(0, "}") for _ in range(200)] + [call_delta(0, '"}')]
    events = streamed(*map(chunk, pieces), chunk({}, "tool_calls"), DONE)
    check_grammar(events)
    assert [block.to_dict()["input"] for block in final_message(events).content] == [{"a": "}" * 200}, {}]


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_all_have_one_number_are_told_apart(index: int | None) -> None:
    events = streamed(
        chunk(call_delta(index, '{"a": 1}', id="1", name="x")),
        chunk(call_delta(index, '{"b": 2}', id="2", name="x")),
        chunk({}, "stop") + DONE,
    )
    check_grammar(events)
    assert [block.to_dict()["input"] for block in final_message(events).content] == [{"a": 1}, {"b": 2}]


def test_refusal_is_text_and_the_reason() -> None:
    message = final_message(streamed(chunk({"refusal": "I "}), chunk({"refusal": "won't."}), chunk({}, "stop"), DONE))
    assert (message.content[0].to_dict()["text"], message.stop_reason) == ("I won't.", "refusal")


def test_stream_without_done_or_usage_ends_well() -> None:
    events = streamed(chunk({"content": "a"}), chunk({}, "stop"))
    check_grammar(events)
    assert events[-2]["usage"]["output_tokens"] == 0


@pytest.mark.parametrize("pieces", [(), (chunk({"content": "a"}),), (b"data: [DONE]\n\n",), (b"data: {",)], ids=len)
def test_stream_without_a_finish_reason_is_truncated(pieces: Sequence[bytes]) -> None:
    with pytest.raises(UpstreamError) as caught:
        streamed(*pieces)
    assert caught.value.fault == "truncated"


def test_broken_arguments_end_the_stream_with_a_fault_behind_what_was_readable() -> None:
    translation = reply(stream=True)
    translation.begin(200, is_event_stream=True)
    seen = translation.feed(chunk(call_delta(0, '{"a"', id="1", name="x")) + chunk({}, "tool_calls") + DONE)
    check_grammar(read_events(seen), is_whole=False)
    with pytest.raises(UpstreamError, match="no JSON object"):
        translation.finish()


def test_call_cut_short_in_a_stream_ends_well() -> None:
    events = streamed(
        chunk(call_delta(0, '{"a"', id="1", name="x")), chunk(call_delta(1, "")), chunk({}, "length"), DONE
    )
    check_grammar(events)
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "m", "type": "server_error"}, "api_error"),
        ({"message": "m", "code": 429}, "rate_limit_error"),
        ({"message": "m", "code": "rate_limit_exceeded"}, "rate_limit_error"),
        ({"message": "m", "type": "overloaded_error"}, "overloaded_error"),
        ("m", "api_error"),
    ],
)
@pytest.mark.parametrize("before", [b"", chunk({"content": "a"})])
def test_error_inside_a_stream_ends_it(error: Any, kind: str, before: bytes) -> None:
    frame = b"data: %b\n\n" % json.dumps({"error": error, "choices": []}).encode()
    events = streamed(before, frame, chunk({"content": "more"}), DONE)
    check_grammar(events, is_whole=False)
    assert events[-1] == {"type": "error", "error": {"type": kind, "message": "m"}}


# --- any order, any cut -------------------------------------------------------------------------------------------

_words = st.text(min_size=1, max_size=6)
_arguments = st.dictionaries(
    st.text(max_size=3), st.integers() | st.text(max_size=4) | st.lists(st.booleans()), max_size=3
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[bytes], list[Any], str]:
    """Draw a stream's chunks with deltas of several calls and of text in any order, and what they say."""
    calls = draw(st.lists(_arguments, max_size=3))
    waiting = []
    for index, arguments in enumerate(calls):
        text = json.dumps(arguments)
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        first = call_delta(index, pieces[0], id=f"call_{index}", name=f"tool_{index}")
        waiting.append([first, *(call_delta(index, piece) for piece in pieces[1:])])
    words = draw(st.lists(st.tuples(st.sampled_from(["content", "reasoning"]), _words), max_size=4))
    waiting.append([{kind: said} for kind, said in words])
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    while any(waiting):
        deltas.append(draw(st.sampled_from([lane for lane in waiting if lane])).pop(0))
    frames = [chunk(delta) for delta in deltas]
    for _ in range(draw(st.integers(0, 2))):
        frames.insert(draw(st.integers(0, len(frames))), b": still there\n\n")
    frames += [
        chunk({}, "tool_calls" if calls else "stop"),
        *draw(st.sampled_from([[], [USAGE_CHUNK], [USAGE_CHUNK, DONE]])),
    ]
    return frames, calls, "".join(said for kind, said in words if kind == "content")


def cut(stream: bytes, at: list[int]) -> list[bytes]:
    ends = sorted(position % (len(stream) + 1) for position in at)
    return [stream[a:b] for a, b in zip([0, *ends], [*ends, len(stream)], strict=True)]


@given(conversations(), st.lists(st.integers(0, 10_000), max_size=8))
def test_any_order_and_any_cut_give_a_well_formed_stream(
    drawn: tuple[list[bytes], list[Any], str], cuts: list[int]
) -> None:
    frames, calls, said = drawn
    events = streamed(*cut(b"".join(frames), cuts))
    check_grammar(events)
    message = final_message(events)
    tools = {block.name: block.input for block in message.content if block.type == "tool_use"}
    assert tools == {f"tool_{index}": arguments for index, arguments in enumerate(calls)}
    assert "".join(block.text for block in message.content if block.type == "text") == said
    assert message.stop_reason == ("tool_use" if calls else "end_turn")


@given(conversations(), st.integers(0, 10_000), st.lists(st.integers(0, 10_000), max_size=8))
def test_abrupt_end_leaves_a_well_formed_beginning(
    drawn: tuple[list[bytes], list[Any], str], end: int, cuts: list[int]
) -> None:
    stream = b"".join(drawn[0])
    stream = stream[: end % len(stream)]
    translation = reply(stream=True)
    translation.begin(200, is_event_stream=True)
    seen = b"".join(translation.feed(piece) for piece in cut(stream, cuts))
    has_finished = b'"finish_reason": "' in stream.rpartition(b"\n\n")[0]
    if has_finished:
        check_grammar(read_events(seen + translation.finish()))
    else:
        check_grammar(read_events(seen), is_whole=False)
        with pytest.raises(UpstreamError, match="finish_reason"):
            translation.finish()


# --- recorded -----------------------------------------------------------------------------------------------------


@needs_recordings
@pytest.mark.parametrize("path", STREAMS, ids=lambda path: f"{path.parent.name}-{path.stem[-30:]}")
def test_recorded_stream_is_well_formed_and_says_the_same(path: Path) -> None:
    body = path.read_bytes()
    events = streamed(*(body[start : start + 1000] for start in range(0, len(body), 1000)))
    check_grammar(events)
    message = final_message(events)
    said, calls = said_in(body)
    assert "".join(block.text for block in message.content if block.type == "text") == said
    assert [block.name for block in message.content if block.type == "tool_use"] == calls


def said_in(body: bytes) -> tuple[str, list[str]]:
    """Return the text and the tools called of a recorded stream's first choice, read in the plainest way."""
    said, calls = "", []
    for line in body.decode().splitlines():
        payload = line.removeprefix("data:").strip()
        if line.startswith("data:") and payload != "[DONE]":
            for choice in json.loads(payload)["choices"]:
                delta = choice["delta"] if choice["index"] == 0 else {}
                said += delta.get("content") or ""
                called = [call.get("function", {}).get("name") for call in delta.get("tool_calls") or []]
                calls += [name for name in called if name]
    return said, calls


@needs_recordings
@pytest.mark.parametrize("path", WHOLES, ids=lambda path: f"{path.parent.name}-{path.stem[-30:]}")
def test_recorded_answer_becomes_a_valid_message(path: Path) -> None:
    body = path.read_bytes()
    message = Message.model_validate(whole(body))
    recorded_message = json.loads(body)["choices"][0]["message"]
    calls = [call["function"] for call in recorded_message.get("tool_calls") or []]
    tools = [block for block in message.content if block.type == "tool_use"]
    called = [(call["name"], json.loads(call.get("arguments") or "{}")) for call in calls]
    assert [(tool.name, tool.input) for tool in tools] == called
    content = recorded_message.get("content")
    if isinstance(content, str) and content:
        assert content in [block.text for block in message.content if block.type == "text"]
