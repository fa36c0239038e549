"""The tables of ledger and counters, on the same metadata as those of objects.

Money and tokens are 64-bit integers. ``ledger`` is append-only; ``debits``, ``counters``, ``rollups`` and ``key_use``
change in the transaction that appends to it, and can be derived from it again.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, String, Table, Text

from penstock_plugins.store.tables import metadata

SCOPES = ("organization_id", "team_id", "project_id", "virtual_key_id", "principal_id")
TOKENS = (
    "input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning",
    "input_audio", "cache_read_audio", "output_audio",
)  # fmt: skip
"""Classes of tokens, named as in Usage."""
SUMS = ("requests", "errors", *TOKENS, "cost_nano_usd", "unpriced", "estimated")
"""What rollups hold of each group and bucket."""
SPANS = (86_400, 10_800, 900)
"""Lengths of the buckets of rollups, in seconds, each a multiple of the next."""

ledger = Table(
    "ledger",
    metadata,
    Column("sequence", Integer, primary_key=True),  # the order in which rows were committed
    Column("request_id", String, nullable=False, unique=True),
    Column("started_at_ns", BigInteger, nullable=False),
    Column("duration_ns", BigInteger, nullable=False),
    *(Column(name, String, nullable=False) for name in SCOPES),
    Column("end_user", String),
    Column("binding_id", String),
    Column("provider", String),
    Column("model_asked", String),
    Column("model_served", String),
    *(Column(name, BigInteger, nullable=False) for name in TOKENS),
    Column("usage_source", String),  # NULL where there is no usage
    Column("cost_nano_usd", BigInteger, nullable=False),
    Column("cost_source", String, nullable=False),
    Column("price_version", String),
    Column("status", Integer),
    Column("outcome", String, nullable=False),
    Column("error", String),
    Column("is_stream", Boolean, nullable=False),
    Column("fallback_count", Integer, nullable=False),
    Column("attempts", Text),  # JSON
    Column("tags", Text),  # JSON
    Column("adjusts", String),
    Column("counted_at_ns", BigInteger),  # when what it counts to budgets was spent; NULL where it counts to none
    Column("dimensions_id", Integer, nullable=False),
    Column("end_user_dimensions_id", Integer),
    Index("ledger_by_time", "started_at_ns", "request_id"),
    Index("ledger_by_key", "virtual_key_id", "started_at_ns", "request_id"),
    Index("ledger_by_project", "project_id", "started_at_ns", "request_id"),
    Index("ledger_by_principal", "principal_id", "started_at_ns", "request_id"),
    Index("ledger_by_adjusted", "adjusts"),
)

counters = Table(
    "counters",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("counter", String, nullable=False),
    Column("period", BigInteger, nullable=False),
    Column("is_durable", Boolean, nullable=False),
    Column("total", BigInteger, nullable=False),
    Column("seed", BigInteger, nullable=False),  # the part of the total spent before there was this counter
    Column("seed_through", Integer, nullable=False),  # the last row of the ledger in the seed
    Column("seed_where", Text),  # JSON: columns and values of the rows in the seed
    Index("counters_by_name", "counter", "period", unique=True),
)

debits = Table(
    "debits",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),  # of the ledger
    Column("counter_id", Integer, primary_key=True, autoincrement=False),
    Column("reserved", BigInteger, nullable=False),
    Column("charged", BigInteger, nullable=False),
    Index("debits_by_counter", "counter_id", "sequence", "charged"),
    sqlite_with_rowid=False,
)

dimensions = Table(
    "dimensions",
    metadata,
    Column("id", Integer, primary_key=True),
    *(Column(name, String, nullable=False) for name in SCOPES),
    Column("binding_id", String, nullable=False),  # here and below: "" stands for none
    Column("provider", String, nullable=False),
    Column("model", String, nullable=False),
    Column("tags", String, nullable=False),  # JSON
    Column("end_user", String, nullable=False),  # "": whoever it was
)
DIMENSIONS = tuple(column.name for column in dimensions.columns if column.name != "id")
Index("dimensions_unique", *(dimensions.c[name] for name in DIMENSIONS), unique=True)

rollups = Table(
    "rollups",
    metadata,
    Column("span", Integer, primary_key=True, autoincrement=False),  # of SPANS; negative: one end user's part
    Column("start", BigInteger, primary_key=True, autoincrement=False),  # seconds since the epoch
    Column("dimensions_id", Integer, primary_key=True, autoincrement=False),
    *(Column(name, BigInteger, nullable=False) for name in SUMS),
    sqlite_with_rowid=False,
)

key_use = Table(
    "key_use",
    metadata,
    Column("virtual_key_id", String, primary_key=True),
    Column("last_used_at_ms", BigInteger, nullable=False),
)

holders = Table(
    "holders",
    metadata,
    Column("holder", String, primary_key=True),  # a process that counts; alive while its journal's lock is held
    Column("is_exclusive", Boolean, nullable=False),  # whether all that is left of every counter is leased to it
)

leases = Table(
    "leases",
    metadata,
    Column("counter_id", Integer, primary_key=True, autoincrement=False),
    Column("holder", String, primary_key=True),
    Column("amount", BigInteger, nullable=False),  # what it may count up to, beyond the total
    Column("answered", BigInteger, nullable=False),  # the last call it gave back what it did not need for
    Index("leases_by_holder", "holder"),
    sqlite_with_rowid=False,
)

calls = Table(
    "calls",
    metadata,
    Column("counter_id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),  # grows with each call to give back
)
