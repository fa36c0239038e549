"""Find where a message body ends while its raw bytes go through; sans-IO (RFC 9112 6 and 7).

Invariants: where a body ends, what its payload is and whether it is refused do not depend on how the bytes
are cut into reads; a byte is judged in the read in which it arrives; only one unfinished line is ever held.
"""

from __future__ import annotations

import re
from typing import Final, Literal, NoReturn, Protocol

LAST_CHUNK: Final = b"0\r\n\r\n"
MARK_BYTES = 16 * 1024
_MAX_SIZE_LINE_BYTES = 1024  # a size needs 17; the rest is for chunk extensions

_TOKEN = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
_QUOTED = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
_EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (_TOKEN, _TOKEN, _QUOTED)
_size_line = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n").match
_next_size_line = re.compile(rb"\r\n([0-9A-Fa-f]{1,15})\r\n").match
_extended_size_line = re.compile(rb"([0-9A-Fa-f]{1,15})(?:%b)*\r\n" % _EXTENSION).fullmatch
_trailer_line = re.compile(rb"(%b):%b*\r\n" % (_TOKEN, _TEXT)).fullmatch
# What an unfinished line may look like: whatever cannot become a good line is refused at once.
_size_line_start = re.compile(rb"[0-9A-Fa-f]{1,15}\r?").fullmatch
_extended_size_line_start = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(?:;%b*)?\r?" % _TEXT).fullmatch
_trailer_line_start = re.compile(rb"\r|%b(?::%b*\r?)?" % (_TOKEN, _TEXT)).fullmatch

# Fields that frame, route or authenticate a message mean nothing after its body (RFC 9110 6.5.1).
_FORBIDDEN_TRAILERS = frozenset(
    (
        b"authorization",
        b"connection",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"cookie",
        b"host",
        b"proxy-authorization",
        b"set-cookie",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
    )
)

# Size lines, with the CRLF before them, that the strict expression has accepted: sizes repeat within a stream.
_MAX_KNOWN_SIZES = 4096
_known_sizes: dict[bytes, int] = {}

_Phase = Literal["size", "payload end", "trailer"]


class FramingError(Exception):
    """Say that a body is not framed as HTTP/1.1 demands; `message` never repeats what was sent."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Framing(Protocol):
    """Follow one body through the reads that carry it."""

    complete: bool
    """Whether the body has ended."""

    def feed(self, data: bytes) -> int:
        """Return how many leading bytes of `data` belong to this body; raises FramingError."""

    def finish_on_eof(self) -> bool:
        """Tell whether the body is whole when the connection ends here."""


class LengthFraming:
    """Follow a body of `length` bytes."""

    __slots__ = ("_remaining", "complete")

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.complete = length == 0

    def feed(self, data: bytes) -> int:
        """Return how many leading bytes of `data` belong to this body."""
        size = len(data)
        remaining = self._remaining
        if size < remaining:
            self._remaining = remaining - size
            return size
        self._remaining = 0
        self.complete = True
        return remaining

    def finish_on_eof(self) -> bool:
        """Tell whether all announced bytes have come."""
        return self.complete


class CloseFraming:
    """Follow a body that ends where the connection does."""

    __slots__ = ("complete",)

    def __init__(self) -> None:
        self.complete = False

    def feed(self, data: bytes) -> int:
        """Return the length of `data`: all of it belongs to this body."""
        return 0 if self.complete else len(data)

    def finish_on_eof(self) -> bool:
        """Complete the body."""
        self.complete = True
        return True


class ChunkedFraming:
    """Follow a chunked body to the end of its trailer section (RFC 9112 7.1).

    Chunk extensions are refused unless `allow_extensions`; then they must be well formed. Lines end in CRLF,
    sizes are 1 to 15 hexadecimal digits, the trailer section with its closing CRLF may have up to
    `max_trailer_bytes`.
    After a FramingError the object must not be fed again.
    """

    __slots__ = (
        "_allow_extensions",
        "_line",
        "_max_trailer_bytes",
        "_phase",
        "_remaining",
        "_trailer_bytes",
        "complete",
        "mark",
    )

    def __init__(self, *, allow_extensions: bool, max_trailer_bytes: int = 8192) -> None:
        self._allow_extensions = allow_extensions
        self._max_trailer_bytes = max_trailer_bytes
        self._phase: _Phase = "size"
        self._remaining = 0  # payload bytes of the current chunk still to come; the phase counts when it is 0
        self._line = b""  # the beginning of a line whose end has not come yet
        self._trailer_bytes = 0
        self.complete = False
        self.mark: tuple[int, ChunkedFraming] | None = None
        """Where the last MARK_BYTES of the last read begin, and a follower that stands there; None for short reads."""

    def copy(self) -> ChunkedFraming:
        """Return an independent follower that stands at the same place."""
        twin = ChunkedFraming(allow_extensions=self._allow_extensions, max_trailer_bytes=self._max_trailer_bytes)
        twin._phase = self._phase
        twin._remaining = self._remaining
        twin._line = self._line
        twin._trailer_bytes = self._trailer_bytes
        twin.complete = self.complete
        return twin

    def feed(self, data: bytes, payload: list[bytes] | None = None) -> int:
        """Return how many leading bytes of `data` belong to this body; append their payload to `payload`.

        Raises FramingError.
        """
        end = len(data)
        self.mark = None
        if not self._remaining and self._phase == "size" and not self._line and payload is None and end <= MARK_BYTES:
            # The usual read of a paced stream is exactly one whole chunk, and leaves everything as it was.
            match = _size_line(data)
            size = 0 if match is None else int(match[1], 16)
            if size and match.end() + size + 2 == end and data.endswith(b"\r\n"):  # type: ignore[union-attr]
                return end
        cut = end - MARK_BYTES
        if cut <= 0 or payload is not None:
            return self._follow(data, 0, end, payload)
        position = self._follow(data, 0, cut, None)
        if position < cut:
            return position
        self.mark = (cut, self.copy())
        return self._follow(data, cut, end, None)

    def _follow(self, data: bytes, position: int, end: int, payload: list[bytes] | None) -> int:
        while position < end and not self.complete:
            if self._remaining:
                position = self._pass_chunks(data, position, end, payload)
            else:
                position = self._pass_line(data, position, end)
        return position

    @property
    def _is_between_chunks(self) -> bool:
        return not self._remaining and not self._line and self._phase == "size"

    def snapshot(self) -> ChunkedFraming:
        """Return a follower that stands at the same place and is only to be copied: between chunks it is shared."""
        return _BETWEEN_CHUNKS if self._is_between_chunks else self.copy()

    def finish_on_eof(self) -> bool:
        """Tell whether the closing chunk and its trailer section have come."""
        return self.complete

    def continuation(self, payload: bytes) -> bytes:
        """Return wire bytes that bring `payload` to the reader of a body that broke off where this follower stands.

        The body stays unfinished. Empty once the closing chunk has begun: nothing can follow it.
        """
        if self._phase == "trailer" or self.complete:
            return b""
        if self._remaining:
            inside, rest = payload[: self._remaining], payload[self._remaining :]
            return inside + (b"\r\n" + encode_chunk(rest) if rest else b"")
        if self._phase == "payload end":
            return b"\r\n"[len(self._line) :] + encode_chunk(payload)
        return self._finish_size_line(payload)

    def _finish_size_line(self, payload: bytes) -> bytes:
        line = self._line
        if not line:
            return encode_chunk(payload)
        if line.endswith(b"\r"):
            ending = b"\n"
        elif b";" in line or len(line) > 11:
            ending = b"\r\n"
        else:
            ending = b"ffff\r\n"  # room enough for any payload, whatever the digits so far
        follower = self.copy()
        try:
            follower.feed(ending)
        except FramingError:
            return b""
        return ending + follower.continuation(payload)

    def _pass_chunks(self, data: bytes, start: int, end: int, payload: list[bytes] | None) -> int:
        size: int | None = self._remaining
        known = _known_sizes.get
        width = 7  # of the size line with its two line ends; seldom changes from one chunk to the next
        while size:
            stop = start + size
            if stop > end:
                self._remaining = stop - end
                if payload is not None:
                    payload.append(data[start:end])
                return end
            if payload is not None:
                payload.append(data[start:stop])
            # The CRLF behind the payload and the size line after it are looked up as one piece.
            start = stop + width
            size = known(data[stop:start])
            if size is None or start > end:
                match = _next_size_line(data, stop, end)
                if match is None:
                    self._remaining = 0
                    self._phase = "payload end"
                    return stop
                start, size = match.end(), int(match[1], 16)
                width = start - stop
                if len(_known_sizes) < _MAX_KNOWN_SIZES:
                    _known_sizes[match[0]] = size
        self._remaining = 0
        self._phase = "trailer"
        return start

    def _pass_line(self, data: bytes, start: int, end: int) -> int:
        if self._phase == "size" and not self._line:
            match = _size_line(data, start, end)
            if match is not None:
                self._begin_chunk(int(match[1], 16))
                return match.end()
        stop = data.find(b"\n", start, end) + 1
        self._check_line_length(len(self._line) + (stop or end) - start)
        if not stop:
            self._line += data[start:end]
            self._check_line_start(self._line)
            return end
        line = self._line + data[start:stop]
        self._line = b""
        self._end_line(line)
        return stop

    def _check_line_length(self, size: int) -> None:
        if self._phase == "trailer":
            if self._trailer_bytes + size > self._max_trailer_bytes:
                raise FramingError(f"the trailer section is longer than {self._max_trailer_bytes} bytes")
        elif size > _MAX_SIZE_LINE_BYTES:
            raise FramingError(f"a chunk size line is longer than {_MAX_SIZE_LINE_BYTES} bytes")

    def _check_line_start(self, line: bytes) -> None:
        if self._phase == "trailer":
            if _trailer_line_start(line) is None:
                raise FramingError("a line of the trailer section is malformed")
        elif self._phase == "payload end":
            if line != b"\r":
                raise FramingError("a chunk does not end in CRLF after the bytes it announced")
        elif (_extended_size_line_start if self._allow_extensions else _size_line_start)(line) is None:
            self._refuse_size_line(line)

    def _end_line(self, line: bytes) -> None:
        if self._phase == "trailer":
            self._trailer_bytes += len(line)
            if line == b"\r\n":
                self.complete = True
                return
            match = _trailer_line(line)
            if match is None:
                raise FramingError("a line of the trailer section is malformed")
            if match[1].lower() in _FORBIDDEN_TRAILERS:
                raise FramingError("the trailer section holds a field that is not allowed after a body")
        elif self._phase == "payload end":
            if line != b"\r\n":
                raise FramingError("a chunk does not end in CRLF after the bytes it announced")
            self._phase = "size"
        else:
            match = _size_line(line)
            if match is None and self._allow_extensions:
                match = _extended_size_line(line)
            if match is None:
                self._refuse_size_line(line)
            self._begin_chunk(int(match[1], 16))

    def _begin_chunk(self, size: int) -> None:
        self._remaining = size
        if not size:
            self._phase = "trailer"

    def _refuse_size_line(self, line: bytes) -> NoReturn:
        if not self._allow_extensions and b";" in line:
            raise FramingError("chunk extensions are refused")
        raise FramingError("a chunk size is not a line of 1 to 15 hexadecimal digits closed by CRLF")


_BETWEEN_CHUNKS = ChunkedFraming(allow_extensions=True)


class ChunkedDecoder:
    """Take the payload out of a chunked body, from its beginning or from where a follower stands."""

    __slots__ = ("_framing", "unused")

    def __init__(self, *, allow_extensions: bool) -> None:
        self._framing = ChunkedFraming(allow_extensions=allow_extensions)
        self.unused = b""

    @classmethod
    def from_state(cls, framing: ChunkedFraming) -> ChunkedDecoder:
        """Return a decoder for the bytes that follow those `framing` has seen; `framing` stays as it is."""
        decoder = cls(allow_extensions=False)
        decoder._framing = framing.copy()
        return decoder

    @property
    def complete(self) -> bool:
        """Tell whether the closing chunk and its trailer section have come."""
        return self._framing.complete

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`; bytes behind the body gather in `unused`. Raises FramingError."""
        payload: list[bytes] = []
        used = self._framing.feed(data, payload)
        if used < len(data):
            self.unused += data[used:]
        return b"".join(payload)


def encode_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk, or nothing for no bytes: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
