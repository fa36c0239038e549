"""Whose fault it is, and the one table that turns a fault into a status.

``RequestError`` is the client's (or a policy's) and becomes an answer; ``UpstreamError`` is the network's on the
provider's side and decides about the next attempt; ``PluginError`` is ours; ``ConfigurationError`` is the operator's
and is printed as one line. An HTTP error of a provider is none of these: it is a response.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

STATUS_OF_CODE: dict[str, int] = {
    "bad_request": 400,
    "missing_model": 400,
    "model_not_recognized": 400,
    "provider_not_bound": 400,
    "unsupported_parameter": 400,
    "cache_override_invalid": 400,
    "idempotency_mismatch": 400,
    "end_user_required": 400,
    "invalid_api_key": 401,
    "budget_exceeded": 402,
    "virtual_key_revoked": 403,
    "virtual_key_disabled": 403,
    "virtual_key_expired": 403,
    "model_not_allowed": 403,
    "tool_not_allowed": 403,
    "url_not_allowed": 403,
    "guardrail_blocked": 403,
    "permission_denied": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "payload_too_large": 413,
    "unsupported_encoding": 415,
    "websocket_unavailable": 426,
    "rate_limit_exceeded": 429,
    "internal_error": 500,
    "plugin_error": 500,
    "provider_error": 502,
    "circuit_open": 503,
    "policy_rules_invalid": 503,
    "guardrail_unavailable": 503,
    "overloaded": 503,
    "draining": 503,
    "upstream_timeout": 504,
}
"""Every code the gateway itself answers with, and its status (the error reference is generated from this)."""

RETRY_CURES = frozenset({"request_timeout", "rate_limit_exceeded", "overloaded", "draining", "circuit_open"})
"""Refusals that pass with time; so do the upstream side's 5xx. All others say ``x-should-retry: false``."""


class PenstockError(Exception):
    """Be the root of everything raised on purpose."""


class RequestError(PenstockError):
    """Refuse the exchange with an answer written by the gateway.

    ``code`` is a key of STATUS_OF_CODE, or one of a plugin's own with a ``status``; ``message`` says what was refused,
    by which rule and what to do, and never holds a secret or prompt text; ``param`` points at the place in the body;
    ``meta`` holds JSON values; ``fields`` are additional response header fields.
    """

    code: str
    """What ``X-Penstock-Error`` and the envelope say."""
    message: str
    """What people read."""
    param: str | None
    """The place in the body, such as ``model``."""
    meta: dict[str, Any]
    """Details, as JSON."""
    fields: tuple[tuple[bytes, bytes], ...]
    """Additional response header fields."""
    status: int
    """HTTP status."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        meta: Mapping[str, Any] | None = None,
        fields: tuple[tuple[bytes, bytes], ...] = (),
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        if status is None and code not in STATUS_OF_CODE:
            raise ValueError(f"{code!r} is no code of the gateway; a code of your own needs status=")
        self.code = code
        self.message = message
        self.param = param
        self.meta = dict(meta or {})
        self.fields = fields
        self.status = STATUS_OF_CODE[code] if status is None else status

    @property
    def should_retry(self) -> bool:
        """Say whether the same request may succeed later; if not, the answer carries ``x-should-retry: false``."""
        return self.code in RETRY_CURES or self.code in ("provider_error", "upstream_timeout")


UpstreamFault = Literal["connect", "dns", "tls", "reset", "truncated", "timeout", "protocol"]


class UpstreamError(PenstockError):
    """Report that an upstream gave no usable answer; ``fault`` is the reason, ``message`` is safe to show."""

    fault: UpstreamFault
    """connect, dns, tls, reset, truncated, timeout or protocol."""
    message: str
    """What happened, in words."""

    def __init__(self, fault: UpstreamFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault
        self.message = message


class PluginError(PenstockError):
    """Report an unexpected exception out of a plugin's hook; the cause is chained."""

    plugin: str
    """The plugin's name in the configuration."""
    hook: str
    """The hook that raised."""

    def __init__(self, plugin: str, hook: str) -> None:
        super().__init__(f"plugin {plugin!r} failed in {hook}")
        self.plugin = plugin
        self.hook = hook


class ConfigurationError(PenstockError):
    """Report configuration that cannot be used: one line per fault with file, table, key and the way out.

    Those raised while a plugin is built or starts need no file and table: the gateway puts them in front.
    """

    faults: tuple[str, ...]
    """The lines."""

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def overloaded(what: str, limit: int) -> RequestError:
    return RequestError(
        "overloaded", f"The gateway already has {limit} {what}; try again shortly.", fields=((b"retry-after", b"1"),)
    )
