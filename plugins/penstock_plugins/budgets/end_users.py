"""For which end user a request is."""

from __future__ import annotations

import json
from hashlib import sha256

from penstock import Exchange, editable_body
from penstock.splice import SpliceError, find

_MAX_CHARACTERS = 256


def end_user_of(exchange: Exchange, name: bytes) -> str | None:
    """Return the end user's id, None where the request names none.

    The header ``name`` (lower case) counts before the members ``user``, ``metadata.user_id`` and
    ``safety_identifier``; one that is blank names nobody. One of over 256 characters goes by its SHA-256: clients
    choose them, and they are kept. So does one that is no Unicode, and could not be.
    """
    header = exchange.request.headers.get(name)
    found = None if header is None else header.decode("utf-8", "surrogateescape").strip()
    if not found:
        found = _in_body(exchange)
    if not found:
        return None
    if len(found) <= _MAX_CHARACTERS and _is_unicode(found):
        return found
    return "sha256:" + sha256(found.encode("utf-8", "surrogatepass")).hexdigest()


def _in_body(exchange: Exchange) -> str | None:
    peek = exchange.peek
    odd = peek.wrong_types
    user = peek.user or (_odd_text(editable_body(exchange.request), "user") if "user" in odd else None)
    if user and not user.isspace():
        return user
    metadata = bytes(peek.metadata)
    user = (peek.metadata_user_id or _odd_text(metadata, "user_id")) if metadata else None
    if user and not user.isspace():
        return user
    name = "safety_identifier"
    user = peek.safety_identifier or (_odd_text(editable_body(exchange.request), name) if name in odd else None)
    return user if user and not user.isspace() else None


def _odd_text(body: bytes, name: str) -> str | None:
    """Return a member that is a string, and no Unicode, with surrogates for what is not; None for any other."""
    try:
        span = find(body, (name,))
        if span is None or body[span.start : span.start + 1] != b'"':
            return None
        text = body[span.start : span.end].decode("utf-8", "surrogateescape")
    except SpliceError:
        return None
    try:
        found: str = json.loads(text, strict=False)
    except ValueError:
        return text  # as it stands, quotes and all
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
