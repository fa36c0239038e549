"""The breaker by itself: bytes of nobody, any order of events, against what the specification says of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock_plugins.fallback.breaker import Breaker, Thresholds
from penstock_plugins.fallback.plugin import Breakers

FEW = Thresholds(failures=3, window_seconds=30.0, open_seconds=60.0)


def opened(at: float = 0.0) -> Breaker:
    breaker = Breaker()
    assert [breaker.fail(at, at, FEW) for _ in range(3)] == [False, False, True]
    return breaker


def test_failures_within_the_window_open_it_and_only_they() -> None:
    breaker = Breaker()
    assert not breaker.fail(0, 0, FEW)
    assert not breaker.fail(29, 29, FEW)
    assert not breaker.fail(31, 31, FEW)  # the first is 31 s old
    assert breaker.state(31, FEW) == "closed"
    assert breaker.fail(58, 58, FEW)
    assert breaker.state(58, FEW) == "open"


def test_open_breaker_lets_nobody_through_and_says_for_how_long() -> None:
    breaker = opened()
    assert not breaker.admit(59.9, FEW, "a")
    assert breaker.wait(15, FEW) == 45
    assert breaker.state(60, FEW) == "half_open"


def test_half_open_breaker_lets_one_through_at_a_time() -> None:
    breaker = opened()
    assert breaker.admit(60, FEW, "a")
    assert not breaker.admit(61, FEW, "b")
    breaker.judge_probe("neutral", 62)
    assert breaker.admit(62, FEW, "b")


def test_answered_probe_closes_it_with_a_clean_sheet() -> None:
    breaker = opened()
    assert breaker.admit(60, FEW, "a")
    breaker.judge_probe("answered", 61)
    assert breaker.state(61, FEW) == "closed"
    assert not breaker.fail(61, 61, FEW)
    assert not breaker.fail(62, 62, FEW)


def test_failed_probe_opens_it_for_as_long_again() -> None:
    breaker = opened()
    assert breaker.admit(70, FEW, "a")
    breaker.judge_probe("failed", 71)
    assert breaker.state(130, FEW) == "open"
    assert breaker.state(131, FEW) == "half_open"


def test_failure_that_began_before_it_closed_does_not_count() -> None:
    breaker = opened()
    breaker.admit(60, FEW, "a")
    breaker.judge_probe("answered", 61)
    assert [breaker.fail(5, 70, FEW) for _ in range(10)] == [False] * 10
    assert breaker.recent(70, FEW) == 0


@pytest.mark.parametrize("now", [1.0, 61.0])
def test_failure_that_is_no_probe_changes_nothing_while_it_is_not_closed(now: float) -> None:
    breaker = opened()
    assert not breaker.fail(now, now, FEW)
    assert (breaker.opened_at, len(breaker.failures)) == (0.0, 3)


@given(st.lists(st.floats(0, 20), max_size=60), st.integers(1, 12), st.floats(1, 60))
def test_it_opens_exactly_when_enough_failures_lie_within_the_window(
    gaps: list[float], failures: int, window: float
) -> None:
    thresholds = Thresholds(failures, window, 60.0)
    breaker, now, times = Breaker(), 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        expected = len(times) >= failures and now - times[-failures] <= window
        assert breaker.fail(now, now, thresholds) is expected
        assert len(breaker.failures) <= failures
        if expected:
            break
    assert all(before <= after for before, after in pairwise(breaker.failures))


class BreakerMachine(RuleBasedStateMachine):
    """Any traffic: nobody is let through while it is open, one at most while it is half-open, and it ends closed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.breaker = Breaker()
        self.probe: object | None = None
        self.number = 0

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def ask(self) -> None:
        self.number += 1
        state = self.breaker.state(self.now, FEW)
        is_admitted = self.breaker.admit(self.now, FEW, self.number)
        assert is_admitted == (state == "closed" or (state == "half_open" and self.probe is None))
        if is_admitted and state == "half_open":
            self.probe = self.number

    @rule(age=st.floats(0, 100))
    def fail(self, age: float) -> None:
        was_open = self.breaker.opened_at is not None
        if self.breaker.fail(self.now - age, self.now, FEW):
            assert not was_open

    @precondition(lambda self: self.probe is not None)
    @rule(outcome=st.sampled_from(["answered", "failed", "neutral"]))
    def judge(self, outcome: str) -> None:
        self.breaker.judge_probe(outcome, self.now)  # type: ignore[arg-type]
        self.probe = None
        expected = {"answered": "closed", "failed": "open", "neutral": "half_open"}[outcome]
        assert self.breaker.state(self.now, FEW) == expected

    @invariant()
    def probe_is_known(self) -> None:
        assert self.breaker.probe == self.probe
        assert len(self.breaker.failures) <= FEW.failures

    @invariant()
    def recovers(self) -> None:
        later = self.now + FEW.open_seconds
        assert self.breaker.state(later, FEW) in ("closed", "half_open")


TestBreakerMachine = BreakerMachine.TestCase


def test_breakers_that_say_nothing_are_forgotten_and_those_that_are_open_kept() -> None:
    breakers = Breakers()
    for number in range(20_000):
        breakers.of(f"gpc_{number}", float(number), FEW).fail(number, number, FEW)
    for _ in range(3):
        breakers.of("gpc_bad", 20_000.0, FEW).fail(20_000, 20_000, FEW)
    for number in range(20_000, 40_000):
        breakers.of(f"gpc_{number}", float(number), FEW).fail(number, number, FEW)
    assert len(breakers.by_binding) <= 1001
    assert breakers.by_binding["gpc_bad"].opened_at == 20_000
