"""Find the object that counts tokens in what was kept of a response body.

In JSON the bytes ``"usage"`` never occur inside a string (its quotes would be escaped), so a search for them
only meets names and values. Whether a hit belongs to the provider or to something a model or a user wrote is
decided by its depth: what follows must close exactly the objects it should be in, or what precedes open them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from penstock.sse import EventSplitter, parse_event

if TYPE_CHECKING:
    from penstock.metering import BodyWindow

COUNT_LIMIT = 10**12
"""No exchange uses as many tokens; a larger number is junk and counts as this."""

USAGE = b'"usage"'
_BACKSLASH = ord("\\")
_SPACE = b" \t\r\n"
_MAX_TRIES = 64
_ERRORS = (ValueError, RecursionError)  # msgspec's errors are ValueErrors

T = TypeVar("T")


class Carrier(msgspec.Struct):
    """Read the one member that matters; what is inside it may be junk."""

    usage: Any = None
    """The member ``usage``, whatever it is."""


_decode_carrier = msgspec.json.Decoder(Carrier).decode
_decode_syntax = msgspec.json.Decoder(msgspec.Struct).decode


def count(value: object) -> int:
    """Read a number of tokens: 0 for anything that is none, between 0 and COUNT_LIMIT otherwise."""
    if type(value) is float and value == value:  # noqa: PLR0124 - not a number differs from itself
        value = int(min(max(value, 0.0), float(COUNT_LIMIT)))
    if type(value) is not int or value < 0:
        return 0
    return min(value, COUNT_LIMIT)


def joined(window: BodyWindow) -> bytes:
    """Give the kept text of a stream; where events may be missing, no line goes on across the gap."""
    return window.text if window.is_whole else b"\n\n".join((window.head, window.tail))


def data_lines(text: bytes) -> Iterator[bytes]:
    """Yield the value of each ``data:`` line that has a ``"usage"`` in it."""
    end = 0
    while (found := text.find(USAGE, end)) >= 0:
        start = text.rfind(b"\n", 0, found) + 1
        end = text.find(b"\n", found)
        end = len(text) if end < 0 else end
        if text.startswith(b"data:", start):
            yield text[start + 5 : end]


def whole_payloads(text: bytes) -> list[bytes]:
    """Split a stream by the book; for events whose payload is spread over several lines."""
    splitter = EventSplitter(max_event_bytes=len(text) + 4)
    events = splitter.feed(text)
    payloads = [parse_event(event).payload for event in [*events, *splitter.finish(), splitter.pending]]
    return [payload for payload in payloads if USAGE in payload]


def usage_before_end(text: bytes, opening: bytes, decode: Callable[[bytes], T | None]) -> T | None:
    """Decode from the last ``"usage"`` of which the rest of the text closes exactly what opening opens.

    opening: the JSON that stands for the missing start, ``{`` for a top-level member.
    """
    found = len(text)
    for _ in range(_MAX_TRIES):
        found = text.rfind(USAGE, 0, found)
        if found < 0:
            return None
        if found == 0 or text[found - 1] == _BACKSLASH:  # the end of a longer name, or perhaps
            continue
        try:
            carrier = decode(opening + text[found:])
        except _ERRORS:
            continue
        if carrier is not None:
            return carrier
    return None


def usage_after_start(text: bytes) -> object:
    """Read the top-level ``usage`` object of JSON of which only the start is there."""
    found = -1
    for _ in range(_MAX_TRIES):
        found = text.find(USAGE, found + 1)
        if found < 0:
            return None
        value = text[found + len(USAGE) :].lstrip(_SPACE).removeprefix(b":").lstrip(_SPACE)
        if text[found - 1] == _BACKSLASH or not value.startswith(b"{"):
            continue
        try:
            _decode_syntax(text[:found] + b'"":0}')
            usage, _ = json.JSONDecoder().raw_decode(value.decode("utf-8", "replace"))
        except _ERRORS:
            continue
        return usage
    return None


def usage_in_cut_json(window: BodyWindow) -> object:
    """Read the top-level ``usage`` object of JSON of which the middle or the end is missing, or None."""
    if window.is_whole:
        return usage_after_start(window.text)
    carrier = usage_before_end(window.tail, b"{", _decode_carrier)
    if carrier is not None and carrier.usage is not None:
        return carrier.usage
    return usage_after_start(window.head)
