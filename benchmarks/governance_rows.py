"""Fill a ledger with rows and print what counting, committing and asking for usage cost.

    python benchmarks/governance_rows.py [--rows 1000000]

Needs nothing but this machine's disk.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import inspect
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread

from penstock import Usage
from penstock.governance import Claim, Debit, Exceeded, Intent, LedgerEntry, UsageQuery
from penstock_plugins.store.accounting import Accounting, open_accounting
from penstock_plugins.store.database import Database
from penstock_plugins.store.schema import migrate

DAY = 86_400
DAYS = 30
START = 1_790_000_000 // DAY * DAY
KEYS, MODELS, END_USERS = 200, 12, 2_000
BUDGETS = ("budget:bud_org", "budget:bud_project", "budget:bud_key")
USAGE_MS, PAGE_MS = 200, 50
IDS: dict[str, Any] = {
    "organization_id": "org_01",
    "team_id": "team_01",
    "principal_id": "user_01",
    "provider": "openai",
}


def make_entries(rows: int) -> list[LedgerEntry]:
    """Return exchanges of a month: each key uses two models, one in ten names its end user."""
    random_ = random.Random(1)
    entries = []
    for number in range(rows):
        key = min(int(random_.expovariate(0.02)), KEYS - 1)
        model = f"model-{(key + random_.randrange(2)) % MODELS}"
        entries.append(
            LedgerEntry(
                **IDS,
                request_id=f"req_{number:012x}{random_.getrandbits(72):018x}",  # in the order of time, as the gateway's
                started_at_ns=START * 10**9 + number * DAYS * DAY * 10**9 // rows,
                duration_ns=10**9,
                project_id=f"proj_{key % 20}",
                virtual_key_id=f"vk_{key}",
                end_user=f"user-{random_.randrange(END_USERS)}" if random_.random() < 0.1 else None,
                binding_id="gpc_01",
                model_asked=model,
                model_served=model,
                usage=Usage(input=random_.randrange(4000), cache_read=random_.randrange(4000), output=500),
                cost_nano_usd=random_.randrange(10**7),
                cost_source="priced",
                price_version="benchmark 2026-11-01",
                status=200,
                outcome="success",
                error=None,
                is_stream=bool(number % 2),
                fallback_count=0,
                debits=tuple(Debit(counter=name, period=START, reserved=10**7) for name in BUDGETS),
                tags=(f"tag-{key % 5}",),
            )
        )
    return entries


def intent_of(entry: LedgerEntry) -> Intent:
    """Return the intent of an exchange."""
    return Intent(
        **IDS,
        request_id=entry.request_id,
        started_at_ns=entry.started_at_ns,
        project_id=entry.project_id,
        virtual_key_id=entry.virtual_key_id,
        end_user=entry.end_user,
        binding_id="gpc_01",
        model_asked=entry.model_asked,
        model_served=entry.model_served,
        estimate_nano_usd=10**7,
        debits=entry.debits,
    )


async def measure_path(accounts: Accounting, entries: list[LedgerEntry]) -> None:
    """Print what the event loop pays for an exchange with three budgets, with the writer idle."""
    claims = [Claim(name, START, 10**7, 10**17, is_durable=True, refuses_at_limit=True) for name in BUDGETS]
    first = accounts.counters.reserve(claims)
    found = await first if inspect.isawaitable(first) else first
    assert not isinstance(found, Exceeded)
    accounts.counters.settle(found)
    intents = [intent_of(entry) for entry in entries]
    rounds: list[float] = []
    for start in range(0, len(entries), 500):
        part = list(zip(intents, entries, strict=True))[start : start + 500]
        began = time.perf_counter()
        for intent, entry in part:
            held = accounts.counters.reserve(claims)
            accounts.ledger.open(intent)
            accounts.counters.settle(held, dict.fromkeys(BUDGETS, entry.cost_nano_usd))  # type: ignore[arg-type]
            accounts.ledger.settle(entry)
        rounds.append((time.perf_counter() - began) / len(part) * 1e6)
        await accounts.ledger.flush()
    rounds.sort()
    print(f"reserve, open, settle, settle: {rounds[len(rounds) // 2]:.1f} us an exchange (min {rounds[0]:.1f})")


async def fill(accounts: Accounting, entries: list[LedgerEntry]) -> None:
    """Print what committing costs: wall time, and processor time of all threads."""
    began, used = time.perf_counter(), time.process_time()
    for start in range(0, len(entries), 5000):
        for entry in entries[start : start + 5000]:
            accounts.ledger.settle(entry)
        await accounts.ledger.flush()
    wall, processor = time.perf_counter() - began, time.process_time() - used
    print(
        f"settle and commit: {wall / len(entries) * 1e6:.0f} us a row, {processor / len(entries) * 1e6:.0f} us of CPU"
    )


async def measure(name: str, limit_ms: int, ask: Callable[[], Awaitable[Any]]) -> None:
    """Print the median of five, with the least and the greatest, and whether it keeps to a limit."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        found = await ask()
        times.append((time.perf_counter() - began) * 1e3)
    least, _, median, _, greatest = sorted(times)
    reached = "yes" if median <= limit_ms else "NO"
    print(
        f"{name + ',':<40} {len(found):>6} rows: {median:>4.0f} [{least:.0f}..{greatest:.0f}] ms, "
        f"to reach ≤ {limit_ms} ms: {reached}"
    )


async def ask(accounts: Accounting) -> None:
    """Print what questions cost."""
    month = {"since_ns": START * 10**9, "until_ns": (START + DAYS * DAY) * 10**9}
    queries: dict[str, dict[str, Any]] = {
        "month, all": {},
        "month by model": {"group_by": ("model",)},
        "month by key, model, tag": {"group_by": ("key", "model", "tag")},
        "days by model": {"group_by": ("model",), "bucket": "day"},
        "days in Kathmandu by model": {"group_by": ("model",), "bucket": "day", "timezone": "Asia/Kathmandu"},
        "days in New York by key, model": {
            "group_by": ("key", "model"), "bucket": "day", "timezone": "America/New_York",
        },
        "hours of the month by project": {"group_by": ("project",), "bucket": "hour"},
        "hours of a day by key": {
            "group_by": ("key",), "bucket": "hour", "since_ns": START * 10**9, "until_ns": (START + DAY) * 10**9,
        },
        "month of one key by end user": {"group_by": ("end_user",), "where": {"virtual_key_id": "vk_3"}},
        "month by end user": {"group_by": ("end_user",)},
    }  # fmt: skip
    for name, query in queries.items():
        asked = UsageQuery(**{**month, **query})
        await measure(f"usage, {name}", USAGE_MS, lambda asked=asked: accounts.reader.usage(asked))  # type: ignore[misc]
    wheres = {"all": {}, "key": {"virtual_key_id": "vk_3"}, "model": {"model": "model-3"}, "tag": {"tag": "tag-3"}}
    for name, where in wheres.items():
        await measure(
            f"page of 50 rows, {name}",
            PAGE_MS,
            lambda where=where: accounts.reader.entries(where, **month, after=None, limit=50),  # type: ignore[misc]
        )
    began = time.perf_counter()
    found = [each async for each in accounts.reader.verify()]
    print(f"verify: {time.perf_counter() - began:.1f} s, {len(found)} differences")


async def main(rows: int) -> None:
    """Measure everything on a fresh database."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.db"
        async with Database(f"sqlite:///{path}") as database:
            await anyio.to_thread.run_sync(migrate, database)
            async with open_accounting(database, Path(f"{path}.journal")) as accounts:
                entries = make_entries(rows)
                await measure_path(accounts, entries[:10_000])
                await fill(accounts, entries[10_000:])
                await ask(accounts)
        print(f"database: {path.stat().st_size / rows:.0f} bytes a row")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    gc.freeze()  # as the gateway does
    gc.set_threshold(10_000, 50, 50)
    parser.add_argument("--rows", type=int, default=1_000_000)
    asyncio.run(main(parser.parse_args().rows))
