"""The budgets of a key, ready for use: each with the period at hand, looked up once per key and change."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import attrs

from penstock import Principal
from penstock.governance import BudgetDirectory, BudgetRule, Period, period_for

_REMEMBERED_KEYS = 50_000
WARN_FROM = 80
"""Percent of a limit from which a budget warns."""


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


@attrs.frozen(eq=False)
class Term:
    """What one budget asks of every exchange of its period."""

    counter: str
    period: int
    """Its start."""
    limit: int | None
    """nano-USD; None where it only warns."""
    is_reserving: bool
    """Whether what is likely is reserved, or nothing."""
    warns_from: int
    """What must be settled for a warning, nano-USD."""


@attrs.define(eq=False)
class Plan:
    """All the budgets of a key."""

    applied: tuple[Applied, ...]
    is_plain: bool
    """Whether none is about one binding, one end user or the most that is possible: each asks the same of everybody."""
    _terms: tuple[Term, ...] = ()
    _since: float = inf
    _until: float = 0

    @classmethod
    def of(cls, rules: Sequence[BudgetRule]) -> Plan:
        """Make one of what the directory says."""
        applied = tuple([Applied.of(rule) for rule in rules])
        is_plain = not any(one.binding_id or one.rule.is_per_end_user or one.mode == "max" for one in applied)
        return cls(applied, is_plain)

    def terms(self, now: float) -> tuple[Term, ...]:
        """Return what a plain plan asks at a moment, in the order of ``applied``."""
        if not self._since <= now < self._until:
            periods = [one.period(now) for one in self.applied]
            self._since = max([period.start for period in periods], default=0)
            self._until = min([inf if period.end is None else period.end for period in periods], default=inf)
            self._terms = tuple(_term(*each) for each in zip(self.applied, periods, strict=True))
        return self._terms


def _term(applied: Applied, period: Period) -> Term:
    limit = applied.limit
    warns_from = -(-limit * WARN_FROM // 100)
    asked = limit if applied.is_blocking else None
    return Term(applied.counter(None), period.start, asked, applied.mode == "expected", warns_from)


class Rules:
    """Remember what applies to each key for as long as the directory answers the same."""

    def __init__(self, directory: BudgetDirectory) -> None:
        self._directory = directory
        self._by_key: dict[str, tuple[Sequence[BudgetRule], Plan]] = {}

    def of(self, principal: Principal) -> Plan:
        """Return every budget that applies to a key."""
        rules = self._directory.budgets_of(principal)
        known = self._by_key.get(principal.virtual_key_id)
        if known is not None and known[0] is rules:
            return known[1]
        if len(self._by_key) >= _REMEMBERED_KEYS:
            self._by_key.clear()
        plan = Plan.of(rules)
        self._by_key[principal.virtual_key_id] = (rules, plan)
        return plan
