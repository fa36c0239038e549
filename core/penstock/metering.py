"""A bounded tee on a response body: what usage is read from once the client has its bytes.

The meter keeps the first reads and the last reads as they are; nothing is decoded until the body has ended, and then
only what was kept. A content-coded body is the exception: it can only be decoded from its start, so it is decoded as
it passes (after the write to the client) and the decoded text is windowed.
"""

from __future__ import annotations

import contextlib
from collections import deque

import attrs

from penstock.codings import CodingError, Decoder
from penstock.framing import MARK_BYTES, ChunkedDecoder, ChunkedFraming, FramingError

HEAD_BYTES = 8 * 1024
TAIL_BYTES = MARK_BYTES
DECODED_LIMIT = 256 * 1024 * 1024
"""Stop decoding a compressed body for the meter's sake here; the client still gets every byte."""


@attrs.frozen
class BodyWindow:
    """Hold the start and the end of a de-framed, decoded body."""

    head: bytes
    """The first bytes."""
    tail: bytes
    """The last bytes; empty where the head has all."""
    total_bytes: int
    """Wire bytes seen, framing included where the relay was raw."""
    is_whole: bool = True
    """Whether nothing is missing between head and tail."""

    @property
    def text(self) -> bytes:
        """Return both ends; with a gap between them unless ``is_whole``."""
        return self.head + self.tail


class Meter:
    """Keep the ends of a body. ``add`` is called once per read and costs a list append."""

    __slots__ = ("_before", "_decoded", "_framing", "_has_gap", "_head", "_head_bytes", "_tail", "_tail_bytes",
                 "total_bytes")  # fmt: skip

    def __init__(self, framing: ChunkedFraming | None, content_encoding: bytes | None) -> None:
        """``framing``: where the raw bytes carry chunk framing, the follower that has just seen what is added."""
        self._framing = framing if content_encoding is None else None
        self._decoded = None if content_encoding is None else _Decoded(framing is not None, content_encoding)
        self._head: list[bytes] = []
        self._head_bytes = 0
        self._tail: deque[tuple[ChunkedFraming | None, bytes]] = deque()
        self._tail_bytes = 0
        self._before: ChunkedFraming | None = None
        self._has_gap = False
        self.total_bytes = 0

    def add(self, data: bytes) -> None:
        """Take the next read; a large one keeps only its ends."""
        self.total_bytes += len(data)
        if self._decoded is not None:
            data = self._decoded.feed(data)
        room = max(0, HEAD_BYTES - self._head_bytes)
        cut = self._cut(data) if len(data) > TAIL_BYTES + room else None
        if room:
            self._head_bytes += len(data)
            if cut is None:
                self._head.append(data)
            else:
                self._has_gap = True
                self._head.append(data[:room])
                self._add_to_tail(cut[1], data[cut[0] :])
        elif cut is None:
            self._add_to_tail(self._before, data)
        else:
            self._has_gap = True
            self._add_to_tail(cut[1], data[cut[0] :])
        if self._framing is not None and self._head_bytes >= HEAD_BYTES:
            self._before = self._framing.snapshot()

    def _cut(self, data: bytes) -> tuple[int, ChunkedFraming | None] | None:
        """Return where the tail may begin inside a read, with the framing's state there."""
        return (len(data) - TAIL_BYTES, None) if self._framing is None else self._framing.mark

    def _add_to_tail(self, before: ChunkedFraming | None, data: bytes) -> None:
        tail = self._tail
        tail.append((before, data))
        self._tail_bytes += len(data)
        while self._tail_bytes - len(tail[0][1]) >= TAIL_BYTES:
            self._tail_bytes -= len(tail.popleft()[1])
            self._has_gap = True

    def follower(self) -> ChunkedFraming:
        """Return a follower of the framing that stands behind what was added.

        The transport's own is further on once it has found fault with a read, of which nothing is added.
        """
        follower, data = ChunkedFraming(allow_extensions=True), b"".join(self._head)
        if self._tail:
            before, data = self._tail[-1]
            assert before is not None
            follower = before.copy()
        follower.feed(data)
        return follower

    def window(self) -> BodyWindow:
        """Return the decoded ends of the body. Never raises: what cannot be decoded is left out."""
        head = b"".join(self._head)
        tail = b"".join([data for _, data in self._tail])
        if self._framing is not None:
            head = _dechunk(ChunkedDecoder(allow_extensions=True), head)
            if tail:
                before = self._tail[0][0]
                assert before is not None
                tail = _dechunk(ChunkedDecoder.from_state(before), tail)
        return BodyWindow(head, tail, self.total_bytes, not self._has_gap)


def _dechunk(decoder: ChunkedDecoder, data: bytes) -> bytes:
    try:
        return decoder.feed(data)
    except FramingError:
        return b""


class _Decoded:
    """Undo chunk framing and content coding as the bytes pass."""

    __slots__ = ("_chunks", "_coding")

    def __init__(self, is_chunked: bool, content_encoding: bytes) -> None:
        self._chunks = ChunkedDecoder(allow_extensions=True) if is_chunked else None
        self._coding: Decoder | None = None
        with contextlib.suppress(CodingError):
            self._coding = Decoder(content_encoding, max_output=DECODED_LIMIT)

    def feed(self, data: bytes) -> bytes:
        if self._coding is None:
            return b""
        try:
            return self._coding.feed(data if self._chunks is None else self._chunks.feed(data))
        except (CodingError, FramingError):
            self._coding = None
            return b""
