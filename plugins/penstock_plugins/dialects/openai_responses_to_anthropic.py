"""Let clients of the Responses API ask providers that speak Anthropic's Messages: the request and the answer. Sans-IO.

Thinking goes to the client as a reasoning item whose ``encrypted_content`` holds the signature, so that a client which
sends its items back, as all do who keep conversations themselves, gives Claude its thinking back.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from penstock import RequestError, Translated
from penstock_plugins.dialects.anthropic_requests import (
    DEFAULT_MAX_TOKENS,
    Block,
    Thinking,
    Turns,
    claude_version,
    document_block,
    image_block,
    takes_sampling,
    thinking_for,
)
from penstock_plugins.dialects.responses_events import ResponseWriter
from penstock_plugins.dialects.responses_from_messages import REDACTED, THINKING, MessagesAnswer
from penstock_plugins.dialects.responses_input import (
    Call,
    Entry,
    Image,
    Part,
    Result,
    Said,
    Text,
    Thought,
)
from penstock_plugins.dialects.responses_requests import Asked, read_request
from penstock_plugins.dialects.responses_tools import Tool
from penstock_plugins.dialects.shared import Dropped, Members, Raw, Reply, encode, read_as

_no_id = re.compile(r"[^a-zA-Z0-9_-]")


@attrs.frozen
class OpenAIResponsesToAnthropic:
    """Translate openai.responses into anthropic.messages."""

    default_max_tokens: int = DEFAULT_MAX_TOKENS
    source: str = attrs.field(default="openai.responses", init=False)
    target: str = attrs.field(default="anthropic.messages", init=False)

    def translate(self, body: bytes, model: str | None) -> Translated:
        """Return the request as Messages. Raises RequestError."""
        asked = read_request(body, model)
        messages = _request(asked, model, self.default_max_tokens)
        writer = ResponseWriter(asked.echo, asked.called)
        return Translated(encode(messages), Reply(MessagesAnswer(writer)), asked.settle())


# --- the request ----------------------------------------------------------------------------------------------------


def _request(asked: Asked, model: str | None, default_max_tokens: int) -> dict[str, Any]:
    conversation = _Conversation(asked.dropped)
    conversation.add(asked.entries)
    choice = _tool_choice(asked)
    is_forced = choice.get("type") in ("any", "tool")
    thinking = _thinking(asked, model, default_max_tokens, is_possible=not is_forced, turns=conversation.turns.messages)
    request: dict[str, Any] = asked.copy("model") if model is None else {"model": model}
    request["max_tokens"] = thinking.max_tokens
    if conversation.system:
        request["system"] = conversation.system
    request["messages"] = conversation.turns.messages
    if asked.tools:
        request["tools"] = [_tool(tool, model, asked.dropped) for tool in asked.tools]
    if choice:
        request["tool_choice"] = choice
    request |= thinking.members
    request |= _output_config(asked, thinking)
    request |= _sampling(asked, model, is_thinking=thinking.is_on)
    request |= _about_the_client(asked)
    if asked.is_stream:
        request["stream"] = True
    return request


def _thinking(
    asked: Asked, model: str | None, default: int, *, is_possible: bool, turns: list[dict[str, Any]]
) -> Thinking:
    """Return how the model is made to think; not at all where Anthropic would refuse it."""
    bound, effort = asked.whole_number("max_output_tokens"), asked.effort
    found = thinking_for(effort, model, bound, default, "reasoning.effort")
    is_adaptive = found.members.get("thinking", {}).get("type") == "adaptive"
    if found.is_on and not (is_possible and (is_adaptive or _thought_before(turns))):
        found = attrs.evolve(thinking_for(None, model, bound, default), is_dropped=True)
    if found.is_dropped:
        asked.dropped.add("reasoning.effort")
    return found


def _thought_before(turns: list[dict[str, Any]]) -> bool:
    """Tell whether the calls that are being answered, if any, begin with thinking: where it is on, they must."""
    said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    last: list[Block] = said[-1] if said else []
    calls_tools = any(block["type"] == "tool_use" for block in last)
    return not calls_tools or last[0]["type"] in ("thinking", "redacted_thinking")


def _tool(tool: Tool, model: str | None, dropped: Dropped) -> Block:
    block: Block = {"name": tool.name}
    if tool.description:
        block["description"] = tool.description
    block["input_schema"] = _schema(tool.parameters)
    if tool.is_strict:
        version = claude_version(model)
        if version is None or version >= (4, 1):
            block["strict"] = True
        else:
            dropped.add("tools[].strict")
    return block


def _schema(parameters: Raw) -> Raw | dict[str, Any]:
    """Return the schema of a tool's arguments as it is spelled; one that does not say ``object`` is made to."""
    members = read_as(Members, parameters, "tools[].parameters")
    return parameters if "type" in members else {"type": "object", **members}


def _tool_choice(asked: Asked) -> Block:
    choice = asked.tool_choice
    if not asked.tools:
        if choice.mode == "required":
            raise RequestError("bad_request", "tool_choice asks for a tool, but there is none.", param="tool_choice")
        return {}
    found: Block = {}
    if choice.mode == "named":
        found = {"type": "tool", "name": choice.name}
    elif choice.is_given:
        found = {"type": "any" if choice.mode == "required" else choice.mode}
    if asked.parallel_tool_calls is False and choice.mode != "none":
        found = {"type": "auto", **found, "disable_parallel_tool_use": True}
    return found


def _output_config(asked: Asked, thinking: Thinking) -> dict[str, Any]:
    config: dict[str, Any] = {} if thinking.effort is None else {"effort": thinking.effort}
    wanted = asked.format
    if wanted is not None and wanted.type == "json_schema":
        config["format"] = {"type": "json_schema", "schema": wanted.schema}
        if wanted.description:
            asked.dropped.add("text.format.description")
    elif wanted is not None:
        asked.dropped.add("text.format")
    return {"output_config": config} if config else {}


def _sampling(asked: Asked, model: str | None, *, is_thinking: bool) -> dict[str, Any]:
    """Return temperature and top_p as far as the model takes them; a temperature over 1 becomes 1, which is listed."""
    temperature, top_p = asked.number("temperature"), asked.number("top_p")
    taken: dict[str, Any] = {}
    if temperature is not None:
        if (is_thinking or not takes_sampling(model)) and temperature != 1:
            asked.dropped.add("temperature")
        elif temperature > 1:
            asked.dropped.add("temperature")
            taken["temperature"] = 1
        elif takes_sampling(model):
            taken["temperature"] = asked.members["temperature"]
    if top_p is not None and top_p != 1:
        version = claude_version(model)
        takes_one = "temperature" in taken and version is not None and version >= (4, 1)
        if takes_one or not takes_sampling(model) or (is_thinking and top_p < 0.95):
            asked.dropped.add("top_p")
        else:
            taken["top_p"] = asked.members["top_p"]
    return taken


def _about_the_client(asked: Asked) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if asked.end_user:
        found["metadata"] = {"user_id": asked.end_user}
    tier = asked.text("service_tier")
    if tier == "default":
        found["service_tier"] = "standard_only"
    elif tier not in (None, "auto"):
        asked.dropped.add("service_tier")
    return found


class _Conversation:
    """Collect what the entries become: the system prompt, and turns that alternate."""

    def __init__(self, dropped: Dropped) -> None:
        self.system: list[Block] = []
        self.turns = Turns()
        self._dropped = dropped

    def add(self, entries: list[Entry]) -> None:
        """Take all entries. Raises RequestError."""
        for entry in entries:
            if isinstance(entry, Said):
                self._say(entry)
            elif isinstance(entry, Thought):
                self._think(entry)
            elif isinstance(entry, Call):
                block = {"type": "tool_use", "id": _id_of(entry.id), "name": entry.name, "input": entry.arguments}
                self.turns.add("assistant", [block])
            else:
                self._answer(entry)
        if not self.turns.messages:
            raise RequestError("bad_request", "input holds nothing that was said by user or assistant.", param="input")

    def _say(self, said: Said) -> None:
        blocks = self._blocks(said.parts)
        if said.role != "system":
            self.turns.add(said.role, blocks)
        elif not self.turns.messages:
            self.system += blocks
        elif blocks:
            self._dropped.add("input[].role")
            self.turns.add("user", blocks)

    def _think(self, thought: Thought) -> None:
        if thought.kind == THINKING:
            self.turns.add("assistant", [{"type": "thinking", "thinking": thought.text, "signature": thought.seal}])
        elif thought.kind == REDACTED:
            self.turns.add("assistant", [{"type": "redacted_thinking", "data": thought.seal}])
        else:
            self._dropped.add("input[].reasoning")

    def _answer(self, result: Result) -> None:
        block: Block = {"type": "tool_result", "tool_use_id": _id_of(result.id)}
        content = self._blocks(result.parts)
        if content:
            block["content"] = content
        self.turns.add("user", [block])

    def _blocks(self, parts: tuple[Part, ...]) -> list[Block]:
        """Return parts as blocks; texts without a visible character, which are refused, left out."""
        blocks: list[Block] = []
        for part in parts:
            if isinstance(part, Text):
                if part.text.strip():
                    blocks.append({"type": "text", "text": part.text})
            elif isinstance(part, Image):
                if part.detail not in (None, "auto"):
                    self._dropped.add("input[].content[].detail")
                blocks.append(image_block(part.url, part.param))
            else:
                blocks.append(document_block(part.url, part.param, part.name))
        return blocks


def _id_of(call_id: str) -> str:
    """Return a call's id in the letters that Anthropic takes."""
    return _no_id.sub("_", call_id)
