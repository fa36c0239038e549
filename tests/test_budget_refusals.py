"""What clients are told of budgets."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.governance import BudgetRule, Period, read_time, read_usd
from penstock.governance.objects import Budget
from penstock_plugins.budgets.refusals import budget_exceeded, end_user_required, warning
from penstock_plugins.budgets.rules import Applied

NOVEMBER = Period(int(read_time("2026-11-01T00:00:00Z")), int(read_time("2026-12-01T00:00:00Z")))
LIMIT = read_usd("10")


def applied(**members: Any) -> Applied:
    given = {"scope": "team", "scope_id": "team_1", "window": "month", "limit_nano_usd": LIMIT, **members}
    return Applied.of(BudgetRule("bud_1", Budget(**given), None, 0.0))


def test_refusal_says_which_budget_what_is_spent_and_when_it_resets() -> None:
    error = budget_exceeded(applied(name="cap"), NOVEMBER, settled=LIMIT + 5, used=LIMIT + 5, amount=1)
    assert (error.code, error.status, error.should_retry) == ("budget_exceeded", 402, False)
    assert error.meta == {
        "budget_id": "bud_1",
        "budget_scope": "team",
        "budget_window": "month",
        "limit_usd": "10",
        "spent_usd": "10.000000005",
        "resets_at": "2026-12-01T00:00:00Z",
    }
    assert "'cap' (bud_1) of this team" in error.message
    assert "10.000000005 of 10 USD" in error.message
    assert "resets at 2026-12-01T00:00:00Z" in error.message


def test_refusal_of_a_binding_names_it() -> None:
    error = budget_exceeded(applied(provider="gpc_eu"), NOVEMBER, settled=LIMIT, used=LIMIT, amount=0)
    assert error.meta["budget_provider"] == "gpc_eu"
    assert "gpc_eu" in error.message


def test_budget_that_never_resets_says_so() -> None:
    error = budget_exceeded(applied(window="total"), Period(0, None), settled=LIMIT, used=LIMIT, amount=0)
    assert error.meta["resets_at"] is None
    assert "does not reset by itself" in error.message


def test_money_held_by_others_is_told_apart_from_money_spent() -> None:
    half = LIMIT // 2
    error = budget_exceeded(applied(), NOVEMBER, settled=half, used=LIMIT, amount=half)
    assert error.meta["spent_usd"] == "5"
    assert "requests under way hold 5 and this one may cost 5" in error.message
    alone = budget_exceeded(applied(), NOVEMBER, settled=half, used=half, amount=LIMIT)
    assert "5 of 10 USD are spent and it may cost 10" in alone.message


def test_missing_end_user_is_told_where_to_go() -> None:
    error = end_user_required(applied(scope="end_user"), b"LangWatch")
    assert (error.code, error.status) == ("end_user_required", 400)
    assert "X-LangWatch-End-User-Id" in error.message


@pytest.mark.parametrize(
    ("settled", "value"),
    [(LIMIT * 8 // 10 - 1, None), (LIMIT * 8 // 10, b"team:80"), (LIMIT - 1, b"team:99"), (LIMIT * 3, b"team:300")],
)
def test_warning_begins_at_80_percent(settled: int, value: bytes | None) -> None:
    assert warning([(applied(), settled)]) == value


def test_warning_names_every_budget_and_the_binding_of_a_filtered_one() -> None:
    mine = [(applied(), LIMIT), (applied(on_breach="warn"), 0), (applied(scope="project", provider="gpc_eu"), LIMIT)]
    assert warning(mine) == b"team:100,project/gpc_eu:100"


def test_limit_of_nothing_is_always_reached() -> None:
    assert warning([(applied(limit_nano_usd=0), 0)]) == b"team:100"


def test_budget_that_only_warns_reserves_no_more_than_is_likely() -> None:
    assert applied(reserve="max", on_breach="warn").mode == "expected"
    assert applied(reserve="max").mode == "max"
