"""Guess token counts from text where the provider reported none; good for a budget, marked as a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from penstock.models import Usage

if TYPE_CHECKING:
    from penstock.metering import BodyWindow

BYTES_PER_TOKEN = 4
_MAX_WORD = 2048
"""A longer string without a space is a file in base64, not a text."""
_MAX_READ = 256 * 1024
"""A larger request counts by its length: reading it would hold up every other exchange."""
_MAX_STRINGS = 20_000
"""What follows these in one member counts by its length."""

# The inside of a string, matched once and for all: atomic groups, for possessive ones match wrongly before
# CPython 3.11.5; two of them, because the matcher keeps some memory per repetition until one ends.
_INSIDE = rb'[^"\\]*+(?>(?:(?>(?:\\.[^"\\]*+){1,2000}))*)'
_WS = rb"[ \t\n\r]*+"
_string = re.compile(rb'"' + _INSIDE + rb'"', re.DOTALL).match
_numbers = re.compile(rb"[0-9]++").findall


def _values_of(*names: bytes) -> re.Pattern[bytes]:
    """Match the string values of members with these names; one the body was cut in counts up to the cut."""
    return re.compile(
        rb'"(?:' + rb"|".join(names) + rb')"' + _WS + rb":" + _WS + rb'"(' + _INSIDE + rb")",
        re.DOTALL,
    )


_JSON_TEXT = _values_of(b"content", b"text", b"arguments", b"reasoning", b"reasoning_content", b"thinking", b"refusal")
_CHAT_DELTAS = _values_of(
    b"content",
    b"text",
    b"arguments",
    b"reasoning",
    b"reasoning_content",
    b"thinking",
    b"refusal",
    b"partial_json",
)
_is_responses = re.compile(rb'"type":' + _WS + rb'"response\.').search
_RESPONSES_DELTAS = _values_of(b"delta")  # the events that follow repeat the text as a whole


class _Prompt(msgspec.Struct):
    """The members of any dialect's request that the model reads."""

    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")
    contents: msgspec.Raw = msgspec.Raw(b"")
    system_instruction: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name="systemInstruction")


_decode_prompt = msgspec.json.Decoder(_Prompt).decode


def estimate_usage(
    request_body: bytes,
    window: BodyWindow,
    *,
    is_stream: bool,
    token_counter: Callable[[str], int] | None = None,
) -> Usage:
    """Estimate usage from the text of a request and of what the meter kept of its response.

    request_body: decoded JSON; a form counts as one token, other bytes, and bodies over 256 KiB, by their
    length. Without a counter four bytes of UTF-8 make a token. What a cut window lacks is scaled up from what
    it has. Raises only what token_counter raises.
    """
    return Usage(
        input=_estimate_input(request_body, token_counter),
        output=_estimate_output(window, is_stream=is_stream, token_counter=token_counter),
        source="estimated",
    )


def _estimate_input(body: bytes, token_counter: Callable[[str], int] | None) -> int:
    if not body:
        return 0
    if len(body) > _MAX_READ:
        return 1 if body.startswith(b"--") else _count_by_length(body)
    try:
        prompt = _decode_prompt(body)
    except (ValueError, RecursionError):
        return 1 if body.startswith(b"--") else -(-len(body) // BYTES_PER_TOKEN)
    raws = [bytes(getattr(prompt, name)) for name in prompt.__struct_fields__]
    texts: list[bytes] = []
    unread = sum(_add_strings(texts, raw) for raw in raws)
    tokens = _count(texts, b"\n", token_counter) + unread // BYTES_PER_TOKEN
    for ids in (raws[1], raws[2]):  # input and prompt may be arrays of token ids
        if b'"' not in ids:
            tokens += len(_numbers(ids))
    return max(tokens, 1) if any(raw not in {b"", b"null", b"[]", b'""'} for raw in raws) else 0


def _count_by_length(body: bytes) -> int:
    """Count a large body by its length, strings without a space left out where they are too long for a word."""
    left_out = position = 0
    for _ in range(_MAX_STRINGS):
        end = body.find(b'"', position)
        if end < 0:
            break
        if end - position > _MAX_WORD and body.find(b" ", position, end) < 0:
            left_out += end - position
        position = end + 1
    return max(1, (len(body) - left_out) // BYTES_PER_TOKEN)


def _add_strings(texts: list[bytes], raw: bytes) -> int:
    """Collect the strings of a JSON value, names too (schemas have them); return the bytes left out."""
    position = raw.find(b'"')
    bound = len(texts) + _MAX_STRINGS
    while position >= 0:
        if len(texts) >= bound:
            return len(raw) - position
        end = raw.find(b'"', position + 1)
        if raw[end - 1] == ord("\\"):
            found = _string(raw, position)
            end = -1 if found is None else found.end() - 1
        if end < 0:
            break
        if end - position <= _MAX_WORD or raw.find(b" ", position, end) >= 0:
            texts.append(raw[position + 1 : end])
        position = raw.find(b'"', end + 1)
    return 0


def _estimate_output(window: BodyWindow, *, is_stream: bool, token_counter: Callable[[str], int] | None) -> int:
    if not is_stream:
        pattern = _JSON_TEXT
    elif _is_responses(window.head):
        pattern = _RESPONSES_DELTAS
    else:
        pattern = _CHAT_DELTAS
    texts: list[bytes] = []
    seen = 0
    for part in (window.text,) if window.is_whole else (window.head, window.tail):
        found = pattern.findall(part)
        texts += found
        seen += len(part) if found else 0  # a part may lie within one long string: its text is not found
    tokens = _count(texts, b"", token_counter)
    if tokens and not window.is_whole and seen < window.total_bytes:
        tokens = -(-tokens * window.total_bytes // seen)
    return tokens


def _count(texts: Iterable[bytes], separator: bytes, token_counter: Callable[[str], int] | None) -> int:
    """Count the tokens of raw JSON strings; 0 where they are all empty."""
    text = _unescape([text for text in texts if text], separator.replace(b"\n", b"\\n"))
    if not text:
        return 0
    if token_counter is not None:
        return max(1, token_counter(text))
    return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)


def _unescape(texts: list[bytes], separator: bytes) -> str:
    raw = separator.join(texts).decode("utf-8", "replace")
    if "\\" not in raw:
        return raw
    try:
        text: str = json.loads(f'"{raw}"', strict=False)
    except ValueError:
        return raw
    return text
