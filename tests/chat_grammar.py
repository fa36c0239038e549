"""What a stream of chat completion chunks looks like, as code that complains."""

from __future__ import annotations

import json
from typing import Any

import attrs
from openai.types.chat import ChatCompletionChunk


@attrs.define
class ChatStream:
    """Hold what a stream said, put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, str]] = attrs.field(factory=list)
    thinking_blocks: list[dict[str, Any]] = attrs.field(factory=list)
    refusal: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False


def read_chat_stream(data: bytes, *, include_usage: bool = False, is_whole: bool = True) -> ChatStream:
    """Return what a stream says. Raises AssertionError for what is no stream of chunks.

    One role, first; calls numbered from 0 without gaps, each begun once; one finish, then usage if asked for, then
    ``[DONE]``, nothing behind it. ``is_whole=False`` allows any end on an event's boundary.
    """
    found = ChatStream()
    identities = set()
    assert data.endswith(b"\n\n") or not data
    for number, raw in enumerate(event for event in data.split(b"\n\n")[:-1] if not event.startswith(b":")):
        assert not found.is_done, "nothing follows [DONE]"
        assert found.error is None, "nothing follows an error"
        payload = raw.removeprefix(b"event: error\n")
        assert payload.startswith(b"data: ")
        payload = payload.removeprefix(b"data: ")
        if payload == b"[DONE]":
            assert found.finish_reason is not None, "[DONE] follows a finish"
            assert (found.usage is not None) == include_usage
            found.is_done = True
            continue
        chunk = json.loads(payload)
        if "error" in chunk:
            assert raw.startswith(b"event: error\n")
            found.error = chunk["error"]
            continue
        ChatCompletionChunk.model_validate(chunk, strict=True)
        identities.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
        assert ("usage" in chunk) == include_usage
        _add(found, chunk, is_first=number == 0)
    assert len(identities) <= 1
    if is_whole:
        assert found.is_done or found.error is not None
    return found


def _add(found: ChatStream, chunk: dict[str, Any], *, is_first: bool) -> None:
    if not chunk["choices"]:
        assert found.finish_reason is not None
        assert found.usage is None, "usage comes once"
        found.usage = chunk["usage"]
        return
    assert found.finish_reason is None, "nothing but usage follows the finish"
    assert chunk.get("usage") is None
    (choice,) = chunk["choices"]
    assert choice["index"] == 0
    delta = choice["delta"]
    assert ("role" in delta) == is_first
    found.finish_reason = choice["finish_reason"]
    assert found.finish_reason is None or delta == {}
    found.content += delta.get("content", "")
    found.reasoning += delta.get("reasoning_content", "")
    found.refusal += delta.get("refusal", "")
    if "thinking_blocks" in delta:
        assert not found.thinking_blocks
        found.thinking_blocks = delta["thinking_blocks"]
    for call in delta.get("tool_calls", ()):
        _add_call(found, call)


def _add_call(found: ChatStream, call: dict[str, Any]) -> None:
    if "id" in call:
        assert call["index"] == len(found.calls)
        assert call["type"] == "function"
        found.calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
    else:
        assert set(call) == {"index", "function"}
        assert set(call["function"]) == {"arguments"}
    found.calls[call["index"]]["arguments"] += call["function"]["arguments"]
