"""A transaction worked out on a view of the store, beside other writers, and written in one step at its end.

Whoever writes waits for the one writer: a document of a thousand objects is seconds of work, and some ten milliseconds
of writing. What is prepared is committed only if no object has changed since the view, so that it is as good as if it
had been worked out on the writer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import msgspec
from sqlalchemy import Connection, delete

from penstock.governance import AuditEntry, ConflictError, Scope, StoredObject
from penstock_plugins.store.bulk import Row, insert_into, run_many
from penstock_plugins.store.objects import (
    REVISION,
    Clock,
    SQLReading,
    change_object,
    columns_of,
    joined_all,
    plain,
    read_revision,
    release_values,
    values_held,
    write_meta,
)
from penstock_plugins.store.tables import audit, idempotency, objects, unique_values

_OBJECT_NAMES = tuple(column.name for column in objects.c)
_VALUE_NAMES = ("kind", "name", "value", "id")
_AUDIT_NAMES = tuple(column.name for column in audit.c if column.name != "number")
_KEPT_NAMES = ("key", "fingerprint", "answer", "expires_at_ms")


class OvertakenError(Exception):
    """Say that objects have changed since the view a transaction was prepared on."""


class PreparedTransaction(SQLReading):
    """Work like a Transaction, and gather what is to be written."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        super().__init__(connection)
        self.now_ms = int(clock() * 1000)
        self._base = read_revision(connection)
        self._changed: defaultdict[str, dict[str, StoredObject]] = defaultdict(dict)
        """By kind and id, as they are to be."""
        self._before: dict[tuple[str, str], StoredObject] = {}
        """What is in the database of those that are to be changed."""
        self._values: dict[tuple[str, str], Mapping[str, str]] = {}
        """Unique values of those that are to be changed, as they are to be."""
        self._holders: dict[tuple[str, str, str], str | None] = {}
        """Who will hold a value that is taken or let go."""
        self._audit: list[AuditEntry] = []
        self._kept: dict[str, tuple[bytes, bytes, int]] = {}
        self._lists: dict[Any, Sequence[StoredObject]] = {}
        """What the view has answered: it does not change."""
        self._gets: dict[tuple[str, str], StoredObject | None] = {}

    # --- reading ------------------------------------------------------------------------------------------------

    def get(self, kind: str, object_id: str) -> StoredObject | None:
        changed = self._changed[kind].get(object_id)
        if changed is not None:
            return changed
        if (kind, object_id) not in self._gets:
            self._gets[kind, object_id] = super().get(kind, object_id)
        return self._gets[kind, object_id]

    def _holder(self, kind: str, constraint: str, value: str) -> str | None:
        if (kind, constraint, value) in self._holders:
            return self._holders[kind, constraint, value]
        return super()._holder(kind, constraint, value)

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
        mine = self._changed[kind]
        replaced = sum((kind, object_id) in self._before for object_id in mine)
        # Those replaced may not be found any more: as many rows more, in steps, so that answers can be kept.
        wide = None if limit is None else limit + (1 << replaced.bit_length() if replaced else 0)
        asked = (kind, scope, tuple(sorted((where or {}).items())), after, wide, include_archived)
        found = self._lists.get(asked)
        if found is None:
            found = self._lists[asked] = super().list(
                kind, scope=scope, where=where, after=after, limit=wide, include_archived=include_archived
            )
        if not mine:
            return found
        wanted = _Wanted({} if scope is None else columns_of(scope), where or {}, after or "", include_archived)
        merged = [stored for stored in found if stored.id not in mine]
        merged += [stored for stored in mine.values() if wanted.holds(stored)]
        return sorted(merged, key=lambda stored: stored.id)[:limit]

    def remembered(self, key: str, *, now_ms: int) -> tuple[bytes, bytes] | None:
        kept = self._kept.get(key)
        return super().remembered(key, now_ms=now_ms) if kept is None else kept[:2]

    # --- changing -----------------------------------------------------------------------------------------------

    def insert(
        self, kind: str, object_id: str, scope: Scope, document: Mapping[str, Any], unique: Mapping[str, Sequence[str]]
    ) -> StoredObject:
        if self.get(kind, object_id) is not None:
            raise ConflictError(f"{kind} {object_id} exists already", field="id", other_id=object_id)
        stored = StoredObject(kind, object_id, scope, 1, self.now_ms, self.now_ms, None, plain(document))
        self._hold(stored, {}, joined_all(unique))
        self._changed[kind][object_id] = stored
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
        self._check_current(stored)
        self._hold(following, self._held(stored), joined_all(unique))
        self._put(following)
        return following

    def archive(self, stored: StoredObject) -> StoredObject:
        following = attrs.evolve(
            stored, version=stored.version + 1, updated_at_ms=self.now_ms, archived_at_ms=self.now_ms
        )
        self._check_current(stored)
        self._hold(following, self._held(stored), {})
        self._put(following)
        return following

    def audit(self, entry: AuditEntry) -> None:
        self._audit.append(entry)

    def remember(self, key: str, fingerprint: bytes, answer: bytes, *, expires_at_ms: int) -> None:
        self._kept[key] = fingerprint, answer, expires_at_ms

    def _check_current(self, stored: StoredObject) -> None:
        current = self.get(stored.kind, stored.id)
        if current is None or current.version != stored.version or current.archived_at_ms is not None:
            raise ConflictError(f"{stored.kind} {stored.id} has changed meanwhile", other_id=stored.id)

    def _put(self, following: StoredObject) -> None:
        place = following.kind, following.id
        if following.id not in self._changed[following.kind]:
            before = self._gets[place]
            assert before is not None, "it was checked to be current"
            self._before[place] = before
        self._changed[following.kind][following.id] = following

    def _held(self, stored: StoredObject) -> Mapping[str, str]:
        held = self._values.get((stored.kind, stored.id))
        return values_held(self._connection, stored) if held is None else held

    def _hold(self, stored: StoredObject, before: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            other = self._holder(stored.kind, name, value)
            if other not in (None, stored.id):
                raise ConflictError(f"{stored.kind}: this {name} is taken", field=name, other_id=other)
        for name, value in before.items():
            self._holders[stored.kind, name, value] = None
        for name, value in wanted.items():
            self._holders[stored.kind, name, value] = stored.id
        self._values[stored.kind, stored.id] = wanted

    # --- writing ------------------------------------------------------------------------------------------------

    def rows(self) -> Rows:
        """Return what is to be written."""
        revision = self._base + 1
        changed = [stored for kind in self._changed.values() for stored in kind.values()]
        return Rows(
            base=self._base,
            made=[_object_row(each, revision) for each in changed if (each.kind, each.id) not in self._before],
            changed=[(self._before[key], each) for each in changed if (key := (each.kind, each.id)) in self._before],
            values=[
                (each.kind, name, value, each.id)
                for each in changed
                for name, value in self._values[each.kind, each.id].items()
            ],
            audit=[_audit_row(entry) for entry in self._audit],
            kept=[(key, *kept) for key, kept in self._kept.items()],
            now_ms=self.now_ms,
        )


@attrs.frozen(kw_only=True)
class Rows:
    """Hold what a prepared transaction writes."""

    base: int
    """Revision of the view it was prepared on."""
    made: Sequence[Row]
    changed: Sequence[tuple[StoredObject, StoredObject]]
    """What is in the database, and what takes its place."""
    values: Sequence[Row]
    audit: Sequence[Row]
    kept: Sequence[Row]
    now_ms: int

    def commit(self, connection: Connection) -> int | None:
        """Write everything; returns the revision of the store after it, None where no object changes.

        Raises OvertakenError where an object has changed since the view.
        """
        if read_revision(connection, lock=True) != self.base:
            raise OvertakenError
        revision = self.base + 1 if self.made or self.changed else None
        if revision is not None:
            write_meta(connection, REVISION, str(revision))
            for before, following in self.changed:
                change_object(connection, before, following, revision)
                release_values(connection, before)
            run_many(connection, _INSERT_OBJECT, _OBJECT_NAMES, self.made)
            run_many(connection, _INSERT_VALUE, _VALUE_NAMES, self.values)
        run_many(connection, _INSERT_AUDIT, _AUDIT_NAMES, self.audit)
        if self.kept:
            gone = (idempotency.c.expires_at_ms <= self.now_ms) | idempotency.c.key.in_([row[0] for row in self.kept])
            connection.execute(delete(idempotency).where(gone))
            run_many(connection, _INSERT_KEPT, _KEPT_NAMES, self.kept)
        return revision


_INSERT_OBJECT = insert_into(objects)
_INSERT_VALUE = insert_into(unique_values)
_INSERT_AUDIT = insert_into(audit)
_INSERT_KEPT = insert_into(idempotency)


@attrs.frozen
class _Wanted:
    """Say of an object what the query of a list says of a row."""

    columns: Mapping[str, Any]
    where: Mapping[str, str]
    after: str
    include_archived: bool

    def holds(self, stored: StoredObject) -> bool:
        if stored.id <= self.after or (stored.archived_at_ms is not None and not self.include_archived):
            return False
        if any(stored.document.get(member) != value for member, value in self.where.items()):
            return False
        return all(value is None or getattr(stored.scope, name) == value for name, value in self.columns.items())


def _object_row(stored: StoredObject, revision: int) -> Row:
    row = {"kind": stored.kind, "id": stored.id, "version": stored.version, "created_at_ms": stored.created_at_ms}
    row |= {"updated_at_ms": stored.updated_at_ms, "archived_at_ms": stored.archived_at_ms, "revision": revision}
    row |= {"document": _text(stored.document), **columns_of(stored.scope)}
    return tuple(row[name] for name in _OBJECT_NAMES)


def _audit_row(entry: AuditEntry) -> Row:
    row = {field.name: getattr(entry, field.name) for field in attrs.fields(AuditEntry) if field.name != "scope"}
    row |= {"before": _text(entry.before), "after": _text(entry.after), **columns_of(entry.scope)}
    return tuple(row[name] for name in _AUDIT_NAMES)


def _text(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
