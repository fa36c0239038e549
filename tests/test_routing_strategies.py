"""In which order a routing policy has its candidates asked: distributions, what is learnt of latencies, prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Attempt, Candidate, OpenAIProvider, ProviderBinding
from penstock.governance import Price, Rates
from penstock.governance.objects import PolicyEntry, RoutingPolicy
from penstock_plugins.routing.strategies import (
    DECAY_SECONDS,
    FAILURE_SECONDS,
    REMEMBERED_LATENCIES,
    Latencies,
    Strategies,
    by_price,
    by_weight,
)

SECOND = 1_000_000_000
NOW = 1_000 * SECOND
Strategy = Literal["ordered", "weighted", "least_latency", "cost"]


def candidate(name: str, model: str = "m") -> Candidate:
    return Candidate(ProviderBinding(name, name, "openai", ""), OpenAIProvider(type="openai"), model)


A, B, C = candidate("a"), candidate("b"), candidate("c")


def names(order: Sequence[Candidate]) -> str:
    return "".join(found.binding.id for found in order)


# --- weighted -------------------------------------------------------------------------------------------------------


def test_first_is_drawn_by_weight_and_the_rest_by_theirs() -> None:
    source = Random(4).random
    drawn = Counter(names(by_weight([A, B, C], [6, 3, 1], source)) for _ in range(20_000))
    # P(abc) = 6/10 · 3/4 and so on: without replacement.
    expected = {"abc": 0.45, "acb": 0.15, "bac": 0.3 * 6 / 7, "bca": 0.3 / 7, "cab": 0.1 * 6 / 9, "cba": 0.1 * 3 / 9}
    assert {order: round(count / 20_000, 2) for order, count in drawn.items()} == pytest.approx(expected, abs=0.015)


def test_weight_of_zero_is_last_in_its_order() -> None:
    source = Random(1).random
    assert {names(by_weight([A, B, C], [0, 1, 0], source)) for _ in range(50)} == {"bac"}
    assert {names(by_weight([A, B, C], [0, 0, 0], source)) for _ in range(50)} == {"abc"}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_every_candidate_is_drawn_once(weights: list[int], source: Random) -> None:
    candidates = [candidate(str(number)) for number in range(len(weights))]
    assert sorted(names(by_weight(candidates, weights, source.random))) == sorted(names(candidates))


# --- least_latency --------------------------------------------------------------------------------------------------


def test_slower_counts_at_once_and_faster_little_by_little() -> None:
    latencies, place = Latencies(), ("a", "m")
    latencies.observe(place, 0.1, NOW)
    latencies.observe(place, 3.0, NOW)
    assert latencies.cost(place, NOW) == 3.0
    latencies.observe(place, 0.1, NOW + SECOND)
    assert 2.5 < latencies.cost(place, NOW + SECOND) < 3.0
    for second in range(2, 60):
        latencies.observe(place, 0.1, NOW + second * SECOND)
    assert latencies.cost(place, NOW + 60 * SECOND) < 0.12


def test_what_is_not_asked_decays_and_is_asked_again_by_one_exchange() -> None:
    latencies, source = Latencies(), Random(2).random
    latencies.observe(("a", "m"), 0.5, NOW)
    latencies.observe(("b", "m"), 2.0, NOW)
    assert names(latencies.order([A, B], NOW, source)) == "ab"
    later = NOW + int(2 * DECAY_SECONDS * SECOND)
    latencies.observe(("a", "m"), 0.5, later)
    assert [names(latencies.order([A, B], later, source)) for _ in range(4)] == ["ba", "ab", "ab", "ab"]


def test_unknown_candidate_is_asked_first_and_by_one_exchange_until_it_answers() -> None:
    latencies, source = Latencies(), Random(2).random
    latencies.observe(("a", "m"), 0.5, NOW)
    assert [names(latencies.order([A, B], NOW, source)) for _ in range(3)] == ["ba", "ab", "ab"]
    latencies.observe(("b", "m"), 0.1, NOW)
    assert latencies.cost(("b", "m"), NOW) == 0.1
    assert names(latencies.order([A, B], NOW, source)) == "ba"


def test_faster_of_two_random_ones_is_first_and_the_slowest_never() -> None:
    latencies, source = Latencies(), Random(3).random
    for place, seconds in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
        latencies.observe((place, "m"), seconds, NOW)
    drawn = Counter(names(latencies.order([C, B, A], NOW, source)) for _ in range(6_000))
    assert set(drawn) == {"abc", "bac"}
    assert drawn["abc"] / 6_000 == pytest.approx(2 / 3, abs=0.03)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_holds_every_candidate_once_and_the_rest_by_cost(seconds: list[float], source: Random) -> None:
    latencies = Latencies()
    candidates = [candidate(str(number)) for number in range(len(seconds))]
    for number, each in enumerate(seconds):
        latencies.observe((str(number), "m"), each, NOW)
    order = names(latencies.order(candidates, NOW, source.random))
    assert sorted(order) == sorted(names(candidates))
    rest = [seconds[int(name)] for name in order[1:]]
    assert rest == sorted(rest)


def attempt(took: float, status: int | None = None, reason: str | None = None, *, is_skipped: bool = False) -> Attempt:
    made = Attempt(0, "a", "openai", "m", b"", NOW, NOW + int(took * SECOND), status, reason)
    made.is_skipped = is_skipped
    return made


@pytest.mark.parametrize(
    ("made", "cost"),
    [
        (attempt(0.25, 200), 0.25),
        (attempt(0.01, 400), 0.0),
        (attempt(0.01, 503, "status"), FAILURE_SECONDS),
        (attempt(0.01, None, "connect"), FAILURE_SECONDS),
        (attempt(30, None, "timeout"), 30),
        (attempt(2, None, "client_gone"), 2),
        (attempt(0.01, None, "rate_limit_exceeded", is_skipped=True), 0.0),
    ],
)
def test_attempt_counts_as(made: Attempt, cost: float) -> None:
    latencies = Latencies()
    latencies.measure([made])
    assert latencies.cost(("a", "m"), made.ended_ns) == cost


def test_client_that_left_early_says_nothing() -> None:
    latencies = Latencies()
    latencies.observe(("a", "m"), 1.0, NOW)
    latencies.measure([attempt(0.001, None, "client_gone")])
    assert latencies.cost(("a", "m"), NOW) == 1.0


def test_only_so_many_latencies_are_remembered() -> None:
    latencies = Latencies()
    for number in range(REMEMBERED_LATENCIES + 1):
        latencies.observe(("a", str(number)), 1.0, NOW)
    assert latencies.cost(("a", "0"), NOW) == 0.0
    assert latencies.cost(("a", "1"), NOW) == 1.0


# --- cost -----------------------------------------------------------------------------------------------------------


class Table:
    """Prices by type and model, USD per million tokens, input and output."""

    unknown = "zero_and_flag"

    def __init__(self, **prices: tuple[int, int]) -> None:
        self.prices = prices
        self.asked: list[tuple[str, str, float, str]] = []

    def find(self, provider: str, model: str, at: float, *, base_url: str = "") -> Price | None:
        self.asked.append((provider, model, at, base_url))
        found = self.prices.get(model)
        rates = found and Rates(input=found[0] * SECOND, output=found[1] * SECOND)
        return Price(rates=rates, version="test") if rates else None

    def estimate(self, provider: str) -> Price | None:
        raise AssertionError(f"{provider}: what stands in for a price is no price")


def test_cheapest_is_first_and_unknown_last() -> None:
    table = Table(dear=(3, 15), cheap=(1, 2), free=(0, 0))
    order = [
        candidate("u", "unknown"), candidate("d", "dear"), candidate("c", "cheap"), candidate("f", "free"),
        candidate("v", "other"),
    ]  # fmt: skip
    assert names(by_price(order, table, 7.0)) == "fcduv"  # type: ignore[arg-type]
    assert names(by_price(order, None, 7.0)) == "udcfv"
    assert table.asked[0] == ("openai", "unknown", 7.0, "")


def test_prices_are_compared_by_three_input_tokens_to_one_of_output() -> None:
    table = Table(talk=(1, 4), listen=(2, 2))  # 7 against 8
    assert names(by_price([candidate("l", "listen"), candidate("t", "talk")], table, 0)) == "tl"  # type: ignore[arg-type]


# --- what a policy says ---------------------------------------------------------------------------------------------


def policy(strategy: Strategy) -> RoutingPolicy:
    entries = (PolicyEntry(binding_id="a", weight=1), PolicyEntry(binding_id="b", weight=0))
    return RoutingPolicy(name="p", scope_id="org_1", strategy=strategy, entries=entries)


def test_order_is_made_where_there_is_something_to_order() -> None:
    strategies = Strategies(None, lambda: 0.0, Random(5).random)
    assert strategies.order_of(policy("ordered"), [A, B]) is None
    assert strategies.order_of(policy("weighted"), [A]) is None
    by_weights = strategies.order_of(policy("weighted"), [B, A])
    assert by_weights is not None
    assert {names(by_weights()) for _ in range(20)} == {"ab"}
    by_latency = strategies.order_of(policy("least_latency"), [A, B])
    assert by_latency is not None
    assert sorted(names(by_latency())) == ["a", "b"]
