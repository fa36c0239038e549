"""Counters on the bundled store: exact in memory, exact among several, whatever order things happen in."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting_process import COUNTER, START, accounting, make_entry, money, reserved
from penstock.governance import Claim, Counters, Debit, Exceeded, Reservation
from penstock.testing.conformance.counters import check_counters
from penstock_plugins.store.accounts import Account
from penstock_plugins.store.counters import MemoryCounters

pytestmark = pytest.mark.anyio


async def test_counters_conform(tmp_path: Path) -> None:
    @asynccontextmanager
    async def open_counters() -> AsyncIterator[Counters]:
        async with accounting(tmp_path / "penstock.db") as accounts:
            yield accounts.counters

    await check_counters(open_counters)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("reserve", "settle")),
        st.integers(0, 12),
        st.integers(0, 12),
        st.sampled_from((START, START + 60)),
        st.sampled_from((0, 5, 20, 30)),
    ),
    max_size=60,
)


@given(STEPS)
def test_claim_is_granted_exactly_where_it_fits(steps: list[tuple[str, int, int, int, int]]) -> None:
    counters = MemoryCounters(lambda: None)
    open_: list[tuple[Reservation, int, int]] = []
    settled = {START: 0, START + 60: 0}
    for step, amount, used, period, limit in steps:
        if step == "settle" and open_:
            reservation, _, of_period = open_.pop(amount % len(open_))
            counters.settle(reservation, {"rpm:a": used})
            settled[of_period] += used
        elif step == "reserve":
            held = sum(each for _, each, of_period in open_ if of_period == period)
            answer = counters.reserve([Claim("rpm:a", period, amount, limit), Claim("rpm:b", 0, 1, None)])
            assert not inspect.isawaitable(answer)
            fits = not amount or settled[period] + held + amount <= limit
            assert isinstance(answer, Exceeded) != fits
            if not isinstance(answer, Exceeded):
                open_.append((answer, amount, period))
        assert {period: counters.used("rpm:a", period) for period in settled} == settled


async def test_unknown_durable_counter_waits_once(tmp_path: Path) -> None:
    async with accounting(tmp_path / "penstock.db") as accounts:
        answer = accounts.counters.reserve([money(1, 10)])
        assert inspect.isawaitable(answer)
        first = await answer
        assert not isinstance(first, Exceeded)
        accounts.counters.settle(first)
        again = accounts.counters.reserve([money(1, 10)])
        assert not inspect.isawaitable(again)
        assert not isinstance(again, Exceeded)
        accounts.counters.settle(again)


async def test_durable_total_outlives_the_process(tmp_path: Path) -> None:
    for number in range(3):
        async with accounting(tmp_path / "penstock.db") as accounts:
            held = await reserved(accounts.counters, money(4, 10))
            if number == 2:
                assert held == Exceeded(money(4, 10), used=8, settled=8)
                return
            assert not isinstance(held, Exceeded)
            accounts.counters.settle(held, {COUNTER: 4})
            accounts.ledger.settle(make_entry(f"req_{number}", 4, COUNTER))


async def test_second_process_takes_over_what_the_first_has_counted(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    claim = Claim("rpd:vk_1", START, 3, 10)
    async with accounting(database) as first:
        held = await reserved(first.counters, claim)
        assert not isinstance(held, Exceeded)
        first.counters.settle(held, {"rpd:vk_1": 3})
        async with accounting(database) as second:
            assert second.counters.is_shared
            assert await reserved(second.counters, Claim("rpd:vk_1", START, 8, 10)) == Exceeded(
                Claim("rpd:vk_1", START, 8, 10), used=3, settled=3
            )
            held = await reserved(second.counters, Claim("rpd:vk_1", START, 7, 10))
            assert not isinstance(held, Exceeded)
            second.counters.settle(held, {"rpd:vk_1": 7})
        with anyio.fail_after(5):
            while first.counters.is_shared:  # noqa: ASYNC110 - there is no event for it
                await anyio.sleep(0.02)
        assert first.counters.used("rpd:vk_1", START) == 10
        assert isinstance(first.counters.reserve([Claim("rpd:vk_1", START, 1, 10)]), Exceeded)


async def test_lowered_limit_holds_for_what_is_leased_already(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as first, accounting(database) as second:
        for accounts in (first, second):
            held = await reserved(accounts.counters, money(1, 1000))
            assert not isinstance(held, Exceeded)
        assert isinstance(await reserved(second.counters, money(9, 10)), Exceeded)
        assert not isinstance(await reserved(first.counters, money(8, 10)), Exceeded)
        assert isinstance(await reserved(second.counters, money(1, 10)), Exceeded)
        assert not isinstance(await reserved(second.counters, money(1, 11)), Exceeded)


async def test_correction_frees_money_at_once(tmp_path: Path) -> None:
    async with accounting(tmp_path / "penstock.db") as accounts:
        held = await reserved(accounts.counters, money(10, 10))
        assert not isinstance(held, Exceeded)
        accounts.counters.settle(held, {COUNTER: 10})
        accounts.ledger.settle(make_entry("req_1", 10, COUNTER))
        await accounts.ledger.flush()
        await accounts.reader.adjust(make_entry("req_2", -6, adjusts="req_1", usage=None))
        assert accounts.counters.used(COUNTER, START) == 4
        assert not isinstance(accounts.counters.reserve([money(6, 10)]), Exceeded)


async def test_counters_of_past_periods_and_idle_ones_are_forgotten() -> None:
    counters = MemoryCounters(lambda: None)
    for minute in range(100):
        held = counters.reserve([Claim("rpm:a", START + 60 * minute, 1, 10)])
        counters.settle(held, {"rpm:a": 1})  # type: ignore[arg-type]
    assert len(counters.accounts) == 2
    for number in range(50):
        counters.settle(counters.reserve([Claim(f"concurrency:{number}", 0, 1, 10)]))  # type: ignore[arg-type]
    for _ in range(20):
        counters.look_for_idle()
    assert {account.name[0] for account in counters.accounts.values()} == {"rpm:a"}


def test_account_that_holds_something_is_kept() -> None:
    account = Account(("a", 0), is_durable=False, is_known=True)
    account.reserved = 1
    assert not account.is_free
    assert Debit(counter="a", period=0, reserved=1).reserved == account.held
