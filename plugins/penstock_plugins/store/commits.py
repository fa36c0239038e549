"""Append to the ledger, and change in the same transaction whatever is derived from it. Runs on the writer thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import add
from typing import TypeVar

import attrs
import msgspec
from sqlalchemy import Connection, Executable, func, select

from penstock.governance import LedgerEntry
from penstock_plugins.store.bulk import (
    Row,
    add_into,
    add_where_id,
    find_among,
    find_one,
    find_where,
    insert_into,
    put_into,
    run_many,
)
from penstock_plugins.store.ledger_tables import (
    ALL,
    COARSE,
    DIMENSIONS,
    END_USERS,
    END_USERS_OF_ORGANIZATION,
    FAILED,
    NOBODY,
    STEP,
    SUMS,
    UNCOUNTED,
    Level,
    counters,
    dimensions,
    end_users,
    key_use,
    ledger,
    rollups,
)
from penstock_plugins.store.totals import CounterSeed, Name, find_or_add, last_sequence

K = TypeVar("K")
MAX_TOKENS = 1 << 40
MAX_COST = 10**16
"""Ten million USD for one exchange: what is beyond is a fault, and would make sums overflow."""

_COLUMNS = tuple(column.name for column in ledger.columns)
_INSERT_ROW = insert_into(ledger)
_DIMENSION = ("level", *DIMENSIONS)
_FIND_DIMENSION = find_where((dimensions.c.id,), *(dimensions.c[name] for name in _DIMENSION))
_INSERT_DIMENSION = insert_into(dimensions)
_END_USER = ("end_user",)
_FIND_END_USER = find_where((end_users.c.id,), end_users.c.end_user)
_INSERT_END_USER = insert_into(end_users)
_ADD_TOTAL = add_where_id(counters, "total")
_BUCKET = ("level", "span", "start", "dimensions_id", "end_user_id")
_ADD_ROLLUP = add_into(rollups, _BUCKET, SUMS)
_USE = ("virtual_key_id", "last_used_at_ms")
_PUT_USE = put_into(key_use, _USE[:1], _USE[1:], only_greater=True)
_KNOWN = 50_000
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[tuple[int, int, int]]).decode
_NO_TOKENS = (0,) * 9


@attrs.frozen
class Receipt:
    """What a committed transaction changed, for the process's memory to follow."""

    charges: Mapping[Name, int]
    """Total of what was charged, by counter."""
    dimension_ids: Mapping[Row, int]
    end_user_ids: Mapping[Row, int]
    counter_ids: Mapping[Name, int]


def clamped(cost: int) -> int:
    """Return a cost that sums have room for."""
    return cost if -MAX_COST <= cost <= MAX_COST else max(-MAX_COST, min(cost, MAX_COST))


def debits_in(text: str) -> Sequence[tuple[int, int, int]]:
    """Return counter, reservation and charge of each debit of a row."""
    return _decode(text)


class Books:
    """Append rows; remembers ids of what rows refer to, as soon as they are committed."""

    def __init__(self, seed: CounterSeed) -> None:
        self.seed = seed
        self._dimension_ids: dict[Row, int] = {}
        self._end_user_ids: dict[Row, int] = {}
        """Of their own, as there may be very many, and every row needs its dimensions."""
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
        return Receipt(posting.charges, posting.new_dimensions, posting.new_end_users, posting.new_counters)

    def remember(self, receipt: Receipt) -> None:
        """Keep the ids that a committed transaction has found."""
        _keep(self._dimension_ids, receipt.dimension_ids)
        _keep(self._end_user_ids, receipt.end_user_ids)
        _keep(self._counter_ids, receipt.counter_ids)

    def dimension_id(self, key: Row) -> int | None:
        """Return a remembered id."""
        return self._dimension_ids.get(key)

    def end_user_id(self, key: Row) -> int | None:
        """Return a remembered id."""
        return self._end_user_ids.get(key)

    def counter_id(self, name: Name) -> int | None:
        """Return a remembered id."""
        return self._counter_ids.get(name)


def _keep(kept: dict[K, int], found: Mapping[K, int]) -> None:
    if len(kept) > _KNOWN:
        kept.clear()
    kept.update(found)


def _not_entered(connection: Connection, entries: Mapping[str, LedgerEntry]) -> list[LedgerEntry]:
    known = find_among(connection, ledger.c.request_id, list(entries))
    return [entry for request_id, entry in entries.items() if request_id not in known]


class _Posting:
    """Gather the rows of one transaction, then write them."""

    def __init__(self, connection: Connection, books: Books, sequence: int) -> None:
        self._connection = connection
        self._books = books
        self._sequence = sequence
        self._rows: list[Row] = []
        self._charged: dict[int, int] = {}
        self._sums: dict[tuple[int, int, int], list[int]] = {}
        self._levels: dict[int, tuple[tuple[Level, int], ...]] = {}
        self._used: dict[str, int] = {}
        self._counters: dict[Name, int] = {}
        self.charges: dict[Name, int] = {}
        self.new_dimensions: dict[Row, int] = {}
        self.new_end_users: dict[Row, int] = {}
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
        cost = clamped(entry.cost_nano_usd)
        usage = entry.usage
        tokens: tuple[int, ...] = _NO_TOKENS if usage is None else (
            usage.input, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h, usage.output, usage.reasoning,
            usage.input_audio, usage.cache_read_audio, usage.output_audio,
        )  # fmt: skip
        if max(tokens) > MAX_TOKENS or min(tokens) < 0:
            tokens = tuple(max(0, min(count, MAX_TOKENS)) for count in tokens)
        tags = _encode(entry.tags).decode() if entry.tags else ""
        model = entry.model_served or entry.model_asked or ""
        values = (
            entry.organization_id, entry.team_id, entry.project_id, entry.virtual_key_id, entry.principal_id,
            entry.binding_id or "", entry.provider or "", model, tags,
        )  # fmt: skip
        dimensions_id = self._dimension((1, *values))
        end_user_id = self._end_user(entry.end_user) if entry.end_user else None
        if dimensions_id not in self._levels:
            self._levels[dimensions_id] = self._levels_of(dimensions_id, values)
        is_adjustment = entry.outcome == "adjustment"
        self._rows.append((
            self._sequence, entry.request_id, entry.started_at_ns, entry.duration_ns, dimensions_id, end_user_id,
            entry.model_asked, entry.model_served, *tokens, None if usage is None else usage.source, cost,
            entry.cost_source, entry.price_version, entry.status, entry.outcome, entry.error, entry.is_stream,
            entry.fallback_count, _encode(entry.attempts).decode() if entry.attempts else None,
            self._charge(entry) if entry.debits else None, entry.adjusts, self._counts_from(entry),
        ))  # fmt: skip
        sums = (
            0 if is_adjustment else 1, int(entry.outcome in FAILED), *tokens, cost,
            int(entry.cost_source == "unpriced"), int(usage is not None and usage.source == "estimated"),
        )  # fmt: skip
        self._add_sums(entry.started_at_ns // 1_000_000_000, dimensions_id, end_user_id, sums)
        if not is_adjustment:
            at_ms = entry.started_at_ns // 1_000_000
            if self._used.get(entry.virtual_key_id, 0) < at_ms:
                self._used[entry.virtual_key_id] = at_ms

    def _counts_from(self, entry: LedgerEntry) -> int | None:
        if entry.adjusts is not None:  # when what it corrects does
            corrected = select(func.coalesce(ledger.c.counts_from_ns, ledger.c.started_at_ns))
            counts_from = self._connection.execute(corrected.where(ledger.c.request_id == entry.adjusts)).scalar()
            return UNCOUNTED if counts_from is None else int(counts_from)
        return UNCOUNTED if entry.error == "guardrail_blocked" else None

    def _charge(self, entry: LedgerEntry) -> str:
        debits = []
        cost = clamped(entry.cost_nano_usd)
        for debit in entry.debits:
            name = (debit.counter, debit.period)
            counter_id = self._counters[name]
            charged = cost
            if entry.adjusts is not None:
                charged = max(cost, -self._charged_for(entry.adjusts, counter_id))
            debits.append((counter_id, debit.reserved, charged))
            self._charged[counter_id] = self._charged.get(counter_id, 0) + charged
            self.charges[name] = self.charges.get(name, 0) + charged
        return _encode(debits).decode()

    def _charged_for(self, request_id: str, counter_id: int) -> int:
        """Return what a row and its corrections have charged a counter with."""
        is_same = (ledger.c.request_id == request_id) | (ledger.c.adjusts == request_id)
        texts = self._connection.scalars(select(ledger.c.debits).where(is_same, ledger.c.debits.is_not(None)))
        return sum(charged for text in texts for id_, _, charged in debits_in(text) if id_ == counter_id)

    def _levels_of(self, dimensions_id: int, values: Row) -> tuple[tuple[Level, int], ...]:
        return ((ALL, dimensions_id), *((level, self._dimension(_coarsened(level, values))) for level in COARSE))

    def _dimension(self, key: Row) -> int:
        found = self._books.dimension_id(key) or self.new_dimensions.get(key)
        if not found:
            found = self._find_or_add(_DIMENSION, _FIND_DIMENSION, _INSERT_DIMENSION, key)
            self.new_dimensions[key] = found
        return found

    def _end_user(self, end_user: str) -> int:
        key = (end_user,)
        found = self._books.end_user_id(key) or self.new_end_users.get(key)
        if not found:
            found = self._find_or_add(_END_USER, _FIND_END_USER, _INSERT_END_USER, key)
            self.new_end_users[key] = found
        return found

    def _find_or_add(self, names: tuple[str, ...], find: Executable, add_one: Executable, key: Row) -> int:
        row = find_one(self._connection, find, names, key)
        if row is None:
            run_many(self._connection, add_one, names, [key])
            row = find_one(self._connection, find, names, key)
        return int(row[0])

    def _add_sums(self, at: int, dimensions_id: int, end_user_id: int | None, sums: Row) -> None:
        start = at - at % STEP
        for end_user in (NOBODY,) if end_user_id is None else (NOBODY, end_user_id):
            held = self._sums.get((start, dimensions_id, end_user))
            if held is None:
                self._sums[start, dimensions_id, end_user] = list(sums)
            else:
                held[:] = map(add, held, sums)

    def write(self) -> None:
        """Write everything gathered."""
        connection = self._connection
        run_many(connection, _INSERT_ROW, _COLUMNS, self._rows)
        charged = [(amount, key) for key, amount in self._charged.items() if amount]
        run_many(connection, _ADD_TOTAL, ("amount", "key"), charged)
        run_many(connection, _ADD_ROLLUP, (*_BUCKET, *SUMS), self._buckets())
        run_many(connection, _PUT_USE, _USE, list(self._used.items()))

    def _buckets(self) -> list[Row]:
        buckets: dict[tuple[int, int, int, int, int], list[int]] = {}
        for (start, dimensions_id, end_user), sums in self._sums.items():
            levels = self._levels[dimensions_id]
            if end_user != NOBODY:
                levels = ((END_USERS, dimensions_id), (END_USERS_OF_ORGANIZATION, levels[-1][1]))
            for level, group in levels:
                for span in level.spans:
                    bucket = (level.number, span, start - start % span, group, end_user)
                    held = buckets.get(bucket)
                    buckets[bucket] = sums if held is None else list(map(add, held, sums))
        return sorted((*bucket, *sums) for bucket, sums in buckets.items())


def _coarsened(level: Level, values: Row) -> Row:
    kept = (value if name in level.dimensions else "" for name, value in zip(DIMENSIONS, values, strict=True))
    return (level.number, *kept)
