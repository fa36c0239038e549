"""Bound the traffic of keys and bindings: requests and tokens a minute, requests a day, exchanges under way.

Minutes slide: what the minute before had used counts in proportion to what of it lies within the last 60 seconds, so
that nobody gets two minutes' worth around the turn of one. Days are UTC's. Tokens are reserved by an estimate and
corrected once the exchange has ended; a request that was refused uses up nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Literal, get_args

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

Dimension = Literal["concurrency", "rpd", "rpm", "tpm"]
MINUTE_MS = 60_000
DAY = 86_400
BYTES_PER_TOKEN = 4
MOST_TOKENS = 10**9
"""More than this nobody can mean to ask for; larger ``max_tokens`` count as this."""
_WORDS: dict[Dimension, str] = {
    "concurrency": "requests at once",
    "rpd": "requests a day",
    "rpm": "requests a minute",
    "tpm": "tokens a minute",
}


# --- the sliding minute, in integers --------------------------------------------------------------------------------


def room(limit: int, previous: int, elapsed_ms: int) -> int:
    """Return what of a limit is left for this minute by what was used in the previous one; not negative."""
    return max(0, limit - -(-previous * (MINUTE_MS - elapsed_ms) // MINUTE_MS))


def wait_ms(limit: int, amount: int, used: int, previous: int, elapsed_ms: int) -> int:
    """Return in how many milliseconds an amount fits, if nothing else is asked for or given back until then.

    ``limit`` is the whole one, of which ``used`` and ``previous`` are taken.
    """
    left = limit - amount - used
    if left >= 0:
        if previous * (MINUTE_MS - elapsed_ms) <= left * MINUTE_MS:
            return 0
        return MINUTE_MS - elapsed_ms - left * MINUTE_MS // previous
    if not used:
        return MINUTE_MS  # nothing is in its way but the limit: it never fits
    left = max(0, limit - amount)
    return 2 * MINUTE_MS - elapsed_ms - min(MINUTE_MS, left * MINUTE_MS // used)


# --- what an exchange holds -----------------------------------------------------------------------------------------


@attrs.frozen
class Ask:
    """Hold the claims of one key or binding for one request."""

    owner: str
    """Id of the key or binding."""
    limits: RateLimits
    claims: Sequence[Claim]
    of_minute: Sequence[Claim]
    """Those of them that minutes slide for."""
    now_ms: int
    """Milliseconds since the epoch."""


@attrs.frozen
class Taken:
    """Hold what was reserved."""

    ask: Ask
    reservation: Reservation


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


@attrs.define(eq=False)
class RateLimiting:
    """Keep keys and bindings within their rate limits."""

    services: Services
    _counters: Counters = attrs.field(init=False, repr=False)
    _dimension_field: bytes = attrs.field(init=False, repr=False)
    _under_way: dict[tuple[str, int], int] = attrs.field(factory=dict, init=False, repr=False)
    """What exchanges of this process have reserved of minutes and not settled."""
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
        since, until = day * 1_000_000_000, int(now * 1_000_000_000) + 1
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
        if principal is None:
            return None
        ask = self._ask(exchange, principal.virtual_key_id, principal.rate_limits)
        if ask is None:
            return None
        answer = self._counters.reserve(ask.claims)
        if isinstance(answer, Awaitable):
            return self._take_for_key_later(exchange, ask, answer)
        self._take_for_key(exchange, ask, answer)
        return None

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> RequestError | Awaitable[RequestError | None] | None:
        """Reserve what the binding's limits ask for, or have it skipped; the attempt before gives back its own."""
        held = exchange.state.get(HELD)
        if held is not None:
            self._release_binding(exchange, held, tokens=0)
        candidate = exchange.candidate
        if candidate is None:
            return None
        ask = self._ask(exchange, candidate.binding.id, candidate.binding.rate_limits)
        if ask is None:
            return None
        answer = self._counters.reserve(ask.claims)
        if isinstance(answer, Awaitable):
            return self._take_for_binding_later(exchange, ask, answer)
        return self._take_for_binding(exchange, ask, answer)

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Put what was used in the place of what was reserved."""
        held = exchange.state.pop(HELD, None)
        if held is None:
            return
        usage = exchange.usage
        tokens = 0 if usage is None else usage.all_input + usage.output
        self._release_binding(exchange, held, tokens)
        if held.key is not None:
            was_dialled = any(not attempt.is_skipped for attempt in exchange.attempts)
            self._settle(held.key, tokens, is_used=was_dialled or exchange.error is None)

    # --- taking -----------------------------------------------------------------------------------------------------

    def _ask(self, exchange: Exchange, owner: str, limits: RateLimits | None) -> Ask | None:
        """Return the claims of a key or binding; None where nothing bounds it."""
        if limits is None:
            return None
        now_ms = int(self.services.clock() * 1000)
        minute, elapsed = now_ms // MINUTE_MS * 60, now_ms % MINUTE_MS
        claims: list[Claim] = []
        if limits.concurrency is not None:
            claims.append(Claim(f"concurrency:{owner}", 0, 1, limits.concurrency))
        if limits.rpd is not None:
            counter, day = f"rpd:{owner}", now_ms // 1000 // DAY * DAY
            claims.append(Claim(counter, day, 1, max(0, limits.rpd - self._before_start.get((counter, day), 0))))
        others = len(claims)
        if limits.rpm is not None:
            claims.append(self._minute_claim(f"rpm:{owner}", minute, 1, limits.rpm, elapsed))
        if limits.tpm is not None and uses_tokens(exchange):
            tokens = max(1, min(expected_tokens(exchange), limits.tpm))  # one too large waits for an empty minute
            claims.append(self._minute_claim(f"tpm:{owner}", minute, tokens, limits.tpm, elapsed))
        return Ask(owner, limits, claims, claims[others:], now_ms) if claims else None

    def _minute_claim(self, counter: str, minute: int, amount: int, limit: int, elapsed_ms: int) -> Claim:
        return Claim(counter, minute, amount, room(limit, self._used(counter, minute - 60), elapsed_ms))

    def _used(self, counter: str, minute: int) -> int:
        """Return what a minute has used: settled, and under way here."""
        return self._counters.used(counter, minute) + self._under_way.get((counter, minute), 0)

    async def _take_for_key_later(
        self, exchange: Exchange, ask: Ask, answer: Awaitable[Reservation | Exceeded]
    ) -> None:
        self._take_for_key(exchange, ask, await _answered(answer))

    def _take_for_key(self, exchange: Exchange, ask: Ask, answer: Reservation | Exceeded) -> None:
        if isinstance(answer, Exceeded):
            raise self._refusal(ask, answer, "This virtual key")
        self._held_by(exchange).key = self._taken(ask, answer)

    async def _take_for_binding_later(
        self, exchange: Exchange, ask: Ask, answer: Awaitable[Reservation | Exceeded]
    ) -> RequestError | None:
        return self._take_for_binding(exchange, ask, await _answered(answer))

    def _take_for_binding(self, exchange: Exchange, ask: Ask, answer: Reservation | Exceeded) -> RequestError | None:
        held = self._held_by(exchange)
        if isinstance(answer, Exceeded):
            refusal = self._refusal(ask, answer, "The provider binding")
            self._prefer_shortest(exchange, held, ask.owner, refusal)
            return refusal
        held.binding, held.attempts_before = self._taken(ask, answer), len(exchange.attempts)
        return None

    def _prefer_shortest(self, exchange: Exchange, held: Held, binding_id: str, refusal: RequestError) -> None:
        """Let the client be told when the first of the skipped bindings has room again, not the one tried first."""
        wait = int(refusal.meta["retry_after"])
        if held.first_skipped is None:
            held.first_skipped, held.shortest_wait = binding_id, wait
        elif wait < held.shortest_wait and exchange.excluded is not None:
            exchange.excluded[held.first_skipped] = refusal
            held.shortest_wait = wait

    def _held_by(self, exchange: Exchange) -> Held:
        held = exchange.state.get(HELD)
        if held is None:
            held = exchange.state[HELD] = Held()
        return held

    def _taken(self, ask: Ask, reservation: Reservation) -> Taken:
        for claim in ask.of_minute:
            place = claim.counter, claim.period
            self._under_way[place] = self._under_way.get(place, 0) + claim.amount
        return Taken(ask, reservation)

    # --- giving back ------------------------------------------------------------------------------------------------

    def _release_binding(self, exchange: Exchange, held: Held, tokens: int) -> None:
        taken, held.binding = held.binding, None
        if taken is not None:
            attempts = exchange.attempts[held.attempts_before : held.attempts_before + 1]
            self._settle(taken, tokens, is_used=bool(attempts) and not attempts[0].is_skipped)

    def _settle(self, taken: Taken, tokens: int, *, is_used: bool) -> None:
        owner = taken.ask.owner
        for claim in taken.ask.of_minute:
            place = claim.counter, claim.period
            left = self._under_way.pop(place) - claim.amount
            if left:
                self._under_way[place] = left
        used = {f"rpm:{owner}": 1, f"rpd:{owner}": 1, f"tpm:{owner}": tokens} if is_used else None
        self._counters.settle(taken.reservation, used)

    # --- refusing ---------------------------------------------------------------------------------------------------

    def _refusal(self, ask: Ask, exceeded: Exceeded, who: str) -> RequestError:
        dimension = _dimension_of(exceeded.claim)
        limit: int = getattr(ask.limits, dimension)
        seconds = max(1, -(-self._wait_ms(ask, exceeded, dimension, limit) // 1000))
        return RequestError(
            "rate_limit_exceeded",
            f"{who} may have {limit} {_WORDS[dimension]}; try again in {seconds} s.",
            meta={"dimension": dimension, "limit": limit, "subject": ask.owner, "retry_after": seconds},
            fields=((self._dimension_field, dimension.encode()), (b"retry-after", b"%d" % seconds)),
        )

    def _wait_ms(self, ask: Ask, exceeded: Exceeded, dimension: Dimension, limit: int) -> int:
        claim = exceeded.claim
        if dimension == "concurrency":
            return 1000
        if dimension == "rpd":
            return (claim.period + DAY) * 1000 - ask.now_ms
        previous = self._used(claim.counter, claim.period - 60)
        return wait_ms(limit, claim.amount, exceeded.used, previous, ask.now_ms % MINUTE_MS)


async def _answered(answer: Awaitable[Reservation | Exceeded]) -> Reservation | Exceeded:
    """Wait for an answer; without one the request is refused: a limit that cannot be kept lets nobody in."""
    try:
        return await answer
    except StoreUnavailableError:
        message = "What is left of a rate limit cannot be found out just now; try again shortly."
        raise RequestError("overloaded", message, fields=((b"retry-after", b"1"),)) from None


def _dimension_of(claim: Claim) -> Dimension:
    name = claim.counter.partition(":")[0]
    return next(dimension for dimension in get_args(Dimension) if dimension == name)


def uses_tokens(exchange: Exchange) -> bool:
    """Tell whether a request makes a model work; listing models or counting tokens does not."""
    endpoint = exchange.request.endpoint
    return endpoint.has_model and endpoint.operation != "count_tokens"


def expected_tokens(exchange: Exchange) -> int:
    """Estimate a request's tokens: four bytes of its JSON make one, and what it may be answered at most is added.

    A form counts as nothing until it is settled. Raises RequestError for a body that cannot be read.
    """
    request = exchange.request
    asked = exchange.peek.max_tokens or 0
    body = request.body if request.decoded is None else request.decoded
    said = 0 if body.startswith(b"--") else len(body) // BYTES_PER_TOKEN
    return said + min(max(0, asked), MOST_TOKENS)
