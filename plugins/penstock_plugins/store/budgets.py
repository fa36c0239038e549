"""Budgets in memory, found by the scopes of a key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import attrs

from penstock import Principal
from penstock.governance import BudgetRule, StoredObject, read_time
from penstock.governance.objects import Budget

REMEMBERED_KEYS = 50_000
"""For how many keys an answer is kept at hand; keys come and go."""
_log = logging.getLogger("penstock.store")
_MEMBERS = frozenset(field.name for field in attrs.fields(Budget))


class StoredBudgets:
    """Find the budgets of a key: a BudgetDirectory and a Follower."""

    kinds = ("budget",)

    def __init__(self) -> None:
        self._by_id: dict[str, BudgetRule] = {}
        self._by_scope: dict[tuple[str, str], tuple[BudgetRule, ...]] = {}
        self._answers: dict[str, tuple[Principal, tuple[BudgetRule, ...]]] = {}

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        following = {stored.id: _rule_of(stored) for stored in changed}
        rules = [*following.values(), *(self._by_id.get(budget_id) for budget_id in following)]
        scopes: dict[tuple[str, str], tuple[BudgetRule, ...]] = {}
        for scope in {_scope_of(rule) for rule in rules if rule is not None}:
            kept = [rule for rule in self._by_scope.get(scope, ()) if rule.id not in following]
            kept += [rule for rule in following.values() if rule is not None and _scope_of(rule) == scope]
            scopes[scope] = tuple(sorted(kept, key=lambda rule: rule.id))

        def swap() -> None:
            self._by_scope.update(scopes)
            for budget_id, rule in following.items():
                if rule is None:
                    self._by_id.pop(budget_id, None)
                else:
                    self._by_id[budget_id] = rule
            if following:
                self._answers = {}

        return swap

    def budgets_of(self, principal: Principal) -> Sequence[BudgetRule]:
        known = self._answers.get(principal.virtual_key_id)
        if known is not None and known[0] is principal:
            return known[1]
        found = tuple(self._find(principal))
        if len(self._answers) >= REMEMBERED_KEYS:
            self._answers.clear()
        self._answers[principal.virtual_key_id] = principal, found
        return found

    def _find(self, principal: Principal) -> Iterator[BudgetRule]:
        find = self._by_scope.get
        yield from find(("organization", principal.organization_id), ())
        yield from find(("team", principal.team_id), ())
        yield from find(("project", principal.project_id), ())
        yield from find(("virtual_key", principal.virtual_key_id), ())
        yield from find(("principal", principal.principal_id), ())
        for group_id in principal.group_ids:
            for rule in find(("group", group_id), ()):
                yield attrs.evolve(rule, subject=principal.principal_id)
        for scope_id in (principal.virtual_key_id, principal.project_id):
            yield from find(("end_user", scope_id), ())

    def find_budget(self, budget_id: str) -> BudgetRule | None:
        """Return a budget by id, without a subject."""
        return self._by_id.get(budget_id)


def _scope_of(rule: BudgetRule) -> tuple[str, str]:
    return rule.budget.scope, rule.budget.scope_id


def _rule_of(stored: StoredObject) -> BudgetRule | None:
    if stored.archived_at_ms is not None:
        return None
    try:
        budget = Budget(**{name: value for name, value in stored.document.items() if name in _MEMBERS})
        reset_at = 0.0 if budget.period_reset_at is None else read_time(budget.period_reset_at)
    except (TypeError, ValueError) as error:
        _log.error("budget %s cannot be used: %r", stored.id, error)
        return None
    return BudgetRule(stored.id, budget, None, reset_at)
