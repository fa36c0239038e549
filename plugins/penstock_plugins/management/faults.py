"""What the management plane refuses with, and the status of each code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATUS_OF_CODE = {
    "bad_request": 400,
    "invalid_api_token": 401,
    "permission_denied": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "idempotency_mismatch": 409,
    "precondition_failed": 412,
    "payload_too_large": 413,
    "unsupported_media_type": 415,
    "internal_error": 500,
    "store_unavailable": 503,
}
"""Every code of the management API, and its status."""


class RefusedError(Exception):
    """Refuse a call; ``message`` says what and by which rule, never with a secret in it."""

    def __init__(self, code: str, message: str, *, meta: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.meta = dict(meta or {})
        self.status = STATUS_OF_CODE[code]

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        return {"error": {"type": self.code, "code": self.code, "message": self.message, "meta": self.meta}}


def bad_field(field: str, rule: str) -> RefusedError:
    """Return the refusal of one member: where it is, and the rule it breaks."""
    return RefusedError("bad_request", f"{field}: {rule}", meta={"field": field})


def not_found(what: str) -> RefusedError:
    return RefusedError("not_found", f"There is no {what} here.")
