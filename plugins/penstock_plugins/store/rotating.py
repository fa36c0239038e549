"""Change a store from the command line: seal everything with a new encryption key, let an administrator in again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection

from penstock import ConfigurationError
from penstock.governance import KINDS, AuditEntry, Scope, StoredObject, new_id
from penstock.governance import unique_values as values_of
from penstock_plugins.store.bootstrap import add_token
from penstock_plugins.store.database import Database
from penstock_plugins.store.files import write_private
from penstock_plugins.store.objects import Clock, SQLTransaction, write_meta
from penstock_plugins.store.opening import StoreSettings, prepare
from penstock_plugins.store.unlocking import CHECK, ring_of
from penstock_plugins.store.vault import SealedVault

_PAGE = 200


@contextmanager
def _opened(settings: StoreSettings, clock: Clock) -> Iterator[tuple[Database, SealedVault]]:
    """Open a database beside the gateways that use it. Raises ConfigurationError."""
    with settings.place.in_use():
        database = Database(settings.url)
        try:
            yield database, prepare(database, settings, None, clock)
        finally:
            database.close()


def rotate(settings: StoreSettings, clock: Clock) -> int:
    """Seal every secret with the first key of the configuration, or with a new one put into the key's file.

    Returns how many were sealed anew. Running gateways go on: they read the file again when they meet the new key. The
    key that sealed until now stays in the file behind the new one, for what was sealed meanwhile and for answers kept
    to be repeated; the next rotation drops it. Secrets of archived objects stay as they are, and end with their key.
    Raises ConfigurationError, StoreUnavailableError.
    """
    with _opened(settings, clock) as (database, vault):
        return _rotate(database, vault, settings, clock)


def _rotate(database: Database, vault: SealedVault, settings: StoreSettings, clock: Clock) -> int:
    if settings.encryption_key is None:
        ring = ring_of(None, settings.place.key).with_new()
        write_private(settings.place.key, ring.text(), replace=True)
        vault = SealedVault(ring, vault.pepper)

    def seal_all(connection: Connection) -> int:
        transaction = SQLTransaction(connection, clock)
        write_meta(connection, CHECK, vault.check_value())
        return sum(_seal_kind(transaction, name, vault) for name, kind in KINDS.items() if kind.secrets)

    return database.write_now(seal_all)


def add_admin_token(settings: StoreSettings, secret: str, clock: Clock) -> None:
    """Add an administrator's token, and keep it beside the database. Raises ConfigurationError."""

    def add(connection: Connection, vault: SealedVault) -> None:
        transaction = SQLTransaction(connection, clock)
        found = transaction.list("organization", limit=1)
        if not found:
            raise ConfigurationError("url: the database holds no organization; a gateway makes one when it starts")
        name = f"administrator {new_id('')}"
        add_token(transaction, secret, name, Scope(found[0].id), vault)

    with _opened(settings, clock) as (database, vault):
        database.write_now(lambda connection: add(connection, vault))
    write_private(settings.place.admin_token, f"{secret}\n", replace=True)


def _seal_kind(transaction: SQLTransaction, name: str, vault: SealedVault) -> int:
    count, after = 0, None
    while page := transaction.list(name, after=after, limit=_PAGE):
        for stored in page:
            members = [
                member
                for member in KINDS[name].secrets
                if str(stored.document.get(member) or "").startswith("v1.")
                and not vault.is_sealed_by_first(stored.document[member])
            ]
            if members:
                _seal(transaction, stored, members, vault)
                count += len(members)
        after = page[-1].id
    return count


def _seal(transaction: SQLTransaction, stored: StoredObject, members: list[str], vault: SealedVault) -> None:
    context = f"{stored.kind}:{stored.id}"
    document: dict[str, Any] = dict(stored.document)
    for member in members:
        document[member] = vault.seal(vault.open(document[member], context=context), context=context)
    transaction.replace(stored, document, values_of(KINDS[stored.kind], document, stored.scope))
    transaction.audit(
        AuditEntry(
            id=new_id("aud_"), at_ms=transaction.now_ms, actor="system", action="organization:rotate",
            kind=stored.kind, object_id=stored.id, scope=stored.scope, before=None, after=None, request_id=None,
            source="cli",
        )
    )  # fmt: skip
