"""What became of an exchange, as the ledger enters it: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from penstock import Attempt, Exchange, Principal, RequestError, Usage, editable_body
from penstock.governance import NANO_PER_USD, CostSource, Debit, LedgerEntry, Outcome, Price
from penstock_plugins.budgets import background
from penstock_plugins.budgets.admission import Admission

_PROVIDERS_FAULT = frozenset({"provider_error", "upstream_timeout", "circuit_open"})
_UNCOUNTED = "guardrail_blocked"
"""What was blocked has cost the operator something, and is no use of anybody's budget."""


@attrs.frozen
class Cost:
    """Hold what an exchange cost, and how that is known."""

    nano_usd: int
    source: CostSource
    usage: Usage | None
    version: str | None = None


NOTHING = Cost(0, "none", None)
_MOST = 10_000_000 * NANO_PER_USD
"""No exchange costs more: what is beyond is a fault, and memory must agree with the ledger, which enters no more."""


def cost_of(exchange: Exchange, usage: Usage | None, price: Price | None, likely_tokens: int) -> Cost:
    """Return the cost of an exchange that was asked of a provider, at a price; None is a model without one.

    ``likely_tokens``: input taken for used where the client left before anything could be counted.
    """
    if usage is None and _was_left_unanswered(exchange):
        usage = Usage(input=likely_tokens, source="estimated")
    if usage is None:
        if exchange.status is None or exchange.status >= 400 or exchange.error is not None:
            return NOTHING
        # An answer that nothing can be counted of: by the request, or visibly without a price.
        if price is None or not price.rates.request:
            return Cost(0, "unpriced", None, None if price is None else price.version)
        return Cost(min(price.rates.request, _MOST), "priced", None, price.version)
    if price is None:
        return Cost(0, "unpriced", usage)
    source: CostSource = "priced" if usage.source == "provider" else "estimated"
    return Cost(min(price.cost(usage), _MOST), source, usage, price.version)


def goes_on(exchange: Exchange) -> bool:
    """Tell whether a provider may work on after its answer: what it will have used is in no answer to this request."""
    request, usage, made = exchange.request, exchange.usage, last_made(exchange.attempts)
    if request.endpoint.operation != "responses" or (usage is not None and usage.source == "provider"):
        return False
    # What the client was told does not matter: it may have left, or be refused what the provider has begun.
    if made is None or (made.status or 200) >= 400 or made.reason not in (None, "client_gone"):
        return False
    if exchange.window is not None and background.is_given(exchange.window, is_stream=exchange.is_stream):
        return True
    return background.is_asked(editable_body(request))


def _was_left_unanswered(exchange: Exchange) -> bool:
    """Tell whether the client was gone while a provider was at work on it."""
    attempts = exchange.attempts
    return bool(attempts) and not attempts[-1].is_skipped and attempts[-1].reason == "client_gone"


def outcome_of(exchange: Exchange) -> Outcome:
    """Say how an exchange ended."""
    error, end = exchange.error, exchange.stream_end
    if error is not None:
        return "provider_error" if error.code in _PROVIDERS_FAULT and exchange.attempts else "refused"
    if end == "client_gone":
        return "client_gone"
    if end == "upstream_failed":
        return "cut"
    if end == "blocked":
        return "refused"
    if exchange.status is None:
        return "client_gone"
    return "provider_error" if exchange.status >= 400 else "success"


def is_counted(exchange: Exchange) -> bool:
    """Tell whether the cost counts to budgets."""
    return exchange.error is None or exchange.error.code != _UNCOUNTED


def debits_of(admission: Admission, binding_id: str) -> tuple[Debit, ...]:
    """Return which counters an exchange with a binding is charged to."""
    known = admission.debits
    if known is not None and known[0] == binding_id:
        return known[1]
    reserved: dict[str, Debit] = {}
    for applied, claim in admission.held:
        if applied.binding_id is None or applied.binding_id == binding_id:
            counter, amount = claim.counter, claim.amount
            before = reserved.get(counter)
            if before is not None:
                amount += before.reserved
            reserved[counter] = Debit(counter=counter, period=claim.period, reserved=amount)
    debits = tuple(reserved.values())
    admission.debits = (binding_id, debits)
    return debits


def entry_of(
    exchange: Exchange,
    principal: Principal,
    admission: Admission | None,
    cost: Cost,
    *,
    made: Attempt | None,
    outcome: Outcome,
    debits: tuple[Debit, ...],
    started_at_ns: int,
) -> LedgerEntry:
    """Return the row of the ledger; ``made`` is the last attempt that was no skip."""
    attempts = exchange.attempts
    error = exchange.error
    return LedgerEntry(
        request_id=exchange.request_id.decode(),
        started_at_ns=started_at_ns,
        duration_ns=exchange.ended_ns - exchange.started_ns,
        organization_id=principal.organization_id,
        team_id=principal.team_id,
        project_id=principal.project_id,
        virtual_key_id=principal.virtual_key_id,
        principal_id=principal.principal_id,
        end_user=None if admission is None else admission.end_user,
        binding_id=None if made is None else made.binding_id,
        provider=None if made is None else made.provider,
        model_asked=model_asked(exchange) if admission is None else admission.model_asked,
        model_served=None if made is None else made.model,
        usage=cost.usage,
        cost_nano_usd=cost.nano_usd,
        cost_source=cost.source,
        price_version=cost.version,
        status=exchange.status,
        outcome=outcome,
        error=error.code if error is not None else None if made is None else made.reason,
        is_stream=exchange.is_stream,
        fallback_count=exchange.fallback_count,
        attempts=tuple([_brief(attempt) for attempt in attempts]),
        debits=debits,
        tags=principal.tags,
    )


def last_made(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the last attempt that was no skip: whoever answered, or failed last."""
    for attempt in reversed(attempts):
        if not attempt.is_skipped:
            return attempt
    return None


def _brief(attempt: Attempt) -> Mapping[str, object]:
    return {
        "binding": attempt.binding_id,
        "model": attempt.model,
        "reason": attempt.outcome,
        "status": attempt.status,
    }


def model_asked(exchange: Exchange) -> str | None:
    """Return the model a request names, None where it cannot be read."""
    try:
        return exchange.peek.model
    except RequestError:
        return None
