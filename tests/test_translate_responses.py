"""Requests of the Responses API, as chat completions and as Messages: what maps, what is dropped, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
from anthropic.types import MessageParam, ToolParam
from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam

from penstock import RequestError, Translated, Translator
from penstock_plugins.dialects.openai_responses_to_anthropic import OpenAIResponsesToAnthropic
from penstock_plugins.dialects.openai_responses_to_openai_chat import OpenAIResponsesToOpenAIChat
from responses_grammar import check_response

CHAT = OpenAIResponsesToOpenAIChat()
MESSAGES = OpenAIResponsesToAnthropic()
BOTH = pytest.mark.parametrize("translator", [CHAT, MESSAGES], ids=["chat", "messages"])
MODEL = "claude-sonnet-4-5"
PNG = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0="
LOOK: dict[str, Any] = {"type": "function", "name": "look", "description": "Look.", "strict": True,
                        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}  # fmt: skip
PATCH: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Edit.",
                         "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}}  # fmt: skip
SPACE: dict[str, Any] = {"type": "namespace", "name": "mcp", "description": "Tools.",
                         "tools": [{"type": "function", "name": "read", "parameters": None}]}  # fmt: skip
_TYPES: dict[str, tuple[pydantic.TypeAdapter[Any], pydantic.TypeAdapter[Any]]] = {
    "openai.chat": (
        pydantic.TypeAdapter(ChatCompletionMessageParam), pydantic.TypeAdapter(ChatCompletionFunctionToolParam)
    ),
    "anthropic.messages": (pydantic.TypeAdapter(MessageParam), pydantic.TypeAdapter(ToolParam)),
}  # fmt: skip


def translated(translator: Translator, body: dict[str, Any] | bytes, model: str | None = MODEL) -> Translated:
    """Return a translated request, whose messages and tools are what the provider's SDK says."""
    data = body if isinstance(body, bytes) else json.dumps({"model": "m", "input": "hi", **body}).encode()
    found = translator.translate(data, model)
    request = json.loads(found.body)
    messages, tools = _TYPES[translator.target]
    for message in request["messages"]:
        messages.validate_python(message)
    for tool in request.get("tools", ()):
        tools.validate_python(tool)
    return found


def request_of(translator: Translator, model: str | None = MODEL, **body: Any) -> dict[str, Any]:
    return dict(json.loads(translated(translator, body, model).body))


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str) -> dict[str, Any]:
    return {"type": "input_text", "text": said}


def call(call_id: str = "c1", arguments: str = '{"at": 1.50}', **members: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "look", "arguments": arguments, **members}


def output(call_id: str = "c1", found: Any = "found") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": found}


# --- what becomes of the conversation ---------------------------------------------------------------------------------


def test_plain_input_is_what_the_user_says() -> None:
    assert request_of(CHAT) == {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    block = {"type": "text", "text": "hi"}
    expected = {"model": MODEL, "max_tokens": 8192, "messages": [{"role": "user", "content": [block]}]}
    assert request_of(MESSAGES) == expected


CONVERSATION = [
    {"role": "developer", "content": [text("one"), text("two")]},
    {"type": "message", "role": "user", "content": "hi"},
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
     "content": [{"type": "output_text", "text": "Looking.", "annotations": []}]},
    call("c1"),
    {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** x"},
    output("c1"),
    {"role": "developer", "content": "later"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": [text("done"), text("")]},
    {"role": "user", "content": [text("and?"), {"type": "input_image", "image_url": PNG, "detail": "high"}]},
]  # fmt: skip


def test_conversation_becomes_chat_messages() -> None:
    arguments = [{"name": "look", "arguments": '{"at": 1.50}'}, {"name": "patch", "arguments": '{"input":"*** x"}'}]
    calls = [{"id": f"c{number}", "type": "function", "function": each} for number, each in enumerate(arguments, 1)]
    image = {"type": "image_url", "image_url": {"url": PNG, "detail": "high"}}
    assert request_of(CHAT, instructions="Be brief.", input=CONVERSATION)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Looking.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "tool", "tool_call_id": "c2", "content": "done\n"},
        {"role": "system", "content": "later"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}, image]},
    ]


def test_conversation_becomes_turns_that_alternate() -> None:
    found = translated(MESSAGES, {"instructions": "Be brief.", "input": CONVERSATION})
    request = json.loads(found.body)
    assert request["system"] == [{"type": "text", "text": each} for each in ("Be brief.", "one", "two")]
    assert [turn["role"] for turn in request["messages"]] == ["user", "assistant", "user"]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}
    assert request["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "found"}]},
        {"type": "tool_result", "tool_use_id": "c2", "content": [{"type": "text", "text": "done"}]},
        {"type": "text", "text": "later"},
        {"type": "text", "text": "and?"},
        image,
    ]
    assert b'"input":{"at": 1.50}' in found.body
    assert b'"input":{"input":"*** x"}' in found.body
    assert found.dropped == ("input[].role", "input[].content[].detail")


@BOTH
def test_calls_one_after_the_other_stay_turns_of_their_own(translator: Translator) -> None:
    items = ["hi", call("c1"), output("c1"), call("c2"), output("c2"), call("c1"), output("c1", "again")]
    turns = request_of(translator, input=[{"role": "user", "content": items[0]}, *items[1:]])["messages"]
    roles = [turn["role"] for turn in turns]
    assert roles == ["user", *(["assistant", "tool" if translator is CHAT else "user"] * 3)]


def test_images_in_tool_outputs_reach_either() -> None:
    items = [call(), output("c1", [text("see"), {"type": "input_image", "image_url": "https://x.test/a.png"}])]
    messages = request_of(CHAT, input=items)["messages"]
    assert [message["role"] for message in messages] == ["assistant", "tool", "user"]
    assert messages[2]["content"][1] == {"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}
    blocks = request_of(MESSAGES, input=items)["messages"][1]["content"][0]["content"]
    assert blocks[1] == {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}}


def test_files_reach_either() -> None:
    items = [user({"type": "input_file", "filename": "a.pdf", "file_data": PDF})]
    (part,) = request_of(CHAT, input=items)["messages"][0]["content"]
    assert part == {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}
    (block,) = request_of(MESSAGES, input=items)["messages"][0]["content"]
    source = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    assert block == {"type": "document", "source": source, "title": "a.pdf"}


@BOTH
def test_arguments_that_are_no_object_are_kept_as_text(translator: Translator) -> None:
    body = translated(translator, {"input": [call(arguments='{"cut'), output()]}).body
    assert b"cut" in body


def test_call_ids_are_spelled_as_anthropic_takes_them() -> None:
    turns = request_of(MESSAGES, input=[call("resp_1:call_0"), output("resp_1:call_0")])["messages"]
    assert [turn["content"][0].get("id", turn["content"][0].get("tool_use_id")) for turn in turns] == [
        "resp_1_call_0", "resp_1_call_0",
    ]  # fmt: skip


# --- tools ------------------------------------------------------------------------------------------------------------


def test_tools_keep_the_text_of_their_numbers() -> None:
    schema = b'{"type": "object", "properties": {"n": {"maximum": 1.0e400, "multipleOf": 0.10}}}'
    body = b'{"input":"hi","tools":[{"type":"function","name":"look","parameters":%b}]}' % schema
    assert b'"parameters":' + schema in translated(CHAT, body).body
    assert b'"input_schema":' + schema in translated(MESSAGES, body).body


@BOTH
def test_custom_tools_and_namespaces_become_functions_and_come_back(translator: Translator) -> None:
    found = translated(translator, {"tools": [LOOK, PATCH, SPACE]})
    tools = [tool.get("function", tool) for tool in json.loads(found.body)["tools"]]
    assert [tool["name"] for tool in tools] == ["look", "patch", "mcp__read"]
    schema = tools[1].get("parameters", tools[1].get("input_schema"))
    assert (schema["required"], "start: /x/" in tools[1]["description"]) == (["input"], True)
    assert [tool.get("strict") for tool in tools] == [True, None, None]
    assert found.dropped == ("tools[].format",)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("patch", {"input": "*** x"}),
        ("mcp__read", {"a": 1}),
        ("patch", {"input": ""}),
    ]
    found.reply.begin(200, is_event_stream=False)
    found.reply.feed(answer_with(translator, calls))
    first, second, third = json.loads(found.reply.finish())["output"]
    assert (first["type"], first["name"], first["input"]) == ("custom_tool_call", "patch", "*** x")
    assert (second["type"], second["name"], second["namespace"]) == ("function_call", "read", "mcp")
    assert json.loads(second["arguments"]) == {"a": 1}
    assert third["input"] == ""
    assert len({first["call_id"], second["call_id"], third["call_id"]}) == 3
    again = request_of(translator, input=[first, second, output(first["call_id"]), output(second["call_id"])])
    assert "mcp__read" in json.dumps(again["messages"])


def answer_with(translator: Translator, calls: list[tuple[str, dict[str, Any]]]) -> bytes:
    """Return an answer that calls tools, all by the same id, as some servers do."""
    if translator.target == "openai.chat":
        said = [{"id": "c", "function": {"name": name, "arguments": json.dumps(found)}} for name, found in calls]
        return json.dumps({"choices": [{"message": {"tool_calls": said}, "finish_reason": "tool_calls"}]}).encode()
    blocks = [{"type": "tool_use", "id": "c", "name": name, "input": found} for name, found in calls]
    return json.dumps({"content": blocks, "stop_reason": "tool_use", "usage": {"input_tokens": 1}}).encode()


CHOICES = [
    ("auto", "auto", {"type": "auto"}),
    ("none", "none", {"type": "none"}),
    ("required", "required", {"type": "any"}),
    ({"type": "function", "name": "look"}, {"type": "function", "function": {"name": "look"}},
     {"type": "tool", "name": "look"}),
    ({"type": "custom", "name": "patch"}, {"type": "function", "function": {"name": "patch"}},
     {"type": "tool", "name": "patch"}),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "of_chat", "of_messages"), CHOICES)
def test_tool_choice_is_said_in_the_other_dialect(choice: Any, of_chat: Any, of_messages: Any) -> None:
    body = {"tools": [LOOK, PATCH], "tool_choice": choice}
    assert request_of(CHAT, **body)["tool_choice"] == of_chat
    assert request_of(MESSAGES, **body)["tool_choice"] == of_messages


@BOTH
def test_allowed_tools_narrow_the_tools(translator: Translator) -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}
    request = request_of(translator, tools=[LOOK, PATCH], tool_choice=choice)
    assert len(request["tools"]) == 1
    assert request["tool_choice"] in ("required", {"type": "any"})


def test_parallel_calls_can_be_turned_off() -> None:
    body: dict[str, Any] = {"tools": [LOOK], "parallel_tool_calls": False}
    assert request_of(CHAT, **body)["parallel_tool_calls"] is False
    assert request_of(MESSAGES, **body)["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_become_those_of_chat() -> None:
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True, "description": "d"}
    found = translated(CHAT, {
        "max_output_tokens": 9, "temperature": 1.5, "top_p": 0.5, "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": form, "verbosity": "low"}, "user": "u", "service_tier": "flex", "stream": True,
        "store": False, "truncation": "disabled", "include": ["reasoning.encrypted_content"], "tool_choice": "auto",
        "parallel_tool_calls": True, "background": False, "previous_response_id": None, "metadata": {"a": "b"},
    }, "llama")  # fmt: skip
    request = json.loads(found.body)
    del request["messages"]
    assert request == {
        "model": "llama", "max_tokens": 9, "temperature": 1.5, "top_p": 0.5, "service_tier": "flex",
        "reasoning_effort": "low", "user": "u", "stream": True, "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "n", "schema": schema, "description": "d", "strict": True,
        }},
    }  # fmt: skip
    assert found.dropped == ("metadata", "text.verbosity")


def test_models_of_openai_get_their_own_bound() -> None:
    assert request_of(CHAT, "gpt-5-mini", max_output_tokens=9)["max_completion_tokens"] == 9


def test_parameters_become_those_of_messages() -> None:
    schema = {"type": "object", "properties": {}}
    found = translated(MESSAGES, {
        "max_output_tokens": 9000, "temperature": 0.25, "top_p": 0.5, "safety_identifier": "u", "stream": True,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}, "service_tier": "flex",
        "store": True, "truncation": "auto",
    })  # fmt: skip
    request = json.loads(found.body)
    del request["messages"]
    assert request == {
        "model": MODEL, "max_tokens": 9000, "temperature": 0.25, "metadata": {"user_id": "u"}, "stream": True,
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }  # fmt: skip
    assert found.dropped == ("store", "truncation", "top_p", "service_tier")


@pytest.mark.parametrize(("model", "effort", "bound", "thinking", "config", "dropped"), [
    (MODEL, "low", None, {"type": "enabled", "budget_tokens": 2048}, None, ()),
    (MODEL, "high", 4000, {"type": "enabled", "budget_tokens": 3000}, None, ()),
    (MODEL, "high", 1000, None, None, ("reasoning.effort",)),
    (MODEL, "none", None, {"type": "disabled"}, None, ()),
    ("claude-opus-4-6", "high", None, {"type": "adaptive"}, {"effort": "high"}, ()),
])  # fmt: skip
def test_effort_makes_claude_think(
    model: str, effort: str, bound: int | None, thinking: Any, config: Any, dropped: tuple[str, ...]
) -> None:
    found = translated(MESSAGES, {"reasoning": {"effort": effort}, "max_output_tokens": bound}, model)
    request = json.loads(found.body)
    assert (request.get("thinking"), request.get("output_config"), found.dropped) == (thinking, config, dropped)


@pytest.mark.parametrize("body", [
    {"tools": [LOOK], "tool_choice": "required"},
    {"input": [{"role": "user", "content": "hi"}, call(), output()]},
])  # fmt: skip
def test_effort_is_dropped_where_anthropic_would_refuse_it(body: dict[str, Any]) -> None:
    found = translated(MESSAGES, {**body, "reasoning": {"effort": "high"}})
    assert ("thinking" in json.loads(found.body), found.dropped) == (False, ("reasoning.effort",))


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"background": True}, "background"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"id": "msg_1"}]}, "input[0]"),
    ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "input[0].type"),
    ({"input": [user({"type": "input_image", "file_id": "file_1"})]}, "input[0].content[0].file_id"),
    ({"input": [user({"type": "input_audio", "input_audio": {}})]}, "input[0].content[0].type"),
    ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    *[({"tools": [LOOK, {"type": kind}]}, "tools[1].type") for kind in (
        "web_search", "web_search_preview", "file_search", "code_interpreter", "computer_use_preview", "mcp",
        "image_generation", "local_shell", "shell", "apply_patch", "tool_search",
    )],
]  # fmt: skip


@BOTH
@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_what_the_answer_depends_on_is_refused(translator: Translator, body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        translated(translator, body)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", param)


MALFORMED: list[tuple[Any, str | None]] = [
    (b"[]", None),
    (b'{"input": 3}', "input"),
    (b"{}", "input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
    ({"input": [call()]}, "input[0].call_id"),
    ({"input": [output()]}, "input[0].call_id"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
]


@BOTH
@pytest.mark.parametrize(("body", "param"), MALFORMED)
def test_what_cannot_be_read_is_a_bad_request(translator: Translator, body: Any, param: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        translated(translator, body)
    assert (caught.value.code, caught.value.param) == ("bad_request", param)


@BOTH
def test_nothing_is_dropped_where_the_client_says_so(translator: Translator) -> None:
    body = {"drop_tuning_params": False, "prompt_cache_key": "k", "text": {"verbosity": "low"}}
    with pytest.raises(RequestError) as caught:
        translated(translator, body)
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.meta == {"dropped": ["prompt_cache_key", "text.verbosity"]}
    assert b"drop_tuning" not in translated(translator, {"drop_tuning_params": False}).body


# --- the response repeats the request ---------------------------------------------------------------------------------


@BOTH
def test_response_repeats_the_request_on_one_line(translator: Translator) -> None:
    body = json.dumps({"input": "hi", "instructions": "a\nb", "tools": [LOOK, PATCH], "temperature": 0.5,
                       "metadata": {"k": "v"}, "stream": True, "reasoning": {"effort": "low"}}, indent=2)  # fmt: skip
    reply = translated(translator, body.encode()).reply
    reply.begin(200, is_event_stream=True)
    opening = {"choices": [{"index": 0, "delta": {}}], "type": "message_start", "message": {}}
    created = reply.feed(b"data: %b\n\n" % json.dumps(opening).encode()).split(b"\n\n")[0]
    assert created.count(b"\n") == 1
    response = check_response(json.loads(created.partition(b"data: ")[2])["response"])
    assert (response.instructions, response.metadata, response.temperature) == ("a\nb", {"k": "v"}, 0.5)
    assert [tool.type for tool in response.tools] == ["function", "custom"]
    assert response.status == "in_progress"


# --- conversations that go on -----------------------------------------------------------------------------------------


def refusal_of(translator: Translator, body: dict[str, Any]) -> RequestError | None:
    try:
        translated(translator, body)
    except RequestError as error:
        return error
    return None


def test_recorded_requests_are_translated_or_refused_by_name(recordings: Path) -> None:
    counts: dict[Translator, int] = {CHAT: 0, MESSAGES: 0}
    for meta_file in sorted(recordings.glob("*/*/responses_*.meta.json")):
        body = (json.loads(meta_file.read_text(encoding="utf-8"))["request"] or {}).get("body") or {}
        if "input" not in body:
            continue
        for translator in counts:
            fault = refusal_of(translator, body)
            counts[translator] += fault is None
            assert fault is None or (fault.param and fault.code in ("unsupported_parameter", "bad_request"))
    assert min(counts.values()) >= 20


def test_recorded_messages_come_back_as_they_were(recordings: Path) -> None:
    """What Claude said goes to the client and, sent back with the next turn, to Claude: thinking and signatures too."""
    count = 0
    for path in sorted((recordings / "json" / "anthropic").glob("messages_*.json")):
        if path.name.endswith(".meta.json"):
            continue
        answer = json.loads(path.read_bytes())
        content = answer.get("content", [])
        if not {block["type"] for block in content} <= {"text", "thinking", "redacted_thinking", "tool_use"}:
            continue
        found = translated(MESSAGES, {}).reply
        found.begin(200, is_event_stream=False)
        found.feed(path.read_bytes())
        response = json.loads(found.finish())
        calls = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
        items = [{"role": "user", "content": "hi"}, *response["output"], *[output(each) for each in calls]]
        turn = request_of(MESSAGES, input=items)["messages"][1]
        assert turn == {"role": "assistant", "content": [bare(block) for block in content]}, path.name
        count += 1
    assert count >= 8


def bare(block: dict[str, Any]) -> dict[str, Any]:
    """Return the members of a block that a request has."""
    return {name: value for name, value in block.items() if name not in ("citations", "caller")}


@pytest.mark.parametrize("member", ["reasoning_content", "reasoning"])
def test_reasoning_goes_back_in_the_member_it_came_in(member: str) -> None:
    said = {"role": "assistant", "content": "Hello.", member: "Hm."}
    found = translated(CHAT, {}).reply
    found.begin(200, is_event_stream=False)
    found.feed(json.dumps({"choices": [{"message": said, "finish_reason": "stop"}]}).encode())
    items = json.loads(found.finish())["output"]
    again = translated(CHAT, {"input": [*items, {"role": "user", "content": "and?"}]})
    assert json.loads(again.body)["messages"][0] == said
    assert again.dropped == ()
    assert translated(MESSAGES, {"input": [*items, {"role": "user", "content": "?"}]}).dropped == ("input[].reasoning",)


@BOTH
def test_reasoning_of_others_is_dropped_and_listed(translator: Translator) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    found = translated(translator, {"input": [{"role": "user", "content": "hi"}, reasoning]})
    assert found.dropped == ("input[].reasoning",)
    assert b"gAAAA" not in found.body
