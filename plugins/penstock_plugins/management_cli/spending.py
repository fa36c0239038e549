"""``usage``, ``spend-events``, ``prices``, ``ledger``: what was used, and what it cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import click

from penstock_plugins.management_cli.client import path_of
from penstock_plugins.management_cli.fields import Field, body_of, parameters, usd
from penstock_plugins.management_cli.output import Column, cell, columns, note
from penstock_plugins.management_cli.resources import (
    Resource,
    idempotency_option,
    list_parameters,
    query_of,
    show_pages,
)
from penstock_plugins.management_cli.terminal import ApiCommand, Terminal, command, confirm, yes_option

_GROUPS = ["key", "principal", "end_user", "model", "provider", "project", "team", "tag"]
_TIMES = (
    Field("--since", "since", "RFC 3339, such as 2026-11-01T00:00:00Z."),
    Field("--until", "until", "RFC 3339; not included."),
)
_WHERE = (
    Field("--organization", "organization_id", "Only of this one."),
    Field("--team", "team_id", "Only of this one."),
    Field("--project", "project_id", "Only of this one."),
    Field("--virtual-key", "virtual_key_id", "Only of this one."),
    Field("--principal", "principal_id", "Only of this one."),
    Field("--end-user", "end_user", "Only of this one."),
    Field("--provider", "provider", "Only of this type of provider."),
    Field("--model", "model", "Only of this model."),
    Field("--tag", "tag", "Only of keys with this tag."),
)
_USAGE = (
    *_TIMES,
    Field("--group-by", "group_by", "Up to three.", type=click.Choice(_GROUPS), is_many=True, read=",".join),
    Field("--bucket", "bucket", type=click.Choice(["hour", "day", "month"])),
    Field("--timezone", "timezone", "IANA name, for the buckets.  [default: UTC]"),
    *_WHERE,
)


def _grouped(row: Mapping[str, Any]) -> str:
    found = row.get("group")
    return ", ".join(f"{name}={cell(value) or '-'}" for name, value in found.items()) if found else ""


_USAGE_COLUMNS = (
    Column("bucket", "bucket_start"),
    Column("group", "", _grouped, is_whole=True),
    Column("requests", "requests"),
    Column("errors", "errors"),
    Column("input", "usage.input"),
    Column("cache read", "usage.cache_read"),
    Column("output", "usage.output"),
    Column("cost_usd", "cost_usd"),
    Column("unpriced", "unpriced"),
    Column("estimated", "estimated"),
)


@click.command(
    "usage", cls=ApiCommand, params=[field.parameter("list") for field in _USAGE], help="Sum up requests, tokens, cost."
)
@click.pass_obj
def usage(terminal: Terminal, /, **values: Any) -> None:
    """Print sums over the ledger, of all pages."""
    rows = [row for page in terminal.api.pages(path_of("usage"), query_of(_USAGE, values)) for row in page["data"]]
    terminal.show_page({"data": rows, "next_cursor": None}, _USAGE_COLUMNS, noun="usage")


# --- the ledger ---------------------------------------------------------------------------------------------

_EVENT_FILTERS = (*_TIMES, *_WHERE)
_EVENT_COLUMNS = columns(
    "request_id", "started_at", "virtual_key_id", "provider", "model_served", "outcome", "status", "cost_usd"
)
spend_events = click.Group("spend-events", help="The ledger: one row per exchange.")


@command(spend_events, "list", list_parameters(_EVENT_FILTERS), about="List rows, newest first.")
def list_events(terminal: Terminal, **values: Any) -> None:
    """Print rows."""
    show_pages(terminal, path_of("spend-events"), _EVENT_COLUMNS, _EVENT_FILTERS, values, noun="spend-events")


@command(spend_events, "get", [click.Argument(["request_id"])], about="Show one row.")
def get_event(terminal: Terminal, request_id: str) -> None:
    """Print one row."""
    terminal.show(terminal.api.request("GET", path_of("spend-events", request_id)))


_REFUND = (
    Field("--amount", "amount_usd", "USD; all that is left, if not given.", read=usd),
    Field("--reason", "reason", "For the audit log."),
)


@command(
    spend_events,
    "refund",
    [click.Argument(["request_id"]), *parameters(_REFUND, "refund"), yes_option(), idempotency_option()],
    about="Give back what an exchange cost, by a further row; budgets count it.",
)
def refund(terminal: Terminal, request_id: str, *, is_sure: bool, **values: Any) -> None:
    """Append a correction."""
    body = body_of(_REFUND, values)
    amount = f"{body['amount_usd']} USD" if "amount_usd" in body else "all that is left"
    confirm(f"{amount} of what {request_id} cost will be given back", is_sure=is_sure)
    place = path_of("spend-events", request_id, "refund")
    terminal.show(terminal.api.request("POST", place, body, idempotency_key=values["idempotency_key"]))


ledger = click.Group("ledger", help="Prove what was spent.")


@command(ledger, "verify", about="Derive all totals anew from the rows; exit status 1 if any differs.")
def verify(terminal: Terminal) -> None:
    """Print what differs."""
    answer = terminal.api.request("POST", path_of("ledger", "verify"), {})
    found = answer.content.get("discrepancies") or answer.content.get("data") or []
    if terminal.form == "json":
        terminal.show(answer)
    elif found:
        terminal.show_page({"data": found}, columns("what", "period", "recorded", "derived"), noun="discrepancies")
    else:
        note("every total agrees with the rows it is derived from")
    if found:
        note(f"penstock: {len(found)} totals differ from the rows they are derived from")
        sys.exit(1)


# --- prices -------------------------------------------------------------------------------------------------

_PRICE_FILTERS = (
    Field("--provider", "provider", "Of this type of provider."),
    Field("--model", "model", "Of this model."),
)
_OVERRIDES = Resource(
    name="prices",
    path="prices",
    noun="price",
    about="What models cost.",
    columns=(
        *columns("id", "provider", "model", "effective_at"),
        Column("input", "rates_usd.input"),
        Column("cache read", "rates_usd.cache_read"),
        Column("output", "rates_usd.output"),
        Column("request", "rates_usd.request"),
        *columns("version"),
    ),
    filters=_PRICE_FILTERS,
)
prices = click.Group("prices", help=_OVERRIDES.about)


_SET = (
    Field("--provider", "provider", "Type of provider, such as openai.", is_required=True),
    Field("--model", "model", "Model, or glob over models.", is_required=True),
    Field("--input", "rates_usd.input", "USD per million tokens.", is_required=True, read=usd),
    Field("--output", "rates_usd.output", "USD per million tokens.", is_required=True, read=usd),
    Field("--cache-read", "rates_usd.cache_read", "USD per million tokens.", read=usd),
    Field("--cache-write-5m", "rates_usd.cache_write_5m", "USD per million tokens.", read=usd),
    Field("--cache-write-1h", "rates_usd.cache_write_1h", "USD per million tokens.", read=usd),
    Field("--request", "rates_usd.request", "USD per request.", read=usd),
    Field("--effective-at", "effective_at", "RFC 3339.  [default: now]"),
    Field("--external-id", "external_id", "Your own id for it."),
)


@command(
    prices,
    "list",
    list_parameters(_PRICE_FILTERS),
    about="List your prices, or with --provider and --model the one in force; USD per million tokens.",
)
def list_prices(terminal: Terminal, **values: Any) -> None:
    """Print prices."""
    show_pages(terminal, _OVERRIDES.place, _OVERRIDES.columns, _PRICE_FILTERS, values, noun="prices")


@command(prices, "set", [*parameters(_SET, "create"), idempotency_option()], about="Put a price over the table's.")
def set_price(terminal: Terminal, **values: Any) -> None:
    """Make an override."""
    body = body_of(_SET, values)
    if "effective_at" not in body:
        from datetime import UTC, datetime  # noqa: PLC0415

        body["effective_at"] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    key = values["idempotency_key"]
    terminal.show(terminal.api.request("POST", path_of("prices", "overrides"), body, idempotency_key=key))


# --- audit --------------------------------------------------------------------------------------------------

_AUDIT_FILTERS = (
    Field("--actor", "actor", "Id of the token or user."),
    Field("--action", "action", "Such as virtualKeys:create."),
    Field("--kind", "kind", "Such as virtual_key."),
    Field("--object", "object_id", "Id of what was changed."),
)
_AUDIT_COLUMNS = columns("id", "at", "actor", "action", "object_id", "source", "request_id")
audit = click.Group("audit", help="Who changed what.")


@command(audit, "list", list_parameters(_AUDIT_FILTERS), about="List entries, newest first.")
def list_audit(terminal: Terminal, **values: Any) -> None:
    """Print entries."""
    show_pages(terminal, path_of("audit"), _AUDIT_COLUMNS, _AUDIT_FILTERS, values, noun="audit entries")


@command(
    audit,
    "export",
    [field.parameter("list") for field in _AUDIT_FILTERS],
    about="Print all entries, newest first, one JSON object per line.",
)
def export_audit(terminal: Terminal, **values: Any) -> None:
    """Print every entry as it comes."""
    for page in terminal.api.pages(path_of("audit"), {"limit": 200, **query_of(_AUDIT_FILTERS, values)}):
        for entry in page["data"]:
            click.echo(json.dumps(entry, ensure_ascii=False, separators=(",", ":")))
