"""What an attempt says about its provider. Pure."""

from __future__ import annotations

from penstock import Attempt, Exchange
from penstock_plugins.fallback.breaker import Outcome

_FAILURES = frozenset({"connect", "dns", "tls", "reset", "truncated", "timeout", "protocol", "error_event"})
_SILENT = frozenset({"client_gone", "not_sent", "internal_error"})
"""Reasons that are nobody's at the provider, before there was an answer."""
_SLACK_NS = 250_000_000
"""Deadlines are looked at ten times a second: one this close to the exchange's own was cut by it."""


def outcome_of(exchange: Exchange, attempt: Attempt) -> Outcome:
    """Return what an attempt that is over says: a refusal such as 429 or 400 is an answer, a 5xx is none."""
    if attempt.is_skipped:
        return "neutral"
    reason, status = attempt.reason, attempt.status
    if reason == "timeout":
        return "neutral" if _had_no_chance(exchange, attempt) else "failed"
    if reason in _FAILURES or (reason == "status" and (status or 0) >= 500):
        return "failed"
    if reason in _SILENT:
        return "neutral"
    return "answered"


def _had_no_chance(exchange: Exchange, attempt: Attempt) -> bool:
    """Tell whether the deadline of all attempts cut this one short, and others had used up most of the time."""
    timeout_ms = exchange.fallback.timeout_ms
    if timeout_ms is None:
        return False
    limit = timeout_ms * 1_000_000
    deadline = exchange.started_ns + limit
    return attempt.ended_ns > deadline - _SLACK_NS and deadline - attempt.started_ns < limit // 2
