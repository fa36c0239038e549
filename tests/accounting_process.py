"""A process of its own that counts and keeps the ledger, for the tests that need several, or kill one.

python tests/accounting_process.py spend <database> <name> <limit> <amount> <at once>
python tests/accounting_process.py load <database> <name>
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from penstock import Usage
from penstock.governance import Claim, Debit, Exceeded, Intent, LedgerEntry, Reservation
from penstock_plugins.store.accounting import Accounting, open_accounting
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.schema import migrate

START = int(time.time()) // 86_400 * 86_400
"""When the exchanges of tests began: the day, seconds since the epoch."""
COUNTER = "budget:bud_shared"


def make_entry(request_id: str, cost: int = 5, *debits: str, **changes: Any) -> LedgerEntry:
    """Return an entry charged to the counters named."""
    values = {
        "request_id": request_id, "started_at_ns": START * 1_000_000_000, "duration_ns": 1_000_000,
        "organization_id": "org_1", "team_id": "team_1", "project_id": "proj_1", "virtual_key_id": "vk_1",
        "principal_id": "user_1", "end_user": None, "binding_id": "gpc_1", "provider": "openai",
        "model_asked": "gpt-5-mini", "model_served": "gpt-5-mini", "usage": Usage(input=3, output=4),
        "cost_nano_usd": cost, "cost_source": "priced", "price_version": "test 2026-11-01", "status": 200,
        "outcome": "success", "error": None, "is_stream": False, "fallback_count": 0,
        "debits": tuple(Debit(counter=name, period=START, reserved=cost) for name in debits),
    }  # fmt: skip
    return LedgerEntry(**{**values, **changes})


def make_intent(request_id: str, estimate: int = 5, *debits: str, **changes: Any) -> Intent:
    """Return an intent charged to the counters named."""
    values = {
        "request_id": request_id, "started_at_ns": START * 1_000_000_000, "organization_id": "org_1",
        "team_id": "team_1", "project_id": "proj_1", "virtual_key_id": "vk_1", "principal_id": "user_1",
        "end_user": None, "binding_id": "gpc_1", "provider": "openai", "model_asked": "gpt-5-mini",
        "model_served": "gpt-5-mini", "estimate_nano_usd": estimate,
        "debits": tuple(Debit(counter=name, period=START, reserved=estimate) for name in debits),
    }  # fmt: skip
    return Intent(**{**values, **changes})


def money(amount: int, limit: int | None, counter: str = COUNTER, period: int = START) -> Claim:
    """Return a claim on a durable counter."""
    return Claim(counter, period, amount, limit, is_durable=True, refuses_at_limit=True)


async def reserved(counters: MemoryCounters, *claims: Claim) -> Reservation | Exceeded:
    """Reserve, and wait where that takes waiting."""
    answer = counters.reserve(claims)
    return await answer if inspect.isawaitable(answer) else answer


@asynccontextmanager
async def accounting(database: Path) -> AsyncIterator[Accounting]:
    """Open ledger and counters on a database that is made where there is none."""
    async with Database(f"sqlite:///{database}") as opened:
        await anyio.to_thread.run_sync(migrate, opened)
        async with open_accounting(opened, Path(f"{database}.journal")) as found:
            yield found


def say(line: str) -> None:
    """Tell whoever started this process."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def spend(database: Path, name: str, limit: int, amount: int, at_once: int) -> None:
    """Reserve and settle, several at once, until nothing is left; print what was granted and how long refusals took."""
    granted = 0
    numbers = itertools.count()
    refusals: list[float] = []

    async def one(accounts: Accounting) -> None:
        nonlocal granted
        while True:
            began = time.perf_counter()
            answer = await reserved(accounts.counters, money(amount, limit))
            if isinstance(answer, Exceeded):
                refusals.append(time.perf_counter() - began)
                return
            request_id = f"{name}-{next(numbers)}"
            accounts.ledger.open(make_intent(request_id, amount, COUNTER))
            await anyio.lowlevel.checkpoint()
            granted += amount
            accounts.counters.settle(answer, {COUNTER: amount})
            accounts.ledger.settle(make_entry(request_id, amount, COUNTER))

    async with accounting(database) as accounts:
        say("ready")
        await anyio.to_thread.run_sync(sys.stdin.readline)
        async with anyio.create_task_group() as tasks:
            for _ in range(at_once):
                tasks.start_soon(one, accounts)
        say(json.dumps({"granted": granted, "refusals": refusals}))
        await anyio.to_thread.run_sync(sys.stdin.readline)


async def load(database: Path, name: str) -> None:
    """Open and settle exchanges for ever, saying of each what is durable by then: until somebody kills it."""
    numbers = itertools.count()

    async def one(accounts: Accounting, keeps_open: bool) -> None:
        while True:
            request_id = f"{name}-{next(numbers)}"
            answer = await reserved(accounts.counters, money(7, 10**15), Claim("concurrency:vk_1", 0, 1, 10_000))
            assert not isinstance(answer, Exceeded)
            accounts.ledger.open(make_intent(request_id, 7, COUNTER))
            say(f"opened {request_id}")
            await anyio.sleep(30 if keeps_open else 0.001)
            accounts.counters.settle(answer, {COUNTER: 5})
            accounts.ledger.settle(make_entry(request_id, 5, COUNTER))
            say(f"settled {request_id}")

    async with accounting(database) as accounts:
        say("ready")
        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(one, accounts, number == 0)


def main() -> None:
    """Do as the command line says."""
    mode, database, name, *numbers = sys.argv[1:]
    if mode == "spend":
        asyncio.run(spend(Path(database), name, *(int(number) for number in numbers)))
    else:
        asyncio.run(load(Path(database), name))


if __name__ == "__main__":
    main()
