"""Let an exchange in: reserve what it may cost from every budget that applies, all of them or none.

One admission follows its exchange from pre_request to its settlement. Most are decided from memory without awaiting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

import attrs

from penstock import Candidate, Exchange, Principal, RequestError, Services, header_stem
from penstock.governance import (
    Claim,
    Counters,
    Debit,
    Exceeded,
    Price,
    PriceTable,
    Reservation,
    StoreUnavailableError,
)
from penstock_plugins.budgets.end_users import end_user_of
from penstock_plugins.budgets.estimates import Averages, Bounds, input_cost, likely_input
from penstock_plugins.budgets.refusals import budget_exceeded, end_user_required, warning, without_price
from penstock_plugins.budgets.rules import Applied, Rules


@attrs.define(eq=False)
class Held:
    """What is reserved from one budget."""

    applied: Applied
    counter: str
    period: int
    """Its start."""
    amount: int
    """nano-USD."""


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
    applied: tuple[Applied, ...] = ()
    held: list[Held] = attrs.Factory(list)
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


@attrs.define(eq=False)
class Admitter:
    """Admit exchanges; one for the plugin."""

    services: Services
    rules: Rules
    counters: Counters
    table: PriceTable
    averages: Averages
    assumed_output: int
    """Tokens, for models whose limit is not known."""
    unseen_input: int
    """Tokens that references in a request may stand for."""
    end_user_header: bytes = attrs.field(init=False)
    """In lower case."""
    _stem: bytes = attrs.field(init=False)
    _header: bytes = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._stem = header_stem(self.services.namespace)
        self.end_user_header = b"x-%b-end-user-id" % self._stem.lower()
        self._header = b"X-%b-Budget-Warning" % self._stem

    def admit(self, exchange: Exchange, admission: Admission) -> Awaitable[None] | None:
        """Reserve what an exchange may cost, for all of its candidates. Raises RequestError.

        A budget of one binding that has no room excludes the binding, and refuses where no other is left.
        """
        admission.applied = self.rules.of(admission.principal)
        admission.end_user = end_user_of(exchange, self.end_user_header)
        if self.table.unknown == "refuse":
            self._exclude_without_price(exchange, admission)
        return self._reserve(exchange, admission, admission.applied)

    def cover(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> Awaitable[None] | None:
        """Reserve what a candidate takes that was not among those admitted. Raises RequestError."""
        admission.candidates.append(candidate)
        if self.table.unknown == "refuse" and admission.price_of(candidate, self.table) is None:
            admission.candidates.remove(candidate)
            raise without_price(candidate)
        return self._reserve(exchange, admission, admission.applied)

    # --- prices ---------------------------------------------------------------------------------------------------

    def _exclude_without_price(self, exchange: Exchange, admission: Admission) -> None:
        for candidate in [*admission.candidates]:
            if admission.price_of(candidate, self.table) is None:
                self._exclude(exchange, admission, candidate.binding.id, without_price(candidate))

    def _exclude(self, exchange: Exchange, admission: Admission, binding_id: str, refusal: RequestError) -> None:
        """Keep the exchange from a binding. Raises why the first may not be asked where no other is left."""
        exchange.exclude(binding_id, refusal)
        left = [candidate for candidate in admission.candidates if candidate.binding.id != binding_id]
        admission.candidates = left
        if not left:
            self._warn(exchange, admission)
            first = exchange.chain[0].binding.id if exchange.chain else binding_id
            raise (exchange.excluded or {}).get(first, refusal)

    # --- reserving ------------------------------------------------------------------------------------------------

    def _reserve(self, exchange: Exchange, admission: Admission, applied: Sequence[Applied]) -> Awaitable[None] | None:
        while True:
            wanted = self._wanted(exchange, admission, applied)
            if not wanted:
                break
            outcome = self.counters.reserve([claim for _, claim in wanted])
            if isinstance(outcome, Awaitable):
                return self._await_reserved(exchange, admission, wanted, outcome)
            if self._take(exchange, admission, wanted, outcome):
                break
        self._warn(exchange, admission)
        return None

    async def _await_reserved(
        self,
        exchange: Exchange,
        admission: Admission,
        wanted: list[tuple[Applied, Claim]],
        pending: Awaitable[Reservation | Exceeded],
    ) -> None:
        if self._take(exchange, admission, wanted, await _answered(pending)):
            self._warn(exchange, admission)
            return
        again = self._reserve(exchange, admission, admission.applied)
        if again is not None:
            await again

    def _take(
        self,
        exchange: Exchange,
        admission: Admission,
        wanted: list[tuple[Applied, Claim]],
        outcome: Reservation | Exceeded,
    ) -> bool:
        """Keep what was reserved; of a budget without room exclude the binding and return False, or refuse."""
        if not isinstance(outcome, Exceeded):
            admission.reservations.append(outcome)
            admission.held += [Held(applied, claim.counter, claim.period, claim.amount) for applied, claim in wanted]
            return True
        claim = outcome.claim
        applied = next(applied for applied, asked in wanted if asked.counter == claim.counter)
        refusal = budget_exceeded(
            applied, applied.period(admission.now), settled=outcome.settled, used=outcome.used, amount=claim.amount
        )
        if applied.binding_id is None:
            self._warn(exchange, admission)
            raise refusal
        self._exclude(exchange, admission, applied.binding_id, refusal)
        return False

    def _wanted(
        self, exchange: Exchange, admission: Admission, applied: Sequence[Applied]
    ) -> list[tuple[Applied, Claim]]:
        """Return what is still to be claimed. Raises RequestError ``end_user_required``."""
        wanted = []
        now, end_user, held = admission.now, admission.end_user, admission.held
        for one in applied:
            candidates: Sequence[Candidate] = admission.candidates
            if one.binding_id is not None:
                candidates = [candidate for candidate in candidates if candidate.binding.id == one.binding_id]
                if not candidates:
                    continue
            if one.rule.is_per_end_user and end_user is None:
                self._miss_end_user(exchange, admission, one)
                continue
            counter = one.counter(end_user)
            amount = self._amount(exchange, admission, one, candidates)
            if held:
                before = [kept.amount for kept in held if kept.counter == counter]
                amount -= sum(before)
                if before and amount <= 0:
                    continue
            limit = one.limit if one.is_blocking else None
            wanted.append((one, Claim(counter, one.period(now).start, amount, limit, True, one.is_blocking)))
        return wanted

    def _miss_end_user(self, exchange: Exchange, admission: Admission, applied: Applied) -> None:
        """Refuse what cannot be counted, unless the budget never refuses."""
        if not applied.is_blocking:
            return
        refusal = end_user_required(applied, self._stem)
        if applied.binding_id is None:
            raise refusal
        self._exclude(exchange, admission, applied.binding_id, refusal)

    def _amount(
        self, exchange: Exchange, admission: Admission, applied: Applied, candidates: Sequence[Candidate]
    ) -> int:
        """Return what to reserve of a budget, in the way it says; nano-USD."""
        if applied.mode == "none" or not candidates:
            return 0
        if applied.mode == "max":
            return max([self.most(exchange, admission, candidate) for candidate in candidates])
        return self.likely(exchange, admission, candidates[0])

    def likely(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> int:
        """Return what an exchange is likely to cost with a candidate, nano-USD."""
        known = admission.likely.get(candidate)
        if known is not None:
            return known
        price = admission.price_of(candidate, self.table)
        likely = 0
        if price is not None:
            if admission.likely_tokens < 0:
                admission.likely_tokens = likely_input(exchange)
            likely = max(
                input_cost(price, admission.likely_tokens),
                self.averages.of(admission.principal.virtual_key_id, candidate.model),
            )
        admission.likely[candidate] = likely
        return likely

    def most(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> int:
        """Return the most an exchange can cost with a candidate, nano-USD."""
        price = admission.price_of(candidate, self.table)
        if price is None:
            return 0
        if admission.bounds is None:
            admission.bounds = Bounds(exchange, self.unseen_input)
        return admission.bounds.cost(price, self.assumed_output)

    # --- warning --------------------------------------------------------------------------------------------------

    def _warn(self, exchange: Exchange, admission: Admission) -> None:
        """Put the warning header on the answer, whatever it will be."""
        applied = admission.applied
        if not applied:
            return
        used, now, end_user = self.counters.used, admission.now, admission.end_user
        spent = [
            (one, used(one.counter(end_user), one.period(now).start))
            for one in applied
            if (one.binding_id is None or _may_be_asked(exchange, admission, one.binding_id))
            and (end_user is not None or not one.rule.is_per_end_user)
        ]
        value = warning(spent)
        if value is not None:
            others = [field for field in exchange.reply_fields if field[0] != self._header]
            exchange.reply_fields = [*others, (self._header, value)]


async def _answered(pending: Awaitable[Reservation | Exceeded]) -> Reservation | Exceeded:
    """Wait for an answer; without one the request is refused: a budget that cannot be kept lets nobody in."""
    try:
        return await pending
    except StoreUnavailableError:
        message = "What is left of a budget cannot be found out just now; try again shortly."
        raise RequestError("overloaded", message, fields=((b"retry-after", b"1"),)) from None


def _may_be_asked(exchange: Exchange, admission: Admission, binding_id: str) -> bool:
    """Tell whether a binding is, or was before its exclusion, a candidate."""
    candidates = exchange.chain or admission.candidates
    return any(candidate.binding.id == binding_id for candidate in candidates)
