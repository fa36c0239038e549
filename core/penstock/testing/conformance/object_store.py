"""Checks of ObjectStore: run ``check_object_store`` in an event loop, on data that nobody else changes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import anyio

from penstock.governance import AuditEntry, ConflictError, ObjectStore, Scope, StoredObject, Transaction, new_id

T = TypeVar("T")
OpenStore = Callable[[], AbstractAsyncContextManager[ObjectStore]]
"""Open one more store on the same data, as another process would."""
KIND = "routing_policy"
SEEN_SECONDS = 2.0
"""Until when a change made elsewhere must be known."""
_WRITERS = 4
_ROUNDS = 10


async def check_object_store(open_store: OpenStore) -> None:
    """Run every check. Raises AssertionError saying what is not kept."""
    checks: Sequence[Callable[[ObjectStore], Awaitable[None]]] = (
        check_versions,
        check_unique_values,
        check_rollback,
        check_lists,
        check_audit,
        check_remembered_answers,
        check_watchers,
    )
    async with open_store() as store:
        for check in checks:
            await check(store)
    await check_other_store_sees_changes(open_store)
    await check_concurrent_writers(open_store)


async def check_versions(store: ObjectStore) -> None:
    """Check that an object has one current version, and that only this one can be replaced or archived."""
    first = await _insert(store, Scope(new_id("org_")), {"name": "a", "numbers": (1, 2), "nothing": None})
    assert (first.version, first.archived_at_ms) == (1, None), "a new object has version 1 and is not archived"
    assert await _get(store, first) == first, "an object is read as it was returned when it was inserted"
    assert first.document == {"name": "a", "numbers": [1, 2], "nothing": None}, "documents hold JSON values"
    moved = Scope(new_id("org_"), new_id("team_"))
    second = await store.transact(lambda transaction: transaction.replace(first, {"name": "b"}, {}, moved))
    assert (second.version, second.scope, second.document) == (2, moved, {"name": "b"}), "a replacement is whole"
    assert second.created_at_ms == first.created_at_ms <= second.updated_at_ms, "times of a replacement"
    await _expect_conflict(store, lambda transaction: transaction.replace(first, {"name": "c"}, {}), "a stale version")
    await _expect_conflict(store, lambda transaction: transaction.archive(first), "archiving a stale version")
    assert await _get(store, first) == second, "a refused change changes nothing"
    third = await store.transact(lambda transaction: transaction.archive(second))
    assert third.version == 3, "archiving makes a version"
    assert third.archived_at_ms is not None, "an archived object says since when"
    assert await _get(store, first) == third, "an archived object is read by id"
    await _expect_conflict(store, lambda transaction: transaction.replace(third, {}, {}), "changing an archived object")
    again = _inserting(first.id, first.scope, {})
    await _expect_conflict(store, again, "a second object of one id")


async def check_unique_values(store: ObjectStore) -> None:
    """Check that a unique value belongs to one active object, and is free again once that is archived or changed."""
    scope, value, other = Scope(new_id("org_")), [new_id(""), 'it\'s "x"'], [new_id("")]
    first = await _insert(store, scope, {}, {"name": value})
    conflict = await _expect_conflict(store, _inserting(new_id("rp_"), scope, {}, {"name": value}), "a value taken")
    assert (conflict.field, conflict.other_id) == ("name", first.id), "the conflict names constraint and holder"
    await _insert(store, scope, {}, {"handle": value})  # another constraint
    found = await store.read(lambda reading: reading.find(KIND, "name", value))
    assert found == first, "an object is found by its unique value"
    second = await store.transact(lambda transaction: transaction.replace(first, {}, {"name": other}))
    assert await store.read(lambda reading: reading.find(KIND, "name", value)) is None, "a changed value is free"
    third = await _insert(store, scope, {}, {"name": value})
    await _expect_conflict(store, lambda transaction: transaction.replace(second, {}, {"name": value}), "a value taken")
    await store.transact(lambda transaction: transaction.archive(third))
    assert await store.read(lambda reading: reading.find(KIND, "name", value)) is None, "archived objects hold no value"
    await _insert(store, scope, {}, {"name": value})


async def check_rollback(store: ObjectStore) -> None:
    """Check that a transaction that raises leaves nothing, and that it reads what it has changed."""
    scope, before, object_id, key = Scope(new_id("org_")), store.revision, new_id("rp_"), new_id("")
    entry = _entry(scope, object_id)

    def fail(transaction: Transaction) -> None:
        stored = transaction.insert(KIND, object_id, scope, {"name": "a"}, {"name": [object_id]})
        transaction.audit(entry)
        transaction.remember(key, b"f", b"a", expires_at_ms=_now_ms() + 60_000)
        assert transaction.get(KIND, object_id) == stored, "a transaction reads its own changes"
        assert transaction.find(KIND, "name", [object_id]) == stored, "a transaction finds its own changes"
        raise LookupError("on purpose")

    try:
        await store.transact(fail)
    except LookupError:
        pass
    else:
        raise AssertionError("what the work raises must reach the caller")
    assert await store.read(lambda reading: reading.get(KIND, object_id)) is None, "nothing of it stays: object"
    assert await store.read(lambda reading: reading.find(KIND, "name", [object_id])) is None, "nothing stays: value"
    entries = await store.read(lambda reading: reading.audit_entries(scope=scope, where={}, after=None, limit=1))
    assert not entries, "nothing of it stays: audit"
    answer = await store.read(lambda reading: reading.remembered(key, now_ms=_now_ms()))
    assert answer is None, "nothing of it stays: answer"
    assert store.revision == before, "a transaction that is rolled back makes no revision"
    await _insert(store, scope, {}, {"name": [object_id]})


async def check_lists(store: ObjectStore) -> None:
    """Check lists: order, pages, scopes, members, archived objects."""
    organization_id, team_id, project_id = new_id("org_"), new_id("team_"), new_id("proj_")
    scopes = [Scope(organization_id), Scope(organization_id, team_id), Scope(organization_id, team_id, project_id)]
    made = [await _insert(store, scope, {"name": f"n{number}"}) for number, scope in enumerate(scopes)]
    await _insert(store, Scope(new_id("org_")), {"name": "n1"})
    made.sort(key=lambda stored: stored.id)

    async def ids(**arguments: Any) -> list[str]:
        found = await store.read(lambda reading: reading.list(KIND, **arguments))
        return [stored.id for stored in found]

    everything = [stored.id for stored in made]
    for scope in scopes:
        wanted = [each.id for each in made if _is_within(each.scope, scope)]
        assert await ids(scope=scope) == wanted, f"a list holds what is in {scope} or below it, and nothing else"
    assert await ids(scope=scopes[0], limit=2) == everything[:2], "a list has its limit"
    assert await ids(scope=scopes[0], after=everything[0]) == everything[1:], "a page begins after an id"
    named = [stored.id for stored in made if stored.document["name"] == "n1"]
    assert await ids(scope=scopes[0], where={"name": "n1"}) == named, "members restrict a list"
    assert await ids(scope=scopes[0], where={"nobody": "n1"}) == [], "a member that no object has matches none"
    archived = await store.transact(lambda transaction: transaction.archive(made[0]))
    assert await ids(scope=scopes[0]) == everything[1:], "archived objects are not listed"
    assert await ids(scope=scopes[0], include_archived=True) == everything, "unless that is asked for"
    assert archived.id == everything[0], "archiving keeps the id"


async def check_audit(store: ObjectStore) -> None:
    """Check that audit entries come back as they were written, newest first, by scope and member."""
    organization_id, team_id = new_id("org_"), new_id("team_")
    entries = [
        _entry(Scope(organization_id), "rp_1"),
        _entry(Scope(organization_id, team_id), "rp_2"),
        _entry(Scope(new_id("org_")), "rp_3"),
    ]
    for entry in entries:
        await store.transact(_auditing(entry))

    async def found(scope: Scope | None, after: str | None = None, **where: str) -> Sequence[AuditEntry]:
        return await store.read(lambda reading: reading.audit_entries(scope=scope, where=where, after=after, limit=10))

    assert await found(Scope(organization_id)) == [entries[1], entries[0]], "newest first, as they were written"
    assert await found(Scope(organization_id, team_id)) == [entries[1]], "by scope"
    assert await found(Scope(organization_id), entries[1].id) == [entries[0]], "a page begins after an id"
    for member in ("actor", "action", "kind", "object_id"):
        value = getattr(entries[0], member)
        assert entries[0] in await found(Scope(organization_id), **{member: value}), f"by {member}"
        assert not await found(Scope(organization_id), **{member: "another"}), f"by {member}"


async def check_remembered_answers(store: ObjectStore) -> None:
    """Check that an answer is kept under its key until it expires, and then makes room for another."""
    key, now = new_id(""), _now_ms()
    await store.transact(lambda transaction: transaction.remember(key, b"f\0", b"\xff", expires_at_ms=now + 50_000))

    async def found(at_ms: int) -> tuple[bytes, bytes] | None:
        return await store.read(lambda reading: reading.remembered(key, now_ms=at_ms))

    assert await found(now) == (b"f\0", b"\xff"), "an answer is kept with its fingerprint"
    assert await found(now + 50_000) is None, "an answer expires"
    await store.transact(lambda transaction: transaction.remember(key, b"g", b"b", expires_at_ms=now + 90_000))
    assert await found(now + 50_000) == (b"g", b"b"), "a key is free again"


async def check_watchers(store: ObjectStore) -> None:
    """Check that watchers are called before a transaction returns, one that fails or not."""
    seen: list[int] = []

    def fail() -> None:
        raise LookupError("on purpose")

    store.watch(fail)
    store.watch(lambda: seen.append(store.revision))
    before = store.revision
    await _insert(store, Scope(new_id("org_")), {})
    assert store.revision > before, "the revision grows with a change"
    assert seen[-1:] == [store.revision], "watchers are called when a transaction returns, and see the revision"


async def check_other_store_sees_changes(open_store: OpenStore) -> None:
    """Check that what one store changes is known to another within two seconds, its watchers told."""
    async with open_store() as one, open_store() as other:
        told = anyio.Event()
        before = other.revision
        other.watch(told.set)
        stored = await _insert(one, Scope(new_id("org_")), {})
        with anyio.move_on_after(SEEN_SECONDS) as waiting:
            await told.wait()
        assert not waiting.cancelled_caught, f"a change made elsewhere must be known within {SEEN_SECONDS} s"
        assert other.revision > before, "the revision grows with changes made elsewhere"
        assert await _get(other, stored) == stored, "another store reads the change"


async def check_concurrent_writers(open_store: OpenStore) -> None:
    """Check that several writers in two stores lose no change, and share no unique value."""
    scope, name = Scope(new_id("org_")), [new_id("")]
    async with open_store() as one, open_store() as other:
        counter = await _insert(one, scope, {"count": 0})
        won: list[str] = []

        async def count(store: ObjectStore) -> None:
            for _ in range(_ROUNDS):
                await store.transact(lambda transaction: _add_one(transaction, counter.id))

        async def race(store: ObjectStore) -> None:
            try:
                won.append((await _insert(store, scope, {}, {"name": name})).id)
            except ConflictError:
                return

        async with anyio.create_task_group() as tasks:
            for number in range(_WRITERS):
                tasks.start_soon(count, (one, other)[number % 2])
                tasks.start_soon(race, (one, other)[number % 2])
        counted = await _get(other, counter)
    assert counted is not None, "what one store inserts another reads"
    assert counted.document["count"] == _WRITERS * _ROUNDS, "no change is lost"
    assert counted.version == 1 + _WRITERS * _ROUNDS, "every change is a version"
    assert len(won) == 1, "a unique value is given to one of those who ask at once"


# --- what the checks are made of ------------------------------------------------------------------------------------


def _add_one(transaction: Transaction, object_id: str) -> None:
    stored = transaction.get(KIND, object_id)
    assert stored is not None
    transaction.replace(stored, {"count": stored.document["count"] + 1}, {})


def _is_within(inner: Scope, outer: Scope) -> bool:
    pairs = zip((inner.organization_id, inner.team_id, inner.project_id),
                (outer.organization_id, outer.team_id, outer.project_id), strict=True)  # fmt: skip
    return all(wanted is None or held == wanted for held, wanted in pairs)


def _inserting(
    object_id: str, scope: Scope, document: Mapping[str, Any], unique: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Transaction], StoredObject]:
    return lambda transaction: transaction.insert(KIND, object_id, scope, document, unique or {})


def _auditing(entry: AuditEntry) -> Callable[[Transaction], None]:
    return lambda transaction: transaction.audit(entry)


async def _insert(
    store: ObjectStore, scope: Scope, document: Mapping[str, Any], unique: Mapping[str, Sequence[str]] | None = None
) -> StoredObject:
    return await store.transact(_inserting(new_id("rp_"), scope, document, unique))


async def _get(store: ObjectStore, stored: StoredObject) -> StoredObject | None:
    return await store.read(lambda reading: reading.get(stored.kind, stored.id))


async def _expect_conflict(store: ObjectStore, work: Callable[[Transaction], object], what: str) -> ConflictError:
    try:
        await store.transact(work)
    except ConflictError as error:
        return error
    raise AssertionError(f"{what} must raise ConflictError")


def _entry(scope: Scope, object_id: str) -> AuditEntry:
    return AuditEntry(
        id=new_id("aud_"), at_ms=_now_ms(), actor="tok_1", action="routingPolicies:create", kind=KIND,
        object_id=object_id, scope=scope, before=None, after={"name": "a", "numbers": [1]}, request_id="req_1",
        source="api",
    )  # fmt: skip


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
