"""In which order the candidates of a routing policy are asked; made anew for each exchange, without I/O."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from time import monotonic_ns

import attrs

from penstock import Attempt, Candidate, Usage
from penstock.governance import PriceTable
from penstock.governance.objects import RoutingPolicy

Random = Callable[[], float]
"""Return a number from 0 up to 1, as ``random.random`` does."""
Order = Callable[[], Sequence[Candidate]]
"""Return the candidates in the order they are asked."""
DECAY_SECONDS = 10.0
"""In how long what is remembered of a latency falls to 1/e."""
FAILURE_SECONDS = 5.0
"""What an attempt that failed counts at least, however soon that was known."""
UNKNOWN_SECONDS = 1.0
"""What one counts that is asked for the first time, until it has answered."""
REMEMBERED_LATENCIES = 4096
NOMINAL = Usage(input=3_000, output=1_000)
"""What prices are compared by."""
_NO_FAULT_OF_ITS = frozenset({"client_gone", "not_sent", "internal_error"})
Place = tuple[str, str | None]
"""Id of a binding, and the model it is asked for."""


@attrs.define(eq=False)
class _Estimate:
    seconds: float
    observed_ns: int
    chosen_ns: int = 0
    is_guess: bool = False


class Latencies:
    """Keep a peak-sensitive moving average of the time to the first byte, per binding and model.

    What is slower than the average counts at once, what is faster little by little; of one that is not asked the
    average decays, so that it is asked again some time. Times are nanoseconds of one clock.
    """

    def __init__(self) -> None:
        self._known: dict[Place, _Estimate] = {}

    def observe(self, place: Place, seconds: float, now_ns: int) -> None:
        """Take a measurement."""
        known = self._known.get(place)
        if known is None or known.is_guess:
            self._keep(place, _Estimate(seconds, now_ns))
            return
        weight = _decay(now_ns - known.observed_ns)
        known.seconds = max(seconds, known.seconds * weight + seconds * (1 - weight))
        known.observed_ns = now_ns

    def observe_at_least(self, place: Place, seconds: float, now_ns: int) -> None:
        """Take the measurement of an answer that nobody waited for any longer."""
        if seconds > self.cost(place, now_ns):
            self.observe(place, seconds, now_ns)

    def cost(self, place: Place, now_ns: int) -> float:
        """Return seconds; 0 where nothing is known."""
        known = self._known.get(place)
        if known is None:
            return 0.0
        return known.seconds * _decay(now_ns - max(known.observed_ns, known.chosen_ns))

    def choose(self, place: Place, now_ns: int) -> None:
        """Note that it is asked: until it has answered, others take it for as slow as it was last seen."""
        known = self._known.get(place)
        if known is None:
            self._keep(place, _Estimate(UNKNOWN_SECONDS, now_ns, is_guess=True))
        else:
            known.chosen_ns = now_ns

    def measure(self, attempts: Sequence[Attempt]) -> None:
        """Learn from the attempts of an exchange that has ended."""
        for attempt in attempts:
            place, now_ns = (attempt.binding_id, attempt.model), attempt.ended_ns
            seconds = (now_ns - attempt.started_ns) / 1e9
            if attempt.is_skipped:
                continue
            if attempt.reason in _NO_FAULT_OF_ITS:
                self.observe_at_least(place, seconds, now_ns)
            elif attempt.reason is not None:
                self.observe(place, max(seconds, FAILURE_SECONDS), now_ns)
            elif attempt.status is not None and attempt.status < 400:
                self.observe(place, seconds, now_ns)

    def order(self, candidates: Sequence[Candidate], now_ns: int, source: Random) -> list[Candidate]:
        """Return the faster of two random candidates, then the others, fastest first."""
        costs = [self.cost(_place(candidate), now_ns) for candidate in candidates]
        one = int(source() * len(costs))
        other = int(source() * (len(costs) - 1))
        other += other >= one
        first = one if costs[one] <= costs[other] else other
        self.choose(_place(candidates[first]), now_ns)
        rest = sorted((cost, number) for number, cost in enumerate(costs) if number != first)
        return [candidates[first], *(candidates[number] for _, number in rest)]

    def _keep(self, place: Place, estimate: _Estimate) -> None:
        self._known.pop(place, None)
        if len(self._known) >= REMEMBERED_LATENCIES:
            del self._known[next(iter(self._known))]
        self._known[place] = estimate


def by_weight(candidates: Sequence[Candidate], weights: Sequence[float], source: Random) -> list[Candidate]:
    """Return the candidates drawn one after the other by weight, each once; those of weight 0 last, in their order.

    The one with the least exponential variate of rate ``weight`` is drawn (Efraimidis and Spirakis, 2006).
    """
    drawn = [
        (-math.log(1 - source()) / weight if weight > 0 else math.inf, candidate)
        for candidate, weight in zip(candidates, weights, strict=True)
    ]
    return [candidate for _, candidate in sorted(drawn, key=itemgetter(0))]


def by_price(candidates: Sequence[Candidate], prices: PriceTable | None, at: float) -> list[Candidate]:
    """Return the candidates, cheapest first by their prices at a moment (epoch seconds); those without any last."""

    def cost(candidate: Candidate) -> float:
        binding = candidate.binding
        found = prices and prices.find(binding.type, candidate.model or "", at, base_url=binding.base_url)
        return found.cost(NOMINAL) if found else math.inf

    return sorted(candidates, key=cost)


@attrs.define(eq=False)
class Strategies:
    """Turn what policies say about order into functions; keep what they learn."""

    prices: PriceTable | None
    clock: Callable[[], float]
    """Seconds since the epoch."""
    source: Random = random.random
    latencies: Latencies = attrs.field(factory=Latencies)

    def order_of(self, policy: RoutingPolicy, candidates: Sequence[Candidate]) -> Order | None:
        """Return what orders the candidates; None where they stay as they are."""
        if len(candidates) < 2 or policy.strategy == "ordered":
            return None
        if policy.strategy == "weighted":
            weights = _weights_of(policy)
            given = [weights.get(candidate.binding.id, 1) for candidate in candidates]
            return lambda: by_weight(candidates, given, self.source)
        if policy.strategy == "cost":
            return lambda: by_price(candidates, self.prices, self.clock())
        return lambda: self.latencies.order(candidates, monotonic_ns(), self.source)


def _weights_of(policy: RoutingPolicy) -> Mapping[str, int]:
    return {entry.binding_id: entry.weight for entry in policy.entries}


def _place(candidate: Candidate) -> Place:
    return candidate.binding.id, candidate.model


def _decay(elapsed_ns: int) -> float:
    return math.exp(-max(0, elapsed_ns) / (DECAY_SECONDS * 1e9))
