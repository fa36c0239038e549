"""The OpenAI dialect as OpenAI, Azure and the compatible providers speak it.

Usage is asked for on chat streams, read from what the meter kept, and what asking added is taken out again.
Shapes: https://platform.openai.com/docs/api-reference, and replies recorded from the providers named below.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from penstock import splice
from penstock.dialects.windows import (
    COUNT_LIMIT,
    USAGE,
    Carrier,
    count,
    joined,
    usage_before_end,
    usage_in_cut_json,
    whole_payloads,
)
from penstock.models import Usage
from penstock.peek import RequestPeek
from penstock.splice import Span, SpliceError
from penstock.sse import EventSplitter, parse_event, replace_payload

if TYPE_CHECKING:
    from penstock.metering import BodyWindow

MAX_EVENT_BYTES = 256 * 1024
"""A longer event passes the usage frame filter unread."""

_ERRORS = (ValueError, RecursionError)  # msgspec's errors are ValueErrors


_Tokens = Annotated[int, msgspec.Meta(ge=0, le=COUNT_LIMIT)] | None


class _CachedDetails(msgspec.Struct, gc=False):
    audio_tokens: _Tokens = None


class _Details(msgspec.Struct, gc=False):
    cached_tokens: _Tokens = None
    cache_write_tokens: _Tokens = None
    reasoning_tokens: _Tokens = None
    audio_tokens: _Tokens = None
    cached_tokens_details: _CachedDetails | None = None  # audio models


class _Counts(msgspec.Struct, gc=False):
    """A usage object in any of its spellings."""

    prompt_tokens: _Tokens = None
    completion_tokens: _Tokens = None
    input_tokens: _Tokens = None
    output_tokens: _Tokens = None
    total_tokens: _Tokens = None
    prompt_tokens_details: _Details | None = None
    prompt_token_details: _Details | None = None  # assistants
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    input_token_details: _Details | None = None  # transcriptions
    output_tokens_details: _Details | None = None
    output_token_details: _Details | None = None
    prompt_cache_hit_tokens: _Tokens = None  # DeepSeek
    num_cached_tokens: _Tokens = None  # Mistral
    cached_tokens: _Tokens = None  # Moonshot, Together


class _StrictCarrier(msgspec.Struct, gc=False):
    usage: _Counts | None = None


class _StrictAnswer(msgspec.Struct, gc=False):
    """The places where a JSON reply or an event may carry usage."""

    usage: _Counts | None = None
    response: _StrictCarrier | None = None  # events of the Responses API
    x_groq: _StrictCarrier | None = None  # Groq's streams, on their last chunk


class _Answer(msgspec.Struct):
    """The same, whatever the types inside."""

    usage: Any = None
    response: Carrier | None = None
    x_groq: Carrier | None = None


_decode_strictly = msgspec.json.Decoder(_StrictAnswer).decode
_decode_answer = msgspec.json.Decoder(_Answer).decode


def read_usage(window: BodyWindow, *, is_stream: bool) -> Usage | None:
    """Read token counts out of a response body; None when it holds none. Never raises.

    Cached and cache-written tokens are part of what OpenAI calls prompt or input tokens and are taken out of
    them; reasoning is part of the output. On a stream the last object counts, on JSON the top-level one. A
    body cut short is searched by structure: what a model or user wrote never passes for the provider's count.
    """
    if is_stream:
        return _read_stream(window)
    if window.is_whole:
        try:
            return _decode_usage(window.text)
        except _ERRORS:
            pass
    return _classify_loosely(usage_in_cut_json(window))


def _read_stream(window: BodyWindow) -> Usage | None:
    tail = window.tail
    if not tail:
        return _last_in(window.head)
    found = _last_in(tail)
    if found is None and not window.is_whole:  # perhaps an event too large for the window: only its end is there
        first = tail.partition(b"\n")[0]
        found = usage_before_end(first, b"{", _decode_usage)
        found = found or usage_before_end(first, b'{"response":{', _decode_usage)
    return found or _last_in(joined(window))


def _last_in(text: bytes) -> Usage | None:
    is_broken = False
    found = text.rfind(USAGE)
    while found >= 0:
        start = text.rfind(b"\n", 0, found) + 1
        if text.startswith(b"data:", start):
            end = text.find(b"\n", found)
            try:
                usage = _decode_usage(text[start + 5 : end] if end >= 0 else text[start + 5 :])
            except _ERRORS:
                is_broken = True
            else:
                if usage is not None:
                    return usage
        found = text.rfind(USAGE, 0, start)
    return _last_by_the_book(text) if is_broken else None


def _last_by_the_book(text: bytes) -> Usage | None:
    for payload in reversed(whole_payloads(text)):
        with contextlib.suppress(*_ERRORS):
            usage = _decode_usage(payload)
            if usage is not None:
                return usage
    return None


def _decode_usage(payload: bytes) -> Usage | None:
    """Read the usage of one JSON text; raises ValueError or RecursionError if it is none."""
    answer: _StrictAnswer | _Answer
    try:
        answer = _decode_strictly(payload)
    except _ERRORS:
        answer = _decode_answer(payload)
    found = answer.usage
    if found is None:
        if answer.response is not None:
            found = answer.response.usage
        elif answer.x_groq is not None:
            found = answer.x_groq.usage
    if found is None:
        return None
    return _classify(found) if type(found) is _Counts else _classify_loosely(found)


def _classify_loosely(found: object) -> Usage | None:
    """Sort a usage object with values of odd types or sizes; what is no count is absent."""
    if type(found) is not dict:
        return None
    fields: dict[str, Any] = {}
    for name in _Counts.__struct_fields__:
        value = found.get(name)
        if not name.endswith("_details"):
            fields[name] = count(value) if type(value) in {int, float} else None
        elif type(value) is dict:
            fields[name] = _details_loosely(value)
    return _classify(_Counts(**fields))


def _details_loosely(found: dict[str, Any]) -> _Details:
    cached = found.get("cached_tokens_details")
    return _Details(
        count(found.get("cached_tokens")),
        count(found.get("cache_write_tokens")),
        count(found.get("reasoning_tokens")),
        count(found.get("audio_tokens")),
        _CachedDetails(count(cached.get("audio_tokens"))) if type(cached) is dict else None,
    )


def _classify(found: _Counts) -> Usage | None:
    """Sort what a provider counted into disjoint classes; None where there is no token count."""
    prompt, output = found.prompt_tokens, found.completion_tokens
    if prompt is not None or output is not None:
        details = found.prompt_tokens_details or found.prompt_token_details
        output_details = found.completion_tokens_details
    else:
        prompt, output = found.input_tokens, found.output_tokens
        details = found.input_tokens_details or found.input_token_details
        output_details = found.output_tokens_details or found.output_token_details
        if prompt is None and output is None:
            return None if found.total_tokens is None else Usage(found.total_tokens)
    prompt = prompt or 0
    output = output or 0
    cached = written = reasoning = 0
    if details is not None:
        cached = details.cached_tokens or 0
        written = details.cache_write_tokens or 0
    if not cached:
        cached = found.prompt_cache_hit_tokens or found.num_cached_tokens or found.cached_tokens or 0
    if output_details is not None and output_details.reasoning_tokens:
        reasoning = output_details.reasoning_tokens
        if found.total_tokens == prompt + output + reasoning:  # xAI counts it beside the output
            output += reasoning
        elif reasoning > output:
            reasoning = output
    cold = max(prompt - cached - written, 0)
    audio = (0, 0) if details is None or not details.audio_tokens else _audio(details, cold, cached)
    spoken = 0 if output_details is None else min(output_details.audio_tokens or 0, output)
    return Usage(cold, cached, written, 0, output, reasoning, "provider", *audio, spoken)


def _audio(details: _Details, cold: int, cached: int) -> tuple[int, int]:
    """Give the part of the cold and of the cached input that is audio: uncached first where nothing tells."""
    audio = details.audio_tokens or 0
    split = details.cached_tokens_details
    known = 0 if split is None else min(split.audio_tokens or 0, cached, audio)
    fresh = min(audio - known, cold)
    return fresh, known if split is not None else min(audio - fresh, cached)


def ask_for_usage(body: bytes, peek: RequestPeek) -> bytes | None:
    """Return the chat request asking for usage on its stream too; None where nothing must change.

    Nothing changes unless it streams and leaves ``stream_options.include_usage`` open (absent or null).
    Values of a wrong type stay for the provider to refuse. Every byte outside the insertion stays as it came.
    """
    if not peek.stream or peek.include_usage is not None:
        return None
    try:
        if not bytes(peek.stream_options_value):  # absent
            return _append_options(body)
        edits = [
            edit for span in splice.find_all(body, ("stream_options",)) if (edit := _ask_in(body, span)) is not None
        ]
    except SpliceError:
        return None
    return splice.edit(body, edits) if edits else None


def _append_options(body: bytes) -> bytes | None:
    """Add the member at the end of a body that was read as an object, so that its last brace is its end."""
    end = body.rfind(b"}")
    if end < 0 or body[end + 1 :].strip(b" \t\n\r"):
        return None
    while body[end - 1] in b" \t\n\r":
        end -= 1
    comma = b"" if body[end - 1] == ord("{") else b","
    return b"".join((body[:end], comma, b'"stream_options":{"include_usage":true}', body[end:]))


def _ask_in(body: bytes, span: Span) -> tuple[Span, bytes] | None:
    """Find the edit that makes one ``stream_options`` value ask for usage."""
    start, end = span
    if body[start:end] == b"null":
        return span, b'{"include_usage":true}'
    if body[start : start + 1] != b"{":
        return None
    last = None
    for child in splice.children(body, span):
        if splice.key_of(body, child) == "include_usage":
            last = child.value
    if last is None:
        at = start + len(body[start : end - 1].rstrip(b" \t\n\r"))
        return Span(at, at), b'"include_usage":true' if at == start + 1 else b',"include_usage":true'
    return (last, b"true") if body[last.start : last.end] == b"null" else None


_ABSENT = msgspec.Raw(b"")


class _Chunk(msgspec.Struct):
    choices: msgspec.Raw = _ABSENT
    usage: msgspec.Raw = _ABSENT


_decode_chunk = msgspec.json.Decoder(_Chunk).decode

# In a chunk of one line, what is in front of or behind "usage":null shows that it is a top-level member: only
# flat members between the opening brace and it, or between it and the end.
_LF, _COMMA = b"\n,"
_SPACE = b" \t"
_WS = rb"[ \t]*+"
_FLAT = rb'"[^"\\]*+"' + _WS + rb":" + _WS + rb'(?:"[^"\\]*+"|[\w.+-]++)' + _WS
_null_member = re.compile(USAGE + _WS + rb":" + _WS + rb"null").match
# Atomic, not possessive: a possessive group matches wrongly before CPython 3.11.5.
_flat_front = re.compile(rb"data:" + _WS + rb"\{" + _WS + rb"(?>(?:" + _FLAT + rb"," + _WS + rb")*)").match
_flat_rest = re.compile(_WS + rb"(?>(?:," + _WS + _FLAT + rb")*)\}" + _WS + rb"\n\n\Z").match


class UsageFrameFilter:
    """Take out of a chat stream what ``include_usage`` adds: the usage frame and ``"usage":null`` members.

    A response filter (`penstock.providers.ResponseFilter`) over de-framed body bytes cut anywhere. The frame,
    an event with ``"choices":[]`` and a usage object, goes with its blank line; all else stays as it is.
    """

    __slots__ = ("_held_bytes", "_is_between_events", "_is_passing", "_splitter")

    def __init__(self) -> None:
        self._splitter = EventSplitter(max_event_bytes=1 << 62)  # the bound is kept here
        self._held_bytes = 0
        self._is_passing = False
        self._is_between_events = True

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of these bytes; an incomplete event is held back."""
        if self._is_between_events:
            if payload.find(b"usage") < 0 and (payload.endswith(b"\n\n") or payload.endswith(b"\r\n\r\n")):  # noqa: PIE810 - a tuple is slower
                return payload
            if payload.find(b"\n") == len(payload) - 2 and payload[-1] == _LF and b"\r" not in payload:
                return _without_usage(payload)
        events = self._splitter.feed(payload)
        if not events:
            self._held_bytes += len(payload)
            self._is_between_events = False
            return self._pass_on() if self._is_passing or self._held_bytes > MAX_EVENT_BYTES else b""
        self._held_bytes = len(self._splitter.pending)
        kept = [events.pop(0)] if self._is_passing else []
        self._is_passing = False
        kept += [_without_usage(event) for event in events]
        if self._held_bytes > MAX_EVENT_BYTES:
            kept.append(self._pass_on())
        self._is_between_events = not (self._held_bytes or self._is_passing)
        return b"".join(kept)

    def finish(self) -> bytes:
        """Return what is still held back at the end of the body."""
        rest = b"".join(self._splitter.finish()) or self._splitter.pending
        self._splitter = EventSplitter()
        return rest if self._is_passing else _without_usage(rest)

    def _pass_on(self) -> bytes:
        """Release an event too large to hold; line ends at the cut stay, for its end is still looked for."""
        pending = self._splitter.pending
        released = pending.rstrip(b"\r\n")
        self._splitter = EventSplitter(max_event_bytes=1 << 62)
        self._splitter.feed(pending[len(released) :])
        self._held_bytes = len(pending) - len(released)
        self._is_passing = True
        return released


def _without_usage(event: bytes) -> bytes:
    """Return the event as it would be without include_usage; empty for the usage frame."""
    at = event.find(USAGE)
    if at < 0 or len(event) > MAX_EVENT_BYTES:
        return event
    null = _null_member(event, at)
    if (
        null is not None
        and event.startswith(b"data:")
        and event.find(b"\n") == len(event) - 2
        and b"\r" not in event
        and event.find(USAGE, null.end()) < 0
    ):
        comma = _before_space(event, at)
        if event[comma] == _COMMA and (
            _flat_rest(event, null.end()) or ((front := _flat_front(event)) and front.end() > at)
        ):
            return event[: _before_space(event, comma) + 1] + event[null.end() :]
    return _without_usage_by_parsing(event)


def _before_space(event: bytes, position: int) -> int:
    position -= 1
    while event[position] in _SPACE:
        position -= 1
    return position


def _without_usage_by_parsing(event: bytes) -> bytes:
    payload = parse_event(event, at_start=event.startswith(b"\xef\xbb\xbf")).payload
    try:
        chunk = _decode_chunk(payload)
        usage = bytes(chunk.usage)
        if usage.startswith(b"{"):
            blank = len(event) - len(event.lstrip(b"\r\n"))
            return event[:blank] if _is_empty_array(bytes(chunk.choices)) else event
        if usage != b"null":
            return event
        spans = splice.find_all(payload, ("usage",))
        if any(payload[span.start : span.end] != b"null" for span in spans):
            return event
        return replace_payload(event, splice.remove(payload, ("usage",)))
    except _ERRORS:
        return event


def _is_empty_array(raw: bytes) -> bool:
    return raw.startswith(b"[") and not raw[1:-1].strip(b" \t\r\n")
