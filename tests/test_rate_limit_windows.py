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
from penstock_plugins.rate_limits.bounds import MINUTE_MS, room, wait_ms
from penstock_plugins.rate_limits.plugin import FEW_BOUNDS, HELD, RateLimiting, expected_tokens

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


async def admitted(setting: Setting, limiting: RateLimiting, key_id: str = "vk_1") -> Exchange | RequestError:
    exchange = sample_exchange(CHAT)
    exchange.principal = Principal(key_id, "one", "ps_vk_test_01", rate_limits=setting.key)
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
    assert not any(bound.is_held for bound in limiting._bounds.values())
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


# --- what is weighed a few times a second only ------------------------------------------------------------------------


def should_fit(setting: Setting, exchange: Exchange) -> bool:
    """Say from the counters alone whether a request fits at this millisecond."""
    assert setting.key is not None
    now_ms = int(setting.now * 1000)
    minute = now_ms // MINUTE_MS * 60
    asked = {"rpm": (setting.key.rpm, 1), "tpm": (setting.key.tpm, expected_tokens(exchange) or 0)}
    for name, (limit, amount) in asked.items():
        if limit is not None:
            taken = [
                sum(
                    amounts.get((f"{name}:vk_1", start), 0)
                    for amounts in (setting.counters.settled, setting.counters.reserved)
                )
                for start in (minute, minute - 60)
            ]
            if taken[0] + max(1, min(amount, limit)) > room(limit, taken[1], now_ms % MINUTE_MS):
                return False
    return True


small_step = st.builds(
    Step,
    wait_ms=st.integers(0, 250) | st.sampled_from([0, 55_000, 60_000]),
    ends=st.none() | st.integers(0, 3),
    tokens=st.integers(0, 400),
    is_dialled=st.booleans(),
)
minute_limits = st.builds(RateLimits, rpm=st.none() | st.integers(0, 20), tpm=st.none() | st.integers(0, 1500))


@given(limits=minute_limits, steps=st.lists(small_step, max_size=80))
async def test_every_request_is_decided_by_what_is_left_at_its_millisecond(
    limits: RateLimits, steps: list[Step]
) -> None:
    setting, limiting = plugged(limits)
    under_way: list[Exchange] = []
    async with limiting.lifespan():
        for step in steps:
            setting.now += step.wait_ms / 1000
            if step.ends is None:
                fits = should_fit(setting, sample_exchange(CHAT))
                answer = await admitted(setting, limiting)
                assert isinstance(answer, Exchange) == fits
                if isinstance(answer, Exchange):
                    under_way.append(answer)
            elif step.ends < len(under_way):
                ended(limiting, under_way.pop(step.ends), step.tokens, is_dialled=step.is_dialled)


async def test_minute_s_turn_is_weighed_at_the_millisecond_for_whoever_would_be_refused() -> None:
    setting, limiting = plugged(RateLimits(rpm=10))
    async with limiting.lifespan():
        setting.now = MIDNIGHT + 59.0
        for _ in range(10):
            answer = await admitted(setting, limiting)
            assert isinstance(answer, Exchange)
            ended(limiting, answer)
        setting.now = MIDNIGHT + 65.99
        assert isinstance(await admitted(setting, limiting), RequestError)
        setting.now = MIDNIGHT + 66.0
        assert isinstance(await admitted(setting, limiting), Exchange)


async def test_tokens_beyond_the_estimate_of_the_minute_before_weigh_at_once() -> None:
    setting, limiting = plugged(RateLimits(tpm=1000))
    async with limiting.lifespan():
        setting.now = MIDNIGHT + 59.0
        long = await admitted(setting, limiting)
        setting.now = MIDNIGHT + 60.0
        assert isinstance(await admitted(setting, limiting), Exchange)
        assert isinstance(long, Exchange)
        ended(limiting, long, tokens=1000)
        assert isinstance(await admitted(setting, limiting), RequestError)


async def test_changed_limits_hold_at_once_and_what_is_under_way_still_counts() -> None:
    setting, limiting = plugged(RateLimits(rpm=9, concurrency=5))
    async with limiting.lifespan():
        under_way = [await admitted(setting, limiting) for _ in range(3)]
        setting.key = RateLimits(rpm=3)
        assert isinstance(await admitted(setting, limiting), RequestError)
        setting.key = RateLimits(rpm=4)
        under_way.append(await admitted(setting, limiting))
        for exchange in under_way:
            assert isinstance(exchange, Exchange)
            ended(limiting, exchange)
    assert setting.counters.left == {}
    assert setting.counters.used("rpm:vk_1", MIDNIGHT + 3600) == 4


async def test_keys_nobody_uses_are_forgotten_and_those_that_hold_something_are_not() -> None:
    setting, limiting = plugged(RateLimits(rpm=9))
    async with limiting.lifespan():
        stream = await admitted(setting, limiting)
        for number in range(5 * FEW_BOUNDS):
            setting.now += 1
            answer = await admitted(setting, limiting, f"vk_{number + 2}")
            assert isinstance(answer, Exchange)
            ended(limiting, answer)
        assert len(limiting._bounds) <= FEW_BOUNDS
        assert limiting._bounds["vk_1"].is_held
        assert isinstance(stream, Exchange)
        ended(limiting, stream)
    assert setting.counters.left == {}
