"""The tables of ledger and counters, on the same metadata as those of objects.

Money and tokens are 64-bit integers. ``ledger`` is append-only; ``counters``, ``rollups`` and ``key_use`` change in the
transaction that appends to it, and can be derived from it again. What many rows of it have in common is in
``dimensions`` once; no id and an empty one are the same there.
"""

from __future__ import annotations

import attrs
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
FAILED = ("refused", "provider_error", "cut", "interrupted")
"""Outcomes that count as errors."""
DIMENSIONS = (*SCOPES, "binding_id", "provider", "model", "tags")
STEP = 900
"""Length of the shortest buckets of rollups, in seconds."""
NOBODY = 0
"""The end user of rollups that are not kept apart by end user."""


@attrs.frozen(eq=False)
class Level:
    """Say by which dimensions rollups are kept apart, the others being "", and in buckets of which lengths.

    ``spans`` in seconds, each a multiple of the next; what is shorter than the last is summed from rows.
    """

    number: int
    dimensions: tuple[str, ...]
    spans: tuple[int, ...]
    kept_by: int
    """Number of the level whose combinations of dimensions these are."""

    @property
    def is_of_end_users(self) -> bool:
        """Whether it holds only exchanges that name an end user, by end user."""
        return "end_user" in self.dimensions


LEVELS = (
    Level(0, (*DIMENSIONS, "end_user"), (86_400,), 1),  # so many that shorter buckets were of one row each
    Level(5, ("organization_id", "end_user"), (86_400, 3_600), 4),
    Level(1, DIMENSIONS, (86_400, 14_400, 3_600, STEP), 1),
    Level(2, ("organization_id", "team_id", "project_id", "binding_id", "provider", "model"),
          (86_400, 14_400, 3_600, STEP), 2),
    Level(3, ("organization_id", "team_id", "project_id"), (86_400, 3_600, STEP), 3),
    Level(4, ("organization_id",), (86_400, 3_600, STEP), 4),
)  # fmt: skip
"""Those of end users, then those of all; from the finest to the coarsest, each a part of the one before."""
END_USERS, END_USERS_OF_ORGANIZATION, ALL, *COARSE = LEVELS


def level_of(names: set[str]) -> Level:
    """Return the coarsest level that keeps dimensions apart."""
    return next(level for level in reversed(LEVELS) if names <= set(level.dimensions))


ledger = Table(
    "ledger",
    metadata,
    Column("sequence", Integer, primary_key=True),  # the order in which rows were committed
    Column("request_id", String, nullable=False, unique=True),
    Column("started_at_ns", BigInteger, nullable=False),
    Column("duration_ns", BigInteger, nullable=False),
    Column("dimensions_id", Integer, nullable=False),
    Column("end_user_id", Integer),
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
    Column("debits", Text),  # JSON: id of the counter, reserved, charged
    Column("adjusts", String),
    Column("counts_from_ns", BigInteger),  # NULL: budgets count it from its start; UNCOUNTED: none does
    Index("ledger_by_time", "started_at_ns", "dimensions_id", "end_user_id"),
    Index("ledger_by_dimensions", "dimensions_id", "started_at_ns"),
)
_has_end_user = ledger.c.end_user_id.is_not(None)
Index(
    "ledger_by_end_user", ledger.c.end_user_id, ledger.c.started_at_ns,
    sqlite_where=_has_end_user,
)  # fmt: skip
for _column in (ledger.c.adjusts, ledger.c.counts_from_ns):
    _is_rare = _column.is_not(None)
    Index(f"ledger_by_{_column.name}", _column, sqlite_where=_is_rare)
UNCOUNTED = -1
"""Before all time: what budgets never count."""

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

dimensions = Table(
    "dimensions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("level", Integer, nullable=False),
    *(Column(name, String, nullable=False) for name in DIMENSIONS),  # "": none, or whichever; tags in JSON
)
Index("dimensions_unique", dimensions.c.level, *(dimensions.c[name] for name in DIMENSIONS), unique=True)

# Clients name end users, and there may be very many: a row of a ledger or rollup refers to one beside its dimensions.
end_users = Table(
    "end_users",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("end_user", String, nullable=False, unique=True),
)

rollups = Table(
    "rollups",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("span", Integer, primary_key=True, autoincrement=False),
    Column("start", BigInteger, primary_key=True, autoincrement=False),  # seconds since the epoch
    Column("dimensions_id", Integer, primary_key=True, autoincrement=False),  # of the level's ``kept_by``
    Column("end_user_id", Integer, primary_key=True, autoincrement=False),
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
