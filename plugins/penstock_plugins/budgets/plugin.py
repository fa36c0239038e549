"""The budgets plugin: admit, open the ledger's intent, settle.

It stands after routing, which says whom a request may go to, and after whatever may refuse for less; the plugins it
needs (``store``, ``prices``) may stand anywhere.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import attrs

from penstock import (
    Attempt,
    Candidate,
    ConfigurationError,
    Exchange,
    Principal,
    Request,
    RequestError,
    Services,
    StateKey,
    hookimpl,
)
from penstock.governance import (
    BudgetDirectory,
    Counters,
    Debit,
    Intent,
    Ledger,
    LedgerUnavailableError,
    Outcome,
    PriceTable,
    Reservation,
)
from penstock_plugins.budgets.admission import Admission
from penstock_plugins.budgets.admitting import Admitter
from penstock_plugins.budgets.end_users import end_user_of
from penstock_plugins.budgets.estimates import Averages, likely_input
from penstock_plugins.budgets.rules import Rules
from penstock_plugins.budgets.settlement import (
    NOTHING,
    Cost,
    cost_of,
    debits_of,
    entry_of,
    goes_on,
    is_counted,
    last_made,
    outcome_of,
)

_ADMISSION: StateKey[Admission] = StateKey("budgets.admission")
_AVERAGES = "budgets.averages"
_COUNTS_TOKENS = re.compile(rb"/v1beta/(?:models|tunedModels)/[A-Za-z0-9._-]+:countTokens").fullmatch
"""Nothing behind which a provider could read another method."""


@attrs.frozen(kw_only=True)
class BudgetsConfig:
    """The ``[plugins.budgets]`` table; budgets themselves live in the store."""

    max_output_tokens: int = 128_000
    """Output taken for possible under ``reserve = "max"`` where neither the request nor the prices say a limit."""
    max_unseen_input_tokens: int = 200_000
    """Input taken for possible under ``reserve = "max"`` where a request refers to what is not in it as text: images,
    files, earlier responses, tools that run at the provider."""


@attrs.define(eq=False)
class Budgets:
    """Reserve what an exchange may cost, refuse what a budget has no room for, and settle."""

    Config = BudgetsConfig

    config: BudgetsConfig
    services: Services
    _admitter: Admitter = attrs.field(init=False, repr=False)
    _counters: Counters = attrs.field(init=False, repr=False)
    _ledger: Ledger = attrs.field(init=False, repr=False)
    _averages: Averages = attrs.field(init=False, repr=False)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Find what is counted with; averages outlive a reload."""
        services, config = self.services, self.config
        if services.find(Counters) is None:  # type: ignore[type-abstract]
            raise ConfigurationError('has nothing to count with: put "store" into [gateway] plugins')
        if services.find(PriceTable) is None:  # type: ignore[type-abstract]
            raise ConfigurationError('knows no prices: put "prices" into [gateway] plugins')
        self._counters = services.get(Counters)  # type: ignore[type-abstract]
        self._ledger = services.get(Ledger)  # type: ignore[type-abstract]
        rules = Rules(services.get(BudgetDirectory))  # type: ignore[type-abstract]
        table = services.get(PriceTable)  # type: ignore[type-abstract]
        async with services.shared.use(_AVERAGES, _new_averages) as averages:
            self._averages = averages
            self._admitter = Admitter(
                services=services,
                rules=rules,
                counters=self._counters,
                table=table,
                averages=averages,
                assumed_output=config.max_output_tokens,
                unseen_input=config.max_unseen_input_tokens,
            )
            yield

    # --- before a provider is asked -------------------------------------------------------------------------------

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[None] | None:
        """Reserve for whoever may be asked; without a chain that waits for the first attempt."""
        principal = exchange.principal
        if principal is None or not exchange.chain or not exchange.request.endpoint.has_model:
            return None
        return self._admit(exchange, principal, [*exchange.chain])

    def _admit(self, exchange: Exchange, principal: Principal, candidates: list[Candidate]) -> Awaitable[None] | None:
        excluded = exchange.excluded
        if excluded:
            candidates = [candidate for candidate in candidates if candidate.binding.id not in excluded]
        admission = Admission(principal, self.services.clock(), candidates, exchange.peek.model)
        exchange.state[_ADMISSION] = admission
        if not _is_charged(exchange.request):
            admission.is_charged = False
            admission.end_user = end_user_of(exchange, self._admitter.end_user_header)
            return None
        return self._admitter.admit(exchange, admission)

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> Awaitable[RequestError | None] | RequestError | None:
        """Reserve for a candidate nobody has reserved for, and enter the intent before the first dial."""
        principal, candidate = exchange.principal, exchange.candidate
        if principal is None or candidate is None or not exchange.request.endpoint.has_model:
            return None
        admission = exchange.state.get(_ADMISSION)
        if admission is not None and (candidate in admission.candidates or not admission.is_charged):
            self._open(exchange, admission, candidate)
            return None
        try:
            pending = self._admit_late(exchange, principal, admission, candidate)
        except RequestError as refusal:
            return _skip_or_refuse(refusal)
        if pending is not None:
            return self._await_late(exchange, candidate, pending)
        return self._refusal_of(exchange, candidate)

    def _admit_late(
        self, exchange: Exchange, principal: Principal, admission: Admission | None, candidate: Candidate
    ) -> Awaitable[None] | None:
        if admission is None:
            return self._admit(exchange, principal, [candidate])
        return self._admitter.cover(exchange, admission, candidate)

    async def _await_late(
        self, exchange: Exchange, candidate: Candidate, pending: Awaitable[None]
    ) -> RequestError | None:
        try:
            await pending
        except RequestError as refusal:
            return _skip_or_refuse(refusal)
        return self._refusal_of(exchange, candidate)

    def _refusal_of(self, exchange: Exchange, candidate: Candidate) -> RequestError | None:
        """Return why a candidate admitted late was excluded, or enter the intent."""
        refusal = None if exchange.excluded is None else exchange.excluded.get(candidate.binding.id)
        if refusal is None:
            self._open(exchange, exchange.state[_ADMISSION], candidate)
        return refusal

    def _open(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> None:
        """Enter the intent, once. Raises RequestError ``overloaded`` where it cannot be made durable."""
        if admission.is_open:
            return
        try:
            self._ledger.open(self._intent_of(exchange, admission, candidate))
        except LedgerUnavailableError:
            raise RequestError(
                "overloaded",
                "The ledger cannot be written, and nothing is asked of a provider unrecorded; try again shortly.",
                fields=((b"retry-after", b"1"),),
            ) from None
        admission.is_open = True

    def _intent_of(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> Intent:
        principal, binding = admission.principal, candidate.binding
        estimate = 0
        debits: tuple[Debit, ...] = ()
        if admission.is_charged:
            estimate, debits = self._estimate(exchange, admission, candidate), debits_of(admission, binding.id)
        return Intent(
            request_id=exchange.request_id.decode(),
            started_at_ns=_nanoseconds(admission.now),
            organization_id=principal.organization_id,
            team_id=principal.team_id,
            project_id=principal.project_id,
            virtual_key_id=principal.virtual_key_id,
            principal_id=principal.principal_id,
            end_user=admission.end_user,
            binding_id=binding.id,
            provider=binding.type,
            model_asked=admission.model_asked,
            model_served=candidate.model,
            estimate_nano_usd=estimate,
            debits=debits,
            is_stream=exchange.peek.stream,
            tags=principal.tags,
        )

    def _estimate(self, exchange: Exchange, admission: Admission, candidate: Candidate) -> int:
        """Return what the exchange is entered with if this process dies: no more than a budget holds for certain."""
        likely = self._admitter.likely(exchange, admission, candidate)
        return likely if admission.bounds is None else min(likely, self._admitter.most(exchange, admission, candidate))

    # --- after it -------------------------------------------------------------------------------------------------

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Enter what became of the exchange, and put its cost in place of what was reserved."""
        principal = exchange.principal
        if principal is None or not exchange.request.endpoint.has_model:
            return
        admission = exchange.state.get(_ADMISSION)
        spent: dict[str, int] = {}
        try:
            spent = self._enter(exchange, principal, admission)
        finally:  # whatever goes wrong, nothing stays reserved
            if admission is not None:
                self._give_back(admission.reservations, spent)

    def _give_back(self, reservations: list[Reservation], spent: dict[str, int]) -> None:
        if len(reservations) == 1:
            self._counters.settle(reservations[0], spent)
            return
        for reservation in reservations:
            claimed = {claim.counter for claim in reservation.claims}.intersection(spent)
            self._counters.settle(reservation, {counter: spent.pop(counter) for counter in claimed})

    def _enter(self, exchange: Exchange, principal: Principal, admission: Admission | None) -> dict[str, int]:
        """Enter an exchange; returns what is charged to which counter."""
        cost = NOTHING
        debits: tuple[Debit, ...] = ()
        made, outcome = last_made(exchange.attempts), outcome_of(exchange)
        if admission is None:
            started_at_ns = _nanoseconds(self.services.clock()) - (exchange.ended_ns - exchange.started_ns)
        else:
            started_at_ns = _nanoseconds(admission.now)
            if admission.is_charged:
                cost, debits = self._cost(exchange, admission, made, outcome)
        self._ledger.settle(
            entry_of(
                exchange, principal, admission, cost,
                made=made, outcome=outcome, debits=debits, started_at_ns=started_at_ns,
            )
        )  # fmt: skip
        return {debit.counter: cost.nano_usd for debit in debits}

    def _cost(
        self, exchange: Exchange, admission: Admission, made: Attempt | None, outcome: Outcome
    ) -> tuple[Cost, tuple[Debit, ...]]:
        """Return what the exchange cost and which counters it is charged to."""
        candidate = exchange.candidate
        if made is None or candidate is None or candidate.binding.id != made.binding_id:
            return NOTHING, ()
        if admission.likely_tokens < 0:
            admission.likely_tokens = likely_input(exchange)
        price = admission.price_of(candidate, self._admitter.table)
        usage = exchange.usage
        if usage is not None and usage.source != "provider" and admission.bounds is not None and price is not None:
            usage = admission.bounds.within(usage, price, self.config.max_output_tokens)
        cost = cost_of(exchange, usage, price, admission.likely_tokens)
        if price is not None and goes_on(exchange):
            reserved = max([claim.amount for _, claim in admission.held], default=0)
            most = max(cost.nano_usd, reserved, self._admitter.likely(exchange, admission, candidate))
            cost = attrs.evolve(cost, nano_usd=most, source="estimated")
        if admission.stand_ins and price in admission.stand_ins and cost.source == "priced":
            cost = attrs.evolve(cost, source="estimated")
        if cost.nano_usd and outcome == "success":
            self._averages.add(admission.principal.virtual_key_id, candidate.model, cost.nano_usd)
        if not is_counted(exchange):
            return cost, ()
        return cost, debits_of(admission, made.binding_id)


def _is_charged(request: Request) -> bool:
    """Tell whether an operation costs anything: counting tokens and looking around does not."""
    endpoint = request.endpoint
    if endpoint.family == "gemini":
        return request.method == b"POST" and _COUNTS_TOKENS(request.path) is None
    return endpoint.operation != "count_tokens"


def _skip_or_refuse(refusal: RequestError) -> RequestError:
    """Return what concerns one candidate, so that the next has its turn. Raises what concerns the exchange."""
    if refusal.code == "budget_exceeded" and "budget_provider" not in refusal.meta:
        raise refusal
    if refusal.code in ("budget_exceeded", "model_not_recognized", "end_user_required"):
        return refusal
    raise refusal


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1_000_000_000)


@asynccontextmanager
async def _new_averages() -> AsyncIterator[Averages]:
    yield Averages()
