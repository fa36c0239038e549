"""Whether the next candidate is tried: one owner of all attempts of an exchange, bounded in number and time; pure."""

from __future__ import annotations

from time import monotonic_ns

import attrs

from penstock.models import Attempt, Exchange, Timeouts
from penstock.policies import FailureClass, Fallback
from penstock.probing import Verdict
from penstock.providers import UpstreamRequest

_STATUS = {404: "not_found", 429: "rate_limit"}

_CLASSES: dict[str, FailureClass] = {
    "connect": "network_error",
    "dns": "network_error",
    "tls": "network_error",
    "reset": "network_error",
    "truncated": "network_error",
    "timeout": "timeout",
    "protocol": "5xx",
    "error_event": "5xx",
}
"""What an attempt is for ``Fallback.on``, by its reason; an answer nobody can read is as good as a 5xx."""


_LEAST_NS = 5_000_000
"""With less left until the deadline nobody is asked: timers may fire a little before it."""


_REASONS: dict[Verdict, str] = {"error_event": "error_event", "no_event": "truncated"}


def is_retryable(status: int) -> bool:
    """Say whether another candidate may be tried after this status."""
    return status >= 500 or status in _STATUS


def reason_of(status: int, verdict: Verdict) -> str | None:
    """Return why an answer that could be relayed should not be; an error status says more than what is in the body."""
    if status >= 400:
        return "status" if is_retryable(status) else None
    return _REASONS.get(verdict)


def class_of(attempt: Attempt) -> FailureClass | None:
    """Return how an attempt failed; None where it did not, or where no other candidate would do better."""
    if attempt.reason == "status":
        return _STATUS.get(attempt.status or 0, "5xx")  # type: ignore[return-value]
    return _CLASSES.get(attempt.reason or "")


def may_go_on(exchange: Exchange) -> bool:
    """Tell, after an attempt, whether another candidate may be asked."""
    attempts = exchange.attempts
    failure = class_of(attempts[-1])
    if failure is None:
        return False
    fallback: Fallback = exchange.fallback
    if failure not in fallback.on:
        return False
    if sum(not attempt.is_skipped for attempt in attempts) >= fallback.max_attempts:
        return False
    return fallback.timeout_ms is None or left_ns(exchange, fallback.timeout_ms) > _LEAST_NS


def bounded(exchange: Exchange, request: UpstreamRequest) -> UpstreamRequest:
    """Return a request that takes no longer than its exchange has left."""
    timeout_ms = exchange.fallback.timeout_ms
    if timeout_ms is None:
        return request
    left = max(0.001, left_ns(exchange, timeout_ms) / 1e9)
    timeouts = request.timeouts
    least = Timeouts(min(timeouts.connect, left), min(timeouts.first_byte, left), timeouts.idle)
    return attrs.evolve(request, timeouts=least)


def left_ns(exchange: Exchange, timeout_ms: int) -> int:
    """Return what is left until an answer must have begun, nanoseconds."""
    return exchange.started_ns + timeout_ms * 1_000_000 - monotonic_ns()
