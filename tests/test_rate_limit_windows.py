"""What sliding minutes promise, for any traffic: exact waits, no burst around the turn of a minute, nothing leaked."""

from __future__ import annotations

import itertools
import math

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from counting import MIDNIGHT, MemoryCounters, Setting
from penstock import Attempt, Exchange, Principal, RateLimits, RequestError, Services, Usage
from penstock.testing import SAMPLES, sample_exchange
from penstock_plugins.rate_limits import HELD, MINUTE_MS, RateLimiting, room, wait_ms

pytestmark = pytest.mark.anyio
CHAT = next(sample for sample in SAMPLES if sample.path == "/v1/chat/completions" and not sample.is_stream)


def fits(limit: int, amount: int, used: int, previous: int, elapsed_ms: int) -> bool:
    """Say whether an amount fits, ``elapsed_ms`` after the start of the minute that ``used`` belongs to."""
    minutes, rest = divmod(elapsed_ms, MINUTE_MS)
    now, before = [(used, previous), (0, used), (0, 0)][min(minutes, 2)]
    return now + amount <= room(limit, before, rest)


@given(
    limit=st.integers(1, 1000),
    amount=st.integers(1, 1000),
    used=st.integers(0, 1500),
    previous=st.integers(0, 1500),
    elapsed_ms=st.integers(0, MINUTE_MS - 1),
)
def test_wait_is_exact_to_the_millisecond(limit: int, amount: int, used: int, previous: int, elapsed_ms: int) -> None:
    amount = min(amount, limit)
    wait = wait_ms(limit, amount, used, previous, elapsed_ms)
    assert fits(limit, amount, used, previous, elapsed_ms + wait)
    assert wait == 0 or not fits(limit, amount, used, previous, elapsed_ms + wait - 1)


def plugged(limits: RateLimits) -> tuple[Setting, RateLimiting]:
    services = Services()
    setting = Setting(services, key=limits)
    return setting, RateLimiting(services)


async def admitted(setting: Setting, limiting: RateLimiting) -> Exchange | RequestError:
    exchange = sample_exchange(CHAT)
    exchange.principal = Principal("vk_1", "one", "ps_vk_test_01", rate_limits=setting.key)
    try:
        assert limiting.pre_request(exchange) is None
    except RequestError as refusal:
        exchange.error = refusal
        limiting.post_response(exchange)
        assert HELD not in exchange.state
        return refusal
    return exchange


def ended(limiting: RateLimiting, exchange: Exchange, tokens: int = 0, *, is_dialled: bool = True) -> None:
    if is_dialled:
        exchange.attempts.append(Attempt(0, "gpc_up", "mock", "m", b"0" * 16, 0))
    else:
        exchange.error = RequestError("permission_denied", "no")
    exchange.usage = Usage(output=tokens)
    limiting.post_response(exchange)


steps = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 12)), max_size=60)


@given(limit=st.integers(1, 12), steps=steps)
async def test_no_burst_passes_at_the_turn_of_a_minute(limit: int, steps: list[tuple[int, int]]) -> None:
    setting, limiting = plugged(RateLimits(rpm=limit))
    async with limiting.lifespan():
        passed = []
        for wait, count in steps:
            setting.now += wait / 1000
            for _ in range(count):
                answer = await admitted(setting, limiting)
                if isinstance(answer, Exchange):
                    passed.append(setting.now)
                    ended(limiting, answer)
        for first, last in itertools.combinations(range(len(passed)), 2):
            seconds = passed[last] - passed[first]
            if seconds <= 60:
                assert last - first + 1 <= limit * (1 + seconds / 60) + 1e-6


@given(limit=st.integers(1, 6), steps=st.lists(st.integers(0, 40_000), min_size=1, max_size=30))
async def test_whoever_comes_back_after_the_time_told_is_let_in(limit: int, steps: list[int]) -> None:
    setting, limiting = plugged(RateLimits(rpm=limit))
    async with limiting.lifespan():
        for wait in steps:
            setting.now += wait / 1000
            answer = await admitted(setting, limiting)
            while isinstance(answer, RequestError):
                seconds = int(dict(answer.fields)[b"retry-after"])
                setting.now += seconds - 1
                if seconds > 1:
                    assert isinstance(await admitted(setting, limiting), RequestError), "it was told to wait too long"
                setting.now += 1
                answer = await admitted(setting, limiting)
                assert isinstance(answer, Exchange), "it was told to come back too early"
            ended(limiting, answer)


@attrs.frozen
class Step:
    """One thing that happens: time passes, and a request comes or the n-th under way ends."""

    wait_ms: int
    ends: int | None
    tokens: int
    is_dialled: bool


any_step = st.builds(
    Step,
    wait_ms=st.integers(0, 45_000),
    ends=st.none() | st.integers(0, 5),
    tokens=st.integers(0, 300),
    is_dialled=st.booleans(),
)
any_limits = st.builds(
    RateLimits,
    rpm=st.none() | st.integers(0, 5),
    tpm=st.none() | st.integers(0, 500),
    rpd=st.none() | st.integers(0, 12),
    concurrency=st.none() | st.integers(0, 4),
)


@given(limits=any_limits, steps=st.lists(any_step, max_size=40))
async def test_whatever_happens_nothing_leaks_and_no_limit_is_passed(limits: RateLimits, steps: list[Step]) -> None:
    setting, limiting = plugged(limits)
    counters: MemoryCounters = setting.counters
    under_way: list[Exchange] = []
    used = 0
    async with limiting.lifespan():
        for step in steps:
            setting.now += step.wait_ms / 1000
            if step.ends is None:
                before = dict(counters.settled), counters.left
                answer = await admitted(setting, limiting)
                if isinstance(answer, Exchange):
                    under_way.append(answer)
                else:
                    assert (dict(counters.settled), counters.left) == before
            elif step.ends < len(under_way):
                ended(limiting, under_way.pop(step.ends), step.tokens, is_dialled=step.is_dialled)
                used += step.is_dialled
            assert len(under_way) <= (math.inf if limits.concurrency is None else limits.concurrency)
        for exchange in under_way:
            ended(limiting, exchange, is_dialled=False)
    assert counters.left == {}
    assert limiting._under_way == {}
    for (counter, _), amount in counters.settled.items():
        limit = getattr(limits, counter.partition(":")[0])
        assert amount <= limit or counter.startswith("tpm:")
    for name in ("rpm", "rpd"):
        total = sum(amount for (counter, _), amount in counters.settled.items() if counter.startswith(name))
        assert total == (0 if getattr(limits, name) is None else used)


async def test_requests_under_way_since_the_minute_before_weigh_too() -> None:
    setting, limiting = plugged(RateLimits(rpm=4))
    async with limiting.lifespan():
        setting.now = MIDNIGHT + 59.0
        streams = [await admitted(setting, limiting) for _ in range(4)]
        setting.now = MIDNIGHT + 61.0
        assert isinstance(await admitted(setting, limiting), RequestError)
        for stream in streams:
            assert isinstance(stream, Exchange)
            ended(limiting, stream)
        assert isinstance(await admitted(setting, limiting), RequestError)
