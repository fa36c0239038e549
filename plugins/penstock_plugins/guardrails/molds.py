"""Read events that look like one read before: the events of a stream differ in few values, so most need no walk.

A *mold* is an event with its changing values left open: strings and numbers that neither hold a text nor decide where
texts are. What fits a mold byte for byte in everything else has its texts in the same places, under the same paths.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator

import attrs

from penstock.splice import Span
from penstock_plugins.guardrails.texts import Path, Text, decoded

Found = tuple[list[Text], list[Text], list[Path]]
"""The parts of tracks in an event, whole texts, and the beginnings of the paths of tracks that end."""
MOST_MOLDS = 16
MOST_LEARNED = 64
"""After so many different events a stream is one whose events have nothing in common."""
MOST_BYTES = 4096
"""Longer events are walked: a pattern for them costs more than it saves."""
_STRING = rb'"[^"\\\x00-\x1f]*(?:\\.[^"\\\x00-\x1f]*)*"'
_NUMBER = rb"-?[0-9][0-9.eE+-]*"
_tokens = re.compile(rb"(%b)(\s*:)?|(%b)" % (_STRING, _NUMBER))
_DECIDING = frozenset((
    b'"type"', b'"index"', b'"output_index"', b'"content_index"', b'"summary_index"', b'"finish_reason"',
    b'"finishReason"', b'"role"',
))  # fmt: skip
"""Members whose values say where the texts are, what they are parts of, and where that ends."""


@attrs.frozen(eq=False)
class Mold:
    """One event with its changing values left open."""

    pattern: re.Pattern[bytes]
    """With a group for each text."""
    parts: tuple[tuple[int, Path], ...]
    """Groups of the parts, and their paths."""
    wholes: tuple[tuple[int, Path], ...]
    ended: tuple[Path, ...]

    def read(self, payload: bytes) -> Found | None:
        """Return what is in an event that fits."""
        match = self.pattern.fullmatch(payload)
        if match is None:
            return None
        parts = [_text(match, group, path) for group, path in self.parts]
        wholes = [_text(match, group, path) for group, path in self.wholes]
        return parts, wholes, [*self.ended]


def _text(match: re.Match[bytes], group: int, path: Path) -> Text:
    start, end = match.span(group)
    return Text(path, Span(start, end), decoded(match[group]))


class Molds:
    """Remember the molds of one stream's latest events."""

    def __init__(self) -> None:
        self._molds: OrderedDict[bytes, Mold] = OrderedDict()
        self._learned = 0

    def read(self, payload: bytes) -> Found | None:
        """Return what is in an event, or None where it fits no mold."""
        for key, mold in self._molds.items():
            try:
                found = mold.read(payload)
            except ValueError:  # a string that is none
                return None
            if found is not None:
                self._molds.move_to_end(key, last=False)
                return found
        return None

    def learn(self, payload: bytes, found: Found) -> None:
        """Make a mold of an event that was walked."""
        if len(payload) > MOST_BYTES or self._learned >= MOST_LEARNED:
            return
        self._learned += 1
        mold = _mold_of(payload, found)
        if mold is None:
            return
        self._molds[mold.pattern.pattern] = mold
        self._molds.move_to_end(mold.pattern.pattern, last=False)
        if len(self._molds) > MOST_MOLDS:
            self._molds.popitem()


def _mold_of(payload: bytes, found: Found) -> Mold | None:
    parts, wholes, ended = found
    places = {text.span.start: number for number, text in enumerate((*parts, *wholes))}
    if any(text.is_raw for text in (*parts, *wholes)) or len(places) != len(parts) + len(wholes):
        return None
    if any(token[2] is not None and b"\\" in token[1] for token in _tokens.finditer(payload)):
        return None  # an escaped name may be one of those that decide
    groups: dict[int, int] = {}
    pieces: list[bytes] = []
    position = 0
    for start, end, is_text, is_string in _open_values(payload, places):
        pieces.append(re.escape(payload[position:start]))
        if is_text:
            groups[places[start]] = len(groups) + 1
        pieces.append(b"(%b)" % _STRING if is_text else _STRING if is_string else _NUMBER)
        position = end
    if len(groups) != len(places):
        return None
    pieces.append(re.escape(payload[position:]))
    pattern = re.compile(b"".join(pieces), re.DOTALL)
    return Mold(
        pattern,
        tuple((groups[number], text.path) for number, text in enumerate(parts)),
        tuple((groups[len(parts) + number], text.path) for number, text in enumerate(wholes)),
        tuple(ended),
    )


def _open_values(payload: bytes, places: dict[int, int]) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield start, end, whether it is a text and whether it is a string of each value that may differ."""
    name = b""
    for token in _tokens.finditer(payload):
        string, colon = token[1], token[2]
        if colon is not None:
            name = string
            continue
        start, end = token.span(1) if string is not None else token.span()
        is_text = start in places
        if is_text or name not in _DECIDING:
            yield start, end, is_text, string is not None
