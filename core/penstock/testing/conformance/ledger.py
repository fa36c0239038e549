"""Checks of Ledger and LedgerReader."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import attrs
import msgspec

from penstock.governance import Debit, Intent, Ledger, LedgerEntry, LedgerReader, UsageQuery
from penstock.models import Usage

_SECOND = 1_000_000_000
_START = 1_700_000_000
_ALWAYS = {"since_ns": 0, "until_ns": 1 << 62}


class Books(Protocol):
    """Hold what is checked."""

    @property
    def ledger(self) -> Ledger:
        """Return what writes."""
        ...

    @property
    def reader(self) -> LedgerReader:
        """Return what reads."""
        ...


Open = Callable[[], AbstractAsyncContextManager[Books]]


async def check_ledger(open_books: Open) -> None:
    """Check what ``open_books`` opens, on an empty store first and on the same one again. Raises AssertionError."""
    async with open_books() as books:
        await _check_rows(books)
        await _check_debits(books)
        await _check_adjustments(books)
        await _check_pages(books)
        await _check_usage(books)
        assert [found async for found in books.reader.verify()] == [], "totals are those of the rows"
    async with open_books() as books:
        assert await books.reader.entry("req_rows_1") == _entry("rows_1"), "rows outlive the process"
        books.ledger.settle(_entry("rows_1", cost_nano_usd=99))
        await books.ledger.flush()
        assert await books.reader.entry("req_rows_1") == _entry("rows_1"), "entering a row again changes nothing"
        assert [found async for found in books.reader.verify()] == [], "totals are those of the rows"


def _entry(name: str, **changes: Any) -> LedgerEntry:
    plain = LedgerEntry(
        request_id=f"req_{name}",
        started_at_ns=_START * _SECOND,
        duration_ns=12_345,
        organization_id="org_1",
        team_id="team_1",
        project_id="proj_1",
        virtual_key_id=f"vk_{name.partition('_')[0]}",
        principal_id="user_1",
        end_user=None,
        binding_id="gpc_1",
        provider="openai",
        model_asked="fast",
        model_served="gpt-5-mini",
        usage=Usage(input=1, cache_read=2, cache_write_5m=3, cache_write_1h=4, output=5, reasoning=1, input_audio=1),
        cost_nano_usd=10,
        cost_source="priced",
        price_version="test 2026-11-01",
        status=200,
        outcome="success",
        error=None,
        is_stream=True,
        fallback_count=1,
        attempts=({"binding_id": "gpc_0", "model": "m", "reason": "5xx", "status": 500},),
        tags=("eu", "batch"),
    )
    return msgspec.structs.replace(plain, **changes)


def _intent(name: str, *debits: Debit) -> Intent:
    return Intent(
        request_id=f"req_{name}",
        started_at_ns=_START * _SECOND,
        organization_id="org_1",
        team_id="team_1",
        project_id="proj_1",
        virtual_key_id="vk_1",
        principal_id="user_1",
        end_user=None,
        binding_id="gpc_1",
        provider="openai",
        model_asked="fast",
        model_served="gpt-5-mini",
        estimate_nano_usd=10,
        debits=debits,
    )


async def _check_rows(books: Books) -> None:
    bare = _entry(
        "rows_2", binding_id=None, provider=None, model_asked=None, model_served=None, usage=None, cost_nano_usd=0,
        cost_source="none", price_version=None, status=None, outcome="refused", error="budget_exceeded", attempts=(),
        tags=(), end_user="ä 'user' \"%_",
    )  # fmt: skip
    books.ledger.open(_intent("rows_1"))
    books.ledger.settle(_entry("rows_1"))
    books.ledger.settle(bare)
    books.ledger.settle(_entry("rows_1", cost_nano_usd=11))
    await books.ledger.flush()
    assert await books.reader.entry("req_rows_1") == _entry("rows_1"), "a row is read as it was entered, the first time"
    assert await books.reader.entry("req_rows_2") == bare, "a row is read as it was entered"
    assert await books.reader.entry("req_unknown") is None, "there is no row of what was never entered"
    used = await books.reader.last_used(["vk_rows", "vk_unknown"])
    assert used == {"vk_rows": _START * 1000}, "keys were last used when the last exchange started"


async def _check_debits(books: Books) -> None:
    debits = (Debit(counter="budget:a", period=_START, reserved=20), Debit(counter="budget:b", period=0, reserved=20))
    names = [("budget:a", _START), ("budget:b", 0)]
    for number in range(3):
        books.ledger.open(_intent(f"debits_{number}", *debits))
        books.ledger.settle(_entry(f"debits_{number}", debits=debits))
    books.ledger.settle(_entry("debits_3", debits=debits[:1]))
    await books.ledger.flush()
    totals = await books.reader.spent([*names, ("budget:unknown", 0)])
    assert totals == {names[0]: 40, names[1]: 30}, "each counter is charged with what its rows cost"
    row = await books.reader.entry("req_debits_0")
    assert row is not None
    assert sorted(row.debits, key=repr) == sorted(debits, key=repr), "a row has its debits"


async def _check_adjustments(books: Books) -> None:
    refund = _entry("refund", usage=None, cost_nano_usd=-4, adjusts="req_debits_0", outcome="adjustment")
    for _ in range(2):
        await books.reader.adjust(refund)
    totals = await books.reader.spent([("budget:a", _START), ("budget:b", 0)])
    assert totals == {("budget:a", _START): 36, ("budget:b", 0): 26}, "a correction is charged to the same, once"
    assert await books.reader.left("req_debits_0") == 6, "what a row has cost is less by its corrections"
    assert await books.reader.left("req_unknown") == 0, "what is not there has cost nothing"
    too_much = _entry("refund_2", usage=None, cost_nano_usd=-7, adjusts="req_debits_0", outcome="adjustment")
    unknown = msgspec.structs.replace(too_much, adjusts="req_unknown")
    for wrong, expected in ((too_much, ValueError), (unknown, LookupError)):
        try:
            await books.reader.adjust(wrong)
        except expected:
            continue
        raise AssertionError(f"{wrong.adjusts}, {wrong.cost_nano_usd}: must raise {expected.__name__}")


async def _check_pages(books: Books) -> None:
    for number in range(7):
        at = (_START + number // 2) * _SECOND
        books.ledger.settle(_entry(f"pages_{number}", started_at_ns=at, tags=("page",)))
    await books.ledger.flush()
    for where in ({"virtual_key_id": "vk_pages"}, {"tag": "page"}, {"tag": "page", "model": "gpt-5-mini"}):
        found: list[str] = []
        after = None
        while page := await books.reader.entries(where, **_ALWAYS, after=after, limit=3):
            after = page[-1].request_id
            found += [entry.request_id for entry in page]
        assert found == [f"req_pages_{number}" for number in reversed(range(7))], "rows come newest first, each once"
    between = await books.reader.entries(
        {"virtual_key_id": "vk_pages"}, since_ns=_START * _SECOND, until_ns=(_START + 1) * _SECOND, after=None, limit=9
    )
    assert [entry.request_id for entry in between] == ["req_pages_1", "req_pages_0"], "the end of a time is not in it"
    assert not await books.reader.entries({"tag": "pag"}, **_ALWAYS, after=None, limit=9), "tags match whole"


async def _check_usage(books: Books) -> None:
    for number, end_user in enumerate(("ann", "bob", None, "ann")):
        at = (_START + 900 * number) * _SECOND
        entry = _entry(f"usage_{number}", started_at_ns=at, end_user=end_user, outcome="success")
        books.ledger.settle(msgspec.structs.replace(entry, organization_id="org_usage"))
    await books.ledger.flush()
    where = {"organization_id": "org_usage"}
    query = UsageQuery(since_ns=_START * _SECOND, until_ns=(_START + 3600) * _SECOND, where=where)
    (total,) = await books.reader.usage(query)
    assert (total.requests, total.errors, total.cost_nano_usd, total.usage.output) == (4, 0, 40, 20), "sums are exact"
    rows = await books.reader.usage(attrs.evolve(query, group_by=("end_user", "tag")))
    found = {(row.group["end_user"], row.group["tag"]): row.requests for row in rows}
    expected = {(user, tag): count for user, count in (("ann", 2), ("bob", 1), (None, 1)) for tag in ("eu", "batch")}
    assert found == expected, "usage is grouped by end user and tag"
    part = attrs.evolve(query, since_ns=query.since_ns + 1, until_ns=query.since_ns + 901 * _SECOND)
    assert [row.requests for row in await books.reader.usage(part)] == [1], "any range of time is exact"
    hours = await books.reader.usage(attrs.evolve(query, bucket="hour", timezone="Asia/Kathmandu"))
    starts = [row.bucket_start for row in hours]
    assert starts == ["2023-11-15T03:00:00+05:45", "2023-11-15T04:00:00+05:45"], "hours are those of the time zone"
    assert [row.requests for row in hours] == [4 - hours[1].requests, hours[1].requests], "each is in one hour"
