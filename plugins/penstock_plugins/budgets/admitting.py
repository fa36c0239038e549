"""Let an exchange in: reserve what it may cost from every budget that applies, all of them or none.

Most exchanges are admitted from memory, without awaiting.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import cast

import attrs

from penstock import Candidate, Exchange, RequestError, Services, header_stem
from penstock.governance import Claim, Counters, Exceeded, PriceTable, Reservation, StoreUnavailableError
from penstock_plugins.budgets.admission import Admission
from penstock_plugins.budgets.end_users import end_user_of
from penstock_plugins.budgets.estimates import Averages, Bounds, input_cost, likely_input
from penstock_plugins.budgets.refusals import budget_exceeded, end_user_required, warning, without_price
from penstock_plugins.budgets.rules import Applied, Plan, Rules

Wanted = list[tuple[Applied, Claim]]
Answer = Reservation | Exceeded


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
        plan = admission.plan = self.rules.of(admission.principal)
        admission.end_user = end_user_of(exchange, self.end_user_header)
        if self.table.unknown == "refuse":
            self._exclude_without_price(exchange, admission)
        if plan.is_plain and admission.candidates:
            return self._reserve_plain(exchange, admission, plan)
        self._miss_end_users(exchange, admission)
        return self._reserve(exchange, admission)

    def cover(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> Awaitable[None] | None:
        """Reserve what a candidate takes that was not among those admitted. Raises RequestError."""
        if self.table.unknown == "refuse" and admission.price_of(candidate, self.table) is None:
            raise without_price(candidate)
        admission.candidates.append(candidate)
        self._miss_end_users(exchange, admission)
        return self._reserve(exchange, admission)

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

    def _reserve_plain(self, exchange: Exchange, admission: Admission, plan: Plan) -> Awaitable[None] | None:
        """Reserve for budgets that ask the same of every exchange of the key."""
        terms = plan.terms(admission.now)
        if not terms:
            return None
        likely = self.likely(exchange, admission, admission.candidates[0])
        claims = [
            Claim(
                term.counter, term.period, likely if term.is_reserving else 0, term.limit, True, term.limit is not None
            )
            for term in terms
        ]
        outcome = self.counters.reserve(claims)
        wanted = [*zip(plan.applied, claims, strict=True)]
        if hasattr(outcome, "__await__"):  # isinstance of an abstract class takes as long as to reserve
            return self._await_reserved(exchange, admission, wanted, cast("Awaitable[Answer]", outcome))
        self._take(exchange, admission, wanted, outcome)
        used = self.counters.used
        for term in terms:
            if used(term.counter, term.period) >= term.warns_from:
                self._warn(exchange, admission)
                break
        return None

    def _reserve(self, exchange: Exchange, admission: Admission) -> Awaitable[None] | None:
        while True:
            wanted = self._wanted(exchange, admission)
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
        self, exchange: Exchange, admission: Admission, wanted: Wanted, pending: Awaitable[Answer]
    ) -> None:
        if self._take(exchange, admission, wanted, await _answered(pending)):
            self._warn(exchange, admission)
            return
        again = self._reserve(exchange, admission)
        if again is not None:
            await again

    def _take(self, exchange: Exchange, admission: Admission, wanted: Wanted, outcome: Answer) -> bool:
        """Keep what was reserved; of a budget without room exclude the binding and return False, or refuse."""
        if not isinstance(outcome, Exceeded):
            admission.reservations.append(outcome)
            admission.held += wanted
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

    def _wanted(self, exchange: Exchange, admission: Admission) -> Wanted:
        """Return what is still to be claimed."""
        wanted = []
        now, end_user, held = admission.now, admission.end_user, admission.held
        for one in admission.plan.applied:
            candidates = _concerned(admission, one)
            if not candidates or (end_user is None and one.rule.is_per_end_user):
                continue
            counter = one.counter(end_user)
            amount = self._amount(exchange, admission, one, candidates)
            if held:
                before = [claim.amount for _, claim in held if claim.counter == counter]
                amount -= sum(before)
                if before and amount <= 0:
                    continue
            limit = one.limit if one.is_blocking else None
            wanted.append((one, Claim(counter, one.period(now).start, amount, limit, True, one.is_blocking)))
        return wanted

    def _miss_end_users(self, exchange: Exchange, admission: Admission) -> None:
        """Refuse what no budget of an end user can count, before anything is claimed. Raises RequestError.

        A budget of one binding excludes the binding; one that only warns counts nothing.
        """
        if admission.end_user is not None:
            return
        for one in admission.plan.applied:
            if one.rule.is_per_end_user and one.is_blocking and _concerned(admission, one):
                refusal = end_user_required(one, self._stem)
                if one.binding_id is None:
                    raise refusal
                self._exclude(exchange, admission, one.binding_id, refusal)

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
        applied = admission.plan.applied
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


def _concerned(admission: Admission, applied: Applied) -> Sequence[Candidate]:
    """Return the candidates whose spend a budget counts."""
    if applied.binding_id is None:
        return admission.candidates
    return [candidate for candidate in admission.candidates if candidate.binding.id == applied.binding_id]


async def _answered(pending: Awaitable[Answer]) -> Answer:
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
