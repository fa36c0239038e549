"""Objects as rows: versioned documents, what is unique about them, their audit, and what a client may ask twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection, Row, Select, Table, and_, bindparam, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from penstock.governance import AuditEntry, ConflictError, Scope, StoredObject
from penstock_plugins.store.tables import audit, idempotency, meta, objects, unique_values

Clock = Callable[[], float]
REVISION = "revision"
_OBJECT = tuple(column for column in objects.c if column.name != "revision")

# Statements that are made anew each time take longer than SQLite does.
_META = select(meta.c.value).where(meta.c.name == bindparam("name"))
_LOCKED_META = _META.with_for_update()
_GET = select(*_OBJECT).where(objects.c.kind == bindparam("kind"), objects.c.id == bindparam("id"))
_INSERT = insert(objects)
_CURRENT = (
    objects.c.kind == bindparam("of_kind"),
    objects.c.id == bindparam("of_id"),
    objects.c.version == bindparam("of_version"),
    objects.c.archived_at_ms.is_(None),
)
_PUT_NAMES = ("version", "updated_at_ms", "archived_at_ms", "document", "revision",
              "organization_id", "team_id", "project_id")  # fmt: skip
_PUT = update(objects).where(*_CURRENT).values({name: bindparam(name) for name in _PUT_NAMES})
_HOLDER = select(unique_values.c.id).where(
    *(unique_values.c[name] == bindparam(name) for name in ("kind", "name", "value"))
)
_MINE = and_(unique_values.c.kind == bindparam("of_kind"), unique_values.c.id == bindparam("of_id"))
_HELD = select(unique_values.c.name, unique_values.c.value).where(_MINE)
_LET_GO = delete(unique_values).where(_MINE)
_HOLD = insert(unique_values)
_AUDIT = insert(audit)


def read_revision(connection: Connection, *, lock: bool = False) -> int:
    """Return the number of the last transaction that changed an object, 0 before the first."""
    found = connection.execute(_LOCKED_META if lock else _META, {"name": REVISION}).scalar()
    return 0 if found is None else int(found)


def changed_since(connection: Connection, revision: int, kinds: Sequence[str]) -> list[StoredObject]:
    """Return the objects of some kinds that changed after a revision, each once; from 0 the active ones alone."""
    query = select(*_OBJECT).where(objects.c.revision > revision, objects.c.kind.in_(kinds))
    if not revision:
        query = query.where(objects.c.archived_at_ms.is_(None))
    return [_stored(row) for row in connection.execute(query)]


class SQLReading:
    """Read objects within one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, kind: str, object_id: str) -> StoredObject | None:
        row = self._connection.execute(_GET, {"kind": kind, "id": object_id}).one_or_none()
        return None if row is None else _stored(row)

    def find(self, kind: str, constraint: str, value: Sequence[str]) -> StoredObject | None:
        holder = self._holder(kind, constraint, _joined(value))
        return None if holder is None else self.get(kind, holder)

    def _holder(self, kind: str, constraint: str, value: str) -> str | None:
        return self._connection.execute(_HOLDER, {"kind": kind, "name": constraint, "value": value}).scalar()

    def list(
        self,
        kind: str,
        *,
        scope: Scope | None = None,
        where: Mapping[str, str] | None = None,
        after: str | None = None,
        limit: int | None = None,
        include_archived: bool = False,
    ) -> Sequence[StoredObject]:
        query = _within(select(*_OBJECT).where(objects.c.kind == kind), objects, scope)
        if not include_archived:
            query = query.where(objects.c.archived_at_ms.is_(None))
        for member, value in (where or {}).items():
            query = query.where(objects.c.document[member].as_string() == value)
        if after is not None:
            query = query.where(objects.c.id > after)
        query = query.order_by(objects.c.id).limit(limit)
        return [_stored(row) for row in self._connection.execute(query)]

    def audit_entries(
        self, *, scope: Scope | None, where: Mapping[str, str], after: str | None, limit: int
    ) -> Sequence[AuditEntry]:
        query = _within(select(audit), audit, scope)
        for name, value in where.items():
            if name not in ("actor", "action", "kind", "object_id"):
                raise ValueError(f"audit entries are not found by {name!r}")
            query = query.where(audit.c[name] == value)
        if after is not None:
            query = query.where(audit.c.number < select(audit.c.number).where(audit.c.id == after).scalar_subquery())
        query = query.order_by(audit.c.number.desc()).limit(limit)
        return [_entry(row) for row in self._connection.execute(query)]

    def remembered(self, key: str, *, now_ms: int) -> tuple[bytes, bytes] | None:
        kept = idempotency.c
        query = select(kept.fingerprint, kept.answer).where(kept.key == key, kept.expires_at_ms > now_ms)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else (row.fingerprint, row.answer)


class SQLTransaction(SQLReading):
    """Change objects within one transaction."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        super().__init__(connection)
        self.now_ms = int(clock() * 1000)
        self.revision: int | None = None
        """Of the store after this transaction; None where it has changed no object."""

    def insert(
        self, kind: str, object_id: str, scope: Scope, document: Mapping[str, Any], unique: Mapping[str, Sequence[str]]
    ) -> StoredObject:
        now = self.now_ms
        stored = StoredObject(kind, object_id, scope, 1, now, now, None, plain(document))
        row = {"kind": kind, "id": object_id, "version": 1, "created_at_ms": now, "updated_at_ms": now}
        row |= {"document": stored.document, "revision": self._changed(), **columns_of(scope)}
        try:
            self._connection.execute(_INSERT, row)
        except IntegrityError:
            raise ConflictError(f"{kind} {object_id} exists already", field="id", other_id=object_id) from None
        self._hold(stored, {}, joined_all(unique))
        return stored

    def replace(
        self,
        stored: StoredObject,
        document: Mapping[str, Any],
        unique: Mapping[str, Sequence[str]],
        scope: Scope | None = None,
    ) -> StoredObject:
        following = attrs.evolve(
            stored,
            version=stored.version + 1,
            updated_at_ms=self.now_ms,
            document=plain(document),
            scope=scope or stored.scope,
        )
        self._put(stored, following)
        self._hold(following, values_held(self._connection, stored), joined_all(unique))
        return following

    def archive(self, stored: StoredObject) -> StoredObject:
        following = attrs.evolve(
            stored, version=stored.version + 1, updated_at_ms=self.now_ms, archived_at_ms=self.now_ms
        )
        self._put(stored, following)
        release_values(self._connection, stored)
        return following

    def audit(self, entry: AuditEntry) -> None:
        row = {field.name: getattr(entry, field.name) for field in attrs.fields(AuditEntry) if field.name != "scope"}
        self._connection.execute(_AUDIT, {**row, **columns_of(entry.scope)})

    def remember(self, key: str, fingerprint: bytes, answer: bytes, *, expires_at_ms: int) -> None:
        kept = idempotency.c
        self._connection.execute(delete(idempotency).where((kept.expires_at_ms <= self.now_ms) | (kept.key == key)))
        row = {"key": key, "fingerprint": fingerprint, "answer": answer, "expires_at_ms": expires_at_ms}
        self._connection.execute(insert(idempotency).values(row))

    def _put(self, stored: StoredObject, following: StoredObject) -> None:
        """Put a version in place of the current one."""
        change_object(self._connection, stored, following, self._changed())

    def _hold(self, stored: StoredObject, before: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        """Hold these unique values in place of those before."""
        if before == wanted:
            return
        if before:
            release_values(self._connection, stored)
        for name, value in wanted.items():
            other = self._holder(stored.kind, name, value)
            try:
                if other is None:
                    row = {"kind": stored.kind, "name": name, "value": value, "id": stored.id}
                    self._connection.execute(_HOLD, row)
                    continue
            except IntegrityError:  # another writer of a database that lets several in was faster
                other = None
            raise ConflictError(f"{stored.kind}: this {name} is taken", field=name, other_id=other)

    def _changed(self) -> int:
        """Return the revision of this transaction, a new one with its first change."""
        if self.revision is None:
            before = read_revision(self._connection, lock=True)
            self.revision = before + 1
            write_meta(self._connection, REVISION, str(self.revision))
        return self.revision


def change_object(connection: Connection, stored: StoredObject, following: StoredObject, revision: int) -> None:
    """Put a version in place of the current one. Raises ConflictError where ``stored`` is not that."""
    row: dict[str, Any] = {"version": following.version, "updated_at_ms": following.updated_at_ms}
    row |= {"archived_at_ms": following.archived_at_ms, "document": following.document}
    row |= {"revision": revision, **columns_of(following.scope)}
    row |= {"of_kind": stored.kind, "of_id": stored.id, "of_version": stored.version}
    if connection.execute(_PUT, row).rowcount != 1:
        raise ConflictError(f"{stored.kind} {stored.id} has changed meanwhile", other_id=stored.id)


def values_held(connection: Connection, stored: StoredObject) -> Mapping[str, str]:
    """Return the unique values of an object, by name of constraint."""
    rows = connection.execute(_HELD, {"of_kind": stored.kind, "of_id": stored.id})
    return {row.name: row.value for row in rows}


def release_values(connection: Connection, stored: StoredObject) -> None:
    """Let others take the unique values of an object."""
    connection.execute(_LET_GO, {"of_kind": stored.kind, "of_id": stored.id})


def read_meta(connection: Connection, name: str) -> str | None:
    """Return a value that the store keeps about itself."""
    return connection.execute(_META, {"name": name}).scalar()


def write_meta(connection: Connection, name: str, value: str) -> None:
    """Keep a value about the store itself."""
    if not connection.execute(update(meta).where(meta.c.name == name).values(value=value)).rowcount:
        connection.execute(insert(meta).values(name=name, value=value))


def _within(query: Select[Any], table: Table, scope: Scope | None) -> Select[Any]:
    """Restrict a query to a scope and what is below it."""
    for name, value in ({} if scope is None else columns_of(scope)).items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query


def plain(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a document as it will be read back."""
    plain: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return plain


def columns_of(scope: Scope) -> dict[str, Any]:
    """Return the columns that hold a scope."""
    return {"organization_id": scope.organization_id, "team_id": scope.team_id, "project_id": scope.project_id}


def joined_all(unique: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return unique values as they are kept."""
    return {name: _joined(value) for name, value in unique.items()}


def _joined(value: Sequence[str]) -> str:
    return msgspec.json.encode(list(value)).decode()


def _stored(row: Row[Any]) -> StoredObject:
    kind, object_id, organization, team, project, version, created, updated, archived, document = tuple(row)
    return StoredObject(
        kind, object_id, Scope(organization, team, project), version, created, updated, archived, document
    )


def _entry(row: Row[Any]) -> AuditEntry:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    del values["number"]
    scope = Scope(*(values.pop(name) for name in ("organization_id", "team_id", "project_id")))
    return AuditEntry(scope=scope, **values)
