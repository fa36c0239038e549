"""Look inside content-coded request bodies: on a bounded tee, the original goes upstream as it came."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.codings import BombError, CodingError, UnknownCoding, decode
from penstock.errors import RequestError

if TYPE_CHECKING:
    from penstock.models import Request

INSPECTION_LIMIT = 32 * 1024 * 1024
"""Decoded bytes at most; more is a bomb."""


def inspectable_body(request: Request, coding: bytes) -> bytes:
    """Return the decoded body, decoded once per request.

    Raises RequestError 413 for a bomb, 415 for an unknown coding, 400 for a corrupt one.
    """
    decoded = request.decoded
    if decoded is not None:
        return decoded
    try:
        decoded = decode(request.body, coding, INSPECTION_LIMIT)
    except BombError:
        raise RequestError(
            "payload_too_large", f"the request body decodes to more than {INSPECTION_LIMIT} bytes; send less"
        ) from None
    except UnknownCoding:
        raise RequestError(
            "unsupported_encoding",
            "the request body's Content-Encoding cannot be read here; send gzip, deflate or an uncompressed body",
        ) from None
    except CodingError:
        raise RequestError("bad_request", "the request body is not valid in its Content-Encoding") from None
    request.keep_decoded(decoded)
    return decoded


def editable_body(request: Request) -> bytes:
    """Return the body of a request about to be read or edited as text: its content coding, if any, undone."""
    coding = request.headers.get(b"content-encoding")
    return request.body if coding is None else inspectable_body(request, coding)
