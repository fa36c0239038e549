"""What the ledger says: rows, sums, corrections; each within what the actor may see of it."""

from __future__ import annotations

import zoneinfo
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, cast

import attrs
import msgspec

from penstock import Usage
from penstock.governance import (
    LedgerEntry,
    Scope,
    UsageQuery,
    UsageRow,
    new_id,
    read_usd,
    write_usd,
)
from penstock_plugins.management.calls import Call
from penstock_plugins.management.documents import structure
from penstock_plugins.management.faults import RefusedError, bad_field, not_found
from penstock_plugins.management.permissions import covers, missing
from penstock_plugins.management.places import find, scope_of
from penstock_plugins.management.resources import CONTAINERS, PRINCIPALS
from penstock_plugins.management.rules import check_zone
from penstock_plugins.management.times import read_time, write_time

WHERE = ("organization_id", "team_id", "project_id", "virtual_key_id", "principal_id", "end_user", "binding_id",
         "provider", "model", "tag")  # fmt: skip
"""What rows can be narrowed by."""
GROUPS = ("key", "principal", "end_user", "model", "provider", "project", "team", "tag")
BUCKETS = ("hour", "day", "month")
DEFAULT_DAYS = 30
MAX_BUCKETS = {"hour": 366 * 24, "day": 10 * 366, "month": 100 * 12}
"""About how many a question may ask for."""
MAX_SUMS = 1000
"""Rows of sums on a page: more at once would keep the event loop from what goes through the gateway."""
_SECONDS = {"hour": 3600, "day": 86_400, "month": 28 * 86_400}
_LAST_NS = 2**62
"""In the year 2116."""
_VIEW = "gatewayUsage:view"
_USAGE = tuple(field.name for field in attrs.fields(Usage))
_read_place = msgspec.json.Decoder(tuple[str | None, tuple[str | None, ...]])
_KINDS: dict[str, tuple[str, ...]] = {
    "organization_id": ("organization",),
    "team_id": ("team",),
    "project_id": ("project",),
    "virtual_key_id": ("virtual_key",),
    "principal_id": PRINCIPALS,
    "binding_id": ("provider_binding",),
}


def visible_where(call: Call, query: Mapping[str, str]) -> dict[str, str]:
    """Return what to narrow the ledger by: what is asked for, within what the actor may see. Raises RefusedError."""
    where = {name: query[name] for name in WHERE if name in query}
    scope = call.actor.home
    for name, kinds in _KINDS.items():
        if name not in where:
            continue
        stored = find(call, kinds, where[name])
        where[name] = stored.id
        if kinds[0] in CONTAINERS:
            inner = scope_of(call, stored.id)
            scope = inner if covers(scope, inner) or not covers(inner, scope) else scope
        elif name == "virtual_key_id" and covers(scope, stored.scope):
            scope = stored.scope
    if scope is not None:
        for name, value in attrs.asdict(scope).items():
            if value is not None and where.setdefault(name, value) != value:
                raise bad_field(name, f"does not go with the others: what they name is in {value}")
    if not call.actor.may(_VIEW, scope):
        if not call.actor.may(_VIEW, scope, call.actor.user_id):
            raise missing(_VIEW, scope)
        if where.setdefault("principal_id", str(call.actor.user_id)) != call.actor.user_id:
            raise missing(_VIEW, scope)
    return where


def interval(call: Call, query: Mapping[str, str]) -> tuple[int, int]:
    """Return ``since`` and ``until`` in nanoseconds; without them the last 30 days. Raises RefusedError."""
    until = moment(query, "until", call.now_ms / 1000 + 1)
    since = moment(query, "since", until - timedelta(days=DEFAULT_DAYS).total_seconds())
    if since >= until:
        raise bad_field("since", "must be before until")
    return _nanoseconds(since), _nanoseconds(until)


def _nanoseconds(seconds: float) -> int:
    """Return a time in nanoseconds, within what the ledger can hold."""
    return max(0, min(round(seconds * 1000) * 1_000_000, _LAST_NS))


def moment(query: Mapping[str, str], name: str, otherwise: float) -> float:
    """Return a time that a query gives, in seconds since the epoch. Raises RefusedError."""
    if name not in query:
        return otherwise
    try:
        return read_time(query[name])
    except ValueError as error:
        raise bad_field(name, str(error)) from None


def usage_query(call: Call, query: Mapping[str, str], after: str | None) -> UsageQuery:
    """Return the question that a query asks, for one row more than the page holds. Raises RefusedError."""
    group_by = tuple(name for name in query.get("group_by", "").split(",") if name)
    for name in group_by:
        if name not in GROUPS:
            raise bad_field("group_by", f"{name[:40]!r} is none of {', '.join(GROUPS)}")
    if len(group_by) > 3 or len(set(group_by)) != len(group_by):
        raise bad_field("group_by", "takes up to three, each once")
    bucket = query.get("bucket")
    if bucket is not None and bucket not in BUCKETS:
        raise bad_field("bucket", f"must be one of {', '.join(BUCKETS)}")
    zone = query.get("timezone", "UTC")
    check_zone("timezone", zone)
    since, until = interval(call, query)
    if bucket is not None and (until - since) // 1_000_000_000 > MAX_BUCKETS[bucket] * _SECONDS[bucket]:
        raise bad_field("bucket", f"asks for more than {MAX_BUCKETS[bucket]} {bucket}s; narrow since and until")
    where = visible_where(call, query)
    return UsageQuery(
        since_ns=since,
        until_ns=until,
        group_by=group_by,
        bucket=cast("Any", bucket),
        timezone=zone,
        where=where,
        limit=sums_on_page(query) + 1,
        after=None if after is None else _read_place.decode(after),
    )


def sums_on_page(query: Mapping[str, str]) -> int:
    """Return how many sums a page holds. Raises RefusedError."""
    text = query.get("limit", str(MAX_SUMS))
    if not text.isascii() or not text.isdigit() or len(text) > len(str(MAX_SUMS)) or not 1 <= int(text) <= MAX_SUMS:
        raise bad_field("limit", f"must be from 1 to {MAX_SUMS}")
    return int(text)


def place_of(row: UsageRow) -> str:
    """Return what the page after a row is asked by."""
    return msgspec.json.encode((row.bucket_start, tuple(row.group.values()))).decode()


def this_month(call: Call, timezone: str = "UTC") -> tuple[int, int]:
    """Return the calendar month so far, in nanoseconds."""
    now = datetime.fromtimestamp(call.now_ms / 1000, zoneinfo.ZoneInfo(timezone))
    first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return round(first.timestamp()) * 1_000_000_000, (call.now_ms + 1000) * 1_000_000


def show_row(row: UsageRow) -> dict[str, Any]:
    """Return sums as the API shows them."""
    return {
        "bucket_start": row.bucket_start,
        "group": dict(row.group),
        "requests": row.requests,
        "errors": row.errors,
        "usage": show_usage(row.usage),
        "cost_usd": write_usd(row.cost_nano_usd),
        "cost_nano_usd": row.cost_nano_usd,
        "unpriced": row.unpriced,
        "estimated": row.estimated,
    }


def show_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Return tokens by class."""
    return None if usage is None else {name: getattr(usage, name) for name in _USAGE}


def empty_row() -> UsageRow:
    """Return the sums of nothing."""
    return UsageRow(
        group={}, bucket_start=None, requests=0, errors=0, usage=Usage(), cost_nano_usd=0, unpriced=0, estimated=0
    )


def show_entry(entry: LedgerEntry) -> dict[str, Any]:
    """Return a row of the ledger as the API shows it."""
    shown: dict[str, Any] = {
        "request_id": entry.request_id,
        "started_at": write_time(entry.started_at_ns / 1_000_000),
        "duration_ms": entry.duration_ns // 1_000_000,
    }
    for name in ("organization_id", "team_id", "project_id", "virtual_key_id", "principal_id", "end_user",
                 "binding_id", "provider", "model_asked", "model_served"):  # fmt: skip
        shown[name] = getattr(entry, name)
    shown["usage"] = show_usage(entry.usage)
    shown["cost_usd"] = write_usd(entry.cost_nano_usd)
    for name in ("cost_nano_usd", "cost_source", "price_version", "status", "outcome", "error", "is_stream",
                 "fallback_count", "adjusts"):  # fmt: skip
        shown[name] = getattr(entry, name)
    shown["attempts"] = [dict(attempt) for attempt in entry.attempts]
    shown["tags"] = list(entry.tags)
    return shown


def require_visible(call: Call, entry: LedgerEntry | None, request_id: str) -> LedgerEntry:
    """Return a row the actor may see. Raises RefusedError as if there were no other."""
    if entry is not None:
        scope = Scope(entry.organization_id, entry.team_id, entry.project_id)
        if call.actor.may(_VIEW, scope, entry.principal_id):
            return entry
    raise not_found(f"spend event {request_id[:80]!r}")


@attrs.frozen(kw_only=True)
class Refund:
    """Say what is given back."""

    amount_usd: str | None = None
    """Decimal string; all that is left of the cost where neither amount is given."""
    amount_nano_usd: int | None = None
    """The same in nano-USD; give one of both."""
    reason: str | None = None
    """For the audit."""


def refund_entry(call: Call, entry: LedgerEntry, body: Mapping[str, Any], once: str | None) -> LedgerEntry:
    """Return the row that gives back what a body says of an entry's cost. Raises RefusedError."""
    wanted: Refund = structure(body, Refund)
    scope = Scope(entry.organization_id, entry.team_id, entry.project_id)
    call.actor.require("gatewayUsage:update", scope)
    if wanted.amount_usd is not None and wanted.amount_nano_usd is not None:
        raise bad_field("amount_usd", "give either amount_usd or amount_nano_usd, not both")
    if wanted.reason is not None and len(wanted.reason) > 1000:
        raise bad_field("reason", "has at most 1000 characters")
    amount = entry.cost_nano_usd if wanted.amount_nano_usd is None else wanted.amount_nano_usd
    if wanted.amount_usd is not None:
        try:
            amount = read_usd(wanted.amount_usd)
        except ValueError as error:
            raise bad_field("amount_usd", str(error)) from None
    if entry.adjusts is not None:
        raise RefusedError("conflict", f"{entry.request_id} is a correction itself.")
    if not entry.cost_nano_usd:
        raise RefusedError("conflict", f"{entry.request_id} has cost nothing, so there is nothing to give back.")
    if not 0 < amount <= entry.cost_nano_usd:
        raise bad_field("amount_usd", f"must be over 0 and at most the cost, {write_usd(entry.cost_nano_usd)}")
    return msgspec.structs.replace(
        entry,
        request_id=new_id("adj_") if once is None else f"adj_{once}",
        started_at_ns=call.now_ms * 1_000_000,
        duration_ns=0,
        usage=None,
        cost_nano_usd=-amount,
        cost_source="adjustment",
        status=None,
        outcome="adjustment",
        error=None,
        fallback_count=0,
        attempts=(),
        debits=tuple(msgspec.structs.replace(debit, reserved=0) for debit in entry.debits),
        adjusts=entry.request_id,
    )
