from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.framing import (
    LAST_CHUNK,
    ChunkedDecoder,
    ChunkedFraming,
    CloseFraming,
    Framing,
    FramingError,
    LengthFraming,
    encode_chunk,
)

PIECES = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
TRAILERS = st.sampled_from([b"", b"X-Sum: 1\r\n", b'X-Sum:\r\nServer-Timing: a;b="c"\r\n'])
EXTENSIONS = st.sampled_from([b"", b"", b";a", b";a=b", b' ; a = "q\\"\xff" ;b', b";a\t;b=1"])
BEHIND = st.sampled_from([b"", b"G", b"GET / HTTP/1.1\r\n", b"\r\n\r\n", b"0\r\n\r\n"])


def encode(pieces: list[bytes], trailers: bytes = b"", extension: bytes = b"") -> bytes:
    chunks = [b"%X%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(chunks) + b"0%b\r\n" % extension + trailers + b"\r\n"


@st.composite
def cut(draw: st.DrawFn, raw: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=10)))
    return [raw[start:stop] for start, stop in zip([0, *places], [*places, len(raw)], strict=True)]


def follow(framing: Framing, reads: list[bytes]) -> int:
    return sum(framing.feed(read) for read in reads)


def one_by_one(raw: bytes) -> list[bytes]:
    return [raw[index : index + 1] for index in range(len(raw))]


# Length and close


@given(st.integers(0, 60), st.data())
def test_length_ends_after_that_many_bytes_however_cut(length: int, draw: st.DataObject) -> None:
    framing = LengthFraming(length)
    assert follow(framing, draw.draw(cut(b"x" * 40))) == min(40, length)
    assert framing.complete is (length <= 40)
    assert framing.finish_on_eof() is (length <= 40)


def test_empty_length_is_complete_at_once() -> None:
    framing = LengthFraming(0)
    assert framing.complete
    assert framing.feed(b"next") == 0


def test_close_takes_everything_until_the_connection_ends() -> None:
    framing = CloseFraming()
    assert framing.feed(b"abc") == 3
    assert not framing.complete
    assert framing.finish_on_eof()
    assert framing.complete
    assert framing.feed(b"x") == 0


# Chunked


@given(PIECES, TRAILERS, EXTENSIONS, BEHIND, st.data())
def test_chunked_end_and_payload_do_not_depend_on_the_cuts(
    pieces: list[bytes], trailers: bytes, extension: bytes, behind: bytes, draw: st.DataObject
) -> None:
    body = encode(pieces, trailers, extension)
    reads = draw.draw(cut(body + behind))
    framing = ChunkedFraming(allow_extensions=True)
    assert follow(framing, reads) == len(body)
    assert framing.complete
    assert framing.finish_on_eof()
    decoder = ChunkedDecoder(allow_extensions=True)
    assert b"".join(map(decoder.feed, reads)) == b"".join(pieces)
    assert decoder.complete
    assert decoder.unused == behind


@given(PIECES, TRAILERS, st.data())
def test_every_proper_beginning_is_incomplete(pieces: list[bytes], trailers: bytes, draw: st.DataObject) -> None:
    body = encode(pieces, trailers)
    beginning = body[: draw.draw(st.integers(0, len(body) - 1))]
    framing = ChunkedFraming(allow_extensions=False)
    assert follow(framing, draw.draw(cut(beginning))) == len(beginning)
    assert not framing.complete
    assert not framing.finish_on_eof()


@given(PIECES, TRAILERS, EXTENSIONS, st.data())
def test_decoder_from_a_snapshot_gives_the_rest_of_the_payload(
    pieces: list[bytes], trailers: bytes, extension: bytes, draw: st.DataObject
) -> None:
    body = encode(pieces, trailers, extension)
    place = draw.draw(st.integers(0, len(body)))
    framing = ChunkedFraming(allow_extensions=True)
    before = ChunkedDecoder(allow_extensions=True)
    beginning = b""
    for read in draw.draw(cut(body[:place])):
        framing.feed(read)
        beginning += before.feed(read)
    snapshot = framing.copy()
    framing.feed(body[place:])
    decoder = ChunkedDecoder.from_state(snapshot)
    rest = b"".join(map(decoder.feed, draw.draw(cut(body[place:] + b"next"))))
    assert beginning + rest == b"".join(pieces)
    assert (decoder.complete, decoder.unused) == (True, b"next")
    assert snapshot.complete is (place == len(body))


@given(PIECES, st.sampled_from([b"", b";a=b", b";a"]), BEHIND, st.data())
def test_chunked_payload_equals_h11(pieces: list[bytes], extension: bytes, behind: bytes, draw: st.DataObject) -> None:
    body = encode(pieces, b"X-Sum: 1\r\n", extension)
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body + behind)
    assert isinstance(connection.next_event(), h11.Request)
    theirs = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data)
        theirs += event.data
    decoder = ChunkedDecoder(allow_extensions=True)
    assert b"".join(map(decoder.feed, draw.draw(cut(body + behind)))) == theirs
    assert (decoder.unused, False) == connection.trailing_data


MALFORMED = {
    "no digits": b"\r\n",
    "not hexadecimal": b"g\r\n",
    "sign": b"+5\r\nabcde\r\n",
    "minus": b"-1\r\n",
    "0x": b"0x5\r\nabcde\r\n",
    "underscore": b"1_0\r\n0123456789abcdef\r\n",
    "leading blank": b" 5\r\nabcde\r\n",
    "trailing blank": b"5 \r\nabcde\r\n",
    "trailing tab": b"5\t\r\nabcde\r\n",
    "16 digits": b"0000000000000005\r\nabcde\r\n",
    "bare LF after the size": b"5\nabcde\r\n",
    "bare CR after the size": b"5\rabcde\r\n",
    "CR CR LF": b"5\r\r\nabcde\r\n",
    "bytes beyond the chunk": b"5\r\nabcdef\r\n",
    "bare LF after the payload": b"5\r\nabcde\n0\r\n\r\n",
    "no line end after the payload": b"5\r\nabcde0\r\n\r\n",
    "CR then no LF after the payload": b"5\r\nabcde\rx",
    "bare LF after the last size": b"0\n\r\n",
    "bare LF as the last line": b"0\r\n\n",
    "bare CR as the last line": b"0\r\n\rx\n",
    "trailer with bare LF": b"0\r\nX: 1\n\r\n",
    "trailer without colon": b"0\r\nX\r\n\r\n",
    "folded trailer": b"0\r\nX: 1\r\n y\r\n\r\n",
    "blank before the colon": b"0\r\nX : 1\r\n\r\n",
    "NUL in a trailer": b"0\r\nX: \x00\r\n\r\n",
    "length as a trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "coding as a trailer": b"0\r\ntransfer-encoding: chunked\r\n\r\n",
    "credential as a trailer": b"0\r\nAuthorization: x\r\n\r\n",
    "NUL in an extension": b"5;a\x00\r\nabcde\r\n",
    "bare LF in an extension": b"5;a\nabcde\r\n",
    "extension without a name": b"5;\r\nabcde\r\n",
    "extension without a value": b"5;a=\r\nabcde\r\n",
    "unclosed quote": b'5;a="b\r\nabcde\r\n',
    "blank behind an extension": b"5;a \r\nabcde\r\n",
    "overlong size line": b"5;" + b"a" * 1024 + b"\r\nabcde\r\n",
}


@pytest.mark.parametrize("allow_extensions", [False, True])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_is_refused_whole_and_byte_by_byte(body: bytes, allow_extensions: bool) -> None:
    for prefix in (b"", b"3\r\nabc\r\n"):
        for reads in ([prefix + body], [prefix, body], one_by_one(prefix + body)):
            with pytest.raises(FramingError):
                follow(ChunkedFraming(allow_extensions=allow_extensions), reads)


@given(
    st.lists(
        st.sampled_from(
            [b"0", b"1", b"3", b"a", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b";", b"=", b" ", b"abc", b"X:"]
        )
    ).map(b"".join),
    st.booleans(),
    st.data(),
)
def test_the_verdict_does_not_depend_on_the_cuts(raw: bytes, allow: bool, draw: st.DataObject) -> None:
    def verdict(reads: list[bytes]) -> tuple[int, bool] | str:
        framing = ChunkedFraming(allow_extensions=allow, max_trailer_bytes=6)
        try:
            return follow(framing, reads), framing.complete
        except FramingError:
            return "refused"

    assert verdict([raw]) == verdict(one_by_one(raw)) == verdict(draw.draw(cut(raw)))


@pytest.mark.parametrize("start", [b"5 ", b"5\n", b"x", b"5;", b"0000000000000000"])
def test_bad_size_line_is_refused_before_its_end(start: bytes) -> None:
    with pytest.raises(FramingError):
        ChunkedFraming(allow_extensions=False).feed(start)


def test_extensions_are_refused_unless_allowed() -> None:
    with pytest.raises(FramingError, match="extensions"):
        ChunkedFraming(allow_extensions=False).feed(b"5;a=b\r\nabcde\r\n")
    assert ChunkedDecoder(allow_extensions=True).feed(b"5;a=b\r\nabcde\r\n") == b"abcde"


def test_trailer_section_is_bounded() -> None:
    raw = b"0\r\n" + b"X: 1\r\n" * 3 + b"\r\n"
    assert ChunkedFraming(allow_extensions=False, max_trailer_bytes=20).feed(raw) == len(raw)
    for reads in ([raw], one_by_one(raw)):
        with pytest.raises(FramingError, match="19 bytes"):
            follow(ChunkedFraming(allow_extensions=False, max_trailer_bytes=19), reads)


def test_refusals_never_repeat_what_was_sent() -> None:
    with pytest.raises(FramingError) as refused:
        ChunkedFraming(allow_extensions=True).feed(b"secret\r\n")
    assert "secret" not in refused.value.message


def test_size_with_leading_zeros_and_any_case_is_read() -> None:
    assert ChunkedDecoder(allow_extensions=False).feed(b"00000000000000A\r\n0123456789\r\n") == b"0123456789"
    decoder = ChunkedDecoder(allow_extensions=False)
    decoder.feed(b"000\r\n\r\n")
    assert decoder.complete


def test_fed_after_the_end_takes_nothing() -> None:
    framing = ChunkedFraming(allow_extensions=False)
    assert framing.feed(LAST_CHUNK) == len(LAST_CHUNK)
    assert framing.feed(b"5\r\n") == 0


@given(PIECES)
def test_encoded_chunks_decode_to_what_went_in(pieces: list[bytes]) -> None:
    raw = b"".join(map(encode_chunk, pieces)) + LAST_CHUNK
    decoder = ChunkedDecoder(allow_extensions=False)
    assert decoder.feed(raw) == b"".join(pieces)
    assert decoder.complete


def test_encoding_nothing_does_not_end_the_body() -> None:
    assert encode_chunk(b"") == b""
