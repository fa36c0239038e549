"""Answers of chat completions as Anthropic messages: whole ones, errors, and what streams share with them.

Shapes: https://platform.openai.com/docs/api-reference/chat/object, and what compatible providers make of it: reasoning
in ``reasoning_content`` or ``reasoning``, content in parts, arguments as an object, errors inside a 200.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec

from penstock import BodyWindow, UpstreamError
from penstock.dialects.openai import read_usage
from penstock_plugins.dialects.shared import (
    UNREADABLE,
    Members,
    ProviderError,
    Raw,
    anthropic_error,
    encode,
    read_error,
)

NO_USAGE = {
    "input_tokens": 0,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 0,
}
"""What is said before a provider has counted, or where it never does."""
_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "model_length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
_WORDS = (
    ("rate_limit", 429),
    ("quota", 429),
    ("overloaded", 529),
    ("invalid_request", 400),
    ("context_length", 400),
    ("auth", 401),
    ("permission", 403),
    ("not_found", 404),
    ("timeout", 504),
)
"""What types and codes of errors hold, and the status that they would have had."""
_no_id = re.compile(r"[^a-zA-Z0-9_-]")
_decode_object = msgspec.json.Decoder(Members).decode
_decode = msgspec.json.decode


def read_answer(payload: bytes) -> dict[str, Any]:
    """Return a body or a chunk. Raises UpstreamError ``protocol``."""
    try:
        found: object = _decode(payload)
    except UNREADABLE:
        found = None
    if not isinstance(found, dict):
        raise UpstreamError("protocol", "its answer is no JSON object")
    return found


def text_in(found: object, name: str) -> str:
    """Return a string member of what may be an object; empty where there is none."""
    value = found.get(name) if isinstance(found, dict) else None
    return value if isinstance(value, str) else ""


def texts_of(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the kind, thinking or text, and the words of what a message or a delta says; none are empty."""
    reasoning = text_in(message, "reasoning_content") or text_in(message, "reasoning")
    if reasoning:
        yield "thinking", reasoning
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if text_in(part, "type") == "thinking":  # Mistral
            inner = part.get("thinking")
            words = "".join(text_in(piece, "text") for piece in inner) if isinstance(inner, list) else ""
            if words:
                yield "thinking", words
        elif text_in(part, "text"):
            yield "text", text_in(part, "text")
    if text_in(message, "refusal"):
        yield "text", text_in(message, "refusal")


def is_object(arguments: str) -> bool:
    """Tell whether a tool's arguments are a whole JSON object."""
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        _decode_object(arguments)
    except UNREADABLE:
        return False
    return True


def arguments_of(function: object) -> str:
    """Return a call's arguments as JSON text; empty where there are none."""
    value = function.get("arguments") if isinstance(function, dict) else None
    return encode(value).decode() if isinstance(value, dict) else value if isinstance(value, str) else ""


def message_id(found: dict[str, Any]) -> str:
    """Return the id of a message, after the provider's own where it gave one."""
    return f"msg_{text_in(found, 'id').removeprefix('chatcmpl-') or secrets.token_hex(12)}"


def call_id(ident: str) -> str:
    """Return the id of a call in the letters that Anthropic takes; one of our own where the provider gave none.

    Some servers number calls as ``functions.weather:0``; Anthropic refuses every later turn with such a call in it.
    """
    return _no_id.sub("_", ident) or f"toolu_{secrets.token_hex(12)}"


def usage_in(payload: bytes) -> dict[str, Any] | None:
    """Return the usage of a body or chunk, each token in one class: Anthropic's input is without cached tokens."""
    found = read_usage(BodyWindow(payload, b"", len(payload)), is_stream=False)
    if found is None:
        return None
    usage: dict[str, Any] = {
        "input_tokens": found.input,
        "cache_creation_input_tokens": found.cache_write_5m + found.cache_write_1h,
        "cache_read_input_tokens": found.cache_read,
        "output_tokens": found.output,
    }
    if found.reasoning:
        usage["output_tokens_details"] = {"thinking_tokens": found.reasoning}
    return usage


@attrs.frozen
class Stop:
    """Say why an answer ended."""

    reason: str
    sequence: str | None = None
    """The stop sequence; only vLLM says which it was."""


def stop_of(choice: dict[str, Any], stops: tuple[str, ...], *, has_calls: bool, has_refused: bool) -> Stop:
    """Return why an answer ended, from the choice that says so."""
    finish = text_in(choice, "finish_reason")
    reason = _REASONS.get(finish, "end_turn")
    if has_refused:
        return Stop("refusal")
    if reason in ("end_turn", "tool_use"):
        reason = "tool_use" if has_calls else "end_turn"
    sequence = text_in(choice, "stop_reason")
    return Stop("stop_sequence", sequence) if reason == "end_turn" and sequence in stops else Stop(reason)


def message_error(error: ProviderError, status: int) -> bytes:
    """Return an error in Anthropic's envelope; one of length begins as Anthropic's do, which assistants act on."""
    if error.code == "context_length_exceeded" and not error.message.startswith("prompt is too long"):
        error = attrs.evolve(error, message=f"prompt is too long: {error.message}")
    return anthropic_error(error, status)


def status_in_stream(error: ProviderError) -> int:
    """Return the status that an error inside a 200 would have had."""
    if error.code is not None and error.code.isdecimal() and 400 <= int(error.code) < 600:
        return int(error.code)
    words = f"{error.kind} {error.code}".lower()
    return next((status for word, status in _WORDS if word in words), 500)


def whole_message(body: bytes, stops: tuple[str, ...], *, shows_thinking: bool) -> bytes:
    """Return a whole answer as a message. Raises UpstreamError ``protocol``."""
    found = read_answer(body)
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise UpstreamError("protocol", "its answer holds no message")
    content = [_block(kind, words) for kind, words in texts_of(message) if kind == "text" or shows_thinking]
    calls = list(_calls(message, is_cut=text_in(choice, "finish_reason") in ("length", "model_length")))
    has_refused = bool(text_in(message, "refusal"))
    stop = stop_of(choice, stops, has_calls=bool(calls), has_refused=has_refused)
    return encode(
        {
            "id": message_id(found),
            "type": "message",
            "role": "assistant",
            "model": text_in(found, "model"),
            "content": content + calls,
            "stop_reason": stop.reason,
            "stop_sequence": stop.sequence,
            "usage": usage_in(body) or NO_USAGE,
        }
    )


def _block(kind: str, words: str) -> dict[str, Any]:
    if kind == "thinking":
        return {"type": "thinking", "thinking": words, "signature": ""}
    return {"type": "text", "text": words}


def _calls(message: dict[str, Any], *, is_cut: bool) -> Iterator[dict[str, Any]]:
    """Yield calls as blocks. One that ``max_tokens`` cut short is none; else arguments must be an object."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        name = text_in(function, "name")
        arguments = arguments_of(function) or "{}"
        if not name or not is_object(arguments):
            if is_cut:
                continue
            raise UpstreamError("protocol", "its answer calls a tool with arguments that are no JSON object")
        yield {
            "type": "tool_use",
            "id": call_id(text_in(call, "id")),
            "name": name,
            "input": Raw(arguments.encode()),
        }


def error_body(status: int, body: bytes) -> bytes:
    """Return the body of an error of chat completions in Anthropic's envelope."""
    return message_error(read_error(body), status)
