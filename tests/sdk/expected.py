"""What every SDK is expected to do with a refusal, apart from the names of its classes."""

from __future__ import annotations

from penstock.errors import STATUS_OF_CODE

RETRIES = 2
"""Retries the clients of these tests are allowed."""
_INCURABLE = {"internal_error", "plugin_error", "guardrail_unavailable", "policy_rules_invalid"}
"""Failures of the gateway itself: 5xx that the same request would meet again."""


def attempts_for(code: str) -> int:
    """Return how many requests a client sends that is refused with this code each time."""
    status = STATUS_OF_CODE[code]
    is_tried_again = (status in (408, 429) or status >= 500) and code not in _INCURABLE
    return 1 + RETRIES if is_tried_again else 1


def should_retry_field(code: str) -> str | None:
    """Return the value of ``x-should-retry``, None for none: SDKs then decide by the status."""
    return "false" if attempts_for(code) == 1 else None
