"""Identifiers: their form, their order, and which trace contexts are continued."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ids import new_request_id, new_span_id, new_trace, new_ulid, parse_traceparent

TRACE = b"0af7651916cd43dd8448eb211c80319c"
SPAN = b"b7ad6b7169203331"


@given(st.integers(0, 2**62))
def test_request_id_is_req_and_thirty_hex_digits(wall_ns: int) -> None:
    assert re.fullmatch(rb"req_[0-9a-f]{30}", new_request_id(wall_ns))


@given(st.integers(0, 2**62), st.integers(1_000_000, 2**60))
def test_later_request_ids_sort_after_earlier_ones(wall_ns: int, step: int) -> None:
    assert new_request_id(wall_ns) < new_request_id(wall_ns + step)


def test_request_ids_of_one_moment_differ() -> None:
    assert len({new_request_id(1) for _ in range(1000)}) == 1000


def test_ulids_are_crockford_and_ordered_by_time() -> None:
    first = new_ulid()
    assert re.fullmatch(r"[0-7][0-9A-HJKMNP-TV-Z]{25}", first)
    assert new_ulid()[:10] >= first[:10]


def test_span_id_is_sixteen_hex_digits() -> None:
    assert re.fullmatch(rb"[0-9a-f]{16}", new_span_id())


def test_callers_trace_is_continued_with_a_span_of_our_own() -> None:
    trace = new_trace(b"00-%b-%b-00" % (TRACE, SPAN), b"vendor=1")
    assert (trace.trace_id, trace.parent_id, trace.flags, trace.state) == (TRACE, SPAN, b"00", b"vendor=1")
    assert trace.span_id != SPAN


def test_trace_begins_where_there_is_none() -> None:
    trace = new_trace(None, b"vendor=1")
    assert re.fullmatch(rb"[0-9a-f]{32}", trace.trace_id)
    assert (trace.parent_id, trace.state) == (None, None)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        b"00-%b-%b" % (TRACE, SPAN),
        b"00-%b-%b-01-extra" % (TRACE, SPAN),
        b"ff-%b-%b-01" % (TRACE, SPAN),
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (TRACE, b"0" * 16),
        b"00-%b-%b-01" % (TRACE.upper(), SPAN),
        b"00-%b-%b-1" % (TRACE, SPAN),
        b"0-%b-%b-01" % (TRACE, SPAN),
        b"00-%b-%b-0x" % (TRACE, SPAN),
        b"00-%b-%b-01" % (TRACE[1:], SPAN),
    ],
)
def test_invalid_traceparent_is_ignored(value: bytes) -> None:
    assert parse_traceparent(value) is None
    assert new_trace(value).parent_id is None


def test_later_version_with_more_parts_is_understood() -> None:
    assert parse_traceparent(b"cc-%b-%b-01-what-comes" % (TRACE, SPAN)) == (TRACE, SPAN, b"01")


@given(st.binary(max_size=80))
def test_no_value_raises(value: bytes) -> None:
    assert parse_traceparent(value) is None or value.count(b"-") >= 3
