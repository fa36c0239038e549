"""What a client is told of budgets: refusals that name the budget, and the header that warns of one."""

from __future__ import annotations

from collections.abc import Iterable

from penstock import Candidate, RequestError
from penstock.governance import Period, write_time, write_usd
from penstock_plugins.budgets.rules import WARN_FROM, Applied

_SPOKEN = {"virtual_key": "virtual key", "end_user": "end user"}


def budget_exceeded(applied: Applied, period: Period, *, settled: int, used: int, amount: int) -> RequestError:
    """Return the refusal of a budget; ``used`` is settled and reserved by others, all in nano-USD."""
    rule, budget = applied.rule, applied.rule.budget
    limit = applied.limit
    named = f"{budget.name!r} ({rule.id})" if budget.name else rule.id
    resets_at = None if period.end is None else write_time(period.end)
    meta = {
        "budget_id": rule.id,
        "budget_scope": budget.scope,
        "budget_window": budget.window,
        "limit_usd": write_usd(limit),
        "spent_usd": write_usd(settled),
        "resets_at": resets_at,
    }
    where = ""
    if applied.binding_id is not None:
        meta["budget_provider"] = applied.binding_id
        where = f" for the provider binding {applied.binding_id}"
    what = f"The budget {named} of this {_SPOKEN.get(budget.scope, budget.scope)}{where}"
    spent = f"{write_usd(settled)} of {write_usd(limit)} USD are spent"
    if settled >= limit:
        how = f"is used up: {spent}"
    elif used > settled:
        pending = f"requests under way hold {write_usd(used - settled)}"
        how = f"has no room for this request: {spent}, {pending} and this one may cost {write_usd(amount)}"
    else:
        how = f"has no room for this request: {spent} and it may cost {write_usd(amount)}"
    when = "it does not reset by itself" if resets_at is None else f"it resets at {resets_at}"
    return RequestError(
        "budget_exceeded", f"{what} {how}; {when}. Wait until then or ask for a higher limit.", meta=meta
    )


def end_user_required(applied: Applied, stem: bytes) -> RequestError:
    """Return the refusal of a request that does not say for whom it is."""
    return RequestError(
        "end_user_required",
        f"The budget {applied.rule.budget.name or applied.rule.id} is per end user, and the request names none; send "
        f"X-{stem.decode()}-End-User-Id, or the member user, safety_identifier or metadata.user_id.",
        meta={"budget_id": applied.rule.id},
    )


def without_price(candidate: Candidate) -> RequestError:
    """Return the refusal of a model whose cost nobody knows, where the policy is to refuse those."""
    model = (candidate.model or "")[:200]
    return RequestError(
        "model_not_recognized",
        f"The model {model!r} of provider type {candidate.binding.type!r} has no price here, and what has none is "
        "refused; ask the operator to set one.",
        param="model",
        meta={"model": model, "provider": candidate.binding.type},
    )


def warning(spent: Iterable[tuple[Applied, int]]) -> bytes | None:
    """Return the value of the warning header for budgets and what is settled of each; None below 80 % of all."""
    words = []
    for applied, settled in spent:
        limit = applied.limit
        if settled * 100 >= limit * WARN_FROM:
            scope = applied.rule.budget.scope
            where = scope if applied.binding_id is None else f"{scope}/{applied.binding_id}"
            words.append(f"{where}:{settled * 100 // limit if limit else 100}")
    return ",".join(words).encode() if words else None
