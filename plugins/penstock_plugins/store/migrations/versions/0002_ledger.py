"""Make the tables of ledger and counters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SCOPES = ("organization_id", "team_id", "project_id", "virtual_key_id", "principal_id")
_TOKENS = (
    "input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning",
    "input_audio", "cache_read_audio", "output_audio",
)  # fmt: skip


def _text(name: str, *, is_nullable: bool = True) -> sa.Column[str]:
    return sa.Column(name, sa.String, nullable=is_nullable)


def _number(name: str, *, is_nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=is_nullable)


def _key(name: str, type_: type[sa.types.TypeEngine[int]] = sa.Integer) -> sa.Column[int]:
    return sa.Column(name, type_, primary_key=True, autoincrement=False)


def upgrade() -> None:
    """Make them."""
    _make_ledger()
    _make_counters()
    _make_rollups()
    _make_leases()


def _make_ledger() -> None:
    op.create_table(
        "ledger",
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("request_id", sa.String, nullable=False, unique=True),
        _number("started_at_ns"),
        _number("duration_ns"),
        sa.Column("dimensions_id", sa.Integer, nullable=False),
        sa.Column("end_user_id", sa.Integer),
        *(_text(name) for name in ("model_asked", "model_served")),
        *(_number(name) for name in _TOKENS),
        _text("usage_source"),
        _number("cost_nano_usd"),
        _text("cost_source", is_nullable=False),
        _text("price_version"),
        sa.Column("status", sa.Integer),
        _text("outcome", is_nullable=False),
        _text("error"),
        sa.Column("is_stream", sa.Boolean, nullable=False),
        sa.Column("fallback_count", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Text),
        sa.Column("debits", sa.Text),
        _text("adjusts"),
        _number("counts_from_ns", is_nullable=True),
    )
    op.create_index("ledger_by_time", "ledger", ["started_at_ns", "dimensions_id", "end_user_id"])
    op.create_index("ledger_by_dimensions", "ledger", ["dimensions_id", "started_at_ns"])
    _index_rare("ledger_by_end_user", "end_user_id", "started_at_ns")
    _index_rare("ledger_by_adjusts", "adjusts")
    _index_rare("ledger_by_counts_from_ns", "counts_from_ns")


def _index_rare(name: str, *columns: str) -> None:
    is_there = sa.text(f"{columns[0]} IS NOT NULL")
    op.create_index(name, "ledger", list(columns), sqlite_where=is_there, postgresql_where=is_there)


def _make_counters() -> None:
    op.create_table(
        "counters",
        sa.Column("id", sa.Integer, primary_key=True),
        _text("counter", is_nullable=False),
        _number("period"),
        sa.Column("is_durable", sa.Boolean, nullable=False),
        _number("total"),
        _number("seed"),
        sa.Column("seed_through", sa.Integer, nullable=False),
        sa.Column("seed_where", sa.Text),
    )
    op.create_index("counters_by_name", "counters", ["counter", "period"], unique=True)


def _make_rollups() -> None:
    names = (*_SCOPES, "binding_id", "provider", "model", "tags")
    op.create_table(
        "dimensions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("level", sa.Integer, nullable=False),
        *(_text(name, is_nullable=False) for name in names),
    )
    op.create_index("dimensions_unique", "dimensions", ["level", *names], unique=True)
    op.create_table(
        "end_users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("end_user", sa.String, nullable=False, unique=True),
    )
    op.create_table(
        "rollups",
        _key("level"),
        _key("span"),
        _key("start", sa.BigInteger),
        _key("dimensions_id"),
        _key("end_user_id"),
        *(_number(name) for name in ("requests", "errors", *_TOKENS, "cost_nano_usd", "unpriced", "estimated")),
        sqlite_with_rowid=False,
    )
    op.create_table("key_use", sa.Column("virtual_key_id", sa.String, primary_key=True), _number("last_used_at_ms"))


def _make_leases() -> None:
    op.create_table(
        "holders",
        sa.Column("holder", sa.String, primary_key=True),
        sa.Column("is_exclusive", sa.Boolean, nullable=False),
    )
    op.create_table(
        "leases",
        _key("counter_id"),
        sa.Column("holder", sa.String, primary_key=True),
        _number("amount"),
        _number("answered"),
        sqlite_with_rowid=False,
    )
    op.create_index("leases_by_holder", "leases", ["holder"])
    op.create_table("calls", _key("counter_id"), _number("number"))
