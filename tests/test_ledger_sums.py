"""Sums over the ledger: whatever rollups they are put together from, they are what the rows add up to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting_process import make_entry
from penstock import Usage
from penstock.governance import LedgerEntry, UsageQuery, UsageRow
from penstock_plugins.store.buckets import buckets_of
from penstock_plugins.store.commits import Books
from penstock_plugins.store.database import Database
from penstock_plugins.store.ledger_tables import FAILED
from penstock_plugins.store.rollups import COLUMN_OF, usage
from penstock_plugins.store.schema import migrate
from penstock_plugins.store.verification import discrepancies

DAY = 86_400
ZONES = {
    "UTC": "2026-03-01T00:00:00+00:00",
    "Asia/Kolkata": "2026-05-10T00:00:00+05:30",
    "Asia/Kathmandu": "2026-05-10T00:00:00+05:45",
    "America/New_York": "2026-03-08T03:00:00-04:00",
    "Europe/Berlin": "2026-10-25T02:00:00+01:00",
    "America/St_Johns": "2026-11-01T01:00:00-03:30",
    "Australia/Lord_Howe": "2026-10-04T02:30:00+11:00",
    "Pacific/Chatham": "2026-04-05T02:45:00+12:45",
    "Africa/Cairo": "2026-04-24T01:00:00+03:00",
    "America/Sao_Paulo": "2018-11-04T01:00:00-02:00",
}
"""A moment of each zone: where its clocks are moved, if they are."""
numbers = itertools.count(1)
Bucket = Literal["hour", "day", "month"]
Key = tuple[str | None, tuple[str | None, ...]]

moments = st.one_of(
    st.integers(-3 * DAY * 10**9, 3 * DAY * 10**9),
    st.builds(lambda quarter, more: quarter * 900 * 10**9 + more, st.integers(-288, 288), st.integers(-1, 1)),
    st.integers(-70 * DAY, 40 * DAY).map(lambda seconds: seconds * 10**9),
)
"""Nanoseconds from the moment of the zone."""
rows = st.fixed_dictionaries({
    "started_at_ns": moments,
    "organization_id": st.sampled_from(["org_1", "org_2"]),
    "team_id": st.sampled_from(["team_1", "team_2"]),
    "project_id": st.sampled_from(["proj_1", "proj_2"]),
    "virtual_key_id": st.sampled_from(["vk_1", "vk_2"]),
    "principal_id": st.sampled_from(["user_1", "user_2"]),
    "end_user": st.sampled_from([None, "ada", "bob", "ä\"%_"]),
    "binding_id": st.sampled_from([None, "gpc_1"]),
    "provider": st.sampled_from([None, "openai"]),
    "model_served": st.sampled_from([None, "m1", "m2"]),
    "tags": st.sampled_from([(), ("eu",), ("eu", "batch"), ("batch", "batch")]),
    "usage": st.none() | st.builds(
        Usage, input=st.integers(0, 9), cache_read=st.integers(0, 9), output=st.integers(0, 9),
        source=st.sampled_from(["provider", "estimated"]),
    ),
    "cost_nano_usd": st.integers(0, 10**9),
    "cost_source": st.sampled_from(["priced", "unpriced"]),
    "outcome": st.sampled_from(["success", "refused", "cut", "adjustment"]),
})  # fmt: skip
wheres = st.fixed_dictionaries(
    {},
    optional={
        "organization_id": st.just("org_1"),
        "project_id": st.just("proj_1"),
        "virtual_key_id": st.just("vk_1"),
        "principal_id": st.just("user_1"),
        "end_user": st.sampled_from(["ada", "nobody"]),
        "model": st.just("m1"),
        "binding_id": st.just("gpc_1"),
        "tag": st.just("eu"),
    },
)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('sums')}/penstock.db")
    migrate(database)
    yield database
    database.close()


def values_of(entry: LedgerEntry, name: str) -> Sequence[str | None]:
    if name == "tag":
        return tuple(dict.fromkeys(entry.tags)) or (None,)
    if name == "model":
        return (entry.model_served or entry.model_asked,)
    return (getattr(entry, COLUMN_OF.get(name, name)),)


def sums_of(entry: LedgerEntry) -> tuple[int, ...]:
    tokens = entry.usage or Usage()
    return (
        int(entry.outcome != "adjustment"), int(entry.outcome in FAILED), tokens.input, tokens.cache_read,
        tokens.output, entry.cost_nano_usd, int(entry.cost_source == "unpriced"), int(tokens.source == "estimated"),
    )  # fmt: skip


def sums_in(row: UsageRow) -> tuple[int, ...]:
    tokens = row.usage
    return (
        row.requests, row.errors, tokens.input, tokens.cache_read, tokens.output, row.cost_nano_usd, row.unpriced,
        row.estimated,
    )  # fmt: skip


def expected_of(query: UsageQuery, entries: Sequence[LedgerEntry]) -> dict[Key, tuple[int, ...]]:
    buckets = list(buckets_of(query))
    found: dict[Key, tuple[int, ...]] = {}
    for entry in entries:
        at = entry.started_at_ns
        matches = all(value in values_of(entry, name) for name, value in query.where.items())
        if not matches or not query.since_ns <= at < query.until_ns:
            continue
        (label,) = (label for label, start, end in buckets if start <= at < end)
        if query.bucket in ("day", "month"):
            length = len("2026-10-25") if query.bucket == "day" else len("2026-10")
            local = datetime.fromtimestamp(at // 10**9, ZoneInfo(query.timezone)).isoformat()
            assert (label or "")[:length] == local[:length]
        for group in itertools.product(*(values_of(entry, name) for name in query.group_by)):
            held = found.get((label, group), (0,) * 8)
            found[label, group] = tuple(map(sum, zip(held, sums_of(entry), strict=True)))
    return {key: sums for key, sums in found.items() if any(sums)}


def key_of(row: UsageRow) -> Key:
    return row.bucket_start, tuple(row.group.values())


@settings(deadline=None)
@given(
    zone=st.sampled_from(list(ZONES)),
    given_rows=st.lists(rows, max_size=14),
    at=st.tuples(moments, moments),
    group_by=st.lists(st.sampled_from(list(COLUMN_OF)), unique=True, max_size=3),
    bucket=st.sampled_from([None, "hour", "day", "month"]),
    where=wheres,
    limit=st.integers(1, 7),
)
def test_sums_and_pages_of_them_are_what_the_rows_add_up_to(
    database: Database, zone: str, given_rows: list[dict[str, Any]], at: tuple[int, int], group_by: list[str],
    bucket: Bucket | None, where: dict[str, str], limit: int,
) -> None:  # fmt: skip
    moment = int(datetime.fromisoformat(ZONES[zone]).timestamp()) * 10**9
    entries = [
        msgspec.structs.replace(
            make_entry(f"req_{next(numbers)}", 0), **{**row, "started_at_ns": moment + row["started_at_ns"]}
        )
        for row in given_rows
    ]
    query = UsageQuery(
        since_ns=moment + min(at), until_ns=moment + max(at), group_by=tuple(group_by), bucket=bucket, timezone=zone,
        where=where,
    )  # fmt: skip
    books = Books(lambda _, __: None)
    with database.writer.connect() as connection:
        books.append(connection, entries[::2])
        books.append(connection, entries)
        found = usage(connection, query)
        assert {key_of(row): sums_in(row) for row in found} == expected_of(query, entries)
        assert len({key_of(row) for row in found}) == len(found)
        assert list(discrepancies(connection)) == []
        paged: list[UsageRow] = []
        for _ in range(len(found) + 1):
            after = key_of(paged[-1]) if paged else None
            page = usage(connection, attrs.evolve(query, limit=limit, after=after))
            paged += page
            if not page:
                break
            assert len(page) <= limit
        assert paged == found
        connection.rollback()
