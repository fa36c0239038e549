"""Anthropic's messages and token counting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.conversation import (
    Answer,
    Piece,
    Prompt,
    Tool,
    all_text_of,
    answer_to,
    member,
    number,
    rows,
    split_json,
    text_of,
)
from penstock_plugins.providers.mock.memory import Counts
from penstock_plugins.providers.mock.replies import (
    RefusedError,
    Reply,
    encode,
    json_reply,
    named,
    stream_reply,
)
from penstock_plugins.providers.mock.schemas import JSON


def create(call: Call) -> Reply:
    """Answer a message, whole or as a stream."""
    prompt = _read(call)
    if prompt.max_tokens is None:
        raise RefusedError(400, "max_tokens: Field required")
    answer = answer_to(prompt)
    counts = call.memory.count_marked(prompt)
    message = {
        "id": call.new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": _blocks(call, answer),
        "stop_reason": _stop_reason(answer),
        "stop_sequence": None,
        "usage": {**_usage(counts), "output_tokens": answer.output_tokens, "service_tier": "standard"},
    }
    return stream_reply(_stream(message, answer)) if call.is_stream else json_reply(message)


def count_tokens(call: Call) -> Reply:
    """Count what a message would use as input; the caches are not touched."""
    return json_reply({"input_tokens": _read(call).input_tokens})


def _read(call: Call) -> Prompt:
    document = call.document
    messages = rows(document.get("messages"))
    if not messages:
        raise RefusedError(400, "messages: at least one message is required")
    offered = rows(document.get("tools"))
    users = [message.get("content") for message in messages if message.get("role") == "user"]
    results = [block for block in rows(messages[-1].get("content")) if block.get("type") == "tool_result"]
    choice = document.get("tool_choice")
    form = member(document.get("output_config"), "format") or document.get("output_format")
    return Prompt(
        model=call.model,
        pieces=tuple(_pieces(document, offered, messages)),
        text=text_of(users[-1]) if users else "",
        tool_result=all_text_of(results[-1].get("content")) if results else None,
        tools=tuple(Tool(tool["name"], tool["input_schema"]) for tool in offered if _is_function(tool)),
        choice=_choice(choice),
        is_parallel=member(choice, "disable_parallel_tool_use") is not True,
        schema=member(form, "schema") if member(form, "type") == "json_schema" else None,
        max_tokens=number(document.get("max_tokens")),
        tokens=call.behaviour.tokens,
    )


def _is_function(tool: dict[str, Any]) -> bool:
    """Tell tools of the client from those of the provider, which have no schema."""
    return isinstance(tool.get("name"), str) and "input_schema" in tool


def _choice(value: JSON) -> str:
    kind = member(value, "type")
    if kind == "tool":
        return f"={member(value, 'name')}"
    return kind if kind in ("any", "none") else "auto"


def _pieces(document: dict[str, Any], offered: list[dict[str, Any]], messages: list[dict[str, Any]]) -> Iterator[Piece]:
    """Yield tools, system and message blocks, where cached prefixes end; a text counts like a text block."""
    for tool in offered:
        yield _piece("tool", tool)
    for block in _as_blocks(document.get("system")):
        yield _piece("system", block)
    last = [message for message in messages if _as_blocks(message.get("content"))][-1:]
    for message in messages:
        blocks = _as_blocks(message.get("content"))
        if message in last and isinstance(document.get("cache_control"), dict):
            blocks = [*blocks[:-1], {"cache_control": document["cache_control"], **blocks[-1]}]
        for block in blocks:
            yield _piece(str(message.get("role")), block)


def _as_blocks(content: JSON) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else rows(content)


def _piece(place: str, block: dict[str, Any]) -> Piece:
    control = block.get("cache_control")
    mark = str(control.get("ttl", "5m")) if isinstance(control, dict) else None
    return Piece(encode([place, {name: value for name, value in block.items() if name != "cache_control"}]), mark)


def _blocks(call: Call, answer: Answer) -> list[dict[str, Any]]:
    if not answer.calls:
        return [{"type": "text", "text": answer.text}]
    return [
        {"type": "tool_use", "id": call.new_id("toolu_", index), "name": found.name, "input": found.arguments}
        for index, found in enumerate(answer.calls)
    ]


def _stop_reason(answer: Answer) -> str:
    if answer.calls:
        return "tool_use"
    return "max_tokens" if answer.is_cut else "end_turn"


def _usage(counts: Counts) -> dict[str, Any]:
    return {
        "input_tokens": counts.input,
        "cache_creation_input_tokens": counts.cache_write,
        "cache_read_input_tokens": counts.cache_read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": counts.cache_write_5m,
            "ephemeral_1h_input_tokens": counts.cache_write_1h,
        },
    }


def _stream(message: dict[str, Any], answer: Answer) -> Iterator[bytes]:
    usage = {**message["usage"], "output_tokens": 1}
    begun = {**message, "content": [], "stop_reason": None, "usage": usage}
    yield named({"type": "message_start", "message": begun})
    yield named({"type": "ping"})
    for index, block in enumerate(message["content"]):
        is_text = block["type"] == "text"
        empty: dict[str, JSON] = {"text": ""} if is_text else {"input": {}}
        yield named({"type": "content_block_start", "index": index, "content_block": {**block, **empty}})
        for delta in _text_deltas(answer) if is_text else _input_deltas(block):
            yield named({"type": "content_block_delta", "index": index, "delta": delta})
        yield named({"type": "content_block_stop", "index": index})
    stop = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    counted = {name: value for name, value in message["usage"].items() if name.endswith("_tokens")}
    yield named({"type": "message_delta", "delta": stop, "usage": counted})
    yield named({"type": "message_stop"})


def _text_deltas(answer: Answer) -> Iterator[dict[str, Any]]:
    for word in answer.words():
        yield {"type": "text_delta", "text": word}


def _input_deltas(block: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "input_json_delta", "partial_json": ""}
    for part in split_json(encode(block["input"]).decode()):
        yield {"type": "input_json_delta", "partial_json": part}
