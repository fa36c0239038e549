"""The ledger on the bundled store: a row once, totals that are its sums, whatever the database and the disk do."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, nullcontext
from pathlib import Path
from typing import Any, Literal

import anyio
import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting_process import COUNTER, START, accounting, make_entry, make_intent, money, reserved
from penstock import Usage
from penstock.governance import Debit, Exceeded, LedgerUnavailableError, UsageQuery
from penstock.models import MAX_MODEL_CHARACTERS
from penstock.testing.conformance.ledger import Books, check_ledger
from penstock_plugins.store.accounting import Accounting
from penstock_plugins.store.buckets import buckets_of, cover
from penstock_plugins.store.journal import SEGMENT_BYTES, Journal, take_dead
from penstock_plugins.store.ledger import JournaledLedger
from penstock_plugins.store.ledger_tables import LEVELS, Level
from penstock_plugins.store.sweep import read_dead
from test_counters_processes import rows_of
from test_journal import file_size_limit

pytestmark = pytest.mark.anyio

Bucket = Literal["hour", "day", "month"]


async def verified(accounts: Accounting) -> list[object]:
    return [found async for found in accounts.reader.verify()]


def files_of(folder: Path, pattern: str) -> list[str]:
    return [path.name for path in folder.glob(pattern)]


async def test_ledger_conforms(tmp_path: Path) -> None:
    @asynccontextmanager
    async def open_books() -> AsyncIterator[Books]:
        async with accounting(tmp_path / "penstock.db") as accounts:
            yield accounts

    await check_ledger(open_books)


async def test_intents_left_open_are_entered_with_their_estimate(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        held = await reserved(accounts.counters, money(7, 10))
        assert not isinstance(held, Exceeded)
        accounts.ledger.open(make_intent("req_1", 7, COUNTER))
    for _ in range(2):
        async with accounting(database) as accounts:
            entry = await accounts.reader.entry("req_1")
            assert entry is not None
            assert (entry.outcome, entry.cost_nano_usd, entry.cost_source) == ("interrupted", 7, "estimated")
            assert await reserved(accounts.counters, money(4, 10)) == Exceeded(money(4, 10), used=7, settled=7)
            assert await verified(accounts) == []


async def test_locked_database_is_waited_for_while_exchanges_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        assert not isinstance(await reserved(accounts.counters, money(0, 10**6)), Exceeded)
        with closing(sqlite3.connect(database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            number = 0
            with anyio.fail_after(20):
                while "could not be written" not in caplog.text:
                    held = accounts.counters.reserve([money(5, 10**6)])
                    accounts.ledger.open(make_intent(f"req_{number}", 5, COUNTER))
                    accounts.counters.settle(held, {COUNTER: 5})  # type: ignore[arg-type]
                    accounts.ledger.settle(make_entry(f"req_{number}", 5, COUNTER))
                    number += 1
                    await anyio.sleep(0.01)
            other.execute("ROLLBACK")
        await accounts.ledger.flush()
        assert rows_of(database, "SELECT COUNT(*), SUM(cost_nano_usd) FROM ledger") == [(number, 5 * number)]
        assert accounts.counters.used(COUNTER, START) == 5 * number
        assert await verified(accounts) == []


async def test_full_disk_refuses_new_exchanges_and_loses_none(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        with file_size_limit(1 << 20):
            with pytest.raises(LedgerUnavailableError, match="journal cannot be written"):
                accounts.ledger.open(make_intent("req_refused"))
            accounts.ledger.settle(make_entry("req_1", 5, COUNTER))
            await accounts.ledger.flush()
        accounts.ledger.open(make_intent("req_2"))
        accounts.ledger.settle(make_entry("req_2", 5, COUNTER))
        await accounts.ledger.flush()
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 10}
        assert await accounts.reader.entry("req_refused") is None


LONGEST = "\U0001f4b0" * 4096
"""What a member of a document may hold at most."""
MODEL = "\U0001f4b0" * MAX_MODEL_CHARACTERS
EXCHANGE: dict[str, Any] = {
    "request_id": f"req_{LONGEST[:64]}", "end_user": LONGEST[:256], "tags": (LONGEST,) * 3, "model_asked": MODEL,
    "debits": tuple(
        Debit(counter=f"budget:bud_{number:026}:{LONGEST[:256]}", period=2**40, reserved=2**62) for number in range(20)
    ),
}  # fmt: skip
SETTLED: dict[str, Any] = {
    **EXCHANGE, "model_served": LONGEST, "duration_ns": 2**62, "started_at_ns": 2**62, "status": 599,
    "cost_nano_usd": 10**16, "price_version": "genai-prices 2026-11-01" * 4, "error": "guardrail_unavailable",
    "usage": Usage(2**40, 2**40, 2**40, 2**40, 2**40, 2**40, "estimated", 2**40, 2**40, 2**40), "fallback_count": 499,
    "attempts": ({"binding": "gpc_" + "0" * 26, "model": LONGEST, "reason": "truncated", "status": 599},) * 500,
}  # fmt: skip


def test_longest_exchange_that_is_admitted_finds_room_to_settle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, "a")
    ledger = JournaledLedger(journal, lambda: None)
    ledger.open(make_intent("first"))
    taken = 0
    with file_size_limit(SEGMENT_BYTES - 1):
        with pytest.raises(LedgerUnavailableError):  # noqa: PT012
            while True:
                changes = {**EXCHANGE, "request_id": f"{EXCHANGE['request_id']}{taken}"}
                ledger.open(make_intent(**changes, estimate=2**62, model_served=MODEL))
                taken += 1
        for number in range(taken):
            changes = {**SETTLED, "request_id": f"{EXCHANGE['request_id']}{number}"}
            ledger.settle(make_entry(**changes))
    journal.close()
    assert caplog.text == ""
    (dead,) = take_dead(tmp_path)
    entries, is_whole = read_dead(dead)
    dead.release()
    assert is_whole
    kept = [entry for entry in entries if entry.outcome == "success"]
    assert len(kept) == taken > 20
    assert {(entry.cost_nano_usd, entry.usage, entry.debits, entry.tags) for entry in kept} == {
        (10**16, SETTLED["usage"], EXCHANGE["debits"], EXCHANGE["tags"])
    }


async def test_entry_that_cannot_be_written_as_it_is_is_cleaned(tmp_path: Path) -> None:
    async with accounting(tmp_path / "penstock.db") as accounts:
        accounts.ledger.settle(make_entry("req_1", end_user="\ud800", usage=Usage(input=10**30), cost_nano_usd=10**25))
        accounts.ledger.settle(make_entry("req_2"))
        await accounts.ledger.flush()
        entry = await accounts.reader.entry("req_1")
        assert entry is not None
        assert (entry.end_user, entry.cost_nano_usd) == ("?", 10**16)
        assert await verified(accounts) == []


async def test_entry_the_database_cannot_hold_is_entered_cleaned(tmp_path: Path) -> None:
    async with accounting(tmp_path / "penstock.db") as accounts:
        held = await reserved(accounts.counters, money(5, 100))
        accounts.counters.settle(held, {COUNTER: 5})  # type: ignore[arg-type]
        accounts.ledger.settle(make_entry("req_1", 5, COUNTER, duration_ns=2**64 - 1))
        await accounts.ledger.flush()
        entry = await accounts.reader.entry("req_1")
        assert entry is not None
        assert entry.duration_ns == 2**62
        assert accounts.counters.used(COUNTER, START) == 5
        assert await verified(accounts) == []
    assert files_of(tmp_path / "penstock.db.journal", "*") == []


REFUSING = """
CREATE TRIGGER refuse BEFORE INSERT ON ledger WHEN NEW.request_id = 'req_bad' BEGIN SELECT RAISE(ABORT, 'no'); END
"""


@pytest.mark.parametrize("is_journaled", [True, False])
async def test_entry_refused_for_good_counts_until_the_next_start_and_is_kept_for_an_operator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_journaled: bool
) -> None:
    database = tmp_path / "penstock.db"
    journal = Path(f"{database}.journal")
    async with accounting(database) as accounts:
        with closing(sqlite3.connect(database)) as other:
            other.execute(REFUSING)
        for request_id in ("req_1", "req_bad", "req_2"):
            held = await reserved(accounts.counters, money(5, 100))
            accounts.ledger.open(make_intent(request_id, 5, COUNTER))
            accounts.counters.settle(held, {COUNTER: 5})  # type: ignore[arg-type]
            is_short = not is_journaled and request_id == "req_bad"
            with file_size_limit(1) if is_short else nullcontext():
                tags = ("x" * SEGMENT_BYTES,) if is_short else ()
                accounts.ledger.settle(make_entry(request_id, 5, COUNTER, tags=tags))
        await accounts.ledger.flush()
        assert accounts.counters.used(COUNTER, START) == 15
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 10}
        assert await verified(accounts) == []
        assert accounts.ledger.open_intents == 0
        assert "the database refuses ledger entry req_bad; its 5 nano-USD count until the next start" in caplog.text
        assert files_of(journal, "*.journal")
    assert "left to the next start" not in caplog.text
    async with accounting(database) as accounts:
        assert await verified(accounts) == []
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): 10}
    assert files_of(journal, "*.refused")


async def test_verify_names_what_differs(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        accounts.ledger.settle(make_entry("req_1", 5, COUNTER, end_user="ann"))
        await accounts.ledger.flush()
        assert await verified(accounts) == []
        with closing(sqlite3.connect(database)) as other, other:
            other.execute("UPDATE counters SET total = 6")
            other.execute("UPDATE rollups SET requests = 3 WHERE level = 0 AND span = 86400")
            other.execute("UPDATE key_use SET last_used_at_ms = 1")
        found = [(each.what, each.recorded, each.derived) async for each in accounts.reader.verify()]
    assert found[0] == (COUNTER, 6, 5)
    assert found[1][0].startswith("rollup of 86400 s, dimensions ")
    assert found[1][0].endswith("requests")
    assert found[2] == ("last use of vk_1", 1, START * 1000)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"scope": "organization", "scope_id": "org_1"}, 31),
        ({"scope": "virtual_key", "scope_id": "vk_1"}, 15),
        ({"scope": "project", "scope_id": "proj_1", "provider": "gpc_1"}, 23),
        ({"scope": "team", "scope_id": "team_other"}, 0),
    ],
    ids=["organization", "key", "provider", "other"],
)
async def test_new_budget_counts_what_its_scope_has_spent(
    tmp_path: Path, document: dict[str, str], expected: int
) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        spent: tuple[tuple[int, dict[str, Any]], ...] = (
            (1, {}), (2, {}), (4, {}), (8, {"binding_id": "gpc_2"}), (16, {"virtual_key_id": "vk_2"}),
            (32, {"started_at_ns": (START - 1) * 10**9}), (64, {"error": "guardrail_blocked"}),
        )  # fmt: skip
        for number, (cost, changes) in enumerate(spent):
            accounts.ledger.settle(make_entry(f"req_{number}", cost, **changes))
        await accounts.ledger.flush()
        with closing(sqlite3.connect(database)) as other, other:
            other.execute(
                "INSERT INTO objects VALUES ('budget', 'bud_shared', 'org_1', NULL, NULL, 1, 0, 0, NULL, 1, ?)",
                (json.dumps({"window": "day", "limit_nano_usd": 1000, **document}),),
            )
        held = await reserved(accounts.counters, money(1, 1000))
        assert not isinstance(held, Exceeded)
        assert accounts.counters.used(COUNTER, START) == expected
        accounts.counters.settle(held, {COUNTER: 1})
        accounts.ledger.settle(make_entry("req_after", 1, COUNTER))
        await accounts.ledger.flush()
        assert await accounts.reader.spent([(COUNTER, START)]) == {(COUNTER, START): expected + 1}
        assert await verified(accounts) == []


async def test_usage_is_what_the_rows_add_up_to_in_any_range_and_zone(tmp_path: Path) -> None:
    random_ = random.Random(1)
    entries = [
        make_entry(
            f"req_{number}",
            random_.randrange(1000),
            started_at_ns=(START - random_.randrange(40 * 86_400)) * 10**9 + random_.randrange(10**9),
            virtual_key_id=random_.choice(("vk_1", "vk_2")),
            end_user=random_.choice((None, "ann", "bob")),
            model_served=random_.choice(("a", "b")),
        )
        for number in range(600)
    ]
    async with accounting(tmp_path / "penstock.db") as accounts:
        for entry in entries:
            accounts.ledger.settle(entry)
        await accounts.ledger.flush()
        buckets: tuple[Bucket | None, ...] = (None, "hour", "day", "month")
        for bucket in buckets:
            for zone in ("UTC", "Asia/Kathmandu", "America/St_Johns", "Australia/Lord_Howe"):
                since = (START - 35 * 86_400) * 10**9 + random_.randrange(10**12)
                query = UsageQuery(
                    since_ns=since, until_ns=since + 30 * 86_400 * 10**9, group_by=("end_user", "model"),
                    bucket=bucket, timezone=zone, where={"virtual_key_id": "vk_1"},
                )  # fmt: skip
                rows = await accounts.reader.usage(query)
                expected: dict[tuple[str | None, str | None, str | None], int] = {}
                for label, start, end in buckets_of(query):
                    for entry in entries:
                        if start <= entry.started_at_ns < end and entry.virtual_key_id == "vk_1":
                            group = (label, entry.end_user, entry.model_served)
                            expected[group] = expected.get(group, 0) + entry.cost_nano_usd
                found = {
                    (row.bucket_start, row.group["end_user"], row.group["model"]): row.cost_nano_usd for row in rows
                }
                assert {group: cost for group, cost in found.items() if cost} == {
                    group: cost for group, cost in expected.items() if cost
                }
        assert await verified(accounts) == []


@given(st.integers(0, 10**7), st.integers(0, 10**6), st.sampled_from(LEVELS))
def test_runs_of_buckets_tile_a_range(since: int, length: int, level: Level) -> None:
    step = level.spans[-1]
    since, until = since * step, (since + length) * step
    at = since
    for span, start, end in cover(since, until, level.spans):
        assert span in level.spans
        assert (start, start % span, end % span) == (at, 0, 0)
        at = end
    assert at == until


@given(
    st.integers(0, 2 * 10**9),
    st.integers(1, 40 * 86_400),
    st.sampled_from(("hour", "day", "month")),
    st.sampled_from(("UTC", "Asia/Kathmandu", "Australia/Lord_Howe", "Africa/Cairo", "America/Sao_Paulo")),
)
def test_buckets_tile_a_range_and_begin_where_the_clock_says(
    since: int, length: int, bucket: Bucket, zone: str
) -> None:
    query = UsageQuery(since_ns=since * 10**9, until_ns=(since + length) * 10**9, timezone=zone)
    found = list(buckets_of(attrs.evolve(query, bucket=bucket)))
    assert [start for _, start, _ in found[1:]] == [end for _, _, end in found[:-1]]
    assert (found[0][1], found[-1][2]) == (query.since_ns, query.until_ns)
    assert len({label for label, _, _ in found}) == len(found)


async def test_rows_wait_no_longer_than_a_second(tmp_path: Path) -> None:
    database = tmp_path / "penstock.db"
    async with accounting(database) as accounts:
        began = time.monotonic()
        accounts.ledger.settle(make_entry("req_1"))
        while not rows_of(database, "SELECT 1 FROM ledger"):  # noqa: ASYNC110 - another connection is to see it
            await anyio.sleep(0.005)
        assert time.monotonic() - began < 1
