"""Counters of one process in memory, and the plugins rate limits are tested with: a clock, keys, bounded bindings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

from penstock import Exchange, Principal, RateLimits, RequestError, Services, hookimpl
from penstock.governance import Claim, Counters, Exceeded, Reservation

MIDNIGHT = 20_600 * 86_400
"""Some day's start, seconds since the epoch."""


@attrs.define(eq=False)
class Reserved:
    """What one call of ``reserve`` took."""

    claims: Sequence[Claim]
    is_settled: bool = False


class MemoryCounters:
    """Count in a dictionary, as the protocol says a process alone does."""

    def __init__(self) -> None:
        self.settled: dict[tuple[str, int], int] = {}
        self.reserved: dict[tuple[str, int], int] = {}

    def reserve(self, claims: Sequence[Claim]) -> Reserved | Exceeded:
        """Reserve all or none."""
        for claim in claims:
            settled = self.settled.get((claim.counter, claim.period), 0)
            used = settled + self.reserved.get((claim.counter, claim.period), 0)
            if claim.limit is not None and used + claim.amount > claim.limit:
                return Exceeded(claim, used, settled)
        for claim in claims:
            place = claim.counter, claim.period
            self.reserved[place] = self.reserved.get(place, 0) + claim.amount
        return Reserved(claims)

    def settle(self, reservation: Reservation, amounts: Mapping[str, int] | None = None) -> None:
        """Replace what was reserved by what was used."""
        assert isinstance(reservation, Reserved)
        if reservation.is_settled:
            return
        reservation.is_settled = True
        for claim in reservation.claims:
            place = claim.counter, claim.period
            self.reserved[place] -= claim.amount
            self.settled[place] = self.settled.get(place, 0) + (amounts or {}).get(claim.counter, 0)

    def used(self, counter: str, period: int) -> int:
        """Return what is settled."""
        return self.settled.get((counter, period), 0)

    @property
    def left(self) -> dict[tuple[str, int], int]:
        """Return what is still reserved."""
        return {place: amount for place, amount in self.reserved.items() if amount}


@attrs.define(eq=False)
class Setting:
    """Provide counters and a clock, and bound one key and any binding: stands before the plugin under test."""

    services: Services
    counters: MemoryCounters = attrs.field(factory=MemoryCounters)
    now: float = MIDNIGHT + 3600.0
    key: RateLimits | None = None
    bindings: dict[str, RateLimits] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.services.provide(Counters, self.counters)  # type: ignore[type-abstract]
        self.services.clock = lambda: self.now

    @hookimpl(tryfirst=True)
    def authenticate(self, exchange: Exchange) -> Principal:
        """Let everybody in, as one key."""
        return Principal("vk_1", "one", "ps_vk_test_01", rate_limits=self.key)

    @hookimpl(tryfirst=True)
    def admit_attempt(self, exchange: Exchange) -> RequestError | None:
        """Give the candidate's binding its bounds."""
        candidate = exchange.candidate
        assert candidate is not None
        limits = self.bindings.get(candidate.binding.id)
        exchange.candidate = attrs.evolve(candidate, binding=attrs.evolve(candidate.binding, rate_limits=limits))
        return None


def setting(**given: Any) -> tuple[tuple[str, Callable[..., Any]], list[Setting]]:
    """Return a plugin entry for a harness, and where its Setting will be."""
    made: list[Setting] = []

    class Made(Setting):
        def __init__(self, services: Services) -> None:
            super().__init__(services, **given)
            made.append(self)

    return ("setting", Made), made
