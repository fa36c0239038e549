"""What one HTTP request asks: path, query, body and conditions, read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import msgspec

from penstock import suggest
from penstock_plugins.management.faults import RefusedError, bad_field

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY = 1024 * 1024
MAX_DEPTH = 64
SMALL_BODY = 16 * 1024
"""Up to here reading a body costs less than asking whose it is."""
DEFAULT_LIMIT = 50
MAX_LIMIT = 200
_etag = re.compile(r'"([1-9][0-9]{0,17})"').fullmatch


@attrs.frozen(eq=False)
class Ask:
    """Hold one request."""

    method: str
    path: str
    """Below ``/api/v1``."""
    parts: Mapping[str, str]
    """What varies in the path, by name."""
    query: Mapping[str, str]
    body: Mapping[str, Any] = attrs.field(repr=False)
    """Empty where there is none."""
    raw: bytes = attrs.field(repr=False)
    version: int | None
    """Of ``If-Match``."""
    once: str | None = attrs.field(repr=False)
    """The ``Idempotency-Key``."""
    token: bytes | None = attrs.field(repr=False)
    request_id: str
    source: str

    @property
    def name(self) -> str:
        """Return the id or name in the path."""
        return self.parts["id"]

    @property
    def limit(self) -> int:
        """Return how many a page holds. Raises RefusedError."""
        text = self.query.get("limit", str(DEFAULT_LIMIT))
        if not text.isascii() or not text.isdigit() or len(text) > 4 or not 1 <= int(text) <= MAX_LIMIT:
            raise bad_field("limit", f"must be from 1 to {MAX_LIMIT}")
        return int(text)

    def flag(self, name: str) -> bool:
        """Return a query parameter that is true or false. Raises RefusedError."""
        text = self.query.get(name, "false")
        if text not in ("true", "false"):
            raise bad_field(name, "must be true or false")
        return text == "true"


@attrs.frozen(eq=False)
class Answer:
    """Hold what is answered."""

    content: Mapping[str, Any] | None = attrs.field(repr=False)
    status: int = 200
    version: int | None = None
    """Becomes the ``ETag``."""


def token_of(request: Request) -> bytes | None:
    """Return the credential a request presents."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not value.strip().isascii():
        return None
    return value.strip().encode() or None


async def read_body(request: Request) -> bytes:
    """Return the whole body. Raises RefusedError for one over the bound."""
    too_large = RefusedError("payload_too_large", f"The body is larger than {MAX_BODY} bytes.")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY:
            raise too_large
        parts.append(chunk)
    return b"".join(parts)


def read_json(request: Request, raw: bytes) -> Mapping[str, Any]:
    """Return the JSON object a body is. Raises RefusedError."""
    if not raw:
        return {}
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError("unsupported_media_type", "The body must be application/json.")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError("unsupported_media_type", "The body must not be content-coded.")
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise RefusedError("bad_request", "The body is no JSON.") from None
    if not isinstance(found, dict):
        raise RefusedError("bad_request", "The body must be a JSON object.")
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _is_deeper(found, MAX_DEPTH):
        raise RefusedError("bad_request", f"The body is nested more than {MAX_DEPTH} deep.")
    return found


def _is_deeper(value: Any, bound: int) -> bool:
    """Say whether a JSON value is nested deeper than a bound; whoever walks it later does so by recursion."""
    level: list[Any] = [value]
    for _ in range(bound):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for group in inner for each in group if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def read_query(request: Request, known: Sequence[str]) -> dict[str, str]:
    """Return the query parameters. Raises RefusedError for unknown ones and for repeated ones but ``group_by``."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise bad_field(name[:80], f"unknown query parameter{suggest(name, known)}")
        if name in found and name != "group_by":
            raise bad_field(name, "is given twice")
        if len(value) > 1000 or "\x00" in value:
            raise bad_field(name, "is too long, or holds NUL characters")
        found[name] = f"{found[name]},{value}" if name in found else value
    return found


def read_version(request: Request) -> int | None:
    """Return the version ``If-Match`` names; None for none or ``*``. Raises RefusedError."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return None
    match = _etag(given.strip())
    if match is None:
        raise RefusedError("precondition_failed", 'If-Match: must be one ETag as the API gave it, such as "3".')
    return int(match[1])
