"""The audit as the API shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.governance import AuditEntry, Scope
from penstock_plugins.management.bodies import show_money
from penstock_plugins.management.calls import Call
from penstock_plugins.management.permissions import EVERYWHERE
from penstock_plugins.management.times import write_time

FILTERS = ("actor", "action", "kind", "object_id")
_PAGE = 200


def browse(
    call: Call, where: Mapping[str, str], *, after: str | None, limit: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Return a page of the entries the actor may see, newest first, and the id it ends with if there are more."""
    found: list[AuditEntry] = []
    while len(found) <= limit:
        page = call.tx.audit_entries(scope=call.actor.home, where=where, after=after, limit=_PAGE)
        found += [entry for entry in page if call.actor.may("audit:view", _reach_of(entry))]
        if len(page) < _PAGE:
            break
        after = page[-1].id
    more = len(found) > limit
    return [show(entry) for entry in found[:limit]], found[limit - 1].id if more else None


def _reach_of(entry: AuditEntry) -> Scope | None:
    """Return the scope an entry is judged by: what is of the whole installation is entered under some organization."""
    document = entry.after or entry.before or {}
    return None if document.get("scope_id") == EVERYWHERE else entry.scope


def show(entry: AuditEntry) -> dict[str, Any]:
    """Return an entry as the API shows it."""
    return {
        "id": entry.id,
        "at": write_time(entry.at_ms),
        "actor": entry.actor,
        "action": entry.action,
        "kind": entry.kind,
        "object_id": entry.object_id,
        "organization_id": entry.scope.organization_id,
        "team_id": entry.scope.team_id,
        "project_id": entry.scope.project_id,
        "before": None if entry.before is None else show_money(dict(entry.before)),
        "after": None if entry.after is None else show_money(dict(entry.after)),
        "request_id": entry.request_id,
        "source": entry.source,
    }
