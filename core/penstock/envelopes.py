"""Errors written by the gateway, in the shape each dialect's SDKs raise their own exception classes for."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.errors import RequestError
from penstock.models import Response

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_GEMINI_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    402: "FAILED_PRECONDITION",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_REQUEST_ID_FIELDS = {"anthropic": b"request-id", "openai": b"x-request-id"}
"""Where each vendor's SDK looks for the ``request_id`` of its exceptions."""
_encode = msgspec.json.encode


def error_response(error: RequestError, family: str, request_id: bytes, namespace: str) -> Response:
    """Return the refusal as an answer in the envelope of ``family`` (openai, anthropic, gemini)."""
    fields = [(b"content-type", b"application/json")]
    fields.append((b"X-%b-Error" % header_stem(namespace), error.code.encode()))
    if not error.should_retry:
        fields.append((b"x-should-retry", b"false"))
    name = _REQUEST_ID_FIELDS.get(family)
    if name is not None:
        fields.append((name, request_id))
    return Response(error.status, _encode(_envelope(error, family, request_id)), (*fields, *error.fields))


def _envelope(error: RequestError, family: str, request_id: bytes) -> dict[str, Any]:
    if family == "anthropic":
        kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        detail: dict[str, Any] = {
            "type": kind,
            "message": error.message,
            "code": error.code,
            "meta": error.meta,
        }
        return {"type": "error", "error": detail, "request_id": request_id.decode()}
    if family == "gemini":
        status = _GEMINI_STATUS.get(error.status, "UNKNOWN" if error.status < 500 else "INTERNAL")
        reason = {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": error.code,
            "metadata": {"meta": _encode(error.meta).decode()},
        }
        return {"error": {"code": error.status, "message": error.message, "status": status, "details": [reason]}}
    return {
        "error": {
            "message": error.message,
            "type": error.code,
            "code": error.code,
            "param": error.param,
            "meta": error.meta,
        }
    }


def stream_error_payload(family: str, kind: str, code: str, message: str) -> bytes:
    """Return the payload of the event that ends a broken stream."""
    if family == "anthropic":
        kind = "api_error" if kind == "provider_error" else kind
        return _encode({"type": "error", "error": {"type": kind, "code": code, "message": message}})
    return _encode({"error": {"type": kind, "code": code, "message": message, "param": None}})


def header_stem(namespace: str) -> bytes:
    """Return how the namespace is spelled inside header names: penstock → Penstock, langwatch → LangWatch."""
    return {"langwatch": b"LangWatch"}.get(namespace, namespace.title().replace("_", "-").encode())
