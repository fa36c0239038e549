"""The meter keeps both ends of a body, whatever its framing, coding and segmentation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.framing import ChunkedFraming, FramingError
from penstock.metering import HEAD_BYTES, TAIL_BYTES, BodyWindow, Meter
from penstock.testing.strategies import chunked_bodies, codings, encode, segmentations


def metered(reads: list[bytes], *, is_chunked: bool = False, coding: str = "") -> Meter:
    framing = ChunkedFraming(allow_extensions=True) if is_chunked else None
    meter = Meter(framing, coding.encode() or None)
    for read in reads:
        if framing is not None:
            assert framing.feed(read) == len(read)
        meter.add(read)
    return meter


def check_ends(window: BodyWindow, body: bytes, total: int) -> None:
    """Whole if nothing is missing; else a true beginning and a true end, each long enough."""
    assert window.total_bytes == total
    assert body.startswith(window.head)
    assert body.endswith(window.tail)
    if window.is_whole:
        assert window.text == body
    else:
        assert len(window.text) <= len(body)
        assert len(window.head) >= HEAD_BYTES


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Draw a body around the size of both windows."""
    size = draw(st.integers(0, 4 * (HEAD_BYTES + TAIL_BYTES)))
    seed = draw(st.binary(min_size=1, max_size=50))
    return (seed * (size // len(seed) + 1))[:size]


BODIES = bodies()


@given(data=st.data(), body=BODIES)
def test_plain_body_is_kept_at_both_ends(data: st.DataObject, body: bytes) -> None:
    check_ends(metered(data.draw(segmentations(body))).window(), body, len(body))


@given(data=st.data(), body=BODIES)
def test_chunked_body_is_kept_without_its_framing(data: st.DataObject, body: bytes) -> None:
    wire = data.draw(chunked_bodies(body))
    window = metered(data.draw(segmentations(wire)), is_chunked=True).window()
    assert body.startswith(window.head)
    assert body.endswith(window.tail)
    assert not window.is_whole or window.text == body


@given(data=st.data(), body=BODIES, coding=st.sampled_from(codings()), is_chunked=st.booleans())
def test_coded_body_is_kept_decoded(data: st.DataObject, body: bytes, coding: str, is_chunked: bool) -> None:
    wire = encode(body, coding)
    wire = data.draw(chunked_bodies(wire)) if is_chunked else wire
    window = metered(data.draw(segmentations(wire)), is_chunked=is_chunked, coding=coding).window()
    check_ends(window, body, len(wire))


@given(data=st.data(), body=BODIES)
def test_small_bodies_are_whole(data: st.DataObject, body: bytes) -> None:
    body = body[: HEAD_BYTES - 1]
    window = metered(data.draw(segmentations(body))).window()
    assert (window.text, window.is_whole) == (body, True)


@given(data=st.data(), body=BODIES)
def test_follower_stands_where_the_transports_stands(data: st.DataObject, body: bytes) -> None:
    wire = data.draw(chunked_bodies(body))
    reads = data.draw(segmentations(wire[: data.draw(st.integers(0, len(wire)))]))
    framing = ChunkedFraming(allow_extensions=True)
    for read in reads:
        framing.feed(read)
    found = metered(reads, is_chunked=True).follower()
    assert found.complete == framing.complete
    assert found.continuation(b"terminal") == framing.continuation(b"terminal")


def test_malformed_read_does_not_move_the_follower() -> None:
    framing = ChunkedFraming(allow_extensions=True)
    meter = Meter(framing, None)
    framing.feed(b"3\r\nabc\r\n")
    meter.add(b"3\r\nabc\r\n")
    try:
        framing.feed(b"3\r\nabcd\r\n")
    except FramingError:
        assert meter.follower().continuation(b"x") == b"1\r\nx\r\n"
    else:
        raise AssertionError("the read was not refused")


def test_corrupt_coding_leaves_the_meter_silent() -> None:
    meter = metered([b"this is no gzip", b" at all"], coding="gzip")
    assert meter.window().text == b""
    assert meter.total_bytes == 22


def test_unknown_coding_is_not_read() -> None:
    assert metered([b"data"], coding="dcb").window().text == b""
