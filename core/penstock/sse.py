"""Server-sent events without I/O: split, read, rewrite and end a stream (WHATWG HTML, 9.2).

- Lines end with CRLF, LF or CR, also mixed; an event ends at a blank line; a byte order mark may come first.
- Raw events are never altered: joined with what is pending they are the input, for any segmentation.
- How the input was cut does not change the events: a CR that may be half a CRLF is held until the next byte.
"""

import functools
import itertools
import re
from collections.abc import Iterable

import attrs

from penstock import splice
from penstock.splice import SpliceError

DEFAULT_MAX_EVENT_BYTES = 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_LOOK_BACK = 3  # bytes of a blank line, at most four long, that may already have been searched
# Two line ends in a row; a final CR is left for the next read.
_boundary = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\Z))")
_final_boundary = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")
_newline = re.compile(rb"\r\n|\n|\r")
_blank_line = re.compile(rb"(?:\A|\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)\Z")


class SSEError(ValueError):
    """Report an event larger than the bound; events holds the complete ones before it."""

    def __init__(self, message: str, events: list[bytes]) -> None:
        super().__init__(message)
        self.events = events


class EventSplitter:
    """Cut a stream of bytes into raw events, each with its blank line.

    An event larger than max_event_bytes raises SSEError from feed: passing it on unsplit would let it go
    unread past whoever inspects events. Its bytes stay in pending, for a caller who forwards them anyway.
    """

    __slots__ = ("_held", "_searched", "max_event_bytes", "newline")

    def __init__(self, max_event_bytes: int = DEFAULT_MAX_EVENT_BYTES) -> None:
        self.max_event_bytes = max_event_bytes
        self.newline: bytes | None = None
        """The line end last seen before a blank line: CRLF, LF or CR."""
        self._held = bytearray()
        self._searched = 0

    @property
    def pending(self) -> bytes:
        """Return the bytes of the event that is not complete yet."""
        return bytes(self._held)

    def feed(self, data: bytes) -> list[bytes]:
        """Take a read of any size; return the raw events it completes."""
        held = self._held
        if held:
            held += data
            if b"\r" in data or b"\r" in held[-len(data) - _LOOK_BACK :]:
                is_complete = _boundary.search(held, self._searched) is not None
            else:
                is_complete = held.find(b"\n\n", self._searched) >= 0
            if not is_complete:
                self._searched = max(0, len(held) - _LOOK_BACK)
                self._check([], len(held))
                return []
            data = bytes(held)
        events, rest = _split(data)
        self._held = bytearray(rest)
        self._searched = max(0, len(rest) - _LOOK_BACK)
        if events:
            self.newline = _last_newline(events[-1])
        if len(data) > self.max_event_bytes:
            self._check(events, len(rest))
        return events

    def finish(self) -> list[bytes]:
        """Take the end of the stream: return the event that only waited for the other half of a CRLF."""
        held = bytes(self._held)
        found = _final_boundary.search(held, self._searched)
        if found is None or found.end() != len(held):
            return []
        self._held.clear()
        self._searched = 0
        return [held]

    def _check(self, events: list[bytes], rest: int) -> None:
        for index, event in enumerate(events):
            if len(event) > self.max_event_bytes:
                self._held = bytearray(b"".join(events[index:]) + self._held)
                self._searched = 0
                raise SSEError(f"an event is larger than {self.max_event_bytes} bytes", events[:index])
        if rest > self.max_event_bytes:
            raise SSEError(f"an event is larger than {self.max_event_bytes} bytes", events)


def _split(data: bytes) -> tuple[list[bytes], bytes]:
    """Cut data at every blank line; the usual two styles without a regular expression."""
    if b"\r" not in data:
        mark = b"\n\n"
    elif data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r"):
        mark = b"\r\n\r\n"
    else:
        ends = [0, *(found.end() for found in _boundary.finditer(data))]
        return [data[start:end] for start, end in itertools.pairwise(ends)], data[ends[-1] :]
    parts = data.split(mark)
    rest = parts.pop()
    return [part + mark for part in parts], rest


def _last_newline(data: bytes) -> bytes | None:
    """Give the line end that data ends with."""
    for newline in (b"\r\n", b"\n", b"\r"):
        if data.endswith(newline):
            return newline
    return None


@attrs.frozen(eq=False)
class Event:
    """One raw event, read when asked.

    at_start: it is the first of its stream, so a byte order mark in front of it is none of its bytes.
    """

    raw: bytes
    """Its bytes as they came, blank line included."""
    at_start: bool = False
    """Whether it is the first of its stream."""

    @functools.cached_property
    def _fields(self) -> tuple[str | None, bytes, bool]:
        """Give name, payload, and whether there is no field at all."""
        raw = self.raw
        if raw.startswith(b"data: ") and b"\r" not in raw and raw.find(b"\n") == len(raw) - 2:
            return None, raw[6:-2], False
        name = b""
        payload: list[bytes] = []
        bare = True
        for line in _lines(self).splitlines():
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                payload.append(value)
            elif field == b"event":
                name = value
            bare = bare and not field
        return name.decode("utf-8", "replace") or None, b"\n".join(payload), bare

    @property
    def name(self) -> str | None:
        """Give the event field; None where it is missing or empty."""
        return self._fields[0]

    @property
    def payload(self) -> bytes:
        """Give the data lines, joined with LF; empty where there are none."""
        return self._fields[1]

    @property
    def is_comment_only(self) -> bool:
        """Tell whether the event consists of nothing but comments and blank lines."""
        return self._fields[2]


def _lines(event: Event) -> bytes:
    return event.raw.removeprefix(_BOM) if event.at_start else event.raw


def parse_event(raw: bytes, *, at_start: bool = False) -> Event:
    """Wrap a raw event; see Event."""
    return Event(raw, at_start)


def first_event(buffer: bytes) -> tuple[Event, int] | None:
    """Give the first complete event of a stream that is not only comments, and the offset where it ends."""
    start = 0
    for found in _boundary.finditer(buffer):
        event = Event(buffer[start : found.end()], at_start=start == 0)
        if not event.is_comment_only:
            return event, found.end()
        start = found.end()
    return None


def is_error_event(event: Event) -> bool:
    """Tell whether an event reports an error instead of content.

    It does if it is named ``error``, or if its payload is a JSON object with an ``error`` member that is not
    null (OpenAI, Groq, OpenRouter) or with ``"type":"error"`` (Anthropic).
    """
    if event.name == "error":
        return True
    payload = event.payload
    if b"error" not in payload and b"\\u" not in payload:
        return False
    try:
        error = splice.find(payload, ("error",))
        if error is not None:
            return payload[error.start : error.end] != b"null"
        kind = splice.find(payload, ("type",))
    except SpliceError:
        return False
    return kind is not None and payload[kind.start : kind.end] == b'"error"'


def replace_payload(raw: bytes, payload: bytes) -> bytes:
    """Put another payload into a raw event; other lines, line ends and the spacing of ``data:`` are kept.

    Line ends in the payload make one data line each. An event without data lines gets them at its end.
    """
    lines: list[bytes] = []
    is_done = False
    for index, line in enumerate(raw.splitlines(keepends=True)):
        if not _is_data(line, first=index == 0):
            lines.append(line)
        elif not is_done:
            lines += _data_lines(line, payload)
            is_done = True
    if not is_done:
        at = len(lines) - 1 if lines and not lines[-1].strip(b"\r\n") else len(lines)
        lines[at:at] = _data_lines(b"data: " + (lines[at - 1] if at else b""), payload)
    return _join(lines)


def _is_data(line: bytes, *, first: bool) -> bool:
    """Tell whether a line is a data line; the first line of a stream may start with a byte order mark."""
    if first:
        line = line.removeprefix(_BOM)
    return line.startswith(b"data:") or line.rstrip(b"\r\n") == b"data"


def _data_lines(model: bytes, payload: bytes) -> list[bytes]:
    """Spell a payload as data lines that look like the model line."""
    bom = _BOM if model.startswith(_BOM) else b""
    newline = _last_newline(model) or b"\n"
    spaced = model[len(bom) :].startswith(b"data: ")
    lines = []
    for text in _newline.split(payload):
        space = b" " if spaced or text.startswith(b" ") else b""
        lines.append(b"data:" + space + text + newline)
    lines[0] = bom + lines[0]
    return lines


def _join(lines: Iterable[bytes]) -> bytes:
    """Join lines so that no CR and LF of different lines become one line end."""
    joined = bytearray()
    for line in lines:
        if line == b"\n" and joined.endswith(b"\r"):
            joined += b"\n"
        joined += line
    return bytes(joined)


def terminal_event(name: str | None, payload: bytes, *, pending: bytes, newline: bytes | None = None) -> bytes:
    """Spell an event to append to a stream so that it starts on a frame boundary.

    pending: the last bytes sent, of which an incomplete event is closed by a blank line first; it may hold
    complete events too. newline: the stream's line end, else the first in pending, else LF.
    """
    seen = _newline.search(pending)
    end = newline or (seen[0] if seen else b"\n")
    pieces = []
    if pending and not _blank_line.search(pending[-8:]):
        if pending.endswith(b"\r"):
            pieces.append(b"\n")  # whether it was half a CRLF or a line end of its own, it is one line end now
        elif not pending.endswith(b"\n"):
            pieces.append(end)
        pieces.append(end)
    if name is not None:
        pieces.append(b"event: " + name.encode() + end)
    pieces.extend(b"data: " + line + end for line in _newline.split(payload))
    pieces.append(end)
    return b"".join(pieces)
