"""Operations that ask the ledger, the prices or a provider beside the store."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from penstock import ConfigurationError
from penstock.governance import LedgerEntry, Price, Scope, UsageQuery, write_usd
from penstock_plugins.management import budgets, idempotency, objects, spend, trails
from penstock_plugins.management.bindings import PROVIDER_BINDINGS, opened
from penstock_plugins.management.calls import Call
from penstock_plugins.management.catalogue import PRICE_OVERRIDES
from penstock_plugins.management.cursors import ListPlace, read_cursor, write_cursor
from penstock_plugins.management.documents import refuse_unknown
from penstock_plugins.management.faults import RefusedError
from penstock_plugins.management.keys import VIRTUAL_KEYS
from penstock_plugins.management.probes import PROBE_ID, Probe, probe
from penstock_plugins.management.resources import reach_of
from penstock_plugins.management.rest.asks import Answer, Ask
from penstock_plugins.management.rest.crud import page
from penstock_plugins.management.rest.desk import Desk, Written
from penstock_plugins.management.rest.routes import LIST_QUERY, Route
from penstock_plugins.management.times import write_time

_TEXT = {"type": "string"}
_TIMES = {"since": {"type": "string"}, "until": {"type": "string"}}
_NARROW = {**_TIMES, **dict.fromkeys(spend.WHERE, _TEXT)}


async def list_spend_events(desk: Desk, ask: Ask) -> Answer:
    """Return rows of the ledger, newest first."""
    filters = {name: value for name, value in ask.query.items() if name in _NARROW}

    def plan(call: Call) -> tuple[dict[str, str], tuple[int, int], str | None, ListPlace]:
        place = ListPlace(call.actor.id, ask.path, filters)
        cursor = ask.query.get("cursor")
        after = None if cursor is None else read_cursor(desk.vault, place, cursor)
        return spend.visible_where(call, ask.query), spend.interval(call, ask.query), after, place

    where, (since, until), after, place = await desk.read(ask, plan, SPEND_EVENTS)
    limit = ask.limit
    rows = await desk.ledger.entries(where, since_ns=since, until_ns=until, after=after, limit=limit + 1)
    cursor = write_cursor(desk.vault, place, rows[limit - 1].request_id) if len(rows) > limit else None
    return Answer({"data": [spend.show_entry(row) for row in rows[:limit]], "next_cursor": cursor})


async def _entry(desk: Desk, ask: Ask, route: Route) -> LedgerEntry:
    request_id = ask.parts["request_id"]
    await desk.admit(ask, route)
    entry = await desk.ledger.entry(request_id)
    return await desk.read(ask, lambda call: spend.require_visible(call, entry, request_id), route)


async def get_spend_event(desk: Desk, ask: Ask) -> Answer:
    """Return one row of the ledger."""
    return Answer(spend.show_entry(await _entry(desk, ask, SPEND_EVENT)))


async def refund(desk: Desk, ask: Ask) -> Written:
    """Append a correction to the ledger, then say so in the audit.

    The ledger is not written in the store's transaction. A repetition with the same ``Idempotency-Key`` has the same
    id, which the ledger enters once, so that what broke off between the two is made good by asking again. Another body
    makes another id: the key is free again after a day, and its correction is there for ever.
    """
    entry = await _entry(desk, ask, REFUND)
    left = await desk.ledger.left(entry.request_id)
    body = dict(ask.body)
    if body.get("amount_usd") is None and body.get("amount_nano_usd") is None:
        body["amount_nano_usd"] = left or entry.cost_nano_usd

    def plan(call: Call) -> tuple[LedgerEntry, idempotency.Once | None, tuple[int, int | None, bytes] | None]:
        once = None
        name = None
        if ask.once is not None:
            once = idempotency.once_of(desk.vault, ask.once, ask.method, ask.path, ask.raw)
            name = hashlib.sha256(f"{call.actor.id}:{ask.once}:".encode() + once.fingerprint).hexdigest()[:30]
        kept = None if once is None else idempotency.recall(call, once)
        return spend.refund_entry(call, entry, body, name), once, kept

    correction, once, kept = await desk.read(ask, plan, REFUND)
    entered = await desk.ledger.entry(correction.request_id) if once else None
    if entered is not None:
        correction = _repeated(entered, correction, ask)
    elif kept is None:
        await _give_back(desk, entry, correction, left)

    def note(call: Call, ask: Ask) -> Answer:
        shown = spend.show_entry(correction)
        scope = Scope(entry.organization_id, entry.team_id, entry.project_id)
        after = {"request_id": correction.request_id, "adjusts": entry.request_id, "reason": ask.body.get("reason"),
                 "cost_nano_usd": correction.cost_nano_usd}  # fmt: skip
        call.audit("gatewayUsage:update", ("spend_event", entry.request_id, scope), before=None, after=after)
        return Answer(shown, 201)

    return await desk.write(ask, note, REFUND)


def _repeated(entered: LedgerEntry, correction: LedgerEntry, ask: Ask) -> LedgerEntry:
    """Return what is entered for what is asked again. Raises RefusedError where it is something else."""
    is_named = any(ask.body.get(name) is not None for name in ("amount_usd", "amount_nano_usd"))
    wanted = correction.cost_nano_usd if is_named else entered.cost_nano_usd  # else it was what was left at the time
    if (entered.adjusts, entered.cost_nano_usd) != (correction.adjusts, wanted):
        raise RefusedError("conflict", f"{entered.request_id} is entered already, and is another correction.")
    return entered


async def _give_back(desk: Desk, entry: LedgerEntry, correction: LedgerEntry, left: int) -> None:
    """Append a correction. Raises RefusedError for one of more than is left of a cost."""
    try:
        if -correction.cost_nano_usd <= left:
            await desk.ledger.adjust(correction)
            return
    except LookupError:
        raise RefusedError("not_found", f"There is no spend event {entry.request_id} here.") from None
    except ValueError:  # another was given back meanwhile
        left = await desk.ledger.left(entry.request_id)
    cost = f"{entry.request_id} has cost {write_usd(entry.cost_nano_usd)} USD"
    if not left:
        raise RefusedError("conflict", f"{cost}, and all of it is given back already.")
    message = f"amount_usd: {cost}, of which {write_usd(left)} is left to give back"
    raise RefusedError("conflict", message, meta={"field": "amount_usd", "left_nano_usd": left})


async def usage(desk: Desk, ask: Ask) -> Answer:
    """Return sums over the ledger, in the order of buckets and groups."""
    filters = {name: value for name, value in ask.query.items() if name not in LIST_QUERY}

    def plan(call: Call) -> tuple[UsageQuery, ListPlace]:
        place = ListPlace(call.actor.id, ask.path, filters)
        cursor = ask.query.get("cursor")
        after = None if cursor is None else read_cursor(desk.vault, place, cursor)
        return spend.usage_query(call, ask.query, after), place

    query, place = await desk.read(ask, plan, USAGE)
    limit = spend.sums_on_page(ask.query)
    rows = await desk.ledger.usage(query)
    cursor = write_cursor(desk.vault, place, spend.place_of(rows[limit - 1])) if len(rows) > limit else None
    return Answer({"data": [spend.show_row(row) for row in rows[:limit]], "next_cursor": cursor})


async def spend_of_key(desk: Desk, ask: Ask) -> Answer:
    """Return what a key has spent since the start of the month, or in the interval given."""

    def plan(call: Call) -> tuple[str, tuple[int, int]]:
        stored = objects.get(call, VIRTUAL_KEYS, ask.name)
        given = "since" in ask.query or "until" in ask.query
        return stored.id, spend.interval(call, ask.query) if given else spend.this_month(call)

    key_id, (since, until) = await desk.read(ask, plan, KEY_SPEND)
    query = UsageQuery(since_ns=since, until_ns=until, where={"virtual_key_id": key_id})
    rows = await desk.ledger.usage(query)
    shown = spend.show_row(rows[0] if rows else spend.empty_row())
    for name in ("bucket_start", "group"):
        del shown[name]
    moments = {"since": write_time(since / 1_000_000), "until": write_time(until / 1_000_000)}
    return Answer({"virtual_key_id": key_id, **moments, **shown})


async def spend_of_budget(desk: Desk, ask: Ask) -> Answer:
    """Return what a budget has spent in its current period."""
    asked = await desk.read(ask, lambda call: budgets.spending(call, ask.name, ask.query.get("subject")), BUDGET_SPEND)
    spent = await desk.ledger.spent([(asked.counter, asked.start)])
    return Answer(budgets.show_spending(asked, spent.get((asked.counter, asked.start), 0)))


async def verify_ledger(desk: Desk, ask: Ask) -> Answer:
    """Derive every total anew and return what differs."""

    def check(call: Call) -> None:
        refuse_unknown(ask.body, ())
        call.actor.require("gatewayUsage:manage", None)

    await desk.read(ask, check, VERIFY)
    found = [attrs.asdict(each) async for each in desk.ledger.verify()]
    return Answer({"ok": not found, "discrepancies": found})


async def test_binding(desk: Desk, ask: Ask) -> Answer:
    """Make one cheap real call with a binding."""

    def plan(call: Call) -> Any:
        refuse_unknown(ask.body, ())
        stored = objects.get(call, PROVIDER_BINDINGS, ask.name)
        call.actor.require("gatewayProviders:manage", reach_of(stored))
        try:
            return opened(call.means, stored, PROBE_ID)
        except (ConfigurationError, ValueError):
            return None

    binding = await desk.read(ask, plan, TEST)
    if binding is None or desk.services.providers.get(binding.type) is None:
        return Answer(attrs.asdict(Probe(False, None, 0, "no enabled plugin can make a request for this binding")))
    return Answer(attrs.asdict(await probe(desk.services, binding)))


async def list_prices(desk: Desk, ask: Ask) -> Answer:
    """Return the overrides, and with provider and model the price in force."""
    query = ask.query

    def overrides(call: Call) -> Answer:
        given = {name: query[name] for name in ("provider",) if name in query}
        limit = ask.limit

        def browse(after: str | None) -> tuple[list[Any], str | None]:
            return objects.browse(call, PRICE_OVERRIDES, given, after=after, limit=limit)

        return page(call, ask, {**given, "model": query.get("model", ""), "at": query.get("at", "")}, browse)

    found = await desk.read(ask, overrides, PRICES)
    at = spend.moment(query, "at", desk.services.clock())
    shown = found.content
    assert shown is not None, "a page has content"
    data = [{**row, "version": row["price_version"]} for row in shown["data"]]
    table = desk.prices
    if "model" in query and "provider" in query and table is not None and "cursor" not in query:
        price = table.find(query["provider"], query["model"], at)
        data = [] if price is None else [_shown_price(query["provider"], query["model"], price)]
        return Answer({"data": data, "next_cursor": None})
    return Answer({"data": data, "next_cursor": shown["next_cursor"]})


def _shown_price(provider: str, model: str, price: Price) -> dict[str, Any]:
    return {
        "id": None,
        "provider": provider,
        "model": model,
        "effective_at": None,
        **_rates(attrs.asdict(price.rates)),
        "tiers": [{"above": tier.above, **_rates(attrs.asdict(tier.rates))} for tier in price.tiers],
        "max_output_tokens": price.max_output_tokens,
        "version": price.version,
    }


def _rates(rates: Mapping[str, int | None]) -> dict[str, Any]:
    in_usd = {name: None if rate is None else write_usd(rate) for name, rate in rates.items()}
    return {"rates": dict(rates), "rates_usd": in_usd}


def _audit(call: Call, ask: Ask) -> Answer:
    filters = {name: ask.query[name] for name in trails.FILTERS if name in ask.query}
    limit = ask.limit
    return page(call, ask, filters, lambda after: trails.browse(call, filters, after=after, limit=limit))


_ROW = {"type": "object", "required": ["request_id", "cost_usd", "cost_nano_usd"]}
_PAGE = {"type": "object", "required": ["data", "next_cursor"],
         "properties": {"data": {"type": "array", "items": {"type": "object"}},
                        "next_cursor": {"type": ["string", "null"]}}}  # fmt: skip
_NOTHING: dict[str, Any] = {"type": "object", "additionalProperties": False}
SPEND_EVENTS = Route(
    method="GET", path="/spend-events", permission="gatewayUsage:view", name="list_spend_events", tag="spend-events",
    summary="List rows of the ledger, newest first; of the last 30 days unless since and until say otherwise.",
    outside=list_spend_events, answer=_PAGE, query={**_NARROW, **LIST_QUERY},
)  # fmt: skip
SPEND_EVENT = Route(
    method="GET", path="/spend-events/{request_id}", permission="gatewayUsage:view", name="get_spend_event",
    tag="spend-events", summary="Read one row of the ledger.", outside=get_spend_event, answer=_ROW,
)  # fmt: skip
REFUND = Route(
    method="POST", path="/spend-events/{request_id}/refund", permission="gatewayUsage:update", tag="spend-events",
    name="refund_spend_event", summary="Give back a part of a cost, or all that is left of it: appends a correction.",
    outside=refund, body=spend.Refund, answer=_ROW, status=201,
)  # fmt: skip
USAGE = Route(
    method="GET", path="/usage", permission="gatewayUsage:view", name="get_usage", tag="usage",
    summary="Sum up the ledger by bucket and up to three groups.", outside=usage, answer=_PAGE,
    query={
        "group_by": _TEXT, "bucket": {"type": "string", "enum": list(spend.BUCKETS)}, "timezone": _TEXT, **_NARROW,
        "limit": {"type": "integer", "minimum": 1, "maximum": spend.MAX_SUMS, "default": spend.MAX_SUMS},
        "cursor": {"type": "string"},
    },
)  # fmt: skip
KEY_SPEND = Route(
    method="GET", path="/virtual-keys/{id}/spend", permission="virtualKeys:view", name="get_virtual_key_spend",
    tag="virtual-keys", summary="Sum up what a key has spent; this month unless since and until say otherwise.",
    outside=spend_of_key, query=_TIMES,
    answer={"type": "object", "required": ["virtual_key_id", "cost_usd", "cost_nano_usd"]},
)  # fmt: skip
BUDGET_SPEND = Route(
    method="GET", path="/budgets/{id}/spend", permission="gatewayBudgets:view", name="get_budget_spend",
    tag="budgets", summary="Say what a budget has spent in its current period, and when the next begins.",
    outside=spend_of_budget, query={"subject": _TEXT},
    answer={"type": "object", "required": ["budget_id", "limit_usd", "spent_usd", "resets_at"]},
)  # fmt: skip
VERIFY = Route(
    method="POST", path="/ledger/verify", permission="gatewayUsage:manage", name="verify_ledger", tag="ledger",
    summary="Derive every total anew from the rows, and report what differs.", outside=verify_ledger, body=_NOTHING,
    answer={"type": "object", "required": ["ok", "discrepancies"]},
)  # fmt: skip
TEST = Route(
    method="POST", path="/provider-bindings/{id}/test", permission="gatewayProviders:manage", body=_NOTHING,
    name="test_provider_binding", tag="provider-bindings", summary="Make one cheap real call, and report.",
    outside=test_binding, answer={"type": "object", "required": ["ok", "status", "latency_ms", "detail"]},
)  # fmt: skip
PRICES = Route(
    method="GET", path="/prices", permission="gatewayProviders:view", name="list_prices", tag="prices",
    summary="Show the price of a provider's model, or list the overrides.", outside=list_prices, answer=_PAGE,
    query={"provider": _TEXT, "model": _TEXT, "at": _TEXT, **LIST_QUERY},
)  # fmt: skip
AUDIT = Route(
    method="GET", path="/audit", permission="audit:view", name="list_audit", tag="audit",
    summary="List who changed what, newest first.", reads=_audit, answer=_PAGE,
    query={**dict.fromkeys(trails.FILTERS, _TEXT), **LIST_QUERY},
)  # fmt: skip
ROUTES: Sequence[Route] = (
    SPEND_EVENTS, SPEND_EVENT, REFUND, USAGE, KEY_SPEND, BUDGET_SPEND, VERIFY, TEST, PRICES, AUDIT,
)  # fmt: skip
