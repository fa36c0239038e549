"""Event streams: any segmentation, mixed line ends, and every recorded stream."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sse import (
    Event,
    EventSplitter,
    SSEError,
    first_event,
    is_error_event,
    parse_event,
    replace_payload,
    terminal_event,
)

RECORDINGS = Path(__file__).parents[2] / "shared" / "recordings" / "streaming"

NEWLINES = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.sampled_from(
    [
        b"",
        b"",
        b"data: x",
        b"data:y",
        b"data",
        b"data:  z ",
        b"event: e",
        b"event",
        b": ping",
        b"id: 1",
        b"retry: 2",
    ]
) | st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=5).map(
    lambda text: b"data: " + text.encode()
)
STREAMS = st.lists(st.tuples(LINES, NEWLINES).map(b"".join), max_size=12).map(b"".join)
CUTS = st.lists(st.integers(0, 12), max_size=30)


def read_all(wire: bytes) -> list[tuple[str | None, bytes]]:
    """Read a stream as the WHATWG text says, line by line: name and payload of each event dispatched."""
    events = []
    name = b""
    payload: list[bytes] = []
    lines = re.split(rb"\r\n|\n|\r", wire.removeprefix(b"\xef\xbb\xbf"))
    for line in lines[:-1]:
        if not line:
            if payload:
                events.append((name.decode() or None, b"\n".join(payload)))
            name, payload = b"", []
            continue
        field, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if field == b"data":
            payload.append(value)
        elif field == b"event":
            name = value
    return events


def cut(wire: bytes, sizes: list[int]) -> list[bytes]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(wire[position : position + size])
        position += size
    return [*pieces, wire[position:]]


def has_data(event: Event) -> bool:
    return any(line.partition(b":")[0] == b"data" for line in event.raw.removeprefix(b"\xef\xbb\xbf").splitlines())


@given(STREAMS, CUTS)
def test_events_are_the_same_for_any_segmentation_and_no_byte_is_lost(wire: bytes, sizes: list[int]) -> None:
    whole = EventSplitter()
    expected = whole.feed(wire)
    splitter = EventSplitter()
    events = [event for piece in cut(wire, sizes) for event in splitter.feed(piece)]
    assert events == expected
    assert b"".join(events) + splitter.pending == wire
    assert splitter.pending == whole.pending


@given(st.sampled_from([b"", b"\xef\xbb\xbf"]), STREAMS, CUTS)
def test_events_read_as_the_standard_says(mark: bytes, wire: bytes, sizes: list[int]) -> None:
    splitter = EventSplitter()
    raws = [event for piece in cut(mark + wire, sizes) for event in splitter.feed(piece)]
    raws += splitter.finish()
    events = [parse_event(raw, at_start=index == 0) for index, raw in enumerate(raws)]
    assert [(event.name, event.payload) for event in events if has_data(event)] == read_all(mark + wire)


@given(st.text(max_size=30), st.sampled_from([b"\n", b"\r\n"]))
def test_multi_byte_text_may_be_cut_anywhere(text: str, newline: bytes) -> None:
    payload = text.replace("\r", "").replace("\n", "").encode()
    wire = b"data: " + payload + newline * 2
    splitter = EventSplitter()
    events = [event for byte in wire for event in splitter.feed(bytes((byte,)))]
    assert [parse_event(event).payload for event in events] == [payload]
    assert splitter.newline == newline


def test_half_of_a_line_end_is_held_until_the_other_half_or_the_end() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: a\r\n\r") == []
    assert splitter.feed(b"\ndata: b\r\r") == [b"data: a\r\n\r\n"]
    assert splitter.pending == b"data: b\r\r"
    assert splitter.finish() == [b"data: b\r\r"]
    assert splitter.pending == b""
    assert splitter.finish() == []
    splitter.feed(b"data: c\r")
    assert splitter.finish() == []
    assert splitter.pending == b"data: c\r"


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_event_beyond_its_bound_is_an_error_and_stays_pending(size: int) -> None:
    wire = b"data: a\n\n" + b"data: " + b"x" * 100 + b"\n\ndata: b\n\n"
    splitter = EventSplitter(max_event_bytes=50)
    events: list[bytes] = []
    fed = b""
    error = None
    while error is None and len(fed) < len(wire):
        piece = wire[len(fed) : len(fed) + size]
        fed += piece
        try:
            events += splitter.feed(piece)
        except SSEError as caught:
            error = caught
    assert error is not None
    assert events + error.events == [b"data: a\n\n"]
    assert b"data: a\n\n" + splitter.pending == fed
    with pytest.raises(SSEError):
        splitter.feed(b"\n\n")


def test_many_events_in_one_read_may_exceed_the_bound_together() -> None:
    assert len(EventSplitter(max_event_bytes=10).feed(b"data: a\n\n" * 100)) == 100


@pytest.mark.parametrize(
    ("raw", "name", "payload", "is_comment_only"),
    [
        (b"data: x\n\n", None, b"x", False),
        (b"data:x \r\n\r\n", None, b"x ", False),
        (b"data: a\ndata\ndata:b\n\n", None, b"a\n\nb", False),
        (b"event: ping\ndata: {}\n\n", "ping", b"{}", False),
        (b"event: a\nevent:\n\n", None, b"", False),
        (b": comment\n\n", None, b"", True),
        (b"\n\n", None, b"", True),
        (b"id: 1\n\n", None, b"", False),
        (b"dataset: x\n\n", None, b"", False),
    ],
)
def test_fields_of_an_event_are_read(raw: bytes, name: str | None, payload: bytes, is_comment_only: bool) -> None:
    event = parse_event(raw)
    assert (event.name, event.payload, event.is_comment_only) == (name, payload, is_comment_only)


def test_first_event_is_found_behind_comments_and_a_byte_order_mark() -> None:
    wire = b"\xef\xbb\xbf: OPENROUTER PROCESSING\n\n: again\n\n\ndata: x\n\ndata: y\n\n"
    found = first_event(wire)
    assert found is not None
    assert (found[0].payload, wire[found[1] :]) == (b"x", b"data: y\n\n")
    assert first_event(b"\xef\xbb\xbfdata: x\n\n") is not None
    assert first_event(b"\xef\xbb\xbf: x\n\n") is None
    assert first_event(b": x\n\ndata: y\n") is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"event: error\ndata: anything\n\n", True),
        (b'data: {"error":{"message":"x"}}\n\n', True),
        (b'data: {"id":"x","error":"overloaded","choices":[]}\r\n\r\n', True),
        (b'data: {"type":"error","error":{"type":"overloaded_error"}}\n\n', True),
        (b'data: {"type":"error","code":"x"}\n\n', True),
        (b'data: {"\\u0065rror":{}}\n\n', True),
        (b'data: {"error":null,"choices":[]}\n\n', False),
        (b'data: {"choices":[{"error":{"x":1}}]}\n\n', False),
        (b'data: {"type":"content","text":"\\"type\\":\\"error\\""}\n\n', False),
        (b'data: ["error"]\n\n', False),
        (b"data: an error that is no JSON\n\n", False),
        (b"data: [DONE]\n\n", False),
    ],
)
def test_error_events_are_told_from_content(raw: bytes, expected: bool) -> None:
    assert is_error_event(parse_event(raw)) is expected


@given(STREAMS, st.binary(max_size=20))
def test_replaced_payload_is_read_back_and_the_other_lines_stay(wire: bytes, payload: bytes) -> None:
    for raw in EventSplitter().feed(wire):
        edited = replace_payload(raw, payload)
        event, before = parse_event(edited), parse_event(raw)
        assert event.payload == re.sub(rb"\r\n|\r", b"\n", payload)
        assert event.name == before.name
        others = [line for line in raw.splitlines() if line.partition(b":")[0] != b"data"]
        assert [line for line in edited.splitlines() if line.partition(b":")[0] != b"data"] == others
        if not raw.startswith((b"\r", b"\n")):  # there a blank line ends an empty event before this one
            assert EventSplitter().feed(edited + b":") == [edited]


@pytest.mark.parametrize(
    ("raw", "payload", "expected"),
    [
        (b"event: e\ndata: {}\nid: 1\n\n", b"[]", b"event: e\ndata: []\nid: 1\n\n"),
        (b": c\r\ndata:{}\r\n\r\n", b"[]", b": c\r\ndata:[]\r\n\r\n"),
        (b"data: a\ndata: b\n\n", b"c", b"data: c\n\n"),
        (b"data: a\n\n", b"b\nc", b"data: b\ndata: c\n\n"),
        (b"data:a\n\n", b" b", b"data:  b\n\n"),
        (b"event: e\r\n\r\n", b"x", b"event: e\r\ndata: x\r\n\r\n"),
        (b"\xef\xbb\xbfdata: a\n\n", b"b", b"\xef\xbb\xbfdata: b\n\n"),
    ],
)
def test_replaced_payload_keeps_the_spelling_of_the_event(raw: bytes, payload: bytes, expected: bytes) -> None:
    assert replace_payload(raw, payload) == expected


@given(STREAMS, st.sampled_from([None, b"\n", b"\r\n"]), st.booleans())
def test_terminal_event_is_read_whole_whatever_was_sent_before(sent: bytes, newline: bytes | None, named: bool) -> None:
    tail = terminal_event("error" if named else None, b'{"error":1}', pending=sent, newline=newline)
    assert read_all(sent + tail)[-1] == ("error" if named else None, b'{"error":1}')
    before = EventSplitter()
    complete = [(e.name, e.payload) for e in map(parse_event, before.feed(sent) + before.finish()) if has_data(e)]
    assert read_all(sent + tail)[: len(complete)] == complete


@pytest.mark.parametrize(
    ("pending", "expected"),
    [
        (b"", b"event: error\ndata: x\n\n"),
        (b"data: a\n\n", b"event: error\ndata: x\n\n"),
        (b"data: a\n", b"\nevent: error\ndata: x\n\n"),
        (b"data: a", b"\n\nevent: error\ndata: x\n\n"),
        (b"data: b\r\n\r\ndata: a", b"\r\n\r\nevent: error\r\ndata: x\r\n\r\n"),
        (b"data: a\r\n", b"\r\nevent: error\r\ndata: x\r\n\r\n"),
    ],
)
def test_terminal_event_closes_an_incomplete_frame_in_the_style_of_the_stream(pending: bytes, expected: bytes) -> None:
    assert terminal_event("error", b"x", pending=pending) == expected


def test_terminal_event_spells_each_line_of_its_payload() -> None:
    assert terminal_event(None, b"a\r\nb\nc", pending=b"", newline=b"\r\n") == (
        b"data: a\r\ndata: b\r\ndata: c\r\n\r\n"
    )


def test_recorded_streams_are_split_and_read_without_loss() -> None:
    recordings = sorted(RECORDINGS.glob("*/*.sse"))
    if not recordings:
        pytest.skip(f"NOTHING CHECKED: no recordings at {RECORDINGS}")
    for path in recordings:
        wire = path.read_bytes()
        for size in (len(wire), 1000, 13):
            splitter = EventSplitter()
            pieces = [wire[start : start + size] for start in range(0, len(wire), size)]
            raws = [raw for piece in pieces for raw in splitter.feed(piece)]
            assert b"".join(raws) + splitter.pending == wire, path
            assert splitter.pending == b"", path
            events = [parse_event(raw) for raw in raws]
            assert [(e.name, e.payload) for e in events if has_data(e)] == read_all(wire), path
            assert all(replace_payload(e.raw, e.payload) == e.raw for e in events if has_data(e)), path
        found = first_event(wire)
        assert found is not None, path
