"""Ids of management requests."""

from __future__ import annotations

import secrets
import time


def request_id() -> str:
    """Return ``req_`` and 30 hex digits, time-ordered, as the data plane's are."""
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(9)}"
