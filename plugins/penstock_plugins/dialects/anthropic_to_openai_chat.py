"""Let clients of Anthropic Messages ask providers that speak chat completions.

Here are the parameters; messages are in ``anthropic_messages``, answers in ``anthropic_answers`` and
``anthropic_stream``. Shapes: https://docs.anthropic.com/en/api/messages and
https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import attrs
import msgspec

from penstock import Translated
from penstock_plugins.dialects.anthropic_messages import (
    chat_messages,
    drop_rest,
    read_array,
    read_object,
    read_text,
    unsupported,
)
from penstock_plugins.dialects.anthropic_stream import MessagesAnswer
from penstock_plugins.dialects.shared import DROP_TUNING_PARAMS, Dropped, Members, Raw, Reply, encode, read_as

MOST_STOPS = 4
"""Stop sequences that chat completions take."""
LONGEST_USER = 64
"""Characters of ``user`` that OpenAI takes; a longer id is sent as its SHA-256 in hexadecimal."""
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_REFUSED = {
    "mcp_servers": "chat completions call no MCP servers",
    "container": "chat completions have no containers",
    "compaction": "chat completions compact no conversations",
    "thread": "chat completions keep no threads",
    "inference_geo": "chat completions promise no region",
}
"""What an answer depends on."""
_is_openai_model = re.compile(r"(?:^|[/:_.-])(?:gpt|chatgpt|codex|o[1-9])(?:[-_.\d]|$)").search
"""Whether a name is one of OpenAI's, also behind a vendor's prefix or in an Azure deployment's name."""
_never_reasons = re.compile(r"(?:^|[/:_.-])(?:gpt-3|gpt-4|chatgpt-4)").search


@attrs.define(eq=False)
class _Request:
    """Put the chat request together."""

    model: str | None
    dropped: Dropped
    asks_claude: bool = False
    """Whether the client names a model of Anthropic's, which may answer a later turn and refuses such thinking."""
    chat: dict[str, Any] = attrs.Factory(dict)
    effort: str | None = None
    """Reasoning effort by name, as ``output_config`` says."""
    budget: int | None = None
    """Tokens of thinking, as ``thinking`` says."""
    shows_thinking: bool = False
    """Whether the client asked for thinking, and can be given some that no Claude has signed."""
    stops: tuple[str, ...] = ()

    def copy(self, name: str, raw: Raw) -> None:
        """Take a member that both dialects have."""
        self.chat[name] = raw

    def take_max_tokens(self, _: str, raw: Raw) -> None:
        name = "max_completion_tokens" if _is_openai_model(self.model or "") else "max_tokens"
        self.chat[name] = raw

    def take_stop_sequences(self, name: str, raw: Raw) -> None:
        self.stops = tuple(read_as(list[str], raw, name))
        if len(self.stops) > MOST_STOPS:
            raise unsupported(name, f"chat completions take at most {MOST_STOPS}")
        if self.stops:
            self.chat["stop"] = self.stops

    def take_metadata(self, name: str, raw: Raw) -> None:
        metadata = read_object(raw, name)
        drop_rest(metadata, frozenset({"user_id"}), name, self.dropped)
        if "user_id" in metadata:
            user = read_text(metadata["user_id"], "metadata.user_id")
            is_long = len(user) > LONGEST_USER
            self.chat["user"] = hashlib.sha256(user.encode()).hexdigest() if is_long else user

    def take_service_tier(self, name: str, raw: Raw) -> None:
        if read_text(raw, name) == "standard_only":
            self.chat["service_tier"] = "default"

    def take_speed(self, name: str, raw: Raw) -> None:
        if read_text(raw, name) != "standard":
            self.dropped.add(name)

    def take_stream(self, name: str, raw: Raw) -> None:
        if read_as(bool, raw, name):
            self.chat["stream"] = True
            self.chat["stream_options"] = {"include_usage": True}

    def take_thinking(self, name: str, raw: Raw) -> None:
        thinking = read_object(raw, name)
        kind = read_text(thinking.get("type"), "thinking.type")
        is_wanted = kind != "disabled" and bytes(thinking.get("display", b"")) != b'"omitted"'
        self.shows_thinking = is_wanted and not self.asks_claude
        if kind == "enabled":
            self.budget = read_as(int, thinking.get("budget_tokens", Raw(b"null")), "thinking.budget_tokens")
        elif kind != "adaptive":
            self.dropped.add(name)
        drop_rest(thinking, frozenset({"type", "budget_tokens", "display"}), name, self.dropped)

    def take_output_config(self, name: str, raw: Raw) -> None:
        config = read_object(raw, name)
        drop_rest(config, frozenset({"effort", "format"}), name, self.dropped)
        if "effort" in config:
            self.effort = read_text(config["effort"], "output_config.effort")
            if self.effort not in _EFFORTS:
                raise unsupported("output_config.effort", f"it is one of {', '.join(_EFFORTS)}")
        if "format" in config:
            self.take_output_format("output_config.format", config["format"])

    def take_output_format(self, name: str, raw: Raw) -> None:
        form = read_object(raw, name)
        kind = read_text(form.get("type"), f"{name}.type")
        if kind != "json_schema" or "schema" not in form:
            raise unsupported(name, f"chat completions know no format {kind!r} of Anthropic's")
        is_strict = _may_be_strict(read_as(object, form["schema"], f"{name}.schema"))
        if not is_strict:
            self.dropped.add(f"{name}.strict")
        schema = {"name": "response", "schema": form["schema"], "strict": is_strict}
        self.chat["response_format"] = {"type": "json_schema", "json_schema": schema}

    def take_tools(self, name: str, raw: Raw) -> None:
        tools = [
            self._tool(read_object(tool, f"tools[{n}]"), f"tools[{n}]") for n, tool in enumerate(read_array(raw, name))
        ]
        if tools:
            self.chat["tools"] = tools

    def _tool(self, tool: Members, where: str) -> dict[str, Any]:
        kind = read_text(tool["type"], f"{where}.type") if "type" in tool else "custom"
        if kind != "custom":
            raise unsupported(where, f"a tool of type {kind!r} exists at Anthropic only")
        drop_rest(tool, _TOOL, "tools[]", self.dropped)
        if bytes(tool.get("allowed_callers", b'["direct"]')).find(b'"direct"') < 0:
            raise unsupported(f"{where}.allowed_callers", "chat completions call tools directly only")
        function: dict[str, Any] = {"name": read_text(tool.get("name"), f"{where}.name")}
        for member, name in _FUNCTION:
            if member in tool:
                function[name] = tool[member]
        return {"type": "function", "function": function}

    def take_tool_choice(self, name: str, raw: Raw) -> None:
        choice = read_object(raw, name)
        kind = read_text(choice.get("type"), "tool_choice.type")
        drop_rest(choice, frozenset({"type", "name", "disable_parallel_tool_use"}), name, self.dropped)
        if kind == "tool":
            function = {"name": read_text(choice.get("name"), "tool_choice.name")}
            self.chat["tool_choice"] = {"type": "function", "function": function}
        elif kind in _CHOICES:
            self.chat["tool_choice"] = _CHOICES[kind]
        else:
            raise unsupported(name, f"chat completions know no choice {kind!r}")
        if bytes(choice.get("disable_parallel_tool_use", b"")) == b"true":
            self.chat["parallel_tool_calls"] = False

    def take_context_management(self, name: str, raw: Raw) -> None:
        """Drop edits that only clear thinking, which is never sent; refuse others."""
        edits = read_array(read_object(raw, name).get("edits", Raw(b"[]")), f"{name}.edits")
        for edit in edits:
            kind = read_text(read_object(edit, f"{name}.edits").get("type"), f"{name}.edits[].type")
            if not kind.startswith("clear_thinking_"):
                raise unsupported(name, f"chat completions do no {kind!r}")
        self.dropped.add(name)

    def finish(self) -> None:
        """Take what two members say together."""
        if "tools" not in self.chat:  # chat completions refuse these where there are no tools
            self.chat.pop("parallel_tool_calls", None)
            if self.chat.get("tool_choice") in ("auto", "none"):
                del self.chat["tool_choice"]
        effort = self.effort or (None if self.budget is None else _effort_of(self.budget))
        if effort is None:
            return
        if _never_reasons(self.model or ""):
            self.dropped.add("output_config.effort" if self.effort else "thinking")
        else:
            self.chat["reasoning_effort"] = effort


_TOOL = frozenset({"type", "name", "description", "input_schema", "strict", "allowed_callers"})
_FUNCTION = (("description", "description"), ("input_schema", "parameters"), ("strict", "strict"))
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_ELSEWHERE = frozenset({"model", "messages", "system", DROP_TUNING_PARAMS})
_Taker = Callable[[_Request, str, Raw], None]
_TAKERS: dict[str, _Taker] = {
    "max_tokens": _Request.take_max_tokens,
    "temperature": _Request.copy,
    "top_p": _Request.copy,
    "stop_sequences": _Request.take_stop_sequences,
    "metadata": _Request.take_metadata,
    "service_tier": _Request.take_service_tier,
    "speed": _Request.take_speed,
    "stream": _Request.take_stream,
    "thinking": _Request.take_thinking,
    "output_config": _Request.take_output_config,
    "output_format": _Request.take_output_format,
    "tools": _Request.take_tools,
    "tool_choice": _Request.take_tool_choice,
    "context_management": _Request.take_context_management,
}


def _names_claude(raw: Raw | None) -> bool:
    return raw is not None and b"claude" in bytes(raw)


def _effort_of(budget: int) -> str:
    """Return the reasoning effort that stands for a budget of thinking tokens."""
    if budget <= 4096:
        return "low"
    return "medium" if budget < 16384 else "high"


def _may_be_strict(schema: object) -> bool:
    """Tell whether OpenAI takes a schema in strict mode: every object closed, and all of its properties required."""
    parts = [schema]  # no recursion: how deep it goes is the client's choice
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            if not _is_closed(part):
                return False
            parts += part.values()
    return True


def _is_closed(schema: dict[str, Any]) -> bool:
    """Tell whether a schema allows and requires its own properties only, where it is one of an object."""
    properties = schema.get("properties")
    if schema.get("type") != "object" and not isinstance(properties, dict):
        return True
    required = schema.get("required", [])
    if schema.get("additionalProperties") is not False or not isinstance(required, list):
        return False
    names = properties if isinstance(properties, dict) else {}
    return set(names) <= {name for name in required if isinstance(name, str)}


class AnthropicToOpenAIChat:
    """Translate Anthropic Messages into chat completions, and the answers back."""

    source = "anthropic.messages"
    target = "openai.chat"

    def translate(self, body: bytes, model: str | None) -> Translated:
        """Return the chat request for a model. Raises RequestError ``bad_request`` or ``unsupported_parameter``."""
        members = read_object(Raw(body), "")
        request = _Request(model, Dropped(), asks_claude=_names_claude(members.get("model")))
        if model is not None or "model" in members:
            request.chat["model"] = members["model"] if model is None else model
        request.chat["messages"] = chat_messages(members, request.dropped)
        for name, raw in members.items():
            take = _TAKERS.get(name)
            if take is not None:
                take(request, name, raw)
            elif name in _REFUSED:
                raise unsupported(name, _REFUSED[name])
            elif name not in _ELSEWHERE:
                request.dropped.add(name)
        request.finish()
        answer = MessagesAnswer(
            shows_thinking=request.shows_thinking, stops=request.stops, is_stream="stream" in request.chat
        )
        try:
            encoded = encode(request.chat)
        except msgspec.MsgspecError:
            raise unsupported("messages", "a part of it cannot be written again") from None
        return Translated(encoded, Reply(answer), request.dropped.settle(members))
