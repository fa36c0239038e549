from __future__ import annotations

import subprocess
import sys

import pytest

from penstock.heads import (
    HeadError,
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


def request(*lines: bytes, start: bytes = b"POST /v1 HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join((start, *((host,) if host else ()), *lines, b"", b""))


def response(*lines: bytes, start: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join((start, *lines, b"", b""))


# What is accepted


def test_ordinary_request_is_read_whole() -> None:
    head = read_request_head(REQUEST)
    assert (head.method, head.target) == (b"POST", b"/v1/chat/completions?beta=true")
    assert (head.content_length, head.chunked, head.keep_alive) == (21, False, True)
    assert (head.expects_continue, head.is_http10) == (False, False)
    assert head.headers.get(b"x-stainless-async") == b"async:asyncio"
    assert head.headers.get_all(b"anthropic-beta") == [b"a,b", b"c"]
    assert b"POST /v1/chat/completions?beta=true HTTP/1.1\r\n" + head.fields + b"\r\n" == REQUEST


def test_ordinary_response_is_read_whole() -> None:
    head = read_response_head(RESPONSE)
    assert (head.status, head.reason, head.content_length) == (200, b"OK", 18)
    assert (head.chunked, head.keep_alive, head.has_body) == (False, True, True)
    assert head.headers.get_all(b"set-cookie") == [b"a=b; path=/", b"c=d"]
    assert b"HTTP/1.1 200 OK\r\n" + head.fields + b"\r\n" == RESPONSE


@pytest.mark.parametrize("head", [REQUEST, CHUNKED_REQUEST, request(), request(start=b"GET / HTTP/1.1")])
def test_ordinary_requests_never_reach_h11(head: bytes) -> None:
    assert _read_ordinary_request(head) is not None


@pytest.mark.parametrize("head", [RESPONSE, CHUNKED_RESPONSE])
def test_ordinary_responses_never_reach_h11(head: bytes) -> None:
    assert _read_ordinary_response(head) is not None


def test_ordinary_heads_are_read_where_h11_cannot_be_imported() -> None:
    code = (
        "import sys; from penstock.heads import read_request_head, read_response_head; "
        "sys.modules['h11'] = None; "
        f"read_request_head({REQUEST!r}); read_response_head({RESPONSE!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_length_or_coding_a_request_has_no_body() -> None:
    head = read_request_head(request(start=b"GET /v1/models HTTP/1.1"))
    assert (head.content_length, head.chunked) == (None, False)


def test_continue_is_expected_only_where_a_body_follows() -> None:
    assert read_request_head(request(b"Expect: 100-Continue", b"Content-Length: 3")).expects_continue
    assert read_request_head(request(b"Expect: 100-continue", b"Transfer-Encoding: chunked")).expects_continue
    assert not read_request_head(request(b"Expect: 100-continue")).expects_continue
    old = request(b"Expect: 100-continue", b"Content-Length: 3", start=b"POST / HTTP/1.0")
    assert not read_request_head(old).expects_continue


@pytest.mark.parametrize(
    ("version", "connection", "expected"),
    [
        (b"1.1", b"close", False),
        (b"1.1", b"Close, TE", False),
        (b"1.1", b"x-y", True),
        (b"1.1", b"Keep-Alive", True),
        (b"1.0", b"keep-alive", True),
        (b"1.0", b"keep-alive, close", False),
        (b"1.0", b"x-y", False),
    ],
)
def test_persistence_follows_version_and_connection(version: bytes, connection: bytes, expected: bool) -> None:
    head = read_request_head(request(b"Connection: " + connection, start=b"GET / HTTP/" + version))
    assert head.keep_alive is expected
    assert head.is_http10 is (version == b"1.0")


def test_http10_request_may_lack_host_and_closes() -> None:
    head = read_request_head(b"OPTIONS / HTTP/1.0\r\n\r\n")
    assert (head.is_http10, head.keep_alive, head.fields) == (True, False, b"")


def test_one_empty_line_before_a_request_is_ignored() -> None:
    assert read_request_head(b"\r\n" + REQUEST) == read_request_head(REQUEST)


@pytest.mark.parametrize(
    "line",
    [
        b"Upgrade: websocket",
        b"TE: trailers",
        b"Trailer: x-sum",
        b"X-Empty:",
        b"X-Pad: v \t",
        b"Keep-Alive: 5",
    ],
)
def test_unusual_but_harmless_fields_are_accepted(line: bytes) -> None:
    assert len(read_request_head(request(line)).headers) == 2


def test_options_asterisk_is_accepted() -> None:
    assert read_request_head(request(start=b"OPTIONS * HTTP/1.1")).target == b"*"


def test_uncommon_method_is_left_to_the_caller() -> None:
    assert read_request_head(request(start=b"PROPFIND / HTTP/1.1")).method == b"PROPFIND"


@pytest.mark.parametrize("host", [b"a", b"a.b-c_d:80", b"127.0.0.1:8080", b"[::1]", b"[fe80::1]:443", b"a:"])
def test_host_with_optional_port_is_accepted(host: bytes) -> None:
    assert read_request_head(request(host=b"Host: " + host)).headers.get(b"host") == host


@pytest.mark.parametrize("coding", [b"chunked", b"Chunked", b" CHUNKED "])
def test_chunked_is_recognised_in_any_case(coding: bytes) -> None:
    assert read_request_head(request(b"Transfer-Encoding:" + coding)).chunked
    assert read_response_head(response(b"Transfer-Encoding:" + coding)).chunked


@pytest.mark.parametrize("start", [b"HTTP/1.1 200", b"HTTP/1.1 200 "])
def test_missing_reason_phrase_is_tolerated(start: bytes) -> None:
    head = read_response_head(response(b"Content-Length: 0", start=start))
    assert (head.status, head.reason, head.keep_alive) == (200, b"", True)


@pytest.mark.parametrize(
    ("head", "has_body", "keep_alive"),
    [
        (response(), True, False),
        (response(b"Content-Length: 1"), True, True),
        (response(b"Content-Length: 1", b"Connection: close"), True, False),
        (response(b"Content-Length: 1", start=b"HTTP/1.0 200 OK"), True, False),
        (response(start=b"HTTP/1.1 204 No Content"), False, True),
        (response(b"Content-Length: 0", start=b"HTTP/1.1 204 No Content"), False, True),
        (response(b"Content-Length: 4", start=b"HTTP/1.1 204 No Content"), False, False),
        (response(b"Transfer-Encoding: chunked", start=b"HTTP/1.1 204 No Content"), False, False),
        (response(b"Content-Length: 4", start=b"HTTP/1.1 304 Not Modified"), False, True),
        (response(start=b"HTTP/1.1 100 Continue"), False, True),
        (response(b"Link: <a>", start=b"HTTP/1.1 103 Early Hints"), False, True),
    ],
)
def test_response_body_and_persistence(head: bytes, has_body: bool, keep_alive: bool) -> None:
    parsed = read_response_head(head)
    assert (parsed.has_body, parsed.keep_alive) == (has_body, keep_alive)


# What is refused

FIELD_VECTORS = {
    "bare LF": b"X-A: 1\nX-B: 2",
    "bare LF alone": b"X-A: 1\n\nX-B: 2",
    "bare CR": b"X-A: 1\rX-B: 2",
    "CR CR LF": b"X-A: 1\r\r\nX-B: 2",
    "NUL": b"X-A: \x00",
    "vertical tab": b"X-A: \x0b1",
    "form feed in coding": b"Transfer-Encoding: \x0cchunked",
    "DEL": b"X-A: \x7f",
    "folded line": b"X-A: 1\r\n folded",
    "folded with tab": b"X-A: 1\r\n\tfolded",
    "folded coding": b"Transfer-Encoding:\r\n chunked",
    "blank before the colon": b"Content-Length : 5",
    "tab before the colon": b"Transfer-Encoding\t: chunked",
    "no colon": b"X-A",
    "no name": b": 1",
    "name not a token": b"X(A): 1",
    "name in Latin-1": b"X\xe9: 1",
    "length and coding": b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    "coding and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5",
    "two equal lengths": b"Content-Length: 5\r\nContent-Length: 5",
    "two lengths": b"Content-Length: 5\r\ncontent-length: 6",
    "list of lengths": b"Content-Length: 5, 5",
    "signed length": b"Content-Length: +5",
    "negative length": b"Content-Length: -5",
    "underscored length": b"Content-Length: 1_0",
    "hexadecimal length": b"Content-Length: 0x5",
    "empty length": b"Content-Length:",
    "length in superscript": b"Content-Length: \xb2",
    "length of 16 digits": b"Content-Length: 1000000000000000",
    "unknown coding": b"Transfer-Encoding: gzip",
    "identity coding": b"Transfer-Encoding: identity",
    "coding list": b"Transfer-Encoding: gzip, chunked",
    "chunked twice in a list": b"Transfer-Encoding: chunked, chunked",
    "chunked twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    "quoted coding": b'Transfer-Encoding: "chunked"',
    "chunked with parameter": b"Transfer-Encoding: chunked;a=b",
    "empty coding": b"Transfer-Encoding:",
    "stopped early": b"X-A: 1\r\n\r\nX-B: 2",
}


@pytest.mark.parametrize("lines", FIELD_VECTORS.values(), ids=FIELD_VECTORS.keys())
def test_dangerous_field_is_refused_in_both_directions(lines: bytes) -> None:
    with pytest.raises(HeadError) as refused:
        read_request_head(request(b"X-First: 1", lines, b"X-Last: 1"))
    assert refused.value.status in (400, 501)
    with pytest.raises(HeadError) as refused:
        read_response_head(response(b"X-First: 1", lines, b"X-Last: 1"))
    assert refused.value.status == 502


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request(start=b"GET http://a/ HTTP/1.1"), 400),
        (request(start=b"CONNECT a:443 HTTP/1.1"), 501),
        (request(start=b"TRACE / HTTP/1.1"), 501),
        (request(start=b"GET a:443 HTTP/1.1"), 400),
        (request(start=b"GET * HTTP/1.1"), 400),
        (request(start=b"GET /a#b HTTP/1.1"), 400),
        (request(start=b"GET /\xe9 HTTP/1.1"), 400),
        (request(start=b"GET  / HTTP/1.1"), 400),
        (request(start=b"GET\t/ HTTP/1.1"), 400),
        (request(start=b"GET / a HTTP/1.1"), 400),
        (request(start=b"GET / HTTP/1.1 "), 400),
        (request(start=b" GET / HTTP/1.1"), 400),
        (request(start=b"G@T / HTTP/1.1"), 400),
        (request(start=b"GET /"), 400),
        (request(start=b"GET / http/1.1"), 400),
        (request(start=b"GET / HTTP/1.01"), 400),
        (request(start=b"GET / HTTP/1.2"), 505),
        (request(start=b"GET / HTTP/0.9"), 505),
        (request(start=b"GET / HTTP/2"), 505),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (request(host=b""), 400),
        (request(b"Host: a"), 400),
        (request(b"Host: b"), 400),
        (request(host=b"Host:"), 400),
        (request(host=b"Host: a/b"), 400),
        (request(host=b"Host: a@b"), 400),
        (request(host=b"Host: a, b"), 400),
        (request(host=b"Host: a:b"), 400),
        (request(host=b"Host: a b"), 400),
        (request(b"Host: b", start=b"GET / HTTP/1.0"), 400),
        (request(b"Transfer-Encoding: chunked", start=b"POST / HTTP/1.0"), 400),
        (request(b"Transfer-Encoding: gzip"), 501),
        (request(b"Expect: 200-ok"), 417),
        (request(b"Expect: 100-continue", b"Expect: 100-continue"), 417),
        (b"\r\n\r\n" + request(), 400),
        (b"\n" + request(), 400),
        (b"\r\n\r\n", 400),
        (request()[:-2], 400),
        (request() + b"x", 400),
        (b"", 400),
    ],
)
def test_request_is_refused_with_the_status_that_says_why(head: bytes, status: int) -> None:
    with pytest.raises(HeadError) as refused:
        read_request_head(head)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "head",
    [
        response(start=b"HTTP/1.1 99 Low"),
        response(start=b"HTTP/1.1 099 Low"),
        response(start=b"HTTP/1.1 600 High"),
        response(start=b"HTTP/1.1 2000 OK"),
        response(start=b"HTTP/1.1  200 OK"),
        response(start=b"HTTP/2 200"),
        response(start=b"HTTP/1.2 200 OK"),
        response(start=b"ICY 200 OK"),
        response(start=b"HTTP/1.1 101 Switching Protocols"),
        response(b"Content-Length: 5", start=b"HTTP/1.1 100 Continue"),
        response(b"Transfer-Encoding: chunked", start=b"HTTP/1.1 103 Early Hints"),
        response(b"Transfer-Encoding: chunked", start=b"HTTP/1.0 200 OK"),
        b"\r\n" + response(),
        b"",
    ],
)
def test_response_is_refused(head: bytes) -> None:
    with pytest.raises(HeadError) as refused:
        read_response_head(head)
    assert refused.value.status == 502


def test_refusals_never_repeat_what_was_sent() -> None:
    for lines in FIELD_VECTORS.values():
        with pytest.raises(HeadError) as refused:
            read_request_head(request(b"sk-secret", lines.replace(b"1", b"sk-secret")))
        assert "sk-secret" not in refused.value.message
        assert str(refused.value) == refused.value.message


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ("bare LF", "bare CR or LF"),
        ("bare CR", "bare CR or LF"),
        ("NUL", "control bytes"),
        ("folded line", "folded"),
        ("blank before the colon", "white space"),
        ("no colon", "no colon"),
        ("name not a token", "not a token"),
        ("length and coding", "together with Content-Length"),
        ("two equal lengths", "Content-Length is given more than once"),
        ("signed length", "not a number"),
        ("chunked twice", "Transfer-Encoding is given more than once"),
        ("coding list", "only transfer coding"),
    ],
)
def test_refusal_names_the_rule_that_was_broken(vector: str, words: str) -> None:
    with pytest.raises(HeadError, match=words):
        read_request_head(request(FIELD_VECTORS[vector]))
    with pytest.raises(HeadError, match=words):
        read_response_head(response(FIELD_VECTORS[vector]))
