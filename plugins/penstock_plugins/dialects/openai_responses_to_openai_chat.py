"""Let clients of the Responses API ask providers that speak chat completions: the request and the answer. Sans-IO."""

from __future__ import annotations

import re
from typing import Any

import attrs

from penstock import Translated
from penstock_plugins.dialects.responses_events import ResponseWriter
from penstock_plugins.dialects.responses_from_chat import THOUGHTS, ChatCompletionAnswer
from penstock_plugins.dialects.responses_input import (
    Call,
    Entry,
    File,
    Image,
    Part,
    Result,
    Said,
    Text,
    Thought,
)
from penstock_plugins.dialects.responses_requests import Asked, read_request
from penstock_plugins.dialects.responses_tools import Tool, ToolChoice
from penstock_plugins.dialects.shared import Raw, Reply, encode, refuse

_is_openai_model = re.compile(r"(?:^|[/:_.-])(?:gpt|chatgpt|codex|o[1-9])(?:[-_.\d]|$)").search
"""Whether a name is one of OpenAI's: its models take max_completion_tokens, servers of others max_tokens."""


@attrs.frozen
class OpenAIResponsesToOpenAIChat:
    """Translate openai.responses into openai.chat."""

    source: str = "openai.responses"
    target: str = "openai.chat"

    def translate(self, body: bytes, model: str | None) -> Translated:
        """Return the request as a chat completion. Raises RequestError."""
        asked = read_request(body, model)
        chat = _request(asked, model)
        writer = ResponseWriter(asked.echo, asked.called)
        return Translated(encode(chat), Reply(ChatCompletionAnswer(writer)), asked.settle())


# --- the request ----------------------------------------------------------------------------------------------------


def _request(asked: Asked, model: str | None) -> dict[str, Any]:
    members = asked.members
    chat: dict[str, Any] = asked.copy("model") if model is None else {"model": model}
    chat["messages"] = _messages(asked.entries, asked)
    chat |= _tools(asked)
    if "max_output_tokens" in members:
        name = "max_completion_tokens" if _is_openai_model(model or "") else "max_tokens"
        chat[name] = members["max_output_tokens"]
    chat |= asked.copy("temperature", "top_p", "service_tier")
    if asked.effort is not None:
        chat["reasoning_effort"] = asked.effort
    chat |= _response_format(asked)
    if asked.end_user is not None:
        chat["user"] = asked.end_user
    if asked.is_stream:
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    return chat


def _tools(asked: Asked) -> dict[str, Any]:
    if not asked.tools:
        return {}
    found: dict[str, Any] = {"tools": [_tool(tool) for tool in asked.tools]}
    if asked.tool_choice.is_given:
        found["tool_choice"] = _tool_choice(asked.tool_choice)
    return found | asked.copy("parallel_tool_calls")


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.parameters
    if tool.is_strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if choice.mode == "named" else choice.mode


def _response_format(asked: Asked) -> dict[str, Any]:
    found = asked.format
    if found is None:
        return {}
    if found.type == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema: dict[str, Any] = {"name": found.name or "answer", "schema": found.schema}
    if found.description is not None:
        schema["description"] = found.description
    if found.strict is not None:
        schema["strict"] = found.strict
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _messages(entries: list[Entry], asked: Asked) -> list[dict[str, Any]]:
    """Return the conversation; what the assistant says, thinks and calls in a row is one message."""
    messages: list[dict[str, Any]] = []
    turn: list[Said | Thought | Call] = []
    attached: list[dict[str, Any]] = []
    for entry in entries:
        if isinstance(entry, Thought | Call) or (isinstance(entry, Said) and entry.role == "assistant"):
            messages += _attached(attached)
            turn.append(entry)
            continue
        messages += _assistant(turn, asked)
        turn.clear()
        if isinstance(entry, Result):
            messages.append(_tool_message(entry, attached))
        elif isinstance(entry, Said):
            messages += _attached(attached)
            messages.append({"role": entry.role, "content": _content(entry.parts)})
    return [*messages, *_assistant(turn, asked), *_attached(attached)]


def _attached(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the user message with what tool messages cannot hold, and forget it."""
    content = list(parts)
    parts.clear()
    return [{"role": "user", "content": content}] if content else []


def _assistant(turn: list[Said | Thought | Call], asked: Asked) -> list[dict[str, Any]]:
    texts = [part for entry in turn if isinstance(entry, Said) for part in entry.parts]
    calls = [
        {"id": entry.id, "type": "function", "function": {"name": entry.name, "arguments": _text_of(entry.arguments)}}
        for entry in turn
        if isinstance(entry, Call)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": _content(tuple(texts)) if texts else None}
    for entry in turn:
        if isinstance(entry, Thought):
            if entry.kind not in THOUGHTS:
                asked.dropped.add("input[].reasoning")
            elif entry.text:
                message[entry.kind] = message.get(entry.kind, "") + entry.text
    if calls:
        message["tool_calls"] = calls
    return [message] if texts or calls else []


def _text_of(raw: Raw) -> str:
    return bytes(raw).decode("utf-8", "replace")


def _content(parts: tuple[Part, ...]) -> Any:
    """Return one text as a string, which every server takes, and anything else as parts."""
    if not parts:
        return ""
    first = parts[0]
    if len(parts) == 1 and isinstance(first, Text):
        return first.text
    return [_part(part) for part in parts]


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    if isinstance(part, Image):
        detail = {} if part.detail is None else {"detail": part.detail}
        return {"type": "image_url", "image_url": {"url": part.url, **detail}}
    return _file(part)


def _file(part: File) -> dict[str, Any]:
    if not part.url.startswith("data:"):
        raise refuse(part.param, f"{part.param}: chat completions take files as data only; send file_data.")
    return {"type": "file", "file": {"filename": part.name or "file", "file_data": part.url}}


def _tool_message(result: Result, attached: list[dict[str, Any]]) -> dict[str, Any]:
    texts = tuple(part for part in result.parts if isinstance(part, Text))
    others = [_part(part) for part in result.parts if not isinstance(part, Text)]
    if others:
        attached.append({"type": "text", "text": f"Attached to the result of tool call {result.id}:"})
        attached += others
        texts = (*texts, Text(f"[attached in the next user message: {len(others)}]"))
    return {"role": "tool", "tool_call_id": result.id, "content": "\n".join(text.text for text in texts)}
