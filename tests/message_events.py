"""The grammar of Anthropic's event streams, and the final message an SDK makes of one."""

from __future__ import annotations

import json
from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

_events: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
_DELTA_OF = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}


def read_events(stream: bytes) -> list[dict[str, Any]]:
    """Return the payloads of a stream, which consists of whole events named after their types."""
    assert not stream or stream.endswith(b"\n\n")
    found = []
    for raw in stream.split(b"\n\n")[:-1]:
        name, payload = raw.split(b"\n")
        event = json.loads(payload.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        found.append(event)
    return found


def check_grammar(events: list[dict[str, Any]], *, is_whole: bool = True) -> None:
    """Assert: message_start (block_start delta* block_stop)* message_delta message_stop; indexes 0, 1, 2…

    ``is_whole`` False: the stream may end anywhere, or with an error.
    """
    open_kind: str | None = None
    index = 0
    expected = {"message_start", "error"}
    for event in events:
        kind = event["type"]
        assert kind in expected, f"{kind} where one of {expected} may stand"
        if kind == "error":
            expected = set()
            continue
        _events.validate_python(event)
        if kind.startswith("content_block"):
            assert event["index"] == index
        if kind == "content_block_start":
            open_kind = event["content_block"]["type"]
            expected = {"content_block_delta", "content_block_stop", "error"}
        elif kind == "content_block_delta":
            assert event["delta"]["type"] == _DELTA_OF[open_kind or ""]
        elif kind == "message_delta":
            expected = {"message_stop"}
        elif kind == "message_stop":
            expected = set()
        else:
            index += kind == "content_block_stop"
            expected = {"content_block_start", "message_delta", "error"}
    assert not is_whole or not expected, f"the stream ends where one of {expected} must stand"


def final_message(events: list[dict[str, Any]]) -> Message:
    """Return what the SDK's own accumulator makes of a whole stream."""
    message = None
    buffers: dict[int, bytes] = {}
    for event in events:
        parsed = _events.validate_python(event)
        message = accumulate_event(event=parsed, current_snapshot=message, json_bufs=buffers)
    assert message is not None
    found: Message = Message.model_validate(message.to_dict(exclude_unset=False))
    return found
