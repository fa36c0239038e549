"""Budgets in memory, found by the scopes of a key."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import attrs
import msgspec
from sqlalchemy import Connection

from penstock import Principal, RequestError
from penstock.governance import BudgetRule, Discrepancy, StoredObject, period_for, read_time
from penstock.governance.objects import Budget, BudgetScope
from penstock_plugins.store.objects import SQLReading

REMEMBERED_KEYS = 50_000
"""For how many keys an answer is kept at hand; keys come and go."""
_log = logging.getLogger("penstock.store")
_SCOPES = get_args(BudgetScope)
_PAGE = 500


@attrs.frozen
class Unreadable:
    """Stand for a budget whose limit nobody knows: nothing is let through under it."""

    id: str
    scope: tuple[str, str]
    """Kind and id of whom it is for; where even that cannot be read, whose object it is."""
    fault: str

    def refusal(self) -> RequestError:
        """Return what is answered to whoever it is for."""
        return RequestError(
            "policy_rules_invalid",
            f"The budget {self.id} over this {self.scope[0].replace('_', ' ')} cannot be read, so nothing is let "
            "through under it; an administrator has to give it anew, or to archive it.",
            meta={"budget": self.id},
        )

    def __str__(self) -> str:
        return f"budget {self.id} of {self.scope[0]} {self.scope[1]} cannot be read: {self.fault}"


class StoredBudgets:
    """Find the budgets of a key: a BudgetDirectory and a Follower."""

    kinds = ("budget",)

    def __init__(self) -> None:
        self._by_id: dict[str, BudgetRule | Unreadable] = {}
        self._by_scope: dict[tuple[str, str], tuple[BudgetRule | Unreadable, ...]] = {}
        self._answers: dict[str, tuple[Principal, tuple[BudgetRule, ...]]] = {}

    def plan(self, changed: Sequence[StoredObject]) -> Callable[[], None]:
        following = {stored.id: _rule_of(stored) for stored in changed}
        for rule in following.values():
            if isinstance(rule, Unreadable):
                _log.error("%s; whoever it is for is refused", rule)
        rules = [*following.values(), *(self._by_id.get(budget_id) for budget_id in following)]
        scopes: dict[tuple[str, str], tuple[BudgetRule | Unreadable, ...]] = {}
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
        """Return every budget that applies. Raises RequestError where one of them cannot be read."""
        known = self._answers.get(principal.virtual_key_id)
        if known is not None and known[0] is principal:
            return known[1]
        found = tuple(self._find(principal))
        if len(self._answers) >= REMEMBERED_KEYS:
            self._answers.clear()
        self._answers[principal.virtual_key_id] = principal, found
        return found

    def _find(self, principal: Principal) -> Iterator[BudgetRule]:
        yield from self._of("organization", principal.organization_id)
        yield from self._of("team", principal.team_id)
        yield from self._of("project", principal.project_id)
        yield from self._of("virtual_key", principal.virtual_key_id)
        yield from self._of("principal", principal.principal_id)
        for group_id in principal.group_ids:
            for rule in self._of("group", group_id):
                yield attrs.evolve(rule, subject=principal.principal_id)
        for scope_id in (principal.virtual_key_id, principal.project_id):
            yield from self._of("end_user", scope_id)

    def _of(self, scope: str, scope_id: str) -> Iterator[BudgetRule]:
        for rule in self._by_scope.get((scope, scope_id), ()):
            if isinstance(rule, Unreadable):
                raise rule.refusal()
            yield rule

    def find_budget(self, budget_id: str) -> BudgetRule | None:
        """Return a budget by id, without a subject."""
        found = self._by_id.get(budget_id)
        return None if isinstance(found, Unreadable) else found

    @property
    def unreadable(self) -> list[Unreadable]:
        """Return the budgets that cannot be read."""
        return [rule for rule in self._by_id.values() if isinstance(rule, Unreadable)]


def unreadable_in(connection: Connection) -> Iterator[Discrepancy]:
    """Yield the budgets of a database that cannot be read, whose spend is bounded by nothing that is known."""
    reading, after = SQLReading(connection), None
    while page := reading.list("budget", after=after, limit=_PAGE):
        for stored in page:
            rule = _rule_of(stored)
            if isinstance(rule, Unreadable):
                yield Discrepancy(what=str(rule), period=0, recorded=0, derived=0)
        after = page[-1].id


def _scope_of(rule: BudgetRule | Unreadable) -> tuple[str, str]:
    return rule.scope if isinstance(rule, Unreadable) else (rule.budget.scope, rule.budget.scope_id)


def _rule_of(stored: StoredObject) -> BudgetRule | Unreadable | None:
    if stored.archived_at_ms is not None:
        return None
    try:
        budget = msgspec.convert(stored.document, Budget)  # what a newer version knows besides is passed over
        reset_at = 0.0 if budget.period_reset_at is None else read_time(budget.period_reset_at)
        period_for(budget, stored.created_at_ms / 1000, reset_at)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError) as error:
        return Unreadable(stored.id, _scope_in(stored), str(error))
    return BudgetRule(stored.id, budget, None, reset_at)


def _scope_in(stored: StoredObject) -> tuple[str, str]:
    scope_id = stored.document.get("scope_id")
    for scope in _SCOPES:
        if stored.document.get("scope") == scope and isinstance(scope_id, str):
            return scope, scope_id
    owner = stored.scope
    if owner.project_id is not None:
        return "project", owner.project_id
    return ("team", owner.team_id) if owner.team_id is not None else ("organization", owner.organization_id)
