"""Identifiers that are no secrets: time-ordered request ids, trace and span ids, prefixed ULIDs."""

from __future__ import annotations

import random
import time

from penstock.models import TraceContext

_random = random.getrandbits
_ZERO_TRACE = b"0" * 32
_ZERO_SPAN = b"0" * 16
_HEX = frozenset(b"0123456789abcdef")
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_request_id(wall_ns: int) -> bytes:
    """Return ``req_`` and 30 hex digits: 12 of milliseconds, 18 random."""
    return b"req_%012x%018x" % (wall_ns // 1_000_000, _random(72))


def new_span_id() -> bytes:
    return b"%016x" % (_random(64) or 1)


def new_ulid() -> str:
    """Return 26 Crockford base32 characters: 48 bits of milliseconds, 80 random bits from the system."""
    value = (time.time_ns() // 1_000_000) << 80 | random.SystemRandom().getrandbits(80)
    return "".join(_CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


def new_trace(traceparent: bytes | None, tracestate: bytes | None = None) -> TraceContext:
    """Continue the caller's trace (W3C Trace Context, version 00 and later), or begin one."""
    parsed = None if traceparent is None else parse_traceparent(traceparent)
    if parsed is None:
        return TraceContext(b"%032x" % (_random(128) or 1), new_span_id())
    trace_id, parent_id, flags = parsed
    return TraceContext(trace_id, new_span_id(), parent_id, flags, tracestate)


def parse_traceparent(value: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Return trace id, parent id and flags, or None for a value that must be ignored."""
    parts = value.split(b"-")
    if len(parts) < 4 or (parts[0] == b"00" and len(parts) != 4) or parts[0] == b"ff":
        return None
    version, trace_id, parent_id, flags = parts[:4]
    if (len(version), len(trace_id), len(parent_id), len(flags)) != (2, 32, 16, 2):
        return None
    if not _HEX.issuperset(version + trace_id + parent_id + flags):
        return None
    if trace_id == _ZERO_TRACE or parent_id == _ZERO_SPAN:
        return None
    return trace_id, parent_id, flags
