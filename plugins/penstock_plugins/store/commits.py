"""Append to the ledger, and change in the same transaction whatever is derived from it. Runs on the writer thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import add

import attrs
import msgspec
from sqlalchemy import Connection, func, select

from penstock.governance import Debit, LedgerEntry
from penstock_plugins.store.bulk import (
    Row,
    add_into,
    add_where_id,
    find_one,
    find_where,
    insert_into,
    put_into,
    run_many,
)
from penstock_plugins.store.ledger_tables import (
    DIMENSIONS,
    SPANS,
    SUMS,
    counters,
    debits,
    dimensions,
    key_use,
    ledger,
    rollups,
)
from penstock_plugins.store.totals import CounterSeed, Name, find_or_add, last_sequence

MAX_TOKENS = 1 << 40
MAX_COST = 10**16
"""Ten million USD for one exchange: what is beyond is a fault, and would make sums overflow."""

FAILED = ("refused", "provider_error", "cut", "interrupted")
"""Outcomes that count as errors."""
_COLUMNS = tuple(column.name for column in ledger.columns)
_INSERT_ROW = insert_into(ledger)
_INSERT_DEBIT = insert_into(debits)
_DEBIT = ("sequence", "counter_id", "reserved", "charged")
_FIND_DIMENSION = find_where((dimensions.c.id,), *(dimensions.c[name] for name in DIMENSIONS))
_INSERT_DIMENSION = insert_into(dimensions)
_ADD_TOTAL = add_where_id(counters, "total")
_BUCKET = ("span", "start", "dimensions_id")
_ADD_ROLLUP = add_into(rollups, _BUCKET, SUMS)
_USE = ("virtual_key_id", "last_used_at_ms")
_PUT_USE = put_into(key_use, _USE[:1], _USE[1:], only_greater=True)
_KNOWN = 50_000
_PART = 500
_encode = msgspec.json.Encoder().encode
_NO_TOKENS = (0,) * 9


@attrs.frozen
class Receipt:
    """What a committed transaction changed, for the process's memory to follow."""

    charges: Mapping[Name, int]
    """Total of what was charged, by counter."""
    dimension_ids: Mapping[Row, int]
    counter_ids: Mapping[Name, int]


def charge_of(entry: LedgerEntry, debit: Debit) -> int:
    """Return what an entry charges a counter with."""
    cost = max(-MAX_COST, min(entry.cost_nano_usd, MAX_COST))
    return (debit.reserved or cost) if entry.outcome == "interrupted" else cost


class Books:
    """Append rows; remembers ids of what rows refer to, as soon as they are committed."""

    def __init__(self, seed: CounterSeed) -> None:
        self.seed = seed
        self._dimension_ids: dict[Row, int] = {}
        self._counter_ids: dict[Name, int] = {}

    def append(self, connection: Connection, entries: Iterable[LedgerEntry]) -> Receipt:
        """Enter what the ledger does not have yet; on commit give the receipt to ``remember``."""
        first: dict[str, LedgerEntry] = {}
        for entry in entries:
            first.setdefault(entry.request_id, entry)
        fresh = _not_entered(connection, first)
        posting = _Posting(connection, self, last_sequence(connection))
        posting.find_counters(fresh)
        for entry in fresh:
            posting.post(entry)
        posting.write()
        return Receipt(posting.charges, posting.new_dimensions, posting.new_counters)

    def remember(self, receipt: Receipt) -> None:
        """Keep the ids that a committed transaction has found."""
        for kept, found in ((self._dimension_ids, receipt.dimension_ids), (self._counter_ids, receipt.counter_ids)):
            if len(kept) > _KNOWN:
                kept.clear()
            kept.update(found)

    def dimension_id(self, key: Row) -> int | None:
        """Return a remembered id."""
        return self._dimension_ids.get(key)

    def counter_id(self, name: Name) -> int | None:
        """Return a remembered id."""
        return self._counter_ids.get(name)


def _not_entered(connection: Connection, entries: Mapping[str, LedgerEntry]) -> list[LedgerEntry]:
    ids = list(entries)
    known: set[str] = set()
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        known.update(connection.scalars(select(ledger.c.request_id).where(ledger.c.request_id.in_(part))))
    return [entry for request_id, entry in entries.items() if request_id not in known]


class _Posting:
    """Gather the rows of one transaction, then write them."""

    def __init__(self, connection: Connection, books: Books, sequence: int) -> None:
        self._connection = connection
        self._books = books
        self._sequence = sequence
        self._rows: list[Row] = []
        self._debits: list[Row] = []
        self._charged: dict[int, int] = {}
        self._sums: dict[tuple[int, int, int], list[int]] = {}
        self._used: dict[str, int] = {}
        self._counters: dict[Name, int] = {}
        self.charges: dict[Name, int] = {}
        self.new_dimensions: dict[Row, int] = {}
        self.new_counters: dict[Name, int] = {}

    def find_counters(self, entries: Sequence[LedgerEntry]) -> None:
        """Find or make the counters, before the rows that change them."""
        missing = []
        for name in {(debit.counter, debit.period) for entry in entries for debit in entry.debits}:
            known = self._books.counter_id(name)
            if known is None:
                missing.append((name, True))
            else:
                self._counters[name] = known
        found = find_or_add(self._connection, missing, self._books.seed)
        self.new_counters = {name: total.id for name, total in found.items()}
        self._counters.update(self.new_counters)

    def post(self, entry: LedgerEntry) -> None:
        """Gather what one entry changes."""
        self._sequence += 1
        cost = max(-MAX_COST, min(entry.cost_nano_usd, MAX_COST))
        usage = entry.usage
        tokens: tuple[int, ...] = _NO_TOKENS if usage is None else (
            usage.input, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h, usage.output, usage.reasoning,
            usage.input_audio, usage.cache_read_audio, usage.output_audio,
        )  # fmt: skip
        if max(tokens) > MAX_TOKENS:
            tokens = tuple(min(count, MAX_TOKENS) for count in tokens)
        tags = _encode(entry.tags).decode() if entry.tags else ""
        scopes = (
            entry.organization_id, entry.team_id, entry.project_id, entry.virtual_key_id, entry.principal_id,
        )  # fmt: skip
        model = entry.model_served or entry.model_asked or ""
        key = (*scopes, entry.binding_id or "", entry.provider or "", model, tags, "")
        dimensions_id = self._dimension(key)
        end_user_id = self._dimension((*key[:-1], entry.end_user)) if entry.end_user else None
        is_adjustment = entry.outcome == "adjustment"
        counted = self._counted_at(entry)
        self._rows.append((
            self._sequence, entry.request_id, entry.started_at_ns, entry.duration_ns, *scopes, entry.end_user,
            entry.binding_id, entry.provider, entry.model_asked, entry.model_served, *tokens,
            None if usage is None else usage.source, cost, entry.cost_source, entry.price_version, entry.status,
            entry.outcome, entry.error, entry.is_stream, entry.fallback_count,
            _encode(entry.attempts).decode() if entry.attempts else None, tags or None, entry.adjusts, counted,
            dimensions_id, end_user_id,
        ))  # fmt: skip
        sums = (
            0 if is_adjustment else 1, int(entry.outcome in FAILED), *tokens, cost,
            int(entry.cost_source == "unpriced"), int(usage is not None and usage.source == "estimated"),
        )  # fmt: skip
        self._add_sums(entry.started_at_ns // 1_000_000_000, dimensions_id, end_user_id, sums)
        if entry.debits:
            self._charge(entry)
        if not is_adjustment:
            at_ms = entry.started_at_ns // 1_000_000
            if self._used.get(entry.virtual_key_id, 0) < at_ms:
                self._used[entry.virtual_key_id] = at_ms

    def _counted_at(self, entry: LedgerEntry) -> int | None:
        if entry.adjusts is not None:
            return self._connection.execute(
                select(ledger.c.counted_at_ns).where(ledger.c.request_id == entry.adjusts)
            ).scalar()
        return None if entry.error == "guardrail_blocked" else entry.started_at_ns

    def _charge(self, entry: LedgerEntry) -> None:
        for debit in entry.debits:
            name = (debit.counter, debit.period)
            counter_id = self._counters[name]
            charged = charge_of(entry, debit)
            if entry.adjusts is not None:
                charged = max(charged, -self._charged_for(entry.adjusts, counter_id))
            self._debits.append((self._sequence, counter_id, debit.reserved, charged))
            self._charged[counter_id] = self._charged.get(counter_id, 0) + charged
            self.charges[name] = self.charges.get(name, 0) + charged

    def _charged_for(self, request_id: str, counter_id: int) -> int:
        """Return what a row and its corrections have charged a counter with."""
        rows = select(ledger.c.sequence).where((ledger.c.request_id == request_id) | (ledger.c.adjusts == request_id))
        charged = select(func.coalesce(func.sum(debits.c.charged), 0)).where(
            debits.c.counter_id == counter_id, debits.c.sequence.in_(rows)
        )
        return int(self._connection.execute(charged).scalar_one())

    def _dimension(self, key: Row) -> int:
        found = self._books.dimension_id(key) or self.new_dimensions.get(key)
        if found is None:
            row = find_one(self._connection, _FIND_DIMENSION, DIMENSIONS, key)
            if row is None:
                run_many(self._connection, _INSERT_DIMENSION, DIMENSIONS, [key])
                row = find_one(self._connection, _FIND_DIMENSION, DIMENSIONS, key)
            found = int(row[0])
            self.new_dimensions[key] = found
        return found

    def _add_sums(self, at: int, dimensions_id: int, end_user_id: int | None, sums: Row) -> None:
        start = at - at % SPANS[-1]
        groups = ((1, dimensions_id),) if end_user_id is None else ((1, dimensions_id), (-1, end_user_id))
        for sign, group in groups:
            held = self._sums.get((sign, start, group))
            if held is None:
                self._sums[sign, start, group] = list(sums)
            else:
                held[:] = map(add, held, sums)

    def write(self) -> None:
        """Write everything gathered."""
        connection = self._connection
        run_many(connection, _INSERT_ROW, _COLUMNS, self._rows)
        run_many(connection, _INSERT_DEBIT, _DEBIT, self._debits)
        charged = [(amount, key) for key, amount in self._charged.items() if amount]
        run_many(connection, _ADD_TOTAL, ("amount", "key"), charged)
        run_many(connection, _ADD_ROLLUP, (*_BUCKET, *SUMS), self._buckets())
        run_many(connection, _PUT_USE, _USE, list(self._used.items()))

    def _buckets(self) -> list[Row]:
        buckets: dict[tuple[int, int, int], list[int]] = {}
        for (sign, start, group), sums in self._sums.items():
            for span in SPANS:
                bucket = (sign * span, start - start % span, group)
                held = buckets.get(bucket)
                buckets[bucket] = sums if held is None else list(map(add, held, sums))
        return [(*bucket, *sums) for bucket, sums in buckets.items()]
