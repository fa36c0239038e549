"""Requests of Anthropic Messages as chat completions: what becomes of each member."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import completion_create_params
from pydantic import TypeAdapter

from penstock import RequestError, Translated
from penstock_plugins.dialects.anthropic_to_openai_chat import AnthropicToOpenAIChat

PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0xLjQK"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"name": "weather", "description": "Look outside.", "input_schema": SCHEMA}
USER = {"role": "user", "content": "hi"}
_params: TypeAdapter[Any] = TypeAdapter(completion_create_params.CompletionCreateParams)


def translate(body: dict[str, Any] | bytes, model: str | None = "gpt-5-mini") -> Translated:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return AnthropicToOpenAIChat().translate(text, model)


def request(**members: Any) -> dict[str, Any]:
    return {"model": "claude-sonnet-4-5", "max_tokens": 100, "messages": [USER], **members}


def chat(**members: Any) -> dict[str, Any]:
    """Return the chat request, which OpenAI's own types must take."""
    found: dict[str, Any] = json.loads(translate(request(**members)).body)
    checked = _params.validate_python(found)
    for name in ("messages", "tools"):
        assert len(list(checked.get(name, ()))) == len(found.get(name, ()))  # what is iterated over is checked then
    return found


def messages(*turns: dict[str, Any], **members: Any) -> list[Any]:
    found: list[Any] = chat(messages=[*turns, *([] if turns[-1]["role"] == "user" else [USER])], **members)["messages"]
    return found


def refusal(body: dict[str, Any] | bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        translate(body)
    return caught.value


def call(ident: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": ident, "name": "weather", "input": arguments}


def result(ident: str, content: Any = "sunny", **members: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": ident, "content": content, **members}


# --- messages -----------------------------------------------------------------------------------------------------


def test_plain_request_says_the_same() -> None:
    assert chat(system="Be short.") == {
        "model": "gpt-5-mini",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 100,
    }


def test_model_stays_where_none_was_resolved() -> None:
    assert json.loads(translate(request(), None).body)["model"] == "claude-sonnet-4-5"


def test_system_blocks_become_one_message_without_the_accounting_of_claude_code() -> None:
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f;"},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Rules."},
    ]
    translated = translate(request(system=blocks))
    assert json.loads(translated.body)["messages"][0] == {"role": "system", "content": "You are Claude Code.\n\nRules."}
    assert translated.dropped == ("system[].x-anthropic-billing-header", "cache_control")


def test_system_message_between_turns_stays_in_its_place() -> None:
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "yes"},
        {"role": "system", "content": "Now French."},
        USER,
    ]
    assert [message["role"] for message in messages(*turns)] == ["user", "assistant", "system", "user"]


def test_texts_and_images_become_parts_in_order() -> None:
    content = [
        {"type": "text", "text": "one"},
        {"type": "image", "source": PNG},
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        {"type": "text", "text": "two"},
    ]
    assert messages({"role": "user", "content": content})[0]["content"] == [
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}},
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "text", "text": "two"},
    ]


def test_single_text_block_becomes_a_string_spelled_as_it_was() -> None:
    body = rb'{"max_tokens":1,"messages":[{"role":"user","content":[{"type":"text","text":"\u00e9 \/ \ud83d\ude00"}]}]}'
    assert rb'"content":"\u00e9 \/ \ud83d\ude00"' in translate(body).body


def test_documents_become_files_or_text() -> None:
    content = [
        {"type": "document", "source": PDF, "title": "a.pdf", "context": "Read it."},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}, "title": "note"},
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "inner"}]}},
        {
            "type": "search_result",
            "source": "https://a.b",
            "title": "A",
            "content": [{"type": "text", "text": "found"}],
        },
    ]
    assert messages({"role": "user", "content": content})[0]["content"] == [
        {"type": "text", "text": "Document: a.pdf\nContext: Read it."},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0xLjQK"}},
        {"type": "text", "text": "Document: note"},
        {"type": "text", "text": "words"},
        {"type": "text", "text": "inner"},
        {"type": "text", "text": "Search result: A\nSource: https://a.b"},
        {"type": "text", "text": "found"},
    ]


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "source": {"type": "file", "file_id": "f"}},
        {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}},
        {"type": "document", "source": {"type": "file", "file_id": "f"}},
        {"type": "document", "source": {**PDF, "media_type": "application/msword"}},
        {"type": "container_upload", "file_id": "f"},
        {"type": "of_tomorrow"},
    ],
    ids=str,
)
def test_content_that_cannot_be_sent_is_refused(block: dict[str, Any]) -> None:
    error = refusal(request(messages=[{"role": "user", "content": [block]}]))
    assert (error.code, str(error.param).partition("[")[0]) == ("unsupported_parameter", "messages")


def test_calls_and_results_pair_up() -> None:
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Looking."}, call("a", city="Rome"), call("b")]},
        {"role": "user", "content": [result("b"), result("a", [{"type": "text", "text": "rain"}])]},
    ]
    assert messages(*turns, tools=[TOOL])[1:] == [
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": "sunny"},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]


def test_results_stand_directly_behind_the_call_whatever_the_user_says_first() -> None:
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": [call("a"), call("b")]},
        {"role": "user", "content": [{"type": "text", "text": "well"}, result("a")]},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [result("b"), {"type": "text", "text": "so"}]},
    ]
    found = messages(USER, *turns)
    assert [message["role"] for message in found[1:]] == ["assistant", "tool", "tool", "user", "system", "user"]
    assert [message["content"] for message in found[4:]] == ["well", "Be kind.", "so"]


def test_images_of_a_result_follow_in_a_user_message() -> None:
    content = [{"type": "text", "text": "a screen"}, {"type": "image", "source": PNG}]
    turns: list[dict[str, Any]] = [
        {"role": "assistant", "content": [call("a")]},
        {"role": "user", "content": [result("a", content), {"type": "text", "text": "What is on it?"}]},
    ]
    tool, user = messages(USER, *turns)[2:]
    assert tool["content"] == "a screen\n[attached in the next user message: 1]"
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert user["content"][0]["text"] == "Attached to the result of tool call a:"


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (result("a", "no such city", is_error=True), "Error: no such city"),
        (result("a", [], is_error=True), "Error"),
        (result("a", "fine", is_error=False), "fine"),
        ({"type": "tool_result", "tool_use_id": "a"}, ""),
        (result("a", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]), "x\ny"),
        (result("a", [{"type": "tool_reference", "tool_name": "t"}]), "Tool found: t"),
    ],
)
def test_result_becomes_text(block: dict[str, Any], text: str) -> None:
    turns: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": [call("a")]},
        {"role": "user", "content": [block]},
    ]
    assert messages(*turns)[2] == {"role": "tool", "tool_call_id": "a", "content": text}


def test_thinking_of_earlier_turns_is_dropped_and_listed_once() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "x"}
    turn = {"role": "assistant", "content": [thinking, hidden, {"type": "text", "text": "Yes."}, thinking]}
    translated = translate(request(messages=[USER, turn, USER, {"role": "assistant", "content": [thinking]}, USER]))
    found = json.loads(translated.body)["messages"]
    assert [message["content"] for message in found] == ["hi", "Yes.", "hi", "hi"]
    assert translated.dropped == ("messages[].content[].thinking", "messages[].content[].redacted_thinking")


def test_numbers_in_arguments_and_schemas_keep_their_text() -> None:
    body = (
        b'{"max_tokens":1e2,"temperature":0.10,"tools":[{"name":"t","input_schema":{"maximum":1.000000000000000000001}}],'
        b'"messages":[{"role":"user","content":"x"},{"role":"assistant","content":[{"type":"tool_use","id":"a","name":"t",'
        b'"input":{"n": 12345678901234567890.50, "n2": 1E+2}}]},{"role":"user","content":[{"type":"tool_result",'
        b'"tool_use_id":"a","content":"ok"}]}]}'
    )
    sent = translate(body).body
    assert b'"parameters":{"maximum":1.000000000000000000001}' in sent
    assert b'"max_completion_tokens":1e2,"temperature":0.10' in sent
    arguments = json.loads(sent)["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"n": 12345678901234567890.50, "n2": 1E+2}'


def test_prefill_is_refused() -> None:
    error = refusal(request(messages=[USER, {"role": "assistant", "content": "The answer is ("}]))
    assert (error.code, error.param) == ("unsupported_parameter", "messages[1]")


# --- parameters ---------------------------------------------------------------------------------------------------


def test_tools_and_choice() -> None:
    found = chat(
        tools=[{**TOOL, "type": "custom", "strict": True}],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    )
    function = {"name": "weather", "description": "Look outside.", "parameters": SCHEMA, "strict": True}
    assert found["tools"] == [{"type": "function", "function": function}]
    assert found["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert found["parallel_tool_calls"] is False


@pytest.mark.parametrize(("kind", "choice"), [("auto", "auto"), ("any", "required"), ("none", "none")])
def test_tool_choice(kind: str, choice: str) -> None:
    found = chat(tools=[TOOL], tool_choice={"type": kind, "disable_parallel_tool_use": False})
    assert found["tool_choice"] == choice
    assert "parallel_tool_calls" not in found


def test_choice_without_tools_is_left_out() -> None:
    assert {"tools", "tool_choice", "parallel_tool_calls"}.isdisjoint(
        chat(tools=[], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt-4o", "max_completion_tokens"),
        ("o3-mini", "max_completion_tokens"),
        ("openai/gpt-oss-120b", "max_completion_tokens"),
        ("prod-gpt-5", "max_completion_tokens"),
        ("ft:gpt-4o-mini:acme::1", "max_completion_tokens"),
        ("mistral-large-latest", "max_tokens"),
        ("deepseek-chat", "max_tokens"),
        ("llama3.1:8b", "max_tokens"),
        ("qwen/qwq-32b", "max_tokens"),
    ],
)
def test_bound_of_tokens_is_named_as_the_model_takes_it(model: str, name: str) -> None:
    assert json.loads(translate(request(), model).body)[name] == 100


def test_tuning_and_stream() -> None:
    found = chat(temperature=0.2, top_p=0.9, stop_sequences=["a", "b"], stream=True, service_tier="standard_only")
    assert {name: found[name] for name in ("temperature", "top_p", "stop", "service_tier")} == {
        "temperature": 0.2,
        "top_p": 0.9,
        "stop": ["a", "b"],
        "service_tier": "default",
    }
    assert (found["stream"], found["stream_options"]) == (True, {"include_usage": True})
    plain = chat(stream=False, stop_sequences=[], service_tier="auto", speed="standard")
    assert {"stream", "stream_options", "stop", "service_tier"}.isdisjoint(plain)


@pytest.mark.parametrize("user", ["u-1", "user_" + "9" * 60])
def test_user_id_is_sent_as_user_within_its_length(user: str) -> None:
    sent = user if len(user) <= 64 else hashlib.sha256(user.encode()).hexdigest()
    assert chat(metadata={"user_id": user})["user"] == sent


@pytest.mark.parametrize(
    ("members", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 8192}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31999}}, "high"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}, "xhigh"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}}, "max"),
        ({}, None),
    ],
)
def test_thinking_becomes_effort(members: dict[str, Any], effort: str | None) -> None:
    translated = translate(request(**members))
    assert json.loads(translated.body).get("reasoning_effort") == effort
    assert translated.dropped == ()


def test_effort_is_dropped_for_models_that_never_reason() -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    translated = translate(request(thinking=thinking), "gpt-4o")
    assert "reasoning_effort" not in json.loads(translated.body)
    assert translated.dropped == ("thinking",)


@pytest.mark.parametrize("member", ["output_format", "output_config"])
@pytest.mark.parametrize("is_closed", [True, False])
def test_schema_of_the_output(member: str, is_closed: bool) -> None:
    schema = {**SCHEMA, "additionalProperties": False} if is_closed else SCHEMA
    form = {"type": "json_schema", "schema": schema}
    translated = translate(request(**{member: form if member == "output_format" else {"format": form}}))
    assert json.loads(translated.body)["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "response", "schema": schema, "strict": is_closed},
    }
    path = member if member == "output_format" else "output_config.format"
    assert translated.dropped == (() if is_closed else (f"{path}.strict",))


DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "top_k": ({"top_k": 4}, "top_k"),
    "cache_control": ({"cache_control": {"type": "ephemeral"}}, "cache_control"),
    "tool's cache_control": ({"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]}, "cache_control"),
    "tool's examples": ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[].input_examples"),
    "thinking off": ({"thinking": {"type": "disabled"}}, "thinking"),
    "clear thinking": (
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        "context_management",
    ),
    "metadata": ({"metadata": {"user_id": "u", "team": "t"}}, "metadata.team"),
    "speed": ({"speed": "fast"}, "speed"),
    "unknown": ({"of_tomorrow": 1}, "of_tomorrow"),
    "citations": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "document", "source": PDF, "citations": {"enabled": True}}]}
            ]
        },
        "citations",
    ),
    "thinking block": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "", "signature": ""}]},
                USER,
            ]
        },
        "messages[].content[].thinking",
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_has_no_equivalent_is_dropped_and_listed_or_refused(name: str) -> None:
    members, path = DROPPED[name]
    assert translate(request(**members)).dropped == (path,)
    assert translate(request(**members, drop_tuning_params=True)).dropped == (path,)
    error = refusal(request(**members, drop_tuning_params=False))
    assert (error.code, error.param) == ("unsupported_parameter", path)


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"stop_sequences": list("abcde")}, "stop_sequences"),
        ({"mcp_servers": [{"type": "url", "url": "https://a.b", "name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"inference_geo": "us"}, "inference_geo"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, "tools[1]"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "of_tomorrow"}}, "tool_choice"),
        ({"output_config": {"effort": "endless"}}, "output_config.effort"),
        ({"output_format": {"type": "grammar"}}, "output_format"),
    ],
)
def test_what_a_request_depends_on_is_refused(members: dict[str, Any], param: str) -> None:
    error = refusal(request(**members))
    assert (error.status, error.code, error.param) == (400, "unsupported_parameter", param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b'{"messages":NaN}', None),
        (b'{"messages":' + b"[" * 100_000, None),
        (b'{"max_tokens":1}', "messages"),
        (b'{"messages":"hi"}', "messages"),
        (b'{"messages":[1]}', "messages[0]"),
        (b'{"messages":[{"role":1,"content":""}]}', "messages[0].role"),
        (b'{"messages":[{"role":"user"}]}', "messages[0].content"),
        (b'{"messages":[{"role":"user","content":[{"text":"a"}]}]}', "messages[0].content[0].type"),
        (b'{"messages":[{"role":"user","content":[{"type":"text","text":1}]}]}', "messages[0].content[0].text"),
        (b'{"messages":[],"stop_sequences":"a"}', "stop_sequences"),
        (b'{"messages":[],"stream":"yes"}', "stream"),
        (b'{"messages":[],"tools":[{"name":5}]}', "tools[0].name"),
    ],
)
def test_what_cannot_be_read_is_a_bad_request(body: bytes, param: str | None) -> None:
    error = refusal(body)
    assert (error.code, error.param) == ("bad_request", param)


def test_null_is_as_good_as_absent() -> None:
    names = ("system", "top_k", "thinking", "container", "metadata", "output_config", "tools", "tool_choice", "stream")
    translated = translate(request(**dict.fromkeys(names)))
    assert translated.dropped == ()
    assert json.loads(translated.body) == chat()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_MEMBERS = ("system", "messages", "tools", "tool_choice", "thinking", "output_config", "metadata", "context_management")
_INNER = ("type", "role", "content", "text", "input", "source", "name", "input_schema", "edits", "schema", "format")
_NAMES = st.sampled_from([*_MEMBERS, *_INNER])
_SHAPES = st.recursive(
    _JSON | st.sampled_from(["user", "assistant", "text", "tool_use", "tool_result", "image", "document", "base64"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_NAMES, _SHAPES, max_size=5))
def test_any_request_is_translated_or_refused(members: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):
        assert isinstance(json.loads(translate(request(**members)).body)["messages"], list)
