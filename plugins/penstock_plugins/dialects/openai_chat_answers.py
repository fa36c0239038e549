"""What Anthropic's Messages answers, as chat completions: whole bodies, errors and streams. Sans-IO.

Texts and arguments are carried over as they are spelled. Blocks and events that chat completions have no words for
(those of server tools, citations, whatever is yet to come) are passed over.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock import UpstreamError
from penstock_plugins.dialects.shared import (
    Members,
    encode,
    is_text,
    openai_error,
    read_error,
    sse,
    status_of,
)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": ping\n\n"
_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "compaction": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_TIERS = {"standard": "default", "priority": "priority"}
_THINKING = ("thinking", "redacted_thinking")
_EMPTY = msgspec.Raw(b'""')


class _Counts(msgspec.Struct):
    input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: dict[str, Any] | None = None
    service_tier: str | None = None

    def update(self, later: _Counts) -> None:
        """Take over what a later report says: its numbers are cumulative."""
        for name in self.__struct_fields__:
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value)

    def as_chat(self) -> dict[str, Any]:
        """Return OpenAI's usage object, where cached tokens are part of the prompt."""
        read, written = self.cache_read_input_tokens or 0, self.cache_creation_input_tokens or 0
        prompt, completion = (self.input_tokens or 0) + read + written, self.output_tokens or 0
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": read, "cache_write_tokens": written},
        }
        thinking = (self.output_tokens_details or {}).get("thinking_tokens")
        if isinstance(thinking, int):
            usage["completion_tokens_details"] = {"reasoning_tokens": thinking}
        return usage


class _Ending(msgspec.Struct):
    stop_reason: str | None = None
    stop_details: dict[str, Any] | None = None

    @property
    def refusal(self) -> str | None:
        """Return why the model refused, where that is said."""
        explanation = (self.stop_details or {}).get("explanation")
        return explanation if self.stop_reason == "refusal" and isinstance(explanation, str) else None

    def finish_reason(self, *, has_calls: bool) -> str:
        return _REASONS.get(self.stop_reason or "", "tool_calls" if has_calls else "stop")


class _Message(_Ending):
    id: str = ""
    model: str = ""
    content: list[Members] = []
    usage: _Counts = msgspec.field(default_factory=_Counts)


class _WholeMessage(_Message, kw_only=True):
    content: list[Members]


class _Event(msgspec.Struct):
    type: str = ""
    index: int = 0
    message: _Message | None = None
    content_block: Members | None = None
    delta: msgspec.Raw = msgspec.Raw(b"{}")
    usage: _Counts | None = None


_decode_message = msgspec.json.Decoder(_WholeMessage).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_members = msgspec.json.Decoder(Members).decode
_decode_ending = msgspec.json.Decoder(_Ending).decode


class ChatAnswer:
    """Turn one answer round; see ``shared.Answer``."""

    def __init__(self, created: int, model: str, *, include_usage: bool) -> None:
        """``created``: seconds since 1970. ``model``: what is said where the provider names none."""
        self._created = created
        self._model = model
        self._include_usage = include_usage
        self._start = self._stop = b""
        """What is around the delta of every chunk."""
        self._counts = _Counts()
        self._ending = _Ending()
        self._blocks: dict[int, Members] = {}
        """Blocks that have begun and not ended."""
        self._calls: dict[int, int] = {}
        """Which call of the chat message each such block is."""
        self._call_count = 0
        self._empty_calls: set[int] = set()
        """Blocks of calls that have no arguments yet."""
        self._thinking: list[Any] = []
        """Blocks of thinking that are complete."""
        self._thoughts: dict[int, list[msgspec.Raw]] = {}
        """The texts of those that are not, so far."""
        self._is_over = False

    # --- whole ----------------------------------------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """Return the chat completion. Raises ValueErrors for what is no message."""
        message = _decode_message(body)
        blocks = message.content
        calls = [_call_of(block) for block in blocks if _kind_of(block) == "tool_use"]
        texts = [block["text"] for block in blocks if _kind_of(block) == "text" and is_text(block.get("text"))]
        said: dict[str, Any] = {"role": "assistant", "content": None, "refusal": message.refusal}
        if texts or not calls:
            said["content"] = _joined(texts)
        thinking = [block for block in blocks if _kind_of(block) in _THINKING]
        if thinking:
            thoughts = [block["thinking"] for block in thinking if is_text(block.get("thinking"))]
            said["reasoning_content"] = _joined(thoughts)
            said["thinking_blocks"] = thinking
        if calls:
            said["tool_calls"] = calls
        finish = message.finish_reason(has_calls=bool(calls))
        choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish}
        completion = self._envelope("chat.completion", message)
        completion |= {"choices": [choice], "usage": message.usage.as_chat()}
        tier = _TIERS.get(message.usage.service_tier or "")
        return encode(completion if tier is None else {**completion, "service_tier": tier})

    def error(self, status: int, body: bytes) -> bytes:
        return openai_error(read_error(body), status)

    def _envelope(self, kind: str, message: _Message) -> dict[str, Any]:
        model = message.model or self._model
        return {"id": message.id or "chatcmpl", "object": kind, "created": self._created, "model": model}

    # --- streams --------------------------------------------------------------------------------------------------

    def event(self, name: str | None, payload: bytes) -> bytes:
        """Return the chunks that an event becomes. Raises ValueErrors for what cannot be read."""
        if self._is_over:
            return b""
        event = _decode_event(payload)
        kind = event.type or name or ""
        if kind == "content_block_delta":
            return self._on_delta(event)
        if kind == "content_block_start":
            return self._on_block(event)
        if kind == "content_block_stop":
            return self._on_block_end(event.index)
        if kind == "message_start":
            self._counts.update(event.message.usage if event.message is not None else _Counts())
            return self._begin(event.message or _Message())
        if kind == "message_delta":
            return self._on_ending(event)
        if kind == "message_stop":
            return self._finish()
        if kind == "error":
            self._is_over = True
            error = read_error(payload)
            return sse(openai_error(error, status_of(error)), "error")
        return _KEEP_ALIVE if kind == "ping" and self._start else b""

    def end(self) -> bytes:
        """Return nothing. Raises UpstreamError where the message has not come to its end."""
        if not self._is_over:
            raise UpstreamError("truncated", "its stream ended before its message did")
        return b""

    def _begin(self, message: _Message) -> bytes:
        """Return the first chunk, which names the role; nothing where it was sent before."""
        if self._start:
            return b""
        envelope = encode(self._envelope("chat.completion.chunk", message))
        self._start = b'data: %b,"choices":[{"index":0,"delta":' % envelope[:-1]
        self._stop = b',"usage":null}\n\n' if self._include_usage else b"}\n\n"
        return self._chunk({"role": "assistant", "content": ""})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = b',"logprobs":null,"finish_reason":%b}]' % encode(finish_reason)
        return self._start + encode(delta) + choice + self._stop

    def _on_block(self, event: _Event) -> bytes:
        block = self._blocks[event.index] = event.content_block or {}
        begun = self._begin(_Message())
        kind = _kind_of(block)
        if kind == "tool_use":
            self._calls[event.index] = number = self._call_count
            self._call_count += 1
            self._empty_calls.add(event.index)
            call = {"index": number, "id": block.get("id", _EMPTY), "type": "function"}
            call["function"] = {"name": block.get("name", _EMPTY), "arguments": ""}
            return begun + self._chunk({"tool_calls": [call]})
        member = {"text": "content", "thinking": "reasoning_content"}.get(kind)
        if member is not None and _says(block.get(kind)):
            return begun + self._chunk({member: block[kind]})
        return begun

    def _on_delta(self, event: _Event) -> bytes:
        delta = _decode_members(event.delta)
        kind = _kind_of(delta)
        block = self._blocks.setdefault(event.index, {"type": msgspec.Raw(b'"%b"' % _BEGUN_BY.get(kind, b""))})
        begun = self._begin(_Message())
        of = _kind_of(block)
        if kind == "text_delta" and of == "text" and _says(delta.get("text")):
            return begun + self._chunk({"content": delta["text"]})
        if kind == "input_json_delta" and event.index in self._calls and _says(delta.get("partial_json")):
            self._empty_calls.discard(event.index)
            return begun + self._arguments(event.index, delta["partial_json"])
        if kind == "thinking_delta" and of == "thinking" and _says(delta.get("thinking")):
            self._thoughts.setdefault(event.index, [block.get("thinking", _EMPTY)]).append(delta["thinking"])
            return begun + self._chunk({"reasoning_content": delta["thinking"]})
        if kind == "signature_delta" and of == "thinking" and is_text(delta.get("signature")):
            block["signature"] = delta["signature"]
        return begun

    def _arguments(self, index: int, arguments: object) -> bytes:
        return self._chunk({"tool_calls": [{"index": self._calls[index], "function": {"arguments": arguments}}]})

    def _on_block_end(self, index: int) -> bytes:
        block = self._blocks.pop(index, {})
        if _kind_of(block) in _THINKING:
            thoughts = self._thoughts.pop(index, None)
            self._thinking.append(block if thoughts is None else {**block, "thinking": _joined(thoughts)})
        return self._fill_in(index, block)

    def _fill_in(self, index: int, block: Members) -> bytes:
        """Return the arguments of a call that came with its beginning, or are none: chat wants JSON."""
        if index not in self._empty_calls:
            return b""
        self._empty_calls.discard(index)
        return self._arguments(index, _arguments_of(block))

    def _on_ending(self, event: _Event) -> bytes:
        if event.usage is not None:
            self._counts.update(event.usage)
        ending = _decode_ending(event.delta)
        if ending.stop_reason is not None:
            self._ending = ending
        return b""

    def _finish(self) -> bytes:
        out = [self._begin(_Message())]
        out += [self._on_block_end(index) for index in list(self._blocks)]
        if self._thinking:
            out.append(self._chunk({"thinking_blocks": self._thinking}))
        if self._ending.refusal is not None:
            out.append(self._chunk({"refusal": self._ending.refusal}))
        out.append(self._chunk({}, self._ending.finish_reason(has_calls=bool(self._call_count))))
        if self._include_usage:
            envelope = self._start.removesuffix(b'[{"index":0,"delta":')
            out.append(envelope + b'[],"usage":%b}\n\n' % encode(self._counts.as_chat()))
        out.append(DONE)
        self._is_over = True
        return b"".join(out)


_BEGUN_BY = {"text_delta": b"text", "thinking_delta": b"thinking"}
"""What a block is whose beginning did not come."""


def _kind_of(members: Members) -> str:
    raw = members.get("type")
    return bytes(raw)[1:-1].decode("utf-8", "replace") if raw is not None and is_text(raw) else ""


def _says(raw: msgspec.Raw | None) -> bool:
    return is_text(raw) and raw != _EMPTY


def _joined(texts: list[msgspec.Raw]) -> msgspec.Raw:
    """Return JSON strings as one, spelled as they are."""
    return msgspec.Raw(b'"%b"' % b"".join([bytes(text)[1:-1] for text in texts]))


def _arguments_of(block: Members) -> str:
    """Return the input of a call as the string that chat has, spelled as it is."""
    raw = block.get("input")
    return "{}" if raw is None or bytes(raw) == b"null" else bytes(raw).decode()


def _call_of(block: Members) -> dict[str, Any]:
    function = {"name": block.get("name", _EMPTY), "arguments": _arguments_of(block)}
    return {"id": block.get("id", _EMPTY), "type": "function", "function": function}
