"""Content codings undone within bounds: gzip, deflate, br and zstd, also stacked (RFC 9110, 8.4).

Decoding works in pieces of at most 64 KiB and stops at the first byte too many, so a bomb costs no more
memory than its bound. brotli and zstandard are optional: without them those codings are unknown here.
"""

import functools
import sys
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

_PIECE = 64 * 1024
_BROTLI_LIMIT = 16 * 1024  # its buffer grows past the limit: this one gives pieces of 32 KiB
_ZSTD_WINDOW = 8 * 1024 * 1024  # RFC 9659
_MAX_STACKED = 4
_MAX_CACHED = 256

Emit = Callable[[bytes], object]


class CodingError(ValueError):
    """Report content that is corrupt or cut off."""


class UnknownCoding(CodingError):  # noqa: N818 - the name says what is wrong
    """Report a content coding that cannot be undone here."""


class BombError(CodingError):
    """Report content that decodes to more bytes than allowed."""


class _Stage(Protocol):
    """Undo one coding; complete is true wherever the content may end."""

    @property
    def complete(self) -> bool: ...

    def feed(self, data: bytes) -> None: ...


class _Zlib:
    """Undo gzip, of any number of members (RFC 1952), or deflate, wrapped or bare (RFC 1950, 1951)."""

    def __init__(self, emit: Emit, *, is_gzip: bool) -> None:
        self.complete = False
        self._emit = emit
        self._is_gzip = is_gzip
        self._head = b""
        self._stream: Any = zlib.decompressobj(wbits=31) if is_gzip else None

    def feed(self, data: bytes) -> None:
        if self._stream is None:
            data = self._head = self._head + data
            if len(data) < 2:
                return
            is_wrapped = data[0] & 0x0F == 8 and int.from_bytes(data[:2], "big") % 31 == 0
            self._stream = zlib.decompressobj(wbits=15 if is_wrapped else -15)
        while data:
            if self._stream.eof:
                data = self._next_member(data)
                continue
            stream = self._stream
            try:
                piece = stream.decompress(data, _PIECE)
                self._emit(piece)
                while len(piece) == _PIECE or stream.unconsumed_tail:
                    piece = stream.decompress(stream.unconsumed_tail, _PIECE)
                    self._emit(piece)
            except zlib.error as error:
                raise CodingError(str(error)) from None
            self.complete = stream.eof
            data = stream.unused_data

    def _next_member(self, data: bytes) -> bytes:
        """Start the next gzip member; zero padding behind a member is skipped."""
        if not self._is_gzip:
            raise CodingError("bytes behind the end of the deflate stream")
        data = data.lstrip(b"\0")
        if data:
            self._stream = zlib.decompressobj(wbits=31)
            self.complete = False
        return data


class _Brotli:
    """Undo br (RFC 7932)."""

    def __init__(self, emit: Emit) -> None:
        import brotli  # noqa: PLC0415 - optional

        self.complete = False
        self._emit = emit
        self._stream = brotli.Decompressor()
        self._error = brotli.error

    def feed(self, data: bytes) -> None:
        if self.complete and data:
            raise CodingError("bytes behind the end of the br stream")
        try:
            while piece := self._stream.process(data, output_buffer_limit=_BROTLI_LIMIT):
                self._emit(piece)
                data = b""
        except self._error as error:
            raise CodingError(str(error)) from None
        self.complete = self._stream.is_finished()


class _Zstandard:
    """Undo zstd (RFC 8878) with the zstandard package, which does not tell where a frame ends."""

    def __init__(self, emit: Emit) -> None:
        import zstandard  # noqa: PLC0415 - optional

        self._frames = _ZstdFrames()
        self._error: type[Exception] = zstandard.ZstdError
        sink: Any = _Sink(emit)
        frames = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._stream = frames.stream_writer(sink, write_size=_PIECE)

    @property
    def complete(self) -> bool:
        return self._frames.complete

    def feed(self, data: bytes) -> None:
        try:
            self._stream.write(data)
        except self._error as error:
            raise CodingError(str(error)) from None
        self._frames.feed(data)


class _Sink:
    """Be the file that the zstandard package writes to."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def write(self, piece: bytes) -> int:
        self._emit(bytes(piece))
        return len(piece)


class _ZstdFrames:
    """Follow the frames and blocks of a zstd stream without decoding them (RFC 8878, 3.1)."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0
        self._in_frame = False
        self._checksum = 0

    @property
    def complete(self) -> bool:
        return not (self._in_frame or self._skip or self._rest)

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        position = 0
        while True:
            step = min(self._skip, len(data) - position)
            position += step
            self._skip -= step
            size = 0 if self._skip else self._read(data[position : position + 8])
            if not size:
                break
            position += size
        self._rest = data[position:]

    def _read(self, head: bytes) -> int:
        """Read one header: set how much follows it, return its size or 0 if it is not all there."""
        if self._in_frame:
            if len(head) < 3:
                return 0
            block = int.from_bytes(head[:3], "little")
            self._skip = 1 if block >> 1 & 3 == 1 else block >> 3
            if block & 1:
                self._in_frame = False
                self._skip += self._checksum
            return 3
        if head[1:4] == b"\x2a\x4d\x18":  # a frame to skip
            if len(head) < 8:
                return 0
            self._skip = int.from_bytes(head[4:8], "little")
            return 8
        if len(head) < 5:
            return 0
        flags = head[4]
        is_single = flags >> 5 & 1
        content_size = (is_single, 2, 4, 8)[flags >> 6]
        self._skip = 1 - is_single + (0, 1, 2, 4)[flags & 3] + content_size
        self._checksum = flags & 4
        self._in_frame = True
        return 5


class _StandardZstd:
    """Undo zstd with the standard library of Python 3.14."""

    def __init__(self, emit: Emit, module: ModuleType) -> None:
        self.complete = False
        self._emit = emit
        self._error: type[Exception] = module.ZstdError
        options = {module.DecompressionParameter.window_log_max: _ZSTD_WINDOW.bit_length() - 1}
        self._start = functools.partial(module.ZstdDecompressor, options=options)
        self._stream = self._start()

    def feed(self, data: bytes) -> None:
        while data:
            if self._stream.eof:
                self._stream = self._start()
            stream = self._stream
            try:
                self._emit(stream.decompress(data, _PIECE))
                while not stream.eof and not stream.needs_input:
                    self._emit(stream.decompress(b"", _PIECE))
            except self._error as error:
                raise CodingError(str(error)) from None
            self.complete = stream.eof
            data = stream.unused_data


@functools.cache
def _stages() -> dict[bytes, Callable[[Emit], _Stage]]:
    """List what can be undone in this installation."""
    gzip = functools.partial(_Zlib, is_gzip=True)
    stages: dict[bytes, Callable[[Emit], _Stage]] = {
        b"gzip": gzip,
        b"x-gzip": gzip,
        b"deflate": functools.partial(_Zlib, is_gzip=False),
    }
    try:
        import brotli  # noqa: PLC0415 - optional

        brotli.Decompressor().process(b"", output_buffer_limit=1)
    except (ImportError, TypeError):  # TypeError: before 1.2 its output could not be bounded
        pass
    else:
        stages[b"br"] = _Brotli
    if sys.version_info >= (3, 14):
        from compression import zstd  # noqa: PLC0415 - not in earlier releases

        stages[b"zstd"] = functools.partial(_StandardZstd, module=zstd)
        return stages
    try:
        import zstandard  # noqa: F401, PLC0415 - optional
    except ImportError:
        return stages
    stages[b"zstd"] = _Zstandard
    return stages


def supported_codings() -> tuple[bytes, ...]:
    """Name the codings that can be undone here, identity apart."""
    return tuple(_stages())


def trim_accept_encoding(value: bytes | None) -> bytes | None:
    """Cut an Accept-Encoding down to codings that can be undone here.

    Order, weights and spelling of those that stay are kept, and the whole value where all do; ``*`` goes,
    because it asks for anything. ``identity`` if nothing is left, None for None.
    """
    if value is None:
        return None
    return _trim_cached(value) if len(value) <= _MAX_CACHED else _trim(value)


def _trim(value: bytes) -> bytes:
    listed = [item.strip(b" \t") for item in value.split(b",")]
    known = {*_stages(), b"identity"}
    kept = [item for item in listed if item.partition(b";")[0].rstrip(b" \t").lower() in known]
    if len(kept) == len(listed):
        return value
    return b", ".join(kept) or b"identity"


_trim_cached = functools.lru_cache(maxsize=512)(_trim)


class _Bound:
    """Pass pieces on until their sum would exceed a limit."""

    __slots__ = ("_emit", "_limit", "_seen")

    def __init__(self, limit: int, emit: Emit) -> None:
        self._limit = limit
        self._seen = 0
        self._emit = emit

    def __call__(self, piece: bytes) -> None:
        self._seen += len(piece)
        if self._seen > self._limit:
            raise BombError(f"the content decodes to more than {self._limit} bytes")
        if piece:
            self._emit(piece)


def _chain(codings: bytes, max_output: int, emit: Emit) -> tuple[Emit, list[_Stage]]:
    """Connect one stage per coding, the last applied first; what stands between two stages is bounded too."""
    names = [name.strip(b" \t").lower() for name in codings.split(b",")]
    names = [name for name in names if name not in {b"", b"identity"}]
    if len(names) > _MAX_STACKED:
        raise UnknownCoding(f"more than {_MAX_STACKED} stacked content codings")
    stages: list[_Stage] = []
    entry: Emit = _Bound(max_output, emit)
    for name in names:
        make = _stages().get(name)
        if make is None:
            raise UnknownCoding(f"content coding {name.decode('latin-1')!r}")
        if stages:
            entry = _Bound(max_output + max_output // 1000 + _PIECE, entry)
        stage = make(entry)
        stages.append(stage)
        entry = stage.feed
    return entry, stages


class Decoder:
    """Undo the codings of one Content-Encoding value (``gzip, br``: br is undone first) as the bytes come.

    Raises UnknownCoding when built; from feed and finish CodingError where the content is corrupt or cut off,
    BombError where it would exceed max_output bytes. After an error no more may be fed.
    """

    __slots__ = ("_entry", "_is_empty", "_pieces", "_stages")

    def __init__(self, codings: bytes, *, max_output: int) -> None:
        self._pieces: list[bytes] = []
        self._is_empty = True
        self._entry, self._stages = _chain(codings, max_output, self._pieces.append)

    @property
    def complete(self) -> bool:
        """Tell whether the content may end here; content of no bytes at all may."""
        return self._is_empty or all(stage.complete for stage in self._stages)

    def feed(self, data: bytes) -> bytes:
        """Take coded bytes, return what they decode to."""
        if not data:
            return b""
        self._is_empty = False
        self._entry(data)
        decoded = b"".join(self._pieces)
        self._pieces.clear()
        return decoded

    def finish(self) -> bytes:
        """Take the end of the content; nothing is ever left over, but content cut off raises CodingError."""
        if not self.complete:
            raise CodingError("the content is cut off")
        return b""


def decode(body: bytes, codings: bytes, max_output: int) -> bytes:
    """Undo the codings of a whole body; raises as Decoder does."""
    decoder = Decoder(codings, max_output=max_output)
    return decoder.feed(body) + decoder.finish()


def decode_prefix(body: bytes, codings: bytes, max_output: int) -> bytes:
    """Undo the codings of the first part of a body, up to max_output bytes; more is left alone, no bomb.

    Raises UnknownCoding, and CodingError where the content is corrupt.
    """
    pieces: list[bytes] = []
    entry, _ = _chain(codings, max_output + _PIECE, pieces.append)
    try:
        if body:
            entry(body)
    except BombError:
        pass
    return b"".join(pieces)[:max_output]
