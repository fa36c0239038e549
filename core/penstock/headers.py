"""Hold header fields and decide which of them travel on; sans-IO.

Invariants: a `Headers` never changes after it is built; forwarding copies the lines it keeps byte for byte
and in order; the quick and the careful forwarding route give the same bytes (a property test compares them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penstock.heads import RequestHead, ResponseHead

CREDENTIAL_FIELDS = frozenset((b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key"))
HOP_BY_HOP_FIELDS = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_TRACE_FIELDS = frozenset((b"traceparent", b"tracestate"))
_REQUEST_DROPPED = (
    HOP_BY_HOP_FIELDS
    | CREDENTIAL_FIELDS
    | _TRACE_FIELDS
    | {b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"forwarded", b"baggage"}
)
_RESPONSE_DROPPED = HOP_BY_HOP_FIELDS | _TRACE_FIELDS | {b"content-length", b"set-cookie"}
_FORWARDED_PREFIX = b"x-forwarded-"
_PLAIN_CONNECTION = frozenset((None, b"keep-alive", b"Keep-Alive", b"close", b"Close"))

_HIDDEN_FIELDS = CREDENTIAL_FIELDS | {b"cookie", b"set-cookie", b"proxy-authorization"}
_HIDDEN_PARTS = (b"token", b"secret", b"key")


class Headers:
    """Keep header fields in order, with duplicates and the spelling in which they were sent.

    Names compare without regard to case, also those passed to the look-ups; lower-case ones are found fastest.
    `raw` holds (name as sent, value stripped of blanks) pairs and `index` maps each lower-case name to its
    first value, in order of first appearance; both are read-only. Two objects are equal when they hold the
    same fields in the same order. `repr` hides the values of fields that may carry credentials.
    """

    __slots__ = ("index", "raw")
    __hash__ = None  # type: ignore[assignment]
    raw: list[tuple[bytes, bytes]]
    """Names and values as they were sent, in order."""
    index: dict[bytes, bytes]
    """Each lower-case name with its first value."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        # A list is kept, not copied: the reader hands over the one its regex has just made.
        self.raw = raw if type(raw) is list else list(raw)
        self.index = index = {name.lower(): value for name, value in self.raw}
        if len(index) != len(self.raw):
            for name, value in reversed(self.raw):
                index[name.lower()] = value

    def get(self, name: bytes, default: bytes | None = None) -> bytes | None:
        """Return the first value of `name`."""
        value = self.index.get(name)
        if value is None:
            return default if name.islower() else self.index.get(name.lower(), default)
        return value

    def get_all(self, name: bytes) -> list[bytes]:
        """Return every value of `name`, in order."""
        name = name.lower()
        if name not in self.index:
            return []
        return [value for sent, value in self.raw if sent.lower() == name]

    def tokens(self, name: bytes) -> frozenset[bytes]:
        """Return the lower-case members of a comma-separated field, over all its lines (RFC 9110 5.6.1)."""
        members = (member.strip(b" \t") for value in self.get_all(name) for member in value.split(b","))
        return frozenset(member.lower() for member in members if member)

    def with_fields(self, pairs: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Return a copy with `pairs` appended; fields of the same name stay."""
        return Headers([*self.raw, *pairs])

    def without(self, names: Iterable[bytes]) -> Headers:
        """Return a copy without the fields called `names`."""
        dropped = frozenset([name.lower() for name in names])
        return Headers([pair for pair in self.raw if pair[0].lower() not in dropped])

    def __contains__(self, name: object) -> bool:
        return name in self.index or (isinstance(name, bytes) and name.lower() in self.index)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Headers):
            return NotImplemented
        mine = [(name.lower(), value) for name, value in self.raw]
        return mine == [(name.lower(), value) for name, value in other.raw]

    def __repr__(self) -> str:
        shown = [(name, b"[hidden]" if _is_hidden(name.lower()) else value) for name, value in self.raw]
        return f"Headers({shown!r})"


def forward_request_fields(head: RequestHead, namespace_prefix: bytes) -> bytes:
    """Return the client's header lines that go upstream, each ending in CRLF, spelled as they came.

    Left out: hop-by-hop fields and those `Connection` names (RFC 9110 7.6.1), `Host`, `Content-Length`,
    `Expect`, `Accept-Encoding`, credentials, cookies, `Forwarded`, `X-Forwarded-*`, trace context, and every
    name that starts with `namespace_prefix` (lower-case, such as `b"x-penstock-"`).
    The caller adds `Host`, framing, `Accept-Encoding` and the credential of the upstream.
    """
    headers = head.headers
    index = headers.index
    names = b"\n" + b"\n".join(index)
    if (
        len(index) == len(headers.raw)
        and index.get(b"connection") in _PLAIN_CONNECTION
        and b"\nx-forwarded-" not in names
        and b"\n" + namespace_prefix not in names
    ):
        lines = head.fields.splitlines(keepends=True)
        return b"".join([line for name, line in zip(index, lines, strict=True) if name not in _REQUEST_DROPPED])
    return _forward_carefully(headers, head.fields, _REQUEST_DROPPED, (_FORWARDED_PREFIX, namespace_prefix))


def forward_response_fields(head: ResponseHead, namespace_prefix: bytes) -> bytes:
    """Return the upstream's header lines that go to the client, each ending in CRLF, spelled as they came.

    Left out: hop-by-hop fields and those `Connection` names (RFC 9110 7.6.1), `Content-Length`, `Set-Cookie`,
    trace context, and every name that starts with `namespace_prefix` (lower-case).
    The caller adds framing and the gateway's own fields.
    """
    headers = head.headers
    index = headers.index
    if (
        len(index) == len(headers.raw)
        and index.get(b"connection") in _PLAIN_CONNECTION
        and b"\n" + namespace_prefix not in b"\n" + b"\n".join(index)
    ):
        lines = head.fields.splitlines(keepends=True)
        return b"".join([line for name, line in zip(index, lines, strict=True) if name not in _RESPONSE_DROPPED])
    return _forward_carefully(headers, head.fields, _RESPONSE_DROPPED, (namespace_prefix,))


def _forward_carefully(
    headers: Headers, fields: bytes, dropped: frozenset[bytes], prefixes: tuple[bytes, ...]
) -> bytes:
    dropped |= headers.tokens(b"connection")
    kept = []
    for (sent, _), line in zip(headers.raw, fields.splitlines(keepends=True), strict=True):
        name = sent.lower()
        if name not in dropped and not name.startswith(prefixes):
            kept.append(line)
    return b"".join(kept)


def _is_hidden(name: bytes) -> bool:
    return name in _HIDDEN_FIELDS or any(part in name for part in _HIDDEN_PARTS)
