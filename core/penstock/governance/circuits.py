"""Which provider bindings are kept from traffic because they failed: local to a process, for metrics and people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import attrs

State = Literal["closed", "open", "half_open"]


@attrs.frozen
class CircuitState:
    """Say how one binding's breaker stands."""

    binding_id: str
    """Id of the binding."""
    state: State
    """closed: asked as ever; open: skipped; half_open: one exchange at a time is let through to see."""
    failures: int
    """Failures within the window; those that opened it while it is not closed."""
    retry_after: float = 0.0
    """Seconds until a probe is let through; 0 where it is not open."""


class CircuitDirectory(Protocol):
    """Tell how breakers stand in this process."""

    def states(self) -> Sequence[CircuitState]:
        """Return the breakers of bindings that failed lately; a binding without one is closed."""
        ...
