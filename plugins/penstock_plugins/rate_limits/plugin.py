"""Bound the traffic of keys and bindings: requests and tokens a minute, requests a day, exchanges under way.

Minutes slide: what the minute before had used counts in proportion to what of it lies within the last 60 seconds, so
that nobody gets two minutes' worth around the turn of one. Days are UTC's. Tokens are reserved by an estimate and
corrected once the exchange has ended; a request that was refused uses up nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias, cast, get_args

import attrs

from penstock import (
    BindingDirectory,
    ConfigurationError,
    Exchange,
    RateLimits,
    RequestError,
    Services,
    StateKey,
    header_stem,
    hookimpl,
)
from penstock.governance import Claim, Counters, Exceeded, LedgerReader, Reservation, StoreUnavailableError, UsageQuery
from penstock_plugins.rate_limits.bounds import DAY, MINUTE_MS, Bound, Dimension, Minute, wait_ms

BYTES_PER_TOKEN = 4
MOST_TOKENS = 10**9
"""More than this nobody can mean to ask for; larger ``max_tokens`` count as this."""
FEW_BOUNDS = 1000
_WORDS: dict[Dimension, str] = {
    "concurrency": "requests at once",
    "rpd": "requests a day",
    "rpm": "requests a minute",
    "tpm": "tokens a minute",
}


@attrs.define(eq=False)
class Taken:
    """Hold what one request asks of a key or binding, and what it was granted of that."""

    bound: Bound
    limits: RateLimits
    """Those in force when it was asked."""
    minute: Minute
    claims: Sequence[Claim]
    tokens: int
    """What of the claims is tokens of the minute; 0 where none are asked for."""
    now_ms: int
    """Milliseconds since the epoch."""
    reservation: Reservation | None = None

    def grant(self, reservation: Reservation) -> None:
        """Note that it was reserved."""
        self.reservation = reservation
        self.minute.requests += 1
        self.minute.tokens += self.tokens

    def weigh_again(self) -> bool:
        """Ask for what is left at the millisecond, where it was weighed before; returns whether that is more."""
        bound = self.bound
        if bound.weighed_ms == self.now_ms or bound.limits is not self.limits:
            return False
        bound.weigh(self.now_ms)
        before, self.minute, self.claims = self.claims, bound.minute, bound.claims_of(self.tokens)
        return self.claims != before


@attrs.define(eq=False)
class Held:
    """Hold what an exchange has taken and must give back."""

    key: Taken | None = None
    binding: Taken | None = None
    attempts_before: int = 0
    """How many attempts there were when the binding was admitted; its own is the next."""
    first_skipped: str | None = None
    """The binding whose refusal answers if no other is left."""
    shortest_wait: int = 0
    """Seconds, among the bindings skipped."""


HELD: StateKey[Held] = StateKey("rate_limits.held")
Answer: TypeAlias = Reservation | Exceeded
Pending: TypeAlias = Awaitable[Answer]


@attrs.define(eq=False)
class RateLimiting:
    """Keep keys and bindings within their rate limits."""

    enforces = ("rate_limits",)

    services: Services
    _counters: Counters = attrs.field(init=False, repr=False)
    _dimension_field: bytes = attrs.field(init=False, repr=False)
    _bounds: dict[str, Bound] = attrs.field(factory=dict, init=False, repr=False)
    """Of the keys and bindings seen, by id."""
    _most_bounds: int = attrs.field(default=FEW_BOUNDS, init=False, repr=False)
    """How many are kept before those that nobody uses are forgotten."""
    _before_start: dict[tuple[str, int], int] = attrs.field(factory=dict, init=False, repr=False)
    """Requests of the day that the counters know nothing of, by counter and start of the day."""

    def __attrs_post_init__(self) -> None:
        self._dimension_field = b"X-%b-RateLimit-Dimension" % header_stem(self.services.namespace)

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Find what counts, and how many requests the day has seen before this start."""
        counters = self.services.find(Counters)  # type: ignore[type-abstract]
        if counters is None:
            raise ConfigurationError('nothing counts for it; enable the plugin "store" too')
        self._counters = counters
        reader = self.services.find(LedgerReader)  # type: ignore[type-abstract]
        if reader is not None:
            await self._look_back(reader)
        yield

    async def _look_back(self, reader: LedgerReader) -> None:
        """Take the day's requests from the ledger, less those the counters have counted themselves."""
        now = self.services.clock()
        day = int(now) // DAY * DAY
        since, until = day * 1_000_000_000, (day + DAY) * 1_000_000_000  # whole days are read from sums
        query = UsageQuery(since_ns=since, until_ns=until, group_by=("key",))
        for row in await reader.usage(query):
            self._note(row.group.get("key"), day, row.requests - row.errors)
        directory = self.services.find(BindingDirectory)  # type: ignore[type-abstract]
        for binding in directory.all_bindings() if directory is not None else ():
            if binding.rate_limits is not None and binding.rate_limits.rpd is not None:
                query = UsageQuery(since_ns=since, until_ns=until, where={"binding_id": binding.id})
                for row in await reader.usage(query):
                    self._note(binding.id, day, row.requests - row.errors)

    def _note(self, owner: str | None, day: int, requests: int) -> None:
        counter = f"rpd:{owner}"
        unknown = requests - self._counters.used(counter, day)
        if owner is not None and unknown > 0:
            self._before_start[counter, day] = unknown

    # --- hooks ------------------------------------------------------------------------------------------------------

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Awaitable[None] | None:
        """Reserve what the key's limits ask for, or refuse."""
        principal = exchange.principal
        if principal is None or principal.rate_limits is None:
            return None
        asked = self._ask(exchange, principal.virtual_key_id, principal.rate_limits)
        if asked is None:
            return None
        answer = self._reserve(asked)
        if hasattr(answer, "__await__"):  # isinstance of an abstract class takes as long as to reserve
            return self._take_for_key_later(exchange, asked, cast("Pending", answer))
        self._take_for_key(exchange, asked, answer)
        return None

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> RequestError | Awaitable[RequestError | None] | None:
        """Reserve what the binding's limits ask for, or have it skipped; the attempt before gives back its own."""
        held = exchange.state.get(HELD)
        if held is not None and held.binding is not None:
            self._release_binding(exchange, held, held.binding, tokens=0)
        candidate = exchange.candidate
        if candidate is None or candidate.binding.rate_limits is None:
            return None
        asked = self._ask(exchange, candidate.binding.id, candidate.binding.rate_limits)
        if asked is None:
            return None
        if held is None:
            held = exchange.state[HELD] = Held()
        answer = self._reserve(asked)
        if hasattr(answer, "__await__"):
            return self._take_for_binding_later(exchange, held, asked, cast("Pending", answer))
        return self._take_for_binding(exchange, held, asked, answer)

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Put what was used in the place of what was reserved."""
        held = exchange.state.pop(HELD, None)
        if held is None:
            return
        usage = exchange.usage
        tokens = 0 if usage is None else usage.all_input + usage.output
        if held.binding is not None:
            self._release_binding(exchange, held, held.binding, tokens)
        if held.key is not None:
            is_used = exchange.error is None or any(not attempt.is_skipped for attempt in exchange.attempts)
            self._settle(held.key, tokens, is_used=is_used)

    # --- taking -----------------------------------------------------------------------------------------------------

    def _ask(self, exchange: Exchange, owner: str, limits: RateLimits) -> Taken | None:
        """Return what is to be reserved of a key or binding; None where nothing bounds it."""
        bound = self._bounds.get(owner)
        if bound is None:
            bound = self._bind(owner, limits)
        elif bound.limits is not limits:
            bound.change(limits)
        if bound.is_empty:
            return None
        now_ms = int(self.services.clock() * 1000)
        if not bound.weighed_ms <= now_ms < bound.until_ms:
            bound.weigh(now_ms)
        tokens = 0
        if bound.tpm is not None:
            expected = expected_tokens(exchange)
            if expected is not None:
                tokens = max(1, min(expected, bound.tpm))  # one too large waits for an empty minute
        claims = bound.claims_of(tokens)
        return Taken(bound, limits, bound.minute, claims, tokens, now_ms) if claims else None

    def _bind(self, owner: str, limits: RateLimits) -> Bound:
        """Make ready what bounds a key or binding met for the first time."""
        bounds = self._bounds
        if len(bounds) >= self._most_bounds:
            since_ms = int(self.services.clock() * 1000) - 2 * MINUTE_MS
            for idle in [bound for bound in bounds.values() if bound.weighed_ms < since_ms and not bound.is_held]:
                del bounds[idle.owner]
            self._most_bounds = max(FEW_BOUNDS, 2 * len(bounds))
        bound = bounds[owner] = Bound(owner, limits, self._counters, self._before_start)
        return bound

    def _reserve(self, asked: Taken) -> Answer | Pending:
        answer = self._counters.reserve(asked.claims)
        if isinstance(answer, Exceeded) and asked.weigh_again():
            return self._counters.reserve(asked.claims)
        return answer

    async def _answered(self, asked: Taken, pending: Pending) -> Answer:
        """Wait for an answer; without one the request is refused: a limit that cannot be kept lets nobody in."""
        try:
            answer = await pending
            if isinstance(answer, Exceeded) and asked.weigh_again():
                again = self._counters.reserve(asked.claims)
                return await again if isinstance(again, Awaitable) else again
        except StoreUnavailableError:
            message = "What is left of a rate limit cannot be found out just now; try again shortly."
            raise RequestError("overloaded", message, fields=((b"retry-after", b"1"),)) from None
        return answer

    async def _take_for_key_later(self, exchange: Exchange, asked: Taken, pending: Pending) -> None:
        self._take_for_key(exchange, asked, await self._answered(asked, pending))

    def _take_for_key(self, exchange: Exchange, asked: Taken, answer: Answer) -> None:
        if isinstance(answer, Exceeded):
            raise self._refusal(asked, answer, "This virtual key")
        asked.grant(answer)
        exchange.state[HELD] = Held(asked)

    async def _take_for_binding_later(
        self, exchange: Exchange, held: Held, asked: Taken, pending: Pending
    ) -> RequestError | None:
        return self._take_for_binding(exchange, held, asked, await self._answered(asked, pending))

    def _take_for_binding(self, exchange: Exchange, held: Held, asked: Taken, answer: Answer) -> RequestError | None:
        if isinstance(answer, Exceeded):
            refusal = self._refusal(asked, answer, "The provider binding")
            self._prefer_shortest(exchange, held, asked.bound.owner, refusal)
            return refusal
        asked.grant(answer)
        held.binding, held.attempts_before = asked, len(exchange.attempts)
        return None

    def _prefer_shortest(self, exchange: Exchange, held: Held, binding_id: str, refusal: RequestError) -> None:
        """Let the client be told when the first of the skipped bindings has room again, not the one tried first."""
        wait = int(refusal.meta["retry_after"])
        if held.first_skipped is None:
            held.first_skipped, held.shortest_wait = binding_id, wait
        elif wait < held.shortest_wait and exchange.excluded is not None:
            exchange.excluded[held.first_skipped] = refusal
            held.shortest_wait = wait

    # --- giving back ------------------------------------------------------------------------------------------------

    def _release_binding(self, exchange: Exchange, held: Held, taken: Taken, tokens: int) -> None:
        held.binding = None
        number, attempts = held.attempts_before, exchange.attempts
        self._settle(taken, tokens, is_used=number < len(attempts) and not attempts[number].is_skipped)

    def _settle(self, taken: Taken, tokens: int, *, is_used: bool) -> None:
        bound, minute, reservation = taken.bound, taken.minute, taken.reservation
        assert reservation is not None
        minute.requests -= 1
        minute.tokens -= taken.tokens
        if minute is not bound.minute:
            bound.until_ms = 0  # it may weigh more than it did
        if not is_used:
            self._counters.settle(reservation)
        elif taken.tokens:
            self._counters.settle(reservation, {**bound.amounts, bound.tokens: tokens})
        else:
            self._counters.settle(reservation, bound.amounts)

    # --- refusing ---------------------------------------------------------------------------------------------------

    def _refusal(self, asked: Taken, exceeded: Exceeded, who: str) -> RequestError:
        dimension = _dimension_of(exceeded.claim)
        limit: int = getattr(asked.limits, dimension)
        seconds = max(1, -(-self._wait_ms(asked, exceeded, dimension, limit) // 1000))
        return RequestError(
            "rate_limit_exceeded",
            f"{who} may have {limit} {_WORDS[dimension]}; try again in {seconds} s.",
            meta={"dimension": dimension, "limit": limit, "subject": asked.bound.owner, "retry_after": seconds},
            fields=((self._dimension_field, dimension.encode()), (b"retry-after", b"%d" % seconds)),
        )

    def _wait_ms(self, asked: Taken, exceeded: Exceeded, dimension: Dimension, limit: int) -> int:
        claim = exceeded.claim
        if dimension == "concurrency":
            return 1000
        if dimension == "rpd":
            return (claim.period + DAY) * 1000 - asked.now_ms
        previous = asked.bound.used(claim.counter, claim.period - 60)
        return wait_ms(limit, claim.amount, exceeded.used, previous, asked.now_ms % MINUTE_MS)


def _dimension_of(claim: Claim) -> Dimension:
    name = claim.counter.partition(":")[0]
    return next(dimension for dimension in get_args(Dimension) if dimension == name)


def expected_tokens(exchange: Exchange) -> int | None:
    """Estimate a request's tokens: four bytes of its JSON make one, and what it may be answered at most is added.

    A form counts as nothing until it is settled. None for what makes no model work, such as listing models or counting
    tokens. Raises RequestError for a body that cannot be read.
    """
    request = exchange.request
    endpoint = request.endpoint
    if not endpoint.has_model or endpoint.operation == "count_tokens":
        return None
    asked = exchange.peek.max_tokens or 0
    body = request.body if request.decoded is None else request.decoded
    said = 0 if body.startswith(b"--") else len(body) // BYTES_PER_TOKEN
    return said + min(max(0, asked), MOST_TOKENS)
