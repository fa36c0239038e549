"""Chat completions for providers that speak Anthropic's Messages: the request. Sans-IO.

Shapes: https://platform.openai.com/docs/api-reference/chat/create and https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import attrs
import msgspec

from penstock import RequestError, Translated
from penstock_plugins.dialects.anthropic_requests import (
    DEFAULT_MAX_TOKENS,
    Thinking,
    Turns,
    claude_version,
    takes_sampling,
    thinking_for,
    thinks_adaptively,
)
from penstock_plugins.dialects.openai_chat_answers import ChatAnswer
from penstock_plugins.dialects.openai_chat_tools import read_tools
from penstock_plugins.dialects.openai_chat_turns import Conversation
from penstock_plugins.dialects.shared import (
    DROP_TUNING_PARAMS,
    UNREADABLE,
    Dropped,
    Members,
    Reply,
    encode,
    is_text,
    read_as,
    read_member,
    read_members,
    refuse,
    says_nothing,
)

_READ = frozenset({
    "messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "user", "stream",
    "stream_options", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "response_format",
    "safety_identifier", "service_tier", DROP_TUNING_PARAMS,
})  # fmt: skip
_REFUSED = ("n", "logprobs", "top_logprobs", "functions", "function_call", "audio", "modalities", "prediction",
            "web_search_options", "moderation")  # fmt: skip
"""What changes what the client gets back, so that an answer without it is none."""
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_logprobs": (0,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "verbosity": ("medium",),
}
"""Values that ask for nothing beyond what happens anyway, besides null, false and empty ones."""


@attrs.define(eq=False)
class OpenAIChatToAnthropic:
    """Translate chat completions into Messages."""

    default_max_tokens: int = DEFAULT_MAX_TOKENS
    clock: Callable[[], float] = time.time
    source: str = attrs.field(default="openai.chat", init=False)
    target: str = attrs.field(default="anthropic.messages", init=False)

    def translate(self, body: bytes, model: str | None) -> Translated:
        """Return the request as Messages. Raises RequestError."""
        members = read_members(body)
        dropped = Dropped()
        _sort_out(members, dropped)
        conversation = Conversation(dropped)
        conversation.read(members.get("messages", msgspec.Raw(b"null")))
        tools, choice = read_tools(members, model, dropped)
        is_forced = choice.get("type") in ("any", "tool")
        thinking = self._thinking(members, model, dropped, is_forced=is_forced, turns=conversation.turns)
        request: dict[str, Any] = {"model": model, "max_tokens": thinking.max_tokens}
        if conversation.system:
            request["system"] = conversation.system
        request["messages"] = conversation.turns.messages
        if tools:
            request["tools"] = tools
        if choice:
            request["tool_choice"] = choice
        request |= thinking.members
        request |= _output_config(members, thinking, dropped)
        request |= _sampling(members, model, dropped, is_thinking=thinking.is_on)
        request |= _stop_sequences(members, dropped)
        request |= _about_the_client(members, dropped)
        is_stream = read_member(members, "stream", bool) or False
        if is_stream:
            request["stream"] = True
        options = read_member(members, "stream_options", Members) or {}
        include_usage = is_stream and read_member(options, "include_usage", bool, "stream_options") is True
        answer = ChatAnswer(int(self.clock()), model or "", include_usage=include_usage)
        return Translated(encode(request), Reply(answer), dropped.settle(members))

    def _thinking(
        self, members: Members, model: str | None, dropped: Dropped, *, is_forced: bool, turns: Turns
    ) -> Thinking:
        bound = read_member(members, "max_completion_tokens", int)
        if bound is None:
            bound = read_member(members, "max_tokens", int)
        effort = read_member(members, "reasoning_effort", str)
        is_impossible = is_forced or (turns.lacks_thinking and not thinks_adaptively(model))
        if effort not in (None, "none") and is_impossible:
            dropped.add("reasoning_effort")  # a tool that must be called leaves no room for thinking
            effort = None
        thinking = thinking_for(effort, model, bound, self.default_max_tokens)
        if thinking.is_dropped:
            dropped.add("reasoning_effort")
        return thinking


def _sort_out(members: Members, dropped: Dropped) -> None:
    """Note what has no equivalent. Raises RequestError for what the request depends on."""
    for name, raw in members.items():
        if name in _READ or says_nothing(raw) or _is_without_effect(name, raw):
            continue
        if name in _REFUSED:
            message = f"{name} has no equivalent in Anthropic's dialect, and the answer depends on it; leave it out."
            raise refuse(name, message)
        dropped.add(name)


def _is_without_effect(name: str, raw: msgspec.Raw) -> bool:
    values = _WITHOUT_EFFECT.get(name)
    if values is None:
        return False
    try:
        return msgspec.json.decode(raw) in values
    except UNREADABLE:
        return False


def _output_config(members: Members, thinking: Thinking, dropped: Dropped) -> dict[str, Any]:
    config: dict[str, Any] = {} if thinking.effort is None else {"effort": thinking.effort}
    form = read_member(members, "response_format", Members) or {}
    kind = read_member(form, "type", str, "response_format") or "text"
    if kind == "json_schema":
        named = read_member(form, "json_schema", Members, "response_format") or {}
        schema = named.get("schema")
        if schema is None or not bytes(schema).startswith(b"{"):
            param = "response_format.json_schema.schema"
            raise RequestError("bad_request", f"{param} is no JSON object.", param=param)
        if not says_nothing(named.get("description")):
            dropped.add("response_format.json_schema.description")
        config["format"] = {"type": "json_schema", "schema": schema}
    elif kind == "json_object":
        dropped.add("response_format")
    elif kind != "text":
        raise refuse("response_format.type", f"response_format.type {kind[:100]!r} has no equivalent.")
    return {"output_config": config} if config else {}


def _sampling(members: Members, model: str | None, dropped: Dropped, *, is_thinking: bool) -> dict[str, Any]:
    """Return temperature and top_p as far as the model takes them; a temperature over 1 becomes 1, which is listed."""
    temperature = read_member(members, "temperature", float)
    top_p = read_member(members, "top_p", float)
    taken: dict[str, Any] = {}
    if temperature is not None:
        if (is_thinking or not takes_sampling(model)) and temperature != 1:
            dropped.add("temperature")
        elif temperature > 1:
            dropped.add("temperature")
            taken["temperature"] = 1
        elif takes_sampling(model):
            taken["temperature"] = members["temperature"]
    if top_p is not None and top_p != 1:
        version = claude_version(model)
        takes_one = "temperature" in taken and version is not None and version >= (4, 1)
        if takes_one or not takes_sampling(model) or (is_thinking and top_p < 0.95):
            dropped.add("top_p")
        else:
            taken["top_p"] = members["top_p"]
    return taken


def _stop_sequences(members: Members, dropped: Dropped) -> dict[str, Any]:
    """Return the stop sequences but those of white space alone, which Anthropic refuses."""
    raw = members.get("stop")
    if says_nothing(raw) or raw is None:
        return {}
    sequences = [read_as(str, raw, "stop")] if is_text(raw) else read_as(list[str], raw, "stop")
    kept = [sequence for sequence in sequences if sequence.strip()]
    if len(kept) < len(sequences):
        dropped.add("stop")
    return {"stop_sequences": kept} if kept else {}


def _about_the_client(members: Members, dropped: Dropped) -> dict[str, Any]:
    found: dict[str, Any] = {}
    user = read_member(members, "user", str)
    identifier = read_member(members, "safety_identifier", str)
    if user and identifier and user != identifier:
        dropped.add("safety_identifier")
    if user or identifier:
        found["metadata"] = {"user_id": user or identifier}
    tier = read_member(members, "service_tier", str)
    if tier == "default":
        found["service_tier"] = "standard_only"
    elif tier not in (None, "auto"):
        dropped.add("service_tier")
    return found
