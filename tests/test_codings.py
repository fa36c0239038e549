"""Content codings: any segmentation, stacked, corrupt, cut off, and bombs within their bound of memory."""

import gzip
import io
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from penstock import codings
from penstock.codings import BombError, CodingError, Decoder, UnknownCoding, decode, decode_prefix

ROOM = 10_000_000
Encode = Callable[[bytes], bytes]


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def streamed_zstd(data: bytes) -> bytes:
    """Write a frame without a content size but with a checksum, in several blocks."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    half = len(data) // 2
    flushed = stream.compress(data[:half]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return flushed + stream.compress(data[half:]) + stream.flush()


ENCODERS: list[tuple[bytes, Encode]] = [
    (b"gzip", gzip.compress),
    (b"X-GZip", gzip.compress),
    (b"deflate", zlib.compress),
    (b"deflate", raw_deflate),
    (b"br", brotli.compress),
    (b"zstd", zstandard.ZstdCompressor().compress),
    (b"zstd", streamed_zstd),
    (b"identity", bytes),
    (b"gzip, br", lambda data: brotli.compress(gzip.compress(data))),
    (b"zstd,, identity , deflate", lambda data: zlib.compress(streamed_zstd(data))),
]
REAL_ENCODERS = [item for item in ENCODERS if item[0] != b"identity"]
each_coding = pytest.mark.parametrize(("name", "encode"), REAL_ENCODERS)


@given(st.sampled_from(ENCODERS), st.binary() | st.binary().map(lambda b: b * 5000), st.lists(st.integers(1, 99)))
def test_content_is_the_same_however_it_was_cut(encoder: tuple[bytes, Encode], data: bytes, cuts: list[int]) -> None:
    name, encode = encoder
    wire = io.BytesIO(encode(data))
    decoder = Decoder(name, max_output=ROOM)
    pieces = [decoder.feed(wire.read(size)) for size in cuts]
    pieces += [decoder.feed(wire.read()), decoder.finish()]
    assert b"".join(pieces) == data
    assert decoder.complete


@each_coding
def test_content_cut_off_anywhere_is_refused_at_its_end(name: bytes, encode: Encode) -> None:
    wire = encode(bytes(range(256)) * 20)
    for end in {1, 2, 5, len(wire) // 2, len(wire) - 1}:
        decoder = Decoder(name, max_output=ROOM)
        decoder.feed(wire[:end])
        assert not decoder.complete
        with pytest.raises(CodingError, match="cut off"):
            decoder.finish()


@each_coding
def test_corrupt_content_is_refused(name: bytes, encode: Encode) -> None:
    with pytest.raises(CodingError):
        decode(b"\xff\xff\xff\xff" + encode(b"x" * 100), name, ROOM)


@each_coding
def test_bytes_behind_the_end_are_refused(name: bytes, encode: Encode) -> None:
    decoder = Decoder(name, max_output=ROOM)
    decoder.feed(encode(b"x" * 100))
    with pytest.raises(CodingError):
        decoder.feed(b"\xfftrailing")


@each_coding
def test_content_that_fills_the_bound_passes_and_one_byte_more_is_a_bomb(name: bytes, encode: Encode) -> None:
    wire = encode(b"ab" * 100_000)
    assert len(decode(wire, name, 200_000)) == 200_000
    with pytest.raises(BombError, match="199999"):
        decode(wire, name, 199_999)


@each_coding
def test_bomb_in_one_read_costs_no_more_memory_than_its_bound(name: bytes, encode: Encode) -> None:
    wire = encode(bytes(50_000_000))
    decoder = Decoder(name, max_output=100_000)
    tracemalloc.start()
    with pytest.raises(BombError):
        decoder.feed(wire)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 + len(wire)


def test_bomb_between_two_stages_is_stopped_too() -> None:
    members = gzip.compress(b"", mtime=0) * 100_000
    with pytest.raises(BombError):
        decode(gzip.compress(members), b"gzip, gzip", 1_000)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5), st.integers(1, 40))
def test_gzip_members_and_zero_padding_read_as_one_content(members: list[bytes], size: int) -> None:
    wire = b"\0\0".join(map(gzip.compress, members)) + b"\0\0\0"
    decoder = Decoder(b"gzip", max_output=ROOM)
    pieces = [decoder.feed(wire[start : start + size]) for start in range(0, len(wire), size)]
    assert b"".join(pieces) + decoder.finish() == b"".join(members)


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=4), st.integers(1, 40))
def test_zstd_frames_and_frames_to_skip_read_as_one_content(frames: list[bytes], size: int) -> None:
    skipped = b"\x55\x2a\x4d\x18\x03\x00\x00\x00abc"
    wire = skipped + skipped.join(map(streamed_zstd, frames)) + skipped
    decoder = Decoder(b"zstd", max_output=ROOM)
    pieces = [decoder.feed(wire[start : start + size]) for start in range(0, len(wire), size)]
    assert b"".join(pieces) + decoder.finish() == b"".join(frames)


def test_zstd_blocks_of_one_repeated_byte_are_followed() -> None:
    wire = zstandard.ZstdCompressor().compress(b"a" * 1_000_000)
    assert decode(wire, b"zstd", ROOM) == b"a" * 1_000_000


def test_zstd_window_beyond_eight_mebibytes_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=25)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    wire = stream.compress(bytes(1000)) + stream.flush()
    with pytest.raises(CodingError):
        decode(wire, b"zstd", ROOM)


@pytest.mark.parametrize("name", [b"compress", b"gzip, exi", b"gzip," * 5])
def test_unknown_codings_are_refused_at_once(name: bytes) -> None:
    with pytest.raises(UnknownCoding):
        Decoder(name, max_output=ROOM)


@pytest.mark.parametrize("name", [b"gzip", b"br", b"zstd", b"deflate", b"identity"])
def test_no_bytes_at_all_are_content_under_any_coding(name: bytes) -> None:
    assert decode(b"", name, 0) == b""
    assert decode_prefix(b"", name, 0) == b""


@each_coding
def test_prefix_gives_what_is_there_and_stops_at_its_bound(name: bytes, encode: Encode) -> None:
    wire = encode(b"data: x\n\n" * 50_000)
    assert decode_prefix(wire, name, 1_000) == (b"data: x\n\n" * 112)[:1_000]
    assert b"data: x\n\n".startswith(decode_prefix(wire[:3], name, 9))


def test_all_codings_are_supported_with_the_optional_packages() -> None:
    assert codings.supported_codings() == (b"gzip", b"x-gzip", b"deflate", b"br", b"zstd")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (b"", b"identity"),
        (b"*", b"identity"),
        (b"compress, dcz;q=0.5", b"identity"),
        (b"gzip, deflate, br, zstd", b"gzip, deflate, br, zstd"),
        (b"GZip;q=1.0 ,br ; q=0.5", b"GZip;q=1.0 ,br ; q=0.5"),
        (b"br;q=0.9,dcb, identity;q=0.1, *;q=0", b"br;q=0.9, identity;q=0.1"),
        (b"x-gzip, sdch", b"x-gzip"),
        (b"sdch, " * 100 + b"gzip", b"gzip"),
    ],
)
def test_accept_encoding_is_cut_down_to_what_can_be_decoded(value: bytes | None, expected: bytes | None) -> None:
    assert codings.trim_accept_encoding(value) == expected
