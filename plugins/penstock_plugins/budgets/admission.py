"""What is decided about one exchange, kept from its admission to its settlement."""

from __future__ import annotations

import attrs

from penstock import Candidate, Principal
from penstock.governance import Claim, Debit, Price, PriceTable, Reservation
from penstock_plugins.budgets.estimates import Bounds
from penstock_plugins.budgets.rules import Applied, Plan

NO_BUDGETS = Plan.of(())


@attrs.define(eq=False)
class Admission:
    """What is decided about one exchange before it is asked of a provider, kept until it is settled."""

    principal: Principal
    now: float
    """Of admission; prices and periods are those of this moment."""
    candidates: list[Candidate]
    """Who may be asked, as far as is known."""
    model_asked: str | None
    is_charged: bool = True
    """Counting tokens is not."""
    end_user: str | None = None
    prices: dict[Candidate, Price | None] = attrs.Factory(dict)
    stand_ins: set[Price] = attrs.Factory(set)
    """Those of ``prices`` that stand in for one nobody knows."""
    plan: Plan = NO_BUDGETS
    held: list[tuple[Applied, Claim]] = attrs.Factory(list)
    """What is reserved, and from which budget."""
    reservations: list[Reservation] = attrs.Factory(list)
    likely_tokens: int = -1
    """Input of the request; -1 until it was looked at."""
    likely: dict[Candidate, int] = attrs.Factory(dict)
    """What it is likely to cost with each candidate, nano-USD."""
    debits: tuple[str, tuple[Debit, ...]] | None = None
    """A binding, and what an exchange with it is charged to; kept from the intent for the settlement."""
    bounds: Bounds | None = None
    is_open: bool = False
    """Whether the ledger knows of the intent."""

    def price_of(self, candidate: Candidate, table: PriceTable) -> Price | None:
        """Return the price at admission, or what stands in for it."""
        prices = self.prices
        if candidate in prices:
            return prices[candidate]
        binding = candidate.binding
        price = table.find(binding.type, candidate.model or "", self.now, base_url=binding.base_url)
        if price is None and table.unknown == "estimate":
            price = table.estimate(binding.type)
            if price is not None:
                self.stand_ins.add(price)
        prices[candidate] = price
        return price
