"""Make the tables of objects."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _scope() -> tuple[sa.Column[str], ...]:
    return (
        sa.Column("organization_id", sa.String, nullable=False),
        sa.Column("team_id", sa.String),
        sa.Column("project_id", sa.String),
    )


def upgrade() -> None:
    """Make objects and what is unique about them, then what is kept about them."""
    op.create_table(
        "objects",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("id", sa.String, primary_key=True),
        *_scope(),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger, nullable=False),
        sa.Column("archived_at_ms", sa.BigInteger),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("document", sa.JSON, nullable=False),
    )
    op.create_index("objects_by_revision", "objects", ["revision"])
    op.create_index("objects_by_organization", "objects", ["kind", "organization_id", "id"])
    op.create_index("objects_by_team", "objects", ["kind", "team_id", "id"])
    op.create_index("objects_by_project", "objects", ["kind", "project_id", "id"])
    op.create_table(
        "unique_values",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("id", sa.String, nullable=False),
    )
    op.create_index("unique_values_by_id", "unique_values", ["kind", "id"])
    op.create_table("meta", sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.Text, nullable=False))
    _keep_calls()


def _keep_calls() -> None:
    """Make the audit of changes, and the answers to requests that may be repeated."""
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("object_id", sa.String, nullable=False),
        *_scope(),
        sa.Column("before", sa.JSON),
        sa.Column("after", sa.JSON),
        sa.Column("request_id", sa.String),
        sa.Column("source", sa.String, nullable=False),
    )
    op.create_index("audit_by_object", "audit", ["object_id", "number"])
    op.create_index("audit_by_actor", "audit", ["actor", "number"])
    op.create_table(
        "idempotency",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("fingerprint", sa.LargeBinary, nullable=False),
        sa.Column("answer", sa.LargeBinary, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("idempotency_by_expiry", "idempotency", ["expires_at_ms"])
