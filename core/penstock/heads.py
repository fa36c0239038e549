"""Read request and response heads of HTTP/1.1; sans-IO.

Two routes. The ordinary head is read here by one strict regular expression and a few set operations; anything
it does not recognise passes a gate that refuses what intermediaries are known to disagree about, and is then
judged by h11, which is more lenient than the gate.

Invariants: what the strict reader accepts, h11 accepts with the same meaning; no accepted head holds a bare
CR or LF, a control byte, a folded line, two lengths, or a length beside a transfer coding. Messages name the
rule that was broken and never repeat what was sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NoReturn

import attrs

from penstock.headers import Headers

_TOKEN = rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+"
_TEXT = rb"[\t\x20-\x7e\x80-\xff]"
# A value must end in a visible byte, so that nothing is left to strip behind it. The atomic group keeps a
# refusal linear: a line once matched is not tried in another way.
_ORDINARY_FIELDS = rb"((?>%b:%b*[\x21-\x7e\x80-\xff]\r\n)+)\r\n" % (_TOKEN, _TEXT)
_ordinary_request = re.compile(
    rb"(GET|POST|PUT|PATCH|DELETE|HEAD|OPTIONS) (/[\x21\x22\x24-\x7e]*) HTTP/1\.1\r\n" + _ORDINARY_FIELDS
).fullmatch
_ordinary_response = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) (%b*)\r\n" % _TEXT + _ORDINARY_FIELDS).fullmatch
_ordinary_pairs = re.compile(rb"([^:]+):[ \t]*([^\r]*)\r\n").findall
_host = re.compile(rb"(?:[-0-9A-Za-z._~%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?").fullmatch

_RARE_IN_REQUEST = frozenset(
    (b"upgrade", b"expect", b"te", b"trailer", b"proxy-connection", b"keep-alive", b"http2-settings")
)
_SINGLE = frozenset((b"host", b"content-length", b"transfer-encoding", b"connection"))

_broken_line_end = re.compile(rb"\r(?!\n)|(?<!\r)\n").search
_control_byte = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]").search
_any_field = re.compile(rb"(%b):[ \t]*(%b*)" % (_TOKEN, _TEXT)).fullmatch
_any_token = re.compile(_TOKEN).fullmatch
_any_version = re.compile(rb"HTTP/[0-9](?:\.[0-9])?").fullmatch
_origin_form = re.compile(rb"/[\x21\x22\x24-\x7e]*").fullmatch
_any_status_line = re.compile(rb"HTTP/(1\.[01]) ([1-5][0-9][0-9])(?: (%b*))?" % _TEXT).fullmatch

_MAX_LENGTH_DIGITS = 15


class HeadError(Exception):
    """Say that a head is refused: `status` to answer with, `message` what is refused and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


# Not attrs.frozen: its __init__ costs 0.6 us a head. Nothing assigns to a head once it is read.
@attrs.define
class RequestHead:
    """Hold one request head.

    `target` is origin-form, or `*` with OPTIONS. `fields` is the block of header lines as sent, each ending
    in CRLF, without the closing blank line. `content_length` None and `chunked` False: there is no body.
    `expects_continue`: the client waits for a 100 before it sends its body.
    """

    method: bytes
    """Such as `b"POST"`."""
    target: bytes = attrs.field(repr=False)
    """Path and query as sent."""
    headers: Headers
    """Header fields."""
    content_length: int | None
    """Announced length of the body."""
    chunked: bool
    """Whether the body is chunked."""
    keep_alive: bool
    """Whether the connection may serve another request."""
    expects_continue: bool
    """Whether `Expect: 100-continue` was sent."""
    is_http10: bool
    """Whether the client speaks HTTP/1.0."""
    fields: bytes = attrs.field(repr=False)
    """Header lines as sent."""


@attrs.define
class ResponseHead:
    """Hold one response head.

    `fields` is as in `RequestHead`. With `has_body` (false for 1xx, 204 and 304), `content_length` None and
    `chunked` False the body ends where the connection does, and `keep_alive` is false.
    """

    status: int
    """HTTP status."""
    reason: bytes
    """Reason phrase."""
    headers: Headers
    """Header fields."""
    content_length: int | None
    """Announced length of the body."""
    chunked: bool
    """Whether the body is chunked."""
    keep_alive: bool
    """Whether the connection may serve another request."""
    has_body: bool
    """Whether a body follows."""
    fields: bytes = attrs.field(repr=False)
    """Header lines as sent."""


def read_request_head(head: bytes) -> RequestHead:
    """Read a request head, from its first byte to and including the blank line.

    One empty line before it is ignored (RFC 9112 2.2). Raises HeadError: 400, 417, 501 or 505.
    """
    return _read_ordinary_request(head) or _judge_request(head)


def read_response_head(head: bytes) -> ResponseHead:
    """Read a response head, from its first byte to and including the blank line.

    The request must not have been HEAD or CONNECT, whose answers are framed differently (RFC 9112 6.3).
    Raises HeadError with status 502.
    """
    return _read_ordinary_response(head) or _judge_response(head)


def _read_ordinary_request(head: bytes) -> RequestHead | None:
    match = _ordinary_request(head)
    if match is None:
        return None
    method, target, fields = match.groups()
    headers = Headers(_ordinary_pairs(fields))
    index = headers.index
    if not _RARE_IN_REQUEST.isdisjoint(index) or _host(index.get(b"host", b"")) is None:
        return None
    if len(index) != len(headers.raw) and _repeats(headers, _SINGLE):
        return None
    connection = index.get(b"connection")
    if connection is not None and connection.lower() != b"keep-alive":
        return None
    length = index.get(b"content-length")
    coding = index.get(b"transfer-encoding")
    if coding is not None:
        if coding != b"chunked" or length is not None:
            return None
        return RequestHead(method, target, headers, None, True, True, False, False, fields)
    if length is None:
        return RequestHead(method, target, headers, None, False, True, False, False, fields)
    if not _is_length(length):
        return None
    return RequestHead(method, target, headers, int(length), False, True, False, False, fields)


def _read_ordinary_response(head: bytes) -> ResponseHead | None:
    match = _ordinary_response(head)
    if match is None:
        return None
    code, reason, fields = match.groups()
    headers = Headers(_ordinary_pairs(fields))
    index = headers.index
    if len(index) != len(headers.raw) and _repeats(headers, _SINGLE):
        return None
    connection = index.get(b"connection")
    if connection is not None and connection.lower() != b"keep-alive":
        return None
    status = int(code)
    length = index.get(b"content-length")
    coding = index.get(b"transfer-encoding")
    if (coding is None) is (length is None) or status in (204, 304):
        return None
    if length is None:
        return ResponseHead(status, reason, headers, None, True, True, True, fields) if coding == b"chunked" else None
    if not _is_length(length):
        return None
    return ResponseHead(status, reason, headers, int(length), False, True, True, fields)


def _judge_request(head: bytes) -> RequestHead:
    head = head.removeprefix(b"\r\n")
    lines = _split_lines(head, 400)
    method, target, is_http10 = _read_request_line(lines[0])
    headers = _read_fields(lines[1:], 400)
    hosts = headers.get_all(b"host")
    # HTTP/1.0 has no Host; probes of load balancers still speak it (RFC 9112 3.2 asks it of HTTP/1.1 only).
    if len(hosts) > 1 or (not hosts and not is_http10):
        raise HeadError(400, "the request must have exactly one Host field")
    if hosts and _host(hosts[0]) is None:
        raise HeadError(400, "the Host field is not a host with an optional port")
    length, chunked = _read_length(headers, 400, is_http10=is_http10)
    if expectations := headers.get_all(b"expect"):
        expected = [value.lower() for value in expectations]
        if expected != [b"100-continue"]:
            raise HeadError(417, "the only expectation that can be met is 100-continue")
    _ask_h11_about_request(head, method, target, headers)
    tokens = headers.tokens(b"connection")
    return RequestHead(
        method,
        target,
        headers,
        length,
        chunked,
        keep_alive=b"close" not in tokens and (not is_http10 or b"keep-alive" in tokens),
        expects_continue=bool(expectations) and not is_http10 and (chunked or bool(length)),
        is_http10=is_http10,
        fields=_join_fields(lines),
    )


def _judge_response(head: bytes) -> ResponseHead:
    lines = _split_lines(head, 502)
    match = _any_status_line(lines[0])
    if match is None:
        raise HeadError(502, "the status line is not HTTP/1.0 or HTTP/1.1 with a status from 100 to 599")
    is_http10 = match[1] == b"1.0"
    status = int(match[2])
    reason: bytes = match[3] or b""
    headers = _read_fields(lines[1:], 502)
    length, chunked = _read_length(headers, 502, is_http10=is_http10)
    is_framed = length is not None or chunked
    if status < 200 and is_framed:
        raise HeadError(502, "an interim response must not announce a body")
    if status == 101:
        raise HeadError(502, "the upstream switched protocols without being asked")
    _ask_h11_about_response(head, status, reason, headers)
    has_body = status >= 200 and status not in (204, 304)
    # A 204 that announces a body may be followed by one: its connection cannot be used again.
    is_delimited = is_framed if has_body else not (status == 204 and (chunked or bool(length)))
    return ResponseHead(
        status,
        reason,
        headers,
        length,
        chunked,
        keep_alive=is_delimited and not is_http10 and b"close" not in headers.tokens(b"connection"),
        has_body=has_body,
        fields=_join_fields(lines),
    )


def _split_lines(head: bytes, status: int) -> list[bytes]:
    """Return the lines of a head without the blank one, once its bytes are known to be harmless."""
    if _broken_line_end(head):
        raise HeadError(status, "lines must end in CRLF: a bare CR or LF is refused")
    if _control_byte(head):
        raise HeadError(status, "control bytes are not allowed in a head")
    if head.find(b"\r\n\r\n") != len(head) - 4 or head.startswith(b"\r\n"):
        raise HeadError(status, "the head must be one block of lines closed by one empty line")
    return head[:-4].split(b"\r\n")


def _read_request_line(line: bytes) -> tuple[bytes, bytes, bool]:
    parts = line.split(b" ")
    if len(parts) != 3 or _any_version(parts[2]) is None:
        raise HeadError(400, "the request line is not method, target and version separated by single spaces")
    method, target, version = parts
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise HeadError(505, "only HTTP/1.1 and HTTP/1.0 are spoken on this connection")
    if _any_token(method) is None:
        raise HeadError(400, "the method is not a token")
    if method in (b"CONNECT", b"TRACE"):
        raise HeadError(501, "the methods CONNECT and TRACE are not implemented")
    if _origin_form(target) is None and (method, target) != (b"OPTIONS", b"*"):
        raise HeadError(
            400,
            "the request target must be a path in visible ASCII, starting with a slash, without a fragment",
        )
    return method, target, version == b"HTTP/1.0"


def _read_fields(lines: list[bytes], status: int) -> Headers:
    pairs = []
    for line in lines:
        match = _any_field(line)
        if match is None:
            _refuse_field(line, status)
        pairs.append((match[1], match[2].rstrip(b" \t")))
    return Headers(pairs)


def _refuse_field(line: bytes, status: int) -> NoReturn:
    if line[:1] in (b" ", b"\t"):
        raise HeadError(status, "folded header lines are refused")
    name, colon, _ = line.partition(b":")
    if not colon:
        raise HeadError(status, "a header line has no colon")
    if name[-1:] in (b" ", b"\t"):
        raise HeadError(status, "white space between a field name and its colon is refused")
    raise HeadError(status, "a field name is not a token")


def _read_length(headers: Headers, status: int, *, is_http10: bool) -> tuple[int | None, bool]:
    """Return Content-Length and whether the body is chunked; refuse what is ambiguous (RFC 9112 6.3)."""
    lengths = headers.get_all(b"content-length")
    codings = headers.get_all(b"transfer-encoding")
    if codings:
        if lengths:
            raise HeadError(status, "Transfer-Encoding together with Content-Length is refused")
        if is_http10:
            raise HeadError(status, "Transfer-Encoding does not exist in HTTP/1.0")
        if len(codings) > 1:
            raise HeadError(status, "Transfer-Encoding is given more than once")
        if codings[0].lower() != b"chunked":
            raise HeadError(501 if status == 400 else status, "the only transfer coding understood is chunked")
        return None, True
    if len(lengths) > 1:
        raise HeadError(status, "Content-Length is given more than once")
    if lengths and not _is_length(lengths[0]):
        raise HeadError(status, f"Content-Length is not a number of up to {_MAX_LENGTH_DIGITS} digits")
    return (int(lengths[0]) if lengths else None), False


def _ask_h11_about_request(head: bytes, method: bytes, target: bytes, headers: Headers) -> None:
    import h11  # noqa: PLC0415  only unusual heads need it

    connection = h11.Connection(h11.SERVER)
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise HeadError(error.error_status_hint, "the request head is not valid HTTP/1.1") from None
    if (
        not isinstance(event, h11.Request)
        or (event.method, event.target) != (method, target)
        or not _is_same(event.headers.raw_items(), headers)
    ):
        raise HeadError(400, "the request head is ambiguous")


def _ask_h11_about_response(head: bytes, status: int, reason: bytes, headers: Headers) -> None:
    import h11  # noqa: PLC0415  only unusual heads need it

    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "upstream")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        raise HeadError(502, "the response head is not valid HTTP/1.1") from None
    if (
        not isinstance(event, (h11.Response, h11.InformationalResponse))
        or (event.status_code, bytes(event.reason)) != (status, reason)
        or not _is_same(event.headers.raw_items(), headers)
    ):
        raise HeadError(502, "the response head is ambiguous")


def _is_same(theirs: Iterable[tuple[bytes, bytes]], ours: Headers) -> bool:
    # h11 writes the transfer coding in lower case; nothing else may differ.
    return [(name, value) for name, value in theirs] == [
        (name, value.lower() if name.lower() == b"transfer-encoding" else value) for name, value in ours
    ]


def _repeats(headers: Headers, names: frozenset[bytes]) -> bool:
    seen = [name for sent, _ in headers.raw if (name := sent.lower()) in names]
    return len(seen) != len(frozenset(seen))


def _is_length(value: bytes) -> bool:
    # bytes.isdigit knows ASCII digits only: no sign, no blank, no underscore.
    return len(value) <= _MAX_LENGTH_DIGITS and value.isdigit()


def _join_fields(lines: list[bytes]) -> bytes:
    return b"".join([line + b"\r\n" for line in lines[1:]])
