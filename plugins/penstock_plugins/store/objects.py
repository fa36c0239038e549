"""Objects as rows: versioned documents, what is unique about them, their audit, and what a client may ask twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection, Row, Select, Table, and_, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from penstock.governance import AuditEntry, ConflictError, Scope, StoredObject
from penstock_plugins.store.tables import audit, idempotency, meta, objects, unique_values

Clock = Callable[[], float]
REVISION = "revision"
_OBJECT = tuple(column for column in objects.c if column.name != "revision")


def read_revision(connection: Connection, *, lock: bool = False) -> int:
    """Return the number of the last transaction that changed an object, 0 before the first."""
    query = select(meta.c.value).where(meta.c.name == REVISION)
    found = connection.execute(query.with_for_update() if lock else query).scalar()
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
        query = select(*_OBJECT).where(objects.c.kind == kind, objects.c.id == object_id)
        row = self._connection.execute(query).one_or_none()
        return None if row is None else _stored(row)

    def find(self, kind: str, constraint: str, value: Sequence[str]) -> StoredObject | None:
        holder = self._holder(kind, constraint, _joined(value))
        return None if holder is None else self.get(kind, holder)

    def _holder(self, kind: str, constraint: str, value: str) -> str | None:
        held = unique_values.c
        query = select(held.id).where(held.kind == kind, held.name == constraint, held.value == value)
        return self._connection.execute(query).scalar()

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
        stored = StoredObject(kind, object_id, scope, 1, now, now, None, _plain(document))
        if self.get(kind, object_id) is not None:
            raise ConflictError(f"{kind} {object_id} exists already", field="id", other_id=object_id)
        row = {"kind": kind, "id": object_id, "version": 1, "created_at_ms": now, "updated_at_ms": now}
        row |= {"document": stored.document, "revision": self._changed(), **attrs.asdict(scope)}
        try:
            self._connection.execute(insert(objects).values(row))
        except IntegrityError:
            raise ConflictError(f"{kind} {object_id} exists already", field="id", other_id=object_id) from None
        self._hold(stored, unique)
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
            document=_plain(document),
            scope=scope or stored.scope,
        )
        self._put(stored, following)
        self._hold(following, unique)
        return following

    def archive(self, stored: StoredObject) -> StoredObject:
        following = attrs.evolve(
            stored, version=stored.version + 1, updated_at_ms=self.now_ms, archived_at_ms=self.now_ms
        )
        self._put(stored, following)
        self._hold(following, {})
        return following

    def audit(self, entry: AuditEntry) -> None:
        row = {field.name: getattr(entry, field.name) for field in attrs.fields(AuditEntry) if field.name != "scope"}
        self._connection.execute(insert(audit).values({**row, **attrs.asdict(entry.scope)}))

    def remember(self, key: str, fingerprint: bytes, answer: bytes, *, expires_at_ms: int) -> None:
        kept = idempotency.c
        self._connection.execute(delete(idempotency).where((kept.expires_at_ms <= self.now_ms) | (kept.key == key)))
        row = {"key": key, "fingerprint": fingerprint, "answer": answer, "expires_at_ms": expires_at_ms}
        self._connection.execute(insert(idempotency).values(row))

    def _put(self, stored: StoredObject, following: StoredObject) -> None:
        """Put a version in place of the current one."""
        held = objects.c
        changed = self._connection.execute(
            update(objects)
            .where(
                held.kind == stored.kind,
                held.id == stored.id,
                held.version == stored.version,
                held.archived_at_ms.is_(None),
            )
            .values(
                version=following.version,
                updated_at_ms=following.updated_at_ms,
                archived_at_ms=following.archived_at_ms,
                document=following.document,
                revision=self._changed(),
                **attrs.asdict(following.scope),
            )
        )
        if changed.rowcount != 1:
            raise ConflictError(f"{stored.kind} {stored.id} has changed meanwhile", other_id=stored.id)

    def _hold(self, stored: StoredObject, unique: Mapping[str, Sequence[str]]) -> None:
        """Hold these unique values and no others."""
        held = unique_values.c
        mine = and_(held.kind == stored.kind, held.id == stored.id)
        before = {row.name: row.value for row in self._connection.execute(select(unique_values).where(mine))}
        wanted = {name: _joined(value) for name, value in unique.items()}
        if before == wanted:
            return
        self._connection.execute(delete(unique_values).where(mine))
        for name, value in wanted.items():
            other = self._holder(stored.kind, name, value)
            row = {"kind": stored.kind, "name": name, "value": value, "id": stored.id}
            try:
                if other is None:
                    self._connection.execute(insert(unique_values).values(row))
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


def read_meta(connection: Connection, name: str) -> str | None:
    """Return a value that the store keeps about itself."""
    return connection.execute(select(meta.c.value).where(meta.c.name == name)).scalar()


def write_meta(connection: Connection, name: str, value: str) -> None:
    """Keep a value about the store itself."""
    if not connection.execute(update(meta).where(meta.c.name == name).values(value=value)).rowcount:
        connection.execute(insert(meta).values(name=name, value=value))


def _within(query: Select[Any], table: Table, scope: Scope | None) -> Select[Any]:
    """Restrict a query to a scope and what is below it."""
    for name, value in () if scope is None else attrs.asdict(scope).items():
        if value is not None:
            query = query.where(table.c[name] == value)
    return query


def _plain(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a document as it will be read back."""
    plain: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return plain


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
