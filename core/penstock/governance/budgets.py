"""Budgets as the data plane sees them: rules, found from memory for each key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs

from penstock.governance.objects import Budget
from penstock.models import Principal


@attrs.frozen(eq=False)
class BudgetRule:
    """Hold one budget that applies to a key."""

    id: str
    budget: Budget
    subject: str | None
    """Whose allowance it is where each has one of his own: the principal's id for groups; None for all others, and
    for end users, whose id comes with the request."""
    reset_at: float
    """No period starts before; seconds since the epoch, 0 without a reset."""

    @property
    def is_per_end_user(self) -> bool:
        """Tell whether the request must name its end user."""
        return self.budget.scope == "end_user"

    def counter(self, end_user: str | None) -> str:
        """Return the name of the counter: one for each subject."""
        subject = end_user if self.is_per_end_user else self.subject
        return f"budget:{self.id}" if subject is None else f"budget:{self.id}:{subject}"


class BudgetDirectory(Protocol):
    """Find the budgets of a key, from memory."""

    def budgets_of(self, principal: Principal) -> Sequence[BudgetRule]:
        """Return every budget that applies: of its organization, team, project, key, principal and groups, and the
        templates for end users on its key and project."""
        ...
