"""Chat completions asked of Anthropic: what requests become, what is dropped, what is refused."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import ConfigurationError, RequestError, Translated
from penstock.testing import json_values
from penstock_plugins.dialects.anthropic_requests import claude_version
from penstock_plugins.dialects.openai_chat_to_anthropic import OpenAIChatToAnthropic
from penstock_plugins.dialects.plugin import Dialects, DialectsConfig

MODEL = "claude-haiku-4-5"
HI = {"role": "user", "content": "Hi"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
PNG = "iVBORw0KGgo="
_types = pydantic.TypeAdapter(anthropic.types.message_create_params.MessageCreateParams)


def translate(body: dict[str, Any] | bytes, model: str = MODEL) -> Translated:
    data = body if isinstance(body, bytes) else json.dumps({"model": "x", **body}).encode()
    return OpenAIChatToAnthropic().translate(data, model)


def asked(body: dict[str, Any], model: str = MODEL) -> Any:
    """Return the translated request, which the Anthropic SDK's types must accept."""
    request = json.loads(translate({"messages": [HI], **body}, model).body)
    assert_typed(request)
    return request


def assert_typed(request: dict[str, Any]) -> None:
    checked = _types.validate_python(request)
    for message in checked["messages"]:
        content: Any = message["content"]
        assert list(content)  # pydantic checks what is in an Iterable when it is iterated over


def dropped(body: dict[str, Any], model: str = MODEL) -> tuple[str, ...]:
    return translate({"messages": [HI], **body}, model).dropped


def refusal(body: dict[str, Any], model: str = MODEL) -> RequestError:
    with pytest.raises(RequestError) as caught:
        translate({"messages": [HI], **body}, model)
    assert caught.value.status == 400
    return caught.value


def text(said: str, **members: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **members}


# --- messages -----------------------------------------------------------------------------------------------


def test_system_and_developer_messages_become_the_system_prompt_in_order() -> None:
    first = [{"role": "system", "content": "A"}, {"role": "developer", "content": [text("B"), text("C")]}]
    request = asked({"messages": [*first, HI]})
    assert request["system"] == [text("A"), text("B"), text("C")]
    assert request["messages"] == [{"role": "user", "content": [text("Hi")]}]


def test_later_system_message_is_text_at_its_place_and_listed() -> None:
    messages = [HI, {"role": "assistant", "content": "Yes?"}, {"role": "system", "content": "In French."}, HI]
    found = translate({"messages": messages})
    assert json.loads(found.body)["messages"][2] == {"role": "user", "content": [text("In French."), text("Hi")]}
    assert found.dropped == ("messages[].role",)


def test_turns_alternate_and_results_come_first() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "weather", "arguments": ""}} for name in "abc"]
    messages = [
        HI,
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
        {"role": "system", "content": "hurry"},
        {"role": "tool", "tool_call_id": "b", "content": [text("rain")]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": "So?"},
    ]
    request = asked({"messages": messages, "tools": [WEATHER]})
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]
    assert request["messages"][0]["content"] == [text("Hi"), text("again")]
    assert request["messages"][1]["content"] == [
        text("Let me see."),
        *({"type": "tool_use", "id": name, "name": "weather", "input": {}} for name in "abc"),
    ]
    assert request["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "a", "content": "sunny"},
        {"type": "tool_result", "tool_use_id": "b", "content": [text("rain")]},
        {"type": "tool_result", "tool_use_id": "c"},
        text("hurry"),
        text("So?"),
    ]


def test_arguments_schemas_and_texts_keep_their_spelling() -> None:
    arguments = rb"{\"a\": 1.50, \"b\": 12345678901234567890123, \"c\": 1e400}"
    body = (
        rb'{"messages": [{"role": "user", "content": "caf\u00e9 \/"}, {"role": "assistant", "tool_calls": '
        rb'[{"id": "x", "function": {"name": "f", "arguments": "' + arguments + rb'"}}]}], "tools": [{"type": '
        rb'"function", "function": {"name": "f", "parameters": {"type": "object", "maximum": 1.0E+3}}}], "top_p": 0.90}'
    )
    sent = translate(body).body
    assert rb'"caf\u00e9 \/"' in sent
    assert arguments.replace(b"\\", b"") in sent
    assert b'{"type": "object", "maximum": 1.0E+3}' in sent
    assert b'"top_p":0.90' in sent


def test_ids_of_calls_are_made_to_fit_alike_on_both_sides() -> None:
    call = {"id": "functions.weather:0", "function": {"name": "weather", "arguments": "{}"}}
    messages = [HI, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "functions.weather:0", "content": "ok"}]  # fmt: skip
    sent = asked({"messages": messages})["messages"]
    assert sent[1]["content"][0]["id"] == sent[2]["content"][0]["tool_use_id"] == "functions_weather_0"


@pytest.mark.parametrize(
    ("part", "block"),
    [
        (
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
        ),
        (
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "auto"}},
            {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        ),
        (
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERg==", "filename": "a.pdf"}},
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="},
                "title": "a.pdf",
            },
        ),
        (
            {"type": "file", "file": {"file_data": "data:text/plain,hello%20there"}},
            {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hello there"}},
        ),
    ],
)
def test_images_and_files_become_blocks(part: dict[str, Any], block: dict[str, Any]) -> None:
    found = translate({"messages": [{"role": "user", "content": [part]}]})
    assert_typed(json.loads(found.body))
    assert json.loads(found.body)["messages"][0]["content"] == [block]
    assert found.dropped == ()


def test_cache_control_goes_onto_the_block() -> None:
    marker = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    call = {"id": "a", "function": {"name": "weather", "arguments": "{}"}}
    request = asked({
        "messages": [
            {"role": "system", "content": "S", **marker},
            {"role": "user", "content": [text("a", **marker), text("b")]},
            {"role": "assistant", "content": "c", "tool_calls": [call], **marker},
            {"role": "tool", "tool_call_id": "a", "content": "d", **marker},
        ],
        "tools": [{**WEATHER, **marker}],
    })  # fmt: skip
    user, assistant, tool = (message["content"] for message in request["messages"])
    assert request["system"] == [text("S", **marker)]
    assert user == [text("a", **marker), text("b")]
    assert ["cache_control" in block for block in assistant] == [True, True]
    assert tool[0]["cache_control"] == request["tools"][0]["cache_control"] == marker["cache_control"]


def test_thinking_blocks_go_back_in_front_of_their_turn_as_they_are() -> None:
    thinking = [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}, {"type": "redacted_thinking", "data": "x"}]
    message = {"role": "assistant", "content": "4", "reasoning_content": "hm", "thinking_blocks": thinking}
    found = translate({"messages": [HI, message]})
    assert json.loads(found.body)["messages"][1]["content"] == [*thinking, text("4")]
    assert found.dropped == ()
    assert dropped({"messages": [HI, {"role": "assistant", "content": "4", "reasoning_content": "hm"}]}) == (
        "messages[].reasoning_content",
    )
    assert refusal({"messages": [HI, {**message, "thinking_blocks": [text("no")]}]}).code == "bad_request"


def test_texts_of_white_space_are_left_out() -> None:
    messages = [HI, {"role": "assistant", "content": " \n\t"}, {"role": "user", "content": [text(""), text("x")]}]
    assert asked({"messages": messages})["messages"] == [{"role": "user", "content": [text("Hi"), text("x")]}]


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, {"max_tokens": 8192}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
        ({"temperature": 0.5}, {"max_tokens": 8192, "temperature": 0.5}),
        ({"stop": "x"}, {"max_tokens": 8192, "stop_sequences": ["x"]}),
        ({"stop": ["x", "y"]}, {"max_tokens": 8192, "stop_sequences": ["x", "y"]}),
        ({"user": "u", "stop": None}, {"max_tokens": 8192, "metadata": {"user_id": "u"}}),
        ({"safety_identifier": "s"}, {"max_tokens": 8192, "metadata": {"user_id": "s"}}),
        ({"service_tier": "default"}, {"max_tokens": 8192, "service_tier": "standard_only"}),
        ({"service_tier": "auto", "drop_tuning_params": True}, {"max_tokens": 8192}),
        ({"stream": True}, {"max_tokens": 8192, "stream": True}),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, {"max_tokens": 8192}),
        (
            {"n": 1, "logprobs": False, "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {},
             "store": False, "modalities": ["text"], "seed": None, "metadata": {}, "top_p": 1},
            {"max_tokens": 8192},
        ),
    ],
)  # fmt: skip
def test_parameter_becomes_its_equivalent(given: dict[str, Any], sent: dict[str, Any]) -> None:
    request = asked(given)
    del request["model"], request["messages"]
    assert request == sent
    assert dropped(given) == ()


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"tool_choice": "none"}, {"type": "none"}),
        ({"tool_choice": "none", "parallel_tool_calls": False}, {"type": "none"}),
        ({"tool_choice": "required", "parallel_tool_calls": True}, {"type": "any"}),
        ({"parallel_tool_calls": False}, {"type": "auto", "disable_parallel_tool_use": True}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": False},
            {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        ),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}}},
            {"type": "any"},
        ),
    ],
)
def test_tool_choice_becomes_its_equivalent(given: dict[str, Any], sent: dict[str, Any]) -> None:
    assert asked({"tools": [WEATHER], **given})["tool_choice"] == sent


def test_allowed_tools_narrow_the_tools() -> None:
    other = {"type": "function", "function": {"name": "other", "description": "O", "strict": True}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [other]}}
    request = asked({"tools": [WEATHER, other], "tool_choice": choice})
    schema = {"type": "object", "properties": {}}
    assert request["tools"] == [{"name": "other", "description": "O", "input_schema": schema, "strict": True}]


def test_strict_is_dropped_for_models_that_do_not_know_it() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"properties": {}}}}
    assert dropped({"tools": [tool]}, "claude-3-5-haiku-20241022") == ("tools[].function.strict",)
    assert asked({"tools": [tool]})["tools"][0]["input_schema"] == {"type": "object", "properties": {}}


def test_json_schema_becomes_an_output_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    assert asked({"response_format": form})["output_config"] == {"format": {"type": "json_schema", "schema": schema}}
    assert "output_config" not in asked({"response_format": {"type": "text"}})


@pytest.mark.parametrize(
    ("effort", "model", "bound", "sent"),
    [
        ("low", MODEL, None, {"max_tokens": 8192 + 2048, "thinking": {"type": "enabled", "budget_tokens": 2048}}),
        ("high", MODEL, 8000, {"max_tokens": 8000, "thinking": {"type": "enabled", "budget_tokens": 6000}}),
        ("high", MODEL, 1000, {"max_tokens": 1000}),
        ("none", MODEL, None, {"max_tokens": 8192, "thinking": {"type": "disabled"}}),
        ("high", "claude-3-5-sonnet-20240620", 5000, {"max_tokens": 5000}),
        ("low", "kimi-k3", 9000, {"max_tokens": 9000, "thinking": {"type": "enabled", "budget_tokens": 2048}}),
        (
            "xhigh", "claude-opus-4-6", 900,
            {"max_tokens": 900, "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        ),
        (
            "minimal", "claude-opus-4-6", 900,
            {"max_tokens": 900, "thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        ),
        (
            "high", "anthropic.claude-sonnet-5-v1", None,
            {"max_tokens": 8192 + 16384, "thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
        ),
    ],
)  # fmt: skip
def test_reasoning_effort_makes_the_model_think(
    effort: str, model: str, bound: int | None, sent: dict[str, Any]
) -> None:
    request = asked({"reasoning_effort": effort, "max_completion_tokens": bound}, model)
    del request["model"], request["messages"]
    assert request == sent
    assert dropped({"reasoning_effort": effort, "max_completion_tokens": bound}, model) == (
        ("reasoning_effort",) if "thinking" not in sent else ()
    )


def test_thinking_gives_way_to_a_forced_tool_and_to_answered_turns_without_it() -> None:
    forced = {"reasoning_effort": "low", "tools": [WEATHER], "tool_choice": "required"}
    assert "thinking" not in asked(forced)
    assert dropped(forced) == ("reasoning_effort",)
    call = {"id": "a", "function": {"name": "weather", "arguments": "{}"}}
    answered: dict[str, Any] = {"role": "assistant", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": "sunny"}
    body: dict[str, Any] = {"reasoning_effort": "low", "tools": [WEATHER], "messages": [HI, answered, result]}
    assert dropped(body) == ("reasoning_effort",)
    assert asked(body, "claude-opus-4-6")["thinking"] == {"type": "adaptive"}
    answered["thinking_blocks"] = [{"type": "thinking", "thinking": "", "signature": "c2ln"}]
    assert asked(body)["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert dropped(body) == ()


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("claude-haiku-4-5-20251001", (4, 5)),
        ("claude-sonnet-4-20250514", (4, 0)),
        ("claude-sonnet-4@20250514", (4, 0)),
        ("us.anthropic.claude-opus-4-1-20250805-v1:0", (4, 1)),
        ("anthropic/claude-sonnet-4.5", (4, 5)),
        ("claude-3-7-sonnet-20250219", (3, 7)),
        ("claude-3-opus-20240229", (3, 0)),
        ("claude-opus-5-5", (5, 5)),
        ("claude-sonnet-5", (5, 0)),
        ("claude-mythos-preview", None),
        ("kimi-k3", None),
        (None, None),
    ],
)
def test_version_of_a_model_is_read_from_its_name(model: str | None, version: tuple[int, int] | None) -> None:
    assert claude_version(model) == version


def test_default_bound_is_configurable_and_positive() -> None:
    (translator,) = (
        each
        for each in Dialects(DialectsConfig(default_max_tokens=77)).register_translators()
        if (each.source, each.target) == ("openai.chat", "anthropic.messages")
    )
    sent = translator.translate(json.dumps({"messages": [HI]}).encode(), MODEL).body
    assert json.loads(sent)["max_tokens"] == 77
    with pytest.raises(ConfigurationError, match="default_max_tokens"):
        Dialects(DialectsConfig(default_max_tokens=0))


# --- what is dropped or refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "listed"),
    [
        ({"seed": 1}, "seed"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": 0.5, "reasoning_effort": "low"}, "temperature"),
        ({"temperature": 0.5, "top_p": 0.9}, "top_p"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"stop": ["\n"]}, "stop"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"something_new": [1]}, "something_new"),
        ({"messages": [{**HI, "name": "Ann"}]}, "messages[].name"),
        ({"messages": [{**HI, "mood": "good"}]}, "messages[].mood"),
    ],
)
def test_parameter_without_equivalent_is_listed_or_refused_on_demand(given: dict[str, Any], listed: str) -> None:
    assert dropped(given) == (listed,)
    error = refusal({**given, "drop_tuning_params": False})
    assert (error.code, error.param, error.meta) == ("unsupported_parameter", listed, {"dropped": [listed]})


def test_temperature_over_one_is_one() -> None:
    assert asked({"temperature": 1.5})["temperature"] == 1
    assert "temperature" not in asked({"temperature": 0.5}, "claude-opus-4-7")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
         "messages[0].content[0].file.file_id"),
        ({"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AAAA"}}]}]},
         "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ],
)  # fmt: skip
def test_what_the_answer_depends_on_is_refused(given: dict[str, Any], param: str) -> None:
    error = refusal(given)
    assert (error.code, error.param) == ("unsupported_parameter", param)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, None),
        ({"messages": [{"role": "system", "content": "only"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [HI, {"role": "assistant", "tool_calls": [
            {"id": "a", "function": {"name": "f", "arguments": "{oops"}}]}]},
         "messages[1].tool_calls[0].function.arguments"),
        ({"temperature": "hot"}, "temperature"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(given: dict[str, Any], param: str | None) -> None:
    error = refusal(given)
    assert error.code == "bad_request"
    assert param is None or error.param == param


_NAMES = ("messages", "tools", "tool_choice", "stop", "temperature", "reasoning_effort", "response_format", "user",
          "stream_options", "max_tokens", "n", "service_tier", "drop_tuning_params")  # fmt: skip


@given(st.dictionaries(st.sampled_from(_NAMES), json_values()), st.lists(json_values(), max_size=3))
def test_any_json_is_translated_or_refused(members: dict[str, bytes], messages: list[bytes]) -> None:
    members.setdefault("messages", b'[{"role":"user","content":"x"},%b]' % b",".join([b"{}", *messages]))
    body = b"{%b}" % b",".join([json.dumps(name).encode() + b":" + value for name, value in members.items()])
    refused = None
    try:
        sent = json.loads(translate(body).body)
    except RequestError as error:
        refused = error.status
    assert refused == 400 if refused else sent["messages"][0]["role"] in ("user", "assistant")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"messages": ' + b"[" * 5000])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        translate(body)
    assert caught.value.code == "bad_request"
