"""Checks of Counters."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import anyio

from penstock.governance import Claim, Counters, Exceeded, Reservation

Open = Callable[[], AbstractAsyncContextManager[Counters]]
_PERIOD = int(time.time()) // 86_400 * 86_400


async def check_counters(open_counters: Open) -> None:
    """Check what ``open_counters`` opens: each time another process's counters, on the same store.

    Raises AssertionError.
    """
    async with open_counters() as counters:
        await _check_one(counters)
        await _check_all_or_none(counters)
        await _check_periods(counters)
        await _check_cancelled(counters)
    for processes in (2, 3):
        await _check_shared(open_counters, processes)


async def reserve(counters: Counters, *claims: Claim) -> Reservation | Exceeded:
    """Reserve, and wait where the implementation has to."""
    answer = counters.reserve(claims)
    return await answer if inspect.isawaitable(answer) else answer


async def _granted(counters: Counters, *claims: Claim) -> Reservation:
    answer = await reserve(counters, *claims)
    assert not isinstance(answer, Exceeded), f"{claims} fit, and were refused: {answer}"
    return answer


async def _refused(counters: Counters, *claims: Claim) -> Exceeded:
    answer = await reserve(counters, *claims)
    assert isinstance(answer, Exceeded), f"{claims} do not fit, and were granted"
    return answer


def _claim(name: str, amount: int, limit: int | None, period: int = _PERIOD, *, at_limit: bool = False) -> Claim:
    return Claim(f"rpm:{name}", period, amount, limit, refuses_at_limit=at_limit)


async def _check_one(counters: Counters) -> None:
    first = await _granted(counters, _claim("one", 6, 10))
    exceeded = await _refused(counters, _claim("one", 5, 10))
    assert exceeded.claim.amount == 5, "the claim that did not fit is named"
    assert (exceeded.used, exceeded.settled) == (6, 0), "what is reserved is used, and not settled"
    second = await _granted(counters, _claim("one", 4, 10))
    counters.settle(first, {"rpm:one": 2})
    counters.settle(first, {"rpm:one": 2})
    assert counters.used("rpm:one", _PERIOD) == 2, "settling twice counts once"
    third = await _granted(counters, _claim("one", 4, 10))
    await _refused(counters, _claim("one", 1, 10))
    counters.settle(second)
    counters.settle(third, {"rpm:other": 9})
    assert counters.used("rpm:one", _PERIOD) == 2, "what is not among the amounts was not used"
    over = await _granted(counters, _claim("one", 8, 10))
    counters.settle(over, {"rpm:one": 20})
    assert counters.used("rpm:one", _PERIOD) == 22, "what was used counts in full, beyond its estimate too"
    await _refused(counters, _claim("one", 0, 10, at_limit=True))
    counters.settle(await _granted(counters, _claim("one", 0, 10)))
    counters.settle(await _granted(counters, _claim("one", 5, None)), {"rpm:one": 5})
    counters.settle(await _granted(counters, _claim("one", 5, 40)))
    assert counters.used("rpm:one", _PERIOD) == 27, "a counter without a limit counts"


async def _check_all_or_none(counters: Counters) -> None:
    exceeded = await _refused(counters, _claim("a", 5, 10), _claim("b", 11, 10), _claim("c", 5, 10))
    assert exceeded.claim.counter == "rpm:b", "the claim that did not fit is named"
    for name in "abc":
        counters.settle(await _granted(counters, _claim(name, 10, 10)))
    held = await _granted(counters, _claim("a", 1, 10), _claim("b", 2, 10))
    assert [claim.amount for claim in held.claims] == [1, 2], "a reservation has its claims"
    counters.settle(held, {"rpm:a": 1, "rpm:b": 1})
    assert (counters.used("rpm:a", _PERIOD), counters.used("rpm:b", _PERIOD)) == (1, 1), "each settles its own amount"


async def _check_periods(counters: Counters) -> None:
    late = await _granted(counters, _claim("p", 10, 10))
    following = await _granted(counters, _claim("p", 10, 10, _PERIOD + 60))
    counters.settle(late, {"rpm:p": 7})
    assert counters.used("rpm:p", _PERIOD) == 7, "an exchange counts in the period it began in"
    assert counters.used("rpm:p", _PERIOD + 60) == 0, "a period starts from nothing"
    counters.settle(following)
    assert counters.used("rpm:unknown", _PERIOD) == 0, "nothing is used of what nobody claimed"


async def _check_cancelled(counters: Counters) -> None:
    with anyio.move_on_after(0):
        answer = counters.reserve([Claim("budget:conformance-cancelled", _PERIOD, 10, 10, is_durable=True)])
        if inspect.isawaitable(answer):
            await answer
        else:
            assert not isinstance(answer, Exceeded)
            counters.settle(answer)
    claim = Claim("budget:conformance-cancelled", _PERIOD, 10, 10, is_durable=True)
    counters.settle(await _granted(counters, claim))


async def _check_shared(open_counters: Open, processes: int) -> None:
    limit = 100
    async with AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(open_counters()) for _ in range(processes)]
        granted: list[tuple[Counters, Reservation]] = []

        async def take(counters: Counters) -> None:
            while not isinstance(answer := await reserve(counters, _claim(f"shared{processes}", 1, limit)), Exceeded):
                granted.append((counters, answer))

        async with anyio.create_task_group() as tasks:
            for counters in opened * 2:
                tasks.start_soon(take, counters)
        assert len(granted) == limit, f"{processes} processes were granted {len(granted)} of {limit}"
        for counters, reservation in granted:
            counters.settle(reservation)
        # What one process gave back is there for another, whole.
        whole = await _granted(opened[-1], _claim(f"shared{processes}", limit, limit))
        opened[-1].settle(whole, {f"rpm:shared{processes}": limit})
        await _refused(opened[0], _claim(f"shared{processes}", 1, limit))
        with anyio.fail_after(2):
            while opened[0].used(f"rpm:shared{processes}", _PERIOD) != limit:  # noqa: ASYNC110 - there is no event for it
                await anyio.sleep(0.02)
