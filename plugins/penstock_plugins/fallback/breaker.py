"""The breaker of one binding. Pure: told the time, asked whether an attempt may be made.

States:

    closed ── enough failures within the window ──▶ open ── time ──▶ half-open ── a probe answered ──▶ closed
                                                      ▲                  │
                                                      └── a probe failed ┘

**Half-open**: one attempt at a time is let through, the probe; only what becomes of it counts. Failures of attempts
that began before the breaker closed last say nothing about the provider as it is now, and do not count either.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

import attrs

State = Literal["closed", "open", "half_open"]
Outcome = Literal["answered", "failed", "neutral"]
"""What an attempt says about a provider; ``neutral``: nothing."""


@attrs.frozen
class Thresholds:
    """Say when a breaker opens and for how long."""

    failures: int = 10
    window_seconds: float = 30.0
    open_seconds: float = 60.0


@attrs.define(eq=False)
class Breaker:
    """Count failures of one binding. Times are seconds of any clock that only goes forwards."""

    failures: deque[float] = attrs.field(factory=deque)
    """When the latest came, oldest first; never more than open it."""
    opened_at: float | None = None
    """None while it is closed."""
    closed_at: float = float("-inf")
    """When a probe closed it last."""
    probe: object | None = None
    """What was let through to see; None where nothing is under way."""

    def state(self, now: float, thresholds: Thresholds) -> State:
        """Return how it stands."""
        if self.opened_at is None:
            return "closed"
        return "open" if now < self.opened_at + thresholds.open_seconds else "half_open"

    def admit(self, now: float, thresholds: Thresholds, probe: object) -> bool:
        """Tell whether an attempt may be made; in half-open state then it is the probe, until ``judge_probe``."""
        if self.opened_at is None:
            return True
        if self.probe is not None or self.state(now, thresholds) == "open":
            return False
        self.probe = probe
        return True

    def wait(self, now: float, thresholds: Thresholds) -> float:
        """Return how long nothing will be let through, seconds; 0 where only a probe is in the way."""
        return 0.0 if self.opened_at is None else max(0.0, self.opened_at + thresholds.open_seconds - now)

    def judge_probe(self, outcome: Outcome, now: float) -> None:
        """Take what became of the probe: it closes the breaker, opens it anew, or says nothing and makes room."""
        self.probe = None
        if outcome == "answered":
            self.opened_at, self.closed_at = None, now
            self.failures.clear()
        elif outcome == "failed":
            self.opened_at = now

    def fail(self, began: float, now: float, thresholds: Thresholds) -> bool:
        """Count a failed attempt that was no probe; returns whether that opened the breaker."""
        if self.opened_at is not None or began < self.closed_at:
            return False
        failures = self.failures
        failures.append(now)
        while len(failures) > thresholds.failures:
            failures.popleft()
        if len(failures) < thresholds.failures or now - failures[0] > thresholds.window_seconds:
            return False
        self.opened_at = now
        return True

    def recent(self, now: float, thresholds: Thresholds) -> int:
        """Return how many failures lie within the window; those that opened it while it is not closed."""
        if self.opened_at is not None:
            return len(self.failures)
        return sum(now - failure <= thresholds.window_seconds for failure in self.failures)

    def is_idle(self, now: float, thresholds: Thresholds) -> bool:
        """Tell whether forgetting it would change nothing."""
        return self.opened_at is None and not self.recent(now, thresholds)
