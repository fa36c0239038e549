from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.headers import (
    CREDENTIAL_FIELDS,
    HOP_BY_HOP_FIELDS,
    Headers,
    forward_request_fields,
    forward_response_fields,
)
from penstock.heads import RequestHead, ResponseHead, read_request_head, read_response_head

NAMESPACE = b"x-penstock-"
DROPPED_FROM_REQUESTS = (
    *sorted(HOP_BY_HOP_FIELDS | CREDENTIAL_FIELDS),
    *(b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"forwarded"),
    *(b"x-forwarded-for", b"x-forwarded-", b"x-penstock-cache", b"x-penstock-", b"traceparent"),
    *(b"tracestate", b"baggage"),
)
DROPPED_FROM_RESPONSES = (
    *sorted(HOP_BY_HOP_FIELDS),
    *(b"content-length", b"set-cookie", b"x-penstock-provider", b"traceparent", b"tracestate"),
)


def request_of(fields: bytes) -> RequestHead:
    return RequestHead(b"POST", b"/", _headers_of(fields), None, False, True, False, False, fields)


def response_of(fields: bytes) -> ResponseHead:
    return ResponseHead(200, b"OK", _headers_of(fields), None, False, True, True, fields)


def _headers_of(fields: bytes) -> Headers:
    pairs = [line.partition(b":") for line in fields.split(b"\r\n")[:-1]]
    return Headers([(name, value.strip(b" \t")) for name, _, value in pairs])


def slow_reference(fields: bytes, dropped: tuple[bytes, ...], prefixes: tuple[bytes, ...]) -> bytes:
    """Say the forwarding rule once more, line by line and without any shortcut."""
    lines = fields.split(b"\r\n")[:-1]
    named = set()
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"connection":
            named |= {member.strip(b" \t").lower() for member in value.split(b",")}
    kept = b""
    for line in lines:
        name = line.partition(b":")[0].lower()
        if name in dropped or name in named or any(name.startswith(prefix) for prefix in prefixes):
            continue
        kept += line + b"\r\n"
    return kept


def test_order_spelling_and_duplicates_are_kept() -> None:
    headers = Headers([(b"B", b"1"), (b"a", b"2"), (b"b", b"3")])
    assert list(headers) == [(b"B", b"1"), (b"a", b"2"), (b"b", b"3")]
    assert len(headers) == 3
    assert list(headers.index) == [b"b", b"a"]


def test_look_ups_ignore_case_and_return_the_first_value() -> None:
    headers = Headers([(b"X-Tag", b"1"), (b"x-TAG", b"2"), (b"Other", b"3")])
    assert headers.get(b"x-tag") == b"1"
    assert headers.get_all(b"x-tag") == [b"1", b"2"]
    assert b"x-tag" in headers
    assert b"absent" not in headers
    assert headers.get(b"absent") is None
    assert headers.get(b"absent", b"d") == b"d"
    assert headers.get_all(b"absent") == []


def test_tokens_join_all_lines_of_a_list_field() -> None:
    headers = Headers([(b"Connection", b"close , X-One"), (b"connection", b",TE,")])
    assert headers.tokens(b"connection") == {b"close", b"x-one", b"te"}


def test_equality_ignores_the_case_of_names_only() -> None:
    assert Headers([(b"A", b"v")]) == Headers([(b"a", b"v")])
    assert Headers([(b"A", b"v")]) != Headers([(b"a", b"V")])
    assert Headers([(b"a", b"1"), (b"b", b"2")]) != Headers([(b"b", b"2"), (b"a", b"1")])
    assert Headers([(b"a", b"1")]) != [(b"a", b"1")]


def test_changed_copies_leave_the_original_alone() -> None:
    headers = Headers([(b"A", b"1"), (b"B", b"2")])
    more = headers.with_fields([(b"a", b"3")])
    less = more.without([b"a"])
    assert list(headers) == [(b"A", b"1"), (b"B", b"2")]
    assert more.get_all(b"a") == [b"1", b"3"]
    assert list(less) == [(b"B", b"2")]


@pytest.mark.parametrize(
    "name",
    [
        *(b"Authorization", b"X-Api-Key", b"api-key", b"x-goog-api-key", b"Cookie", b"Set-Cookie"),
        *(b"Proxy-Authorization", b"X-Amz-Security-Token", b"client-secret", b"Ocp-Apim-Subscription-Key"),
    ],
)
def test_repr_hides_the_values_of_credential_fields(name: bytes) -> None:
    shown = repr(Headers([(name, b"hunter2"), (b"Accept", b"text/plain")]))
    assert "hunter2" not in shown
    assert name.decode() in shown
    assert "text/plain" in shown


@pytest.mark.parametrize("name", DROPPED_FROM_REQUESTS)
def test_request_field_does_not_go_upstream(name: bytes) -> None:
    fields = b"Accept: */*\r\n" + name.title() + b": x\r\nanthropic-beta: a,b\r\n"
    assert forward_request_fields(request_of(fields), NAMESPACE) == b"Accept: */*\r\nanthropic-beta: a,b\r\n"


@pytest.mark.parametrize("name", DROPPED_FROM_RESPONSES)
def test_response_field_does_not_go_to_the_client(name: bytes) -> None:
    fields = name.title() + b": x\r\nx-forwarded-for: kept\r\n"
    assert forward_response_fields(response_of(fields), NAMESPACE) == b"x-forwarded-for: kept\r\n"


def test_fields_named_by_connection_are_dropped_in_both_directions() -> None:
    fields = b"X-Hop: 1\r\nConnection: Keep-Alive, X-Hop\r\nX-End: 2\r\nconnection: x-other\r\nX-OTHER: 3\r\n"
    assert forward_request_fields(request_of(fields), NAMESPACE) == b"X-End: 2\r\n"
    assert forward_response_fields(response_of(fields), NAMESPACE) == b"X-End: 2\r\n"


def test_kept_lines_are_the_bytes_that_came() -> None:
    fields = b"ACCEPT:*/*\r\nx-Odd:\t a  b \t\r\nX-Empty:\r\nHost: a\r\nX-Latin: \xe9\r\n"
    head = read_request_head(b"GET / HTTP/1.1\r\n" + fields + b"\r\n")
    kept = b"ACCEPT:*/*\r\nx-Odd:\t a  b \t\r\nX-Empty:\r\nX-Latin: \xe9\r\n"
    assert forward_request_fields(head, NAMESPACE) == kept


def test_a_head_without_fields_forwards_nothing() -> None:
    assert forward_request_fields(read_request_head(b"GET / HTTP/1.0\r\n\r\n"), NAMESPACE) == b""
    assert forward_response_fields(read_response_head(b"HTTP/1.1 200 OK\r\n\r\n"), NAMESPACE) == b""


NAMES = st.one_of(
    st.sampled_from([*DROPPED_FROM_REQUESTS, *DROPPED_FROM_RESPONSES, b"x-forwarde", b"x-penstock", b"accept"]),
    st.text(alphabet="abx-_", min_size=1, max_size=12).map(str.encode),
)
VALUES = st.sampled_from([b"", b"v", b"keep-alive", b"close", b"a, b", b"x-b ,accept", b"a: b", b"\xff x"])
RESPELL: list[Callable[[bytes], bytes]] = [bytes.lower, bytes.title, bytes.upper]
LINES = st.builds(
    lambda name, value, respell, before, after: respell(name) + b":" + before + value + after + b"\r\n",
    NAMES,
    VALUES,
    st.sampled_from(RESPELL),
    st.sampled_from([b"", b" ", b"\t "]),
    st.sampled_from([b"", b" "]),
)
FIELDS = st.lists(LINES, max_size=12).map(b"".join)


@given(FIELDS)
@example(b"x-forwarded-for: 1\r\naccept: a\r\n")
@example(b"x-penstock-cache: 1\r\n")
@example(b"connection: accept\r\naccept: a\r\n")
@example(b"accept: a\r\naccept: b\r\n")
def test_request_forwarding_equals_the_line_by_line_rule(fields: bytes) -> None:
    expected = slow_reference(fields, DROPPED_FROM_REQUESTS, (b"x-forwarded-", NAMESPACE))
    assert forward_request_fields(request_of(fields), NAMESPACE) == expected


@given(FIELDS)
@example(b"x-penstock-cache: 1\r\n")
@example(b"connection: accept\r\naccept: a\r\n")
@example(b"set-cookie: a\r\nset-cookie: b\r\naccept: c\r\n")
def test_response_forwarding_equals_the_line_by_line_rule(fields: bytes) -> None:
    expected = slow_reference(fields, DROPPED_FROM_RESPONSES, (NAMESPACE,))
    assert forward_response_fields(response_of(fields), NAMESPACE) == expected


@given(st.sets(NAMES, max_size=10), VALUES)
def test_a_lone_and_a_doubled_block_forward_the_same_lines(names: set[bytes], value: bytes) -> None:
    # Doubling every line forces the careful route; its result must be the quick one's, twice.
    fields = b"".join(name + b": " + value + b"\r\n" for name in sorted(names))
    once = forward_request_fields(request_of(fields), NAMESPACE)
    assert forward_request_fields(request_of(fields + fields), NAMESPACE) == once + once
    once = forward_response_fields(response_of(fields), NAMESPACE)
    assert forward_response_fields(response_of(fields + fields), NAMESPACE) == once + once
