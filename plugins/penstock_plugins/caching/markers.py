"""Take prompt-cache markers out of a request body, or put them in: splices, every other byte stays; sans-IO.

Anthropic admits four markers a request, and none for five minutes before one for an hour, in the order tools, system,
messages. A marker that is there is never moved or changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import attrs

from penstock.splice import Child, Span, append_member, children, edit, find, key_of, remove, remove_everywhere, root

NAME = "cache_control"
LIMIT = 4
"""Markers a request may hold at most."""
SHORT = b'{"type":"ephemeral"}'
"""For five minutes."""
LONG = b'{"type":"ephemeral","ttl":"1h"}'
_GEMINI = ("cachedContent", "cached_content")
_SECTIONS = ("tools", "system", "messages")
"""In the order in which they are cached."""
_UNMARKABLE = ("thinking", "redacted_thinking")
"""Types of blocks that bear no marker."""
_candidates = re.compile(rb'"(?:cache_control|[^"\\]*\\u[^"]*)"[ \t\n\r]*+:[ \t\n\r]*+').finditer
_SPACE = b" \t\n\r"


def without_markers(body: bytes, family: str) -> bytes:
    """Remove every ``cache_control``, and from a Gemini request the name of its cached content. Raises SpliceError."""
    body = remove_everywhere(body, NAME)
    if family == "gemini" and (b"cached" in body or b"\\u" in body):
        for name in _GEMINI:
            body = remove(body, (name,))
    return body


@attrs.frozen
class Marker:
    """Say where a marker stands and for how long it is."""

    section: int
    start: int
    is_long: bool

    @property
    def order(self) -> tuple[int, int]:
        """Return what sorts markers as they are cached."""
        return self.section, self.start


@attrs.frozen
class Place:
    """Hold a block that may get a marker."""

    section: int
    span: Span
    is_text: bool
    """Whether it is a string, which becomes a block of text."""

    def marked(self, body: bytes, marker: bytes) -> bytes:
        """Return the block with a marker; its own bytes stay."""
        value = body[self.span.start : self.span.end]
        if not self.is_text:
            return append_member(value, NAME, marker)
        return b'[{"type":"text","text":%b,"%b":%b}]' % (value, NAME.encode(), marker)


def with_markers(body: bytes, *, is_long: bool) -> bytes:
    """Mark the last block of the last message and the last block of the system prompt of an Anthropic request.

    The message's marker covers all before it, so it comes first where there is room for one only. Where the order of
    durations asks for it, a marker is for the other duration. Raises SpliceError for what is no JSON.
    """
    sections = _sections(body)
    markers = list(_markers(body, sections))
    room = LIMIT - len(markers)
    edits: list[tuple[Span, bytes]] = []
    is_automatic = NAME in sections  # at the top: the provider marks the last block by itself
    places = [None if is_automatic else _last_of_message(body, sections), _last_of_system(body, sections)]
    for place in places:
        if place is not None and len(edits) < room:
            marker = LONG if _is_long_at(place, markers, is_long=is_long) else SHORT
            edits.append((place.span, place.marked(body, marker)))
            markers.append(Marker(place.section, place.span.end, marker is LONG))
    return edit(body, edits)


def _is_long_at(place: Place, markers: list[Marker], *, is_long: bool) -> bool:
    """Return the duration that may stand at a place, the one that is wanted where both may."""
    order = place.section, place.span.end
    if is_long:
        return not any(marker.order < order and not marker.is_long for marker in markers)
    return any(marker.order > order and marker.is_long for marker in markers)


def _sections(body: bytes) -> dict[str, Span]:
    """Return the members at the top that matter here; of duplicates the last."""
    wanted = (*_SECTIONS, NAME)
    members = {key_of(body, child): child.value for child in children(body, root(body))}
    return {name: members[name] for name in wanted if name in members and not _is_null(body, members[name])}


def _is_null(body: bytes, span: Span) -> bool:
    return body[span.start : span.end] == b"null"


def _markers(body: bytes, sections: dict[str, Span]) -> Iterator[Marker]:
    """Yield the markers there are, at any depth of what is cached; the one at the top counts as the message's last."""
    if NAME in sections:
        yield Marker(len(_SECTIONS), 0, _says_1h(body, sections[NAME].start))
    for number, name in enumerate(_SECTIONS):
        if name not in sections:
            continue
        start, end = sections[name]
        for found in _named(body, start, end):
            if not body.startswith(b"null", found):
                yield Marker(number, found, _says_1h(body, found))


def _named(body: bytes, start: int, end: int) -> Iterator[int]:
    """Yield where the values of members called ``cache_control`` begin.

    What only looks like a member in the middle of a string is none: a quote within a string stands behind a backslash.
    """
    if body.find(NAME.encode(), start, end) < 0 and body.find(b"\\u", start, end) < 0:
        return
    for found in _candidates(body, start, end):
        opening = found.start()
        if body[opening - 1] == 0x5C:
            continue
        name = found[0].rstrip(_SPACE)[:-1].rstrip(_SPACE)
        if _text(name) == NAME:
            yield found.end()


def _says_1h(body: bytes, start: int) -> bool:
    """Tell the duration of the marker whose value begins here."""
    try:
        span = next(child.value for child in children(body, _object_at(body, start)) if key_of(body, child) == "ttl")
    except StopIteration:
        return False
    return _text(body[span.start : span.end]) == "1h"


def _object_at(body: bytes, start: int) -> Span:
    return Span(start, len(body))  # children walk from the start and see for themselves where it ends


def _text(raw: bytes) -> str | None:
    """Decode a JSON string; None for anything else."""
    if not raw.startswith(b'"'):
        return None
    try:
        found: str = json.loads(raw.decode("utf-8", "replace"), strict=False)
    except ValueError:
        return None
    return found


def _last_of_system(body: bytes, sections: dict[str, Span]) -> Place | None:
    span = sections.get("system")
    return None if span is None else _last_block(body, span, section=1)


def _last_of_message(body: bytes, sections: dict[str, Span]) -> Place | None:
    span = sections.get("messages")
    if span is None or body[span.start] != ord("["):
        return None
    message = _last(children(body, span))
    if message is None or body[message.value.start] != ord("{"):
        return None
    start, end = message.value
    content = find(body[start:end], ("content",))
    return None if content is None else _last_block(body, Span(start + content.start, start + content.end), section=2)


def _last_block(body: bytes, span: Span, *, section: int) -> Place | None:
    """Return the block to mark: the text itself, or the last block that may bear a marker; None where it has one."""
    opening = body[span.start : span.start + 1]
    if opening == b'"':
        return Place(section, span, is_text=True) if span.end - span.start > 2 else None
    if opening != b"[":
        return None
    for child in reversed(list(children(body, span))):
        start, end = child.value
        if body[start] != ord("{"):
            return None
        members = {key_of(body, member): member.value for member in children(body, child.value)}
        kind = members.get("type")
        if kind is not None and _text(body[kind.start : kind.end]) in _UNMARKABLE:
            continue
        text = members.get("text")
        is_empty = text is not None and text.end - text.start <= 2
        return None if NAME in members or is_empty else Place(section, Span(start, end), is_text=False)
    return None


def _last(found: Iterator[Child]) -> Child | None:
    last = None
    for child in found:
        last = child
    return last
