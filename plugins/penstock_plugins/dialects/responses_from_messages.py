"""Read what Anthropic's Messages answers into a response of the Responses API: bodies, events, errors. Sans-IO."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from penstock import UpstreamError
from penstock_plugins.dialects.responses_events import Reason, ResponseWriter, Spent
from penstock_plugins.dialects.responses_input import seal_thought
from penstock_plugins.dialects.shared import Members, ProviderError, encode, openai_error, read_error

THINKING = "anthropic.thinking"
REDACTED = "anthropic.redacted"
_EMPTY_INPUTS = (b"", b"{}", b"null")


class _Ending(msgspec.Struct):
    stop_reason: str | None = None
    stop_details: dict[str, Any] | None = None


class _Message(_Ending, kw_only=True):
    model: str | None = None
    content: list[Members] | None = None
    usage: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    type: str = ""
    index: int = 0
    message: _Message | None = None
    content_block: Members | None = None
    delta: Members | None = None
    usage: dict[str, Any] | None = None


_read_message = msgspec.json.Decoder(_Message).decode
_read_event = msgspec.json.Decoder(_Event).decode
_read_text = msgspec.json.Decoder(str | None).decode
_KEEP_ALIVE = b": ping\n\n"
_INCOMPLETE: dict[str, Reason] = {
    "max_tokens": "max_output_tokens",
    "model_context_window_exceeded": "max_output_tokens",
    "refusal": "content_filter",
}


class MessagesAnswer:
    """Read a message, whole or as events, into a response; see ``shared.Answer``.

    Blocks and events of later versions, of server tools and of citations are passed over.
    """

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer
        self._blocks: dict[int, Members] = {}
        self._signatures: dict[int, str] = {}
        self._ending = _Ending()
        self._usage: dict[str, Any] = {}

    def whole(self, body: bytes) -> bytes:
        message = _read_message(body)
        if message.content is None:
            raise UpstreamError("protocol", "its answer holds no content")
        self._writer.start(message.model)
        for index, block in enumerate(message.content):
            self._begin(index, block)
            self._close(index)
        self._count(message.usage)
        self._ending = message
        self._end()
        return encode(self._writer.whole)

    def error(self, status: int, body: bytes) -> bytes:
        return openai_error(_named(read_error(body)), status)

    def event(self, name: str | None, payload: bytes) -> bytes:
        self._writer.is_stream = True
        if self._writer.is_ended:
            return b""
        event = _read_event(payload)
        kind = event.type or name or ""
        if kind == "error":
            error = _named(read_error(payload))
            self._writer.fail(error.code or error.kind or "server_error", error.message)
        elif kind == "ping":
            return _KEEP_ALIVE if self._writer.is_started else b""
        else:
            self._take(kind, event)
        return self._writer.take()

    def end(self) -> bytes:
        if not self._writer.is_ended:
            raise UpstreamError("truncated", "its stream ended before its message did")
        return b""

    def _take(self, kind: str, event: _Event) -> None:
        if kind == "message_start":
            message = event.message or _Message()
            self._count(message.usage)
            self._writer.start(message.model)
        elif kind == "content_block_start":
            self._writer.start(None)
            self._begin(event.index, event.content_block or {})
        elif kind == "content_block_delta":
            self._take_delta(event.index, event.delta or {})
        elif kind == "content_block_stop":
            self._close(event.index)
        elif kind == "message_delta":
            self._count(event.usage)
            ending = msgspec.convert(_members_of(event.delta), _Ending)
            self._ending = ending if ending.stop_reason is not None else self._ending
        elif kind == "message_stop":
            self._end()

    def _begin(self, index: int, block: Members) -> None:
        """Take a block, or how it begins."""
        kind = _text(block, "type")
        self._blocks[index] = block
        if kind == "text":
            self._writer.text(_text(block, "text"))
        elif kind == "thinking":
            self._writer.close_speech()
            self._writer.reasoning(_text(block, "thinking"))
            self._signatures[index] = _text(block, "signature")
        elif kind == "redacted_thinking":
            self._writer.close_speech()
            self._writer.seal(seal_thought(REDACTED, _text(block, "data")))
        elif kind == "tool_use":
            self._writer.call(index, _text(block, "name"), _text(block, "id"))

    def _take_delta(self, index: int, delta: Members) -> None:
        kind = _text(delta, "type")
        begun = _text(self._blocks.get(index, {}), "type")
        if kind == "text_delta" and begun == "text":
            self._writer.text(_text(delta, "text"))
        elif kind == "thinking_delta" and begun == "thinking":
            self._writer.reasoning(_text(delta, "thinking"))
        elif kind == "signature_delta" and begun == "thinking":
            self._signatures[index] += _text(delta, "signature")
        elif kind == "input_json_delta" and self._writer.is_open(index):
            self._writer.arguments(index, _text(delta, "partial_json"))

    def _close(self, index: int) -> None:
        """Take the end of a block."""
        block = self._blocks.pop(index, {})
        signature = self._signatures.pop(index, None)
        if signature:
            self._writer.seal(seal_thought(THINKING, signature))
        elif signature is not None:
            self._writer.close_speech()
        if self._writer.is_open(index):
            given = bytes(block.get("input", b""))
            if given not in _EMPTY_INPUTS and not self._writer.has_arguments(index):
                self._writer.arguments(index, given.decode("utf-8", "replace"))
            self._writer.close_whole_call(index)

    def _count(self, usage: dict[str, Any] | None) -> None:
        """Take counts, which are cumulative: the last of each holds."""
        self._usage |= {name: value for name, value in (usage or {}).items() if value is not None}

    def _end(self) -> None:
        details = self._ending.stop_details or {}
        if self._ending.stop_reason == "refusal" and isinstance(details.get("explanation"), str):
            self._writer.refusal(details["explanation"])
        self._writer.end(_spent(self._usage), _INCOMPLETE.get(self._ending.stop_reason or ""))


def _text(members: Members, name: str) -> str:
    raw = members.get(name)
    return "" if raw is None else _read_text(raw) or ""


def _members_of(delta: Members | None) -> dict[str, Any]:
    """Return the end of a message as plain values."""
    names = ("stop_reason", "stop_details")
    return {name: msgspec.json.decode(delta[name]) for name in names if delta is not None and name in delta}


def _named(error: ProviderError) -> ProviderError:
    """Return an error with the code that clients of the Responses API act upon, where there is one."""
    text = error.message.lower()
    if "prompt is too long" in text or "context window" in text or "context limit" in text:
        return attrs.evolve(error, code="context_length_exceeded")
    if error.kind == "rate_limit_error":
        return attrs.evolve(error, code="rate_limit_exceeded")
    if error.kind == "billing_error" or "credit balance is too low" in text:
        return attrs.evolve(error, code="insufficient_quota")
    return error


def _spent(usage: dict[str, Any]) -> Spent | None:
    if not usage:
        return None
    read, written = _number(usage, "cache_read_input_tokens"), _number(usage, "cache_creation_input_tokens")
    details = usage.get("output_tokens_details")
    return Spent(
        _number(usage, "input_tokens") + read + written,
        read,
        written,
        _number(usage, "output_tokens"),
        _number(details, "thinking_tokens") if isinstance(details, dict) else 0,
    )


def _number(members: dict[str, Any], name: str) -> int:
    found = members.get(name)
    return found if type(found) is int else 0
