"""The tables of objects. ``metadata`` holds every table of the store; migrations make what it describes."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Index, Integer, LargeBinary, MetaData, String, Table, Text

metadata = MetaData()

objects = Table(
    "objects",
    metadata,
    Column("kind", String, primary_key=True),
    Column("id", String, primary_key=True),
    Column("organization_id", String, nullable=False),
    Column("team_id", String),
    Column("project_id", String),
    Column("version", Integer, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    Column("archived_at_ms", BigInteger),
    Column("revision", BigInteger, nullable=False),  # of the store, when this version was written
    Column("document", JSON, nullable=False),
    Index("objects_by_revision", "revision"),
    Index("objects_by_organization", "kind", "organization_id", "id"),
    Index("objects_by_team", "kind", "team_id", "id"),
    Index("objects_by_project", "kind", "project_id", "id"),
)

unique_values = Table(
    "unique_values",
    metadata,
    Column("kind", String, primary_key=True),
    Column("name", String, primary_key=True),  # of the constraint
    Column("value", String, primary_key=True),  # a JSON list
    Column("id", String, nullable=False),
    Index("unique_values_by_id", "kind", "id"),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order in which they were written
    Column("id", String, nullable=False, unique=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String, nullable=False),
    Column("action", String, nullable=False),
    Column("kind", String, nullable=False),
    Column("object_id", String, nullable=False),
    Column("organization_id", String, nullable=False),
    Column("team_id", String),
    Column("project_id", String),
    Column("before", JSON(none_as_null=True)),
    Column("after", JSON(none_as_null=True)),
    Column("request_id", String),
    Column("source", String, nullable=False),
    Index("audit_by_object", "object_id", "number"),
    Index("audit_by_actor", "actor", "number"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("key", String, primary_key=True),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("expires_at_ms", BigInteger, nullable=False),
    Index("idempotency_by_expiry", "expires_at_ms"),
)

meta = Table(
    "meta",
    metadata,
    Column("name", String, primary_key=True),
    Column("value", Text, nullable=False),
)
