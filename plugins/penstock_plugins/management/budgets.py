"""Budgets: what they may say, their resets, and what was spent in the current period."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from penstock.governance import KINDS, BudgetRule, StoredObject, write_usd
from penstock.governance.objects import Budget
from penstock.governance.windows import period_of
from penstock_plugins.management import objects
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import refuse_unknown, structure
from penstock_plugins.management.faults import RefusedError, bad_field
from penstock_plugins.management.permissions import covers
from penstock_plugins.management.places import find, find_default
from penstock_plugins.management.resources import (
    CONTAINERS,
    PRINCIPALS,
    Draft,
    Resource,
    kind_of_id,
    reach_of,
)
from penstock_plugins.management.rules import check_zone
from penstock_plugins.management.times import read_time, write_time

SUBJECTS: dict[str, tuple[str, ...]] = {
    "organization": ("organization",),
    "team": ("team",),
    "project": ("project",),
    "virtual_key": ("virtual_key",),
    "principal": PRINCIPALS,
    "group": ("group",),
    "end_user": ("virtual_key", "project"),
}
"""Whose spend each scope bounds."""
_ALIASES = ("organization", "team", "project", "virtual_key", "principal", "group")


def _intake(call: Call, members: dict[str, Any]) -> None:
    """Read whose spend it bounds: ``scope`` and ``scope_id``, or ``project: "default"``."""
    for alias in _ALIASES:
        if alias not in members:
            continue
        if "scope_id" in members:
            raise bad_field(alias, f"give either {alias} or scope_id, not both")
        scope = members.setdefault("scope", alias)
        if alias != scope and not (scope == "end_user" and alias in ("virtual_key", "project")):
            raise bad_field(alias, f"does not go with scope {str(scope)[:40]!r}")
        members["scope_id"] = members.pop(alias)
        break
    scope, subject = members.get("scope"), members.get("scope_id")
    if isinstance(subject, str):
        kinds = SUBJECTS.get(scope) if isinstance(scope, str) else None
        kinds = kinds or ((kind_of_id(subject) or "project"),)
        try:
            members["scope_id"] = find(call, kinds, subject).id
        except RefusedError as error:
            raise RefusedError(error.code, f"scope_id: {error.message}", meta={"field": "scope_id"}) from None


def _default_subject(call: Call, members: Mapping[str, Any]) -> str | None:
    scope = members.get("scope")
    if scope == "organization":
        return call.actor.organization_id
    found = find_default(call, scope, call.actor.home) if scope in CONTAINERS else None
    return None if found is None else found.id


def _check(call: Call, draft: Draft) -> None:
    budget: Budget = draft.document
    if budget.limit_nano_usd <= 0:
        raise bad_field("limit_usd", "must be over 0")
    check_zone("timezone", budget.timezone)
    if budget.cycle_anchor_at is not None and budget.window in ("total", "manual"):
        raise bad_field("cycle_anchor_at", f"goes with no window {budget.window!r}: it has no cycle")
    subject = call.tx.get(kind_of_id(budget.scope_id) or "project", budget.scope_id)
    if subject is None or subject.kind not in SUBJECTS[budget.scope]:
        raise bad_field("scope_id", f"must be the id of a {' or '.join(SUBJECTS[budget.scope])}")
    if subject.archived_at_ms is not None and draft.before is None:
        raise bad_field("scope_id", f"{subject.id} is archived")
    if budget.provider is not None:
        binding = call.tx.get("provider_binding", budget.provider)
        related = binding is not None and (
            covers(reach_of(binding), draft.scope) or covers(draft.scope, reach_of(binding))
        )
        if not related:
            raise bad_field("provider", "must be a provider binding that the budget's scope can use")


BUDGETS = Resource(
    kind=KINDS["budget"],
    path="budgets",
    grants="gatewayBudgets",
    aliases=dict.fromkeys(_ALIASES, "scope_id"),
    references={"scope_id": (), "provider": ("provider_binding",)},
    locked=frozenset(("scope", "scope_id")),
    readonly=frozenset(("period_reset_at",)),
    filters=("name", "scope", "scope_id", "window", "external_id"),
    intake=_intake,
    fills={"scope_id": _default_subject},
    check=_check,
)


def reset(
    call: Call, name: str, body: Mapping[str, Any], *, version: int | None = None
) -> tuple[StoredObject, dict[str, Any]]:
    """Let the current period start now; what was spent before stays in the ledger."""
    refuse_unknown(body, ())
    stored = objects.to_change(call, BUDGETS, name, "update", version)
    document: Budget = structure(stored.document, Budget)
    document = attrs.evolve(document, period_reset_at=write_time(_reset_ms(call, stored.id, document)))
    return objects.save(call, Draft(BUDGETS, stored.id, stored, document, reach_of(stored), {}), "update"), {}


def _reset_ms(call: Call, budget_id: str, budget: Budget) -> int:
    """Return when a period begins anew, milliseconds: periods start with whole seconds, so no two in one.

    Raises RefusedError where the second after the last reset's has been given away too.
    """
    if budget.period_reset_at is None:
        return call.now_ms
    before_ms = round(read_time(budget.period_reset_at) * 1000)
    if -(-call.now_ms // 1000) > -(-before_ms // 1000):
        return call.now_ms
    if before_ms > call.now_ms + 2000:
        return call.now_ms  # the clock has gone back
    if before_ms > call.now_ms:
        raise RefusedError("conflict", f"budget {budget_id} has been reset twice just now; try again in a second.")
    return -(-before_ms // 1000) * 1000 + 1


@attrs.frozen
class Spending:
    """Say what to ask the ledger for: the counter of one budget or of one member of it, and its period."""

    budget_id: str
    budget: Budget
    counter: str
    start: int
    """Seconds since the epoch."""
    end: int | None


def spending(call: Call, name: str, subject: str | None) -> Spending:
    """Return which counter holds what a budget has spent in its current period.

    ``subject``: the end user, or member of the group, whose allowance it is. Raises RefusedError where one is needed.
    """
    stored = objects.get(call, BUDGETS, name)
    budget = structure(stored.document, Budget)
    reset_at = 0.0 if budget.period_reset_at is None else read_time(budget.period_reset_at)
    needs_subject = budget.scope in ("group", "end_user")
    if needs_subject != (subject is not None):
        fault = "is required: each has an allowance of his own" if needs_subject else "goes with groups and end users"
        raise bad_field("subject", fault)
    rule = BudgetRule(stored.id, budget, subject, reset_at)
    anchor = None if budget.cycle_anchor_at is None else read_time(budget.cycle_anchor_at)
    period = period_of(budget.window, call.now_ms / 1000, timezone=budget.timezone, anchor=anchor, reset_at=reset_at)
    return Spending(stored.id, budget, rule.counter(subject), period.start, period.end)


def show_spending(asked: Spending, spent_nano_usd: int) -> dict[str, Any]:
    """Return what a budget has spent as the API shows it."""
    limit = asked.budget.limit_nano_usd
    left = max(0, limit - spent_nano_usd)
    return {
        "budget_id": asked.budget_id,
        "period_start": write_time(asked.start * 1000),
        "resets_at": None if asked.end is None else write_time(asked.end * 1000),
        "limit_usd": write_usd(limit),
        "limit_nano_usd": limit,
        "spent_usd": write_usd(spent_nano_usd),
        "spent_nano_usd": spent_nano_usd,
        "remaining_usd": write_usd(left),
        "remaining_nano_usd": left,
        "percent": spent_nano_usd * 100 // limit,
        "is_breached": spent_nano_usd >= limit,
    }
