"""Times as the API writes them: RFC 3339, UTC, with a Z."""

from __future__ import annotations

from datetime import UTC, datetime


def write_time(ms: float) -> str:
    """Return milliseconds since the epoch as ``2026-11-22T00:44:13.123Z``; whole seconds without a fraction."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    text = moment.isoformat(timespec="milliseconds" if moment.microsecond else "seconds")
    return text.replace("+00:00", "Z")


def read_time(text: str) -> float:
    """Return RFC 3339 as seconds since the epoch. Raises ValueError with the rule."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None and "T" in text.upper() and 1970 <= moment.year <= 9000:
            return moment.timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError("must be a time as in RFC 3339, such as 2026-12-31T23:59:59Z")


def normal_time(text: str) -> str:
    """Return RFC 3339 in UTC. Raises ValueError with the rule."""
    return write_time(round(read_time(text) * 1000))
