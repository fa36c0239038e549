"""What the head reader accepts, h11 accepts with the same meaning, and none of it is dangerous."""

from __future__ import annotations

import random
import re

import h11
from hypothesis import given
from hypothesis import strategies as st

from penstock.heads import (
    HeadError,
    RequestHead,
    ResponseHead,
    _read_ordinary_request,
    _read_ordinary_response,
    read_request_head,
    read_response_head,
)

REQUEST = (
    b"POST /v1/chat/completions?beta=true HTTP/1.1\r\nHost: 127.0.0.1:8100\r\nAccept: application/json\r\n"
    b"Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
    b"User-Agent: OpenAI/Python 1.99.0\r\nX-Stainless-Lang: python\r\nX-Stainless-OS: Linux\r\n"
    b"X-Stainless-Runtime: CPython\r\nX-Stainless-Async: async:asyncio\r\nAuthorization: Bearer abc\r\n"
    b"anthropic-beta: a,b\r\nanthropic-beta: c\r\nContent-Length: 21\r\n\r\n"
)
CHUNKED_REQUEST = REQUEST.replace(b"Content-Length: 21", b"Transfer-Encoding: chunked")
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nDate: Mon, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: 18\r\nx-request-id: req_0123456789\r\nopenai-processing-ms: 12\r\n"
    b"Server: cloudflare\r\nset-cookie: a=b; path=/\r\nset-cookie: c=d\r\nConnection: keep-alive\r\n\r\n"
)
CHUNKED_RESPONSE = RESPONSE.replace(b"Content-Length: 18", b"Transfer-Encoding: chunked")
CHUNKED_BODY = b"3\r\nabc\r\n0\r\n\r\n"

FRAGMENTS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"\x00",
        b"\x0b",
        b"\x0c",
        b"\x7f",
        b"\x85",
        b"\xa0",
        b"\xff",
    ),
    *(b"Host: a\r\n", b"Content-Length: 5\r\n", b"content-length: 05\r\n", b"Content-Length: +5\r\n"),
    *(b"Content-Length: 5,5\r\n", b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: Chunked\r\n"),
    *(b"Connection: close\r\n", b"Connection: Keep-Alive\r\n", b"Expect: 100-continue\r\n", b" folded\r\n"),
    *(b"\r\n\r\n", b"HTTP/1.0", b"HTTP/1.1", b"GET ", b"100", b"204", b"304", b";", b",", b"a:\r\n"),
    *(b": x\r\n", b"X :y\r\n", b"Upgrade: h2c\r\n", b"TE: trailers\r\n", b"#", b"chunked", b"\r\n\t"),
]


def mutants(heads: list[bytes], count: int, seed: int) -> list[bytes]:
    rnd = random.Random(seed)
    made: list[bytes] = []
    while len(made) < count:
        head = bytearray(rnd.choice(heads))
        for _ in range(rnd.choice((1, 1, 1, 2, 2, 3, 4))):
            place = rnd.randrange(len(head))
            match rnd.randrange(5):
                case 0:
                    head[place] = rnd.randrange(256)
                case 1:
                    head[place:place] = rnd.choice(FRAGMENTS)
                case 2:
                    del head[place : place + rnd.randrange(1, 12)]
                case _:
                    line_end = head.find(b"\r\n", place)
                    if line_end >= 0:
                        head[line_end + 2 : line_end + 2] = rnd.choice(FRAGMENTS)
        end = head.find(b"\r\n\r\n")
        if end >= 0:
            made.append(bytes(head[: end + 4]))
    return made


def body_of(length: int | None, *, chunked: bool) -> bytes | None:
    if chunked:
        return CHUNKED_BODY
    return b"x" * (length or 0) if (length or 0) < 100_000 else None


def assert_h11_ends_the_body_there(connection: h11.Connection, body: bytes | None) -> None:
    if body is None:
        return
    if body:
        connection.receive_data(body)
    events = []
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert isinstance(event, h11.Data)
        events.append(bytes(event.data))
    assert b"".join(events) == (b"abc" if body is CHUNKED_BODY else body)
    assert connection.trailing_data[0] == b""


def pairs_as_h11_writes_them(head: RequestHead | ResponseHead) -> list[tuple[bytes, bytes]]:
    low = b"transfer-encoding"
    return [(name, value.lower() if name.lower() == low else value) for name, value in head.headers]


def assert_h11_reads_the_same_request(head: bytes, parsed: RequestHead) -> None:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head.removeprefix(b"\r\n"))
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    assert (event.method, event.target) == (parsed.method, parsed.target)
    assert event.http_version == (b"1.0" if parsed.is_http10 else b"1.1")
    assert event.headers.raw_items() == pairs_as_h11_writes_them(parsed)
    assert_h11_ends_the_body_there(connection, body_of(parsed.content_length, chunked=parsed.chunked))
    # Two cases in which h11's state says nothing: it never keeps an HTTP/1.0 connection open (this reader
    # does when asked to), and beside an Upgrade it waits for the answer before it decides.
    is_told = not parsed.is_http10 and b"upgrade" not in parsed.headers
    if is_told and body_of(parsed.content_length, chunked=parsed.chunked) is not None:
        assert (connection.their_state is h11.MUST_CLOSE) is not parsed.keep_alive


def assert_h11_reads_the_same_response(head: bytes, parsed: ResponseHead) -> None:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head)
    event = connection.next_event()
    assert isinstance(event, (h11.Response, h11.InformationalResponse))
    assert (event.status_code, bytes(event.reason)) == (parsed.status, parsed.reason)
    assert event.headers.raw_items() == pairs_as_h11_writes_them(parsed)
    if isinstance(event, h11.InformationalResponse):
        assert not parsed.has_body
        return
    if not parsed.has_body:
        assert_h11_ends_the_body_there(connection, b"")
        return
    body = body_of(parsed.content_length, chunked=parsed.chunked)
    if parsed.content_length is None and not parsed.chunked:
        assert not parsed.keep_alive
        connection.receive_data(b"")
    assert_h11_ends_the_body_there(connection, body)
    if body is not None and parsed.keep_alive:
        assert connection.their_state is h11.DONE


def assert_harmless(head: bytes) -> None:
    """Look for the smuggling vectors by means of its own, not the reader's."""
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head)
    assert b"\r" not in head.replace(b"\r\n", b"")
    assert b"\n" not in head.replace(b"\r\n", b"")
    assert not re.search(rb"\n[ \t]", head)
    lines = head.removeprefix(b"\r\n").split(b"\r\n")[1:-2]
    assert all(re.match(rb"[^\s:]+:", line) for line in lines)
    lengths = [line for line in lines if line.lower().startswith(b"content-length")]
    codings = [line for line in lines if line.lower().startswith(b"transfer-encoding:")]
    # Host says something in requests only.
    hosts = [line for line in lines if line.lower().startswith(b"host:")]
    assert head.startswith(b"HTTP/") or len(hosts) <= 1
    assert len(codings) + len([line for line in lengths if line[14:15] == b":"]) <= 1
    assert all(re.fullmatch(rb".{17}:[ \t]*chunked[ \t]*", line.lower()) for line in codings)


def read_request_or_none(head: bytes) -> RequestHead | None:
    try:
        return read_request_head(head)
    except HeadError:
        return None


def read_response_or_none(head: bytes) -> ResponseHead | None:
    try:
        return read_response_head(head)
    except HeadError:
        return None


def test_accepted_request_mutants_mean_the_same_to_h11() -> None:
    accepted = strictly = 0
    for head in mutants([REQUEST, CHUNKED_REQUEST], 4000, seed=7):
        parsed = read_request_or_none(head)
        strict = _read_ordinary_request(head)
        strictly += strict is not None
        if parsed is not None:
            accepted += 1
            assert_harmless(head)
            assert_h11_reads_the_same_request(head, parsed)
    assert 0 < strictly < accepted < 4000


def test_accepted_response_mutants_mean_the_same_to_h11() -> None:
    accepted = strictly = 0
    for head in mutants([RESPONSE, CHUNKED_RESPONSE], 4000, seed=8):
        parsed = read_response_or_none(head)
        strict = _read_ordinary_response(head)
        strictly += strict is not None
        if parsed is not None:
            accepted += 1
            assert_harmless(head)
            assert_h11_reads_the_same_response(head, parsed)
    assert 0 < strictly < accepted < 4000


PARTS = st.sampled_from(
    [
        *FRAGMENTS,
        *(
            b"GET",
            b"POST",
            b"OPTIONS",
            b" /",
            b" * ",
            b" HTTP/1.1\r\n",
            b"Connection: ",
            b"keep-alive",
            b"close",
        ),
        *(
            b"Content-Length:",
            b"Transfer-Encoding:",
            b"1",
            b"0",
            b"a",
            b"Host: b\r\n",
            b"HTTP/1.1 200 OK\r\n",
        ),
    ]
)
TAILS = st.one_of(st.lists(PARTS, max_size=8).map(b"".join), st.binary(max_size=12))


@given(st.sampled_from([b"", b"POST / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.0\r\n"]), TAILS)
def test_composed_requests_are_harmless_and_mean_the_same_to_h11(start: bytes, tail: bytes) -> None:
    head = start + tail + b"\r\n\r\n"
    parsed = read_request_or_none(head)
    if parsed is not None:
        assert_harmless(head)
        assert_h11_reads_the_same_request(head, parsed)


@given(st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 404 No\r\n"]), TAILS)
def test_composed_responses_are_harmless_and_mean_the_same_to_h11(start: bytes, tail: bytes) -> None:
    head = start + tail + b"\r\n\r\n"
    parsed = read_response_or_none(head)
    if parsed is not None:
        assert_harmless(head)
        assert_h11_reads_the_same_response(head, parsed)


def test_both_routes_read_an_ordinary_head_alike() -> None:
    # An empty line in front sends the same request to the gate and h11.
    for head in mutants([REQUEST, CHUNKED_REQUEST], 500, seed=9):
        if (strict := _read_ordinary_request(head)) is not None:
            assert read_request_head(b"\r\n" + head) == strict
