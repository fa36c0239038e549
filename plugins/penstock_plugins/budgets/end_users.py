"""For which end user a request is."""

from __future__ import annotations

from hashlib import sha256

from penstock import Exchange

_MAX_CHARACTERS = 256


def end_user_of(exchange: Exchange, name: bytes) -> str | None:
    """Return the end user's id, None where the request names none.

    The header ``name`` (lower case) counts before the members ``user``, ``metadata.user_id`` and
    ``safety_identifier``. One of over 256 characters goes by its SHA-256: clients choose them, and they are kept.
    """
    header = exchange.request.headers.get(name)
    if header:
        found: str | None = header.strip().decode("utf-8", "replace")
    else:
        peek = exchange.peek
        found = peek.user or peek.metadata_user_id or peek.safety_identifier
    if not found:
        return None
    return found if len(found) <= _MAX_CHARACTERS else "sha256:" + sha256(found.encode()).hexdigest()
