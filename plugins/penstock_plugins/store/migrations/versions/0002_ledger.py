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
        *(_text(name, is_nullable=False) for name in _SCOPES),
        *(_text(name) for name in ("end_user", "binding_id", "provider", "model_asked", "model_served")),
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
        sa.Column("tags", sa.Text),
        _text("adjusts"),
        _number("counted_at_ns", is_nullable=True),
        sa.Column("dimensions_id", sa.Integer, nullable=False),
        sa.Column("end_user_dimensions_id", sa.Integer),
    )
    op.create_index("ledger_by_time", "ledger", ["started_at_ns", "request_id"])
    op.create_index("ledger_by_key", "ledger", ["virtual_key_id", "started_at_ns", "request_id"])
    op.create_index("ledger_by_project", "ledger", ["project_id", "started_at_ns", "request_id"])
    op.create_index("ledger_by_principal", "ledger", ["principal_id", "started_at_ns", "request_id"])
    op.create_index("ledger_by_adjusted", "ledger", ["adjusts"])


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
    op.create_table(
        "debits",
        _key("sequence"),
        _key("counter_id"),
        _number("reserved"),
        _number("charged"),
        sqlite_with_rowid=False,
    )
    op.create_index("debits_by_counter", "debits", ["counter_id", "sequence", "charged"])


def _make_rollups() -> None:
    names = (*_SCOPES, "binding_id", "provider", "model", "tags", "end_user")
    op.create_table(
        "dimensions",
        sa.Column("id", sa.Integer, primary_key=True),
        *(_text(name, is_nullable=False) for name in names),
    )
    op.create_index("dimensions_unique", "dimensions", list(names), unique=True)
    op.create_table(
        "rollups",
        _key("span"),
        _key("start", sa.BigInteger),
        _key("dimensions_id"),
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
