"""Replies of the mock, as the bytes a provider would send: heads, JSON, event streams, error envelopes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import msgspec

from penstock import ResponseHead, read_response_head
from penstock_plugins.providers.mock.schemas import JSON

CREATED = 1_735_689_600
"""What every answer gives as its time: answers depend on the request alone."""
encode = msgspec.json.encode

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_GEMINI_STATUS = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class RefusedError(Exception):
    """End a call with an error of the provider's kind."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


@attrs.frozen(eq=False)
class Reply:
    """Hold an answer: a body, or the events of a stream, made while they are sent."""

    body: bytes = b""
    events: Iterator[bytes] | None = None
    status: int = 200
    content_type: bytes = b"application/json"
    fields: tuple[tuple[bytes, bytes], ...] = ()

    def head(self, request_id: bytes, family: str = "openai") -> ResponseHead:
        """Return the response head, read as one from a wire would be."""
        name = b"request-id" if family == "anthropic" else b"x-request-id"
        fields = [(b"content-type", self.content_type), (name, request_id), *self.fields]
        if self.events is None:
            fields.append((b"content-length", b"%d" % len(self.body)))
        else:
            fields += [(b"cache-control", b"no-cache"), (b"transfer-encoding", b"chunked")]
        lines = b"".join([b"%b: %b\r\n" % field for field in fields])
        return read_response_head(b"HTTP/1.1 %d Mock\r\n%b\r\n" % (self.status, lines))


def json_reply(document: JSON) -> Reply:
    return Reply(encode(document))


def stream_reply(events: Iterator[bytes]) -> Reply:
    return Reply(events=events, content_type=b"text/event-stream; charset=utf-8")


def sse(payload: Mapping[str, Any], *, name: str | None = None) -> bytes:
    """Return one event; ``name`` adds the event field."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    return b"%bdata: %b\n\n" % (head, encode(payload))


def named(payload: Mapping[str, Any]) -> bytes:
    """Return one event named by its payload's type, as Responses and Anthropic streams have them."""
    return sse(payload, name=payload["type"])


def seed_of(path: bytes, body: bytes) -> bytes:
    """Return what ids of one request are made of."""
    return hashlib.blake2b(path + b"\n" + body, digest_size=16).digest()


def identifier(seed: bytes, prefix: str, number: int = 0) -> str:
    """Return an id that follows from a request: the same request, the same id."""
    return prefix + hashlib.blake2b(b"%b %d" % (prefix.encode(), number), key=seed, digest_size=12).hexdigest()


def error_document(family: str, error: RefusedError, request_id: str) -> dict[str, Any]:
    """Return an error body in the shape of the route's vendor."""
    status = error.status
    default = "invalid_request_error" if status < 500 else "api_error"
    if family == "anthropic":
        detail = {"type": _ANTHROPIC_TYPES.get(status, default), "message": error.message}
        return {"type": "error", "error": detail, "request_id": request_id}
    if family == "gemini":
        word = _GEMINI_STATUS.get(status, "INVALID_ARGUMENT" if status < 500 else "UNKNOWN")
        return {"error": {"code": status, "message": error.message, "status": word}}
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_event(dialect: str, message: str) -> bytes:
    """Return the event with which a stream of the dialect reports an error instead of content."""
    if dialect == "anthropic.messages":
        return named({"type": "error", "error": {"type": "overloaded_error", "message": message}})
    if dialect == "openai.responses":
        return named({"type": "error", "code": "server_error", "message": message, "param": None, "sequence_number": 0})
    family = dialect.partition(".")[0]
    return sse(error_document(family, RefusedError(503, message, code="server_error"), ""))
