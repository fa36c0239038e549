"""The budgets of a key, ready for use: each with the period at hand, looked up once per key and change."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from penstock import Principal
from penstock.governance import BudgetDirectory, BudgetRule, Period, period_for

_REMEMBERED_KEYS = 50_000


@attrs.define(eq=False)
class Applied:
    """One budget that applies to a key."""

    rule: BudgetRule
    binding_id: str | None
    """The only binding whose spend counts."""
    limit: int
    """nano-USD."""
    is_blocking: bool
    mode: str
    """``expected``, ``max`` or ``none``."""
    _counter: str | None
    _period: Period = Period(0, 0)

    @classmethod
    def of(cls, rule: BudgetRule) -> Applied:
        """Make one of a rule."""
        budget = rule.budget
        is_blocking = budget.on_breach == "block"
        # What only warns must not be held up by a bound that nobody holds it to.
        mode = "expected" if budget.reserve == "max" and not is_blocking else budget.reserve
        counter = None if rule.is_per_end_user else rule.counter(None)
        return cls(rule, budget.provider, budget.limit_nano_usd, is_blocking, mode, counter)

    def counter(self, end_user: str | None) -> str:
        """Return the name of the counter."""
        return self._counter or self.rule.counter(end_user)

    def period(self, now: float) -> Period:
        """Return the period of a moment, seconds since the epoch."""
        period = self._period
        end = period.end
        if now < period.start or (end is not None and now >= end):
            period = self._period = period_for(self.rule.budget, now, self.rule.reset_at)
        return period


class Rules:
    """Remember what applies to each key for as long as the directory answers the same."""

    def __init__(self, directory: BudgetDirectory) -> None:
        self._directory = directory
        self._by_key: dict[str, tuple[Sequence[BudgetRule], tuple[Applied, ...]]] = {}

    def of(self, principal: Principal) -> tuple[Applied, ...]:
        """Return every budget that applies to a key."""
        rules = self._directory.budgets_of(principal)
        known = self._by_key.get(principal.virtual_key_id)
        if known is not None and known[0] is rules:
            return known[1]
        if len(self._by_key) >= _REMEMBERED_KEYS:
            self._by_key.clear()
        applied = tuple([Applied.of(rule) for rule in rules])
        self._by_key[principal.virtual_key_id] = (rules, applied)
        return applied
