"""Where the management plane keeps its objects: versioned documents, changed in transactions together with their audit.

An implementation stores; what may be stored, by whom and in which shape is decided above it (``objects``, management).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import attrs

T = TypeVar("T")


@attrs.frozen
class Scope:
    """Say where in the ownership tree an object lives; what is None lies above it."""

    organization_id: str
    team_id: str | None = None
    project_id: str | None = None


@attrs.frozen
class StoredObject:
    """Hold one version of an object."""

    kind: str
    """Name of its Kind, such as ``virtual_key``."""
    id: str
    scope: Scope
    version: int
    """From 1, one more with every change; the ETag."""
    created_at_ms: int
    updated_at_ms: int
    archived_at_ms: int | None
    document: Mapping[str, Any]
    """JSON values; secrets in it are sealed or hashed already."""


@attrs.frozen(kw_only=True)
class AuditEntry:
    """Say who changed what."""

    id: str
    """``aud_`` and a ULID."""
    at_ms: int
    actor: str
    """Id of the token or user, or ``system``."""
    action: str
    """``virtualKeys:create`` …"""
    kind: str
    object_id: str
    scope: Scope
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    request_id: str | None
    source: str
    """``api``, ``cli``, ``apply``, ``system`` or an address."""


class ConflictError(Exception):
    """Say that an object changed meanwhile, or that a unique value is taken (``field`` and ``other_id``)."""

    def __init__(self, message: str, *, field: str | None = None, other_id: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.other_id = other_id


class StoreUnavailableError(Exception):
    """Say that the store cannot be reached or written just now."""


class Reading(Protocol):
    """One consistent view of the store."""

    def get(self, kind: str, object_id: str) -> StoredObject | None:
        """Return an object by id, archived ones included."""
        ...

    def find(self, kind: str, constraint: str, value: Sequence[str]) -> StoredObject | None:
        """Return the active object that holds a unique value: ``find("virtual_key", "name", ["proj_…", "k"])``."""
        ...

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
        """Return objects by id, oldest first, from after the id ``after``.

        ``scope``: those in it or below it. ``where``: equality with members of the document (strings).
        """
        ...

    def audit_entries(
        self, *, scope: Scope | None, where: Mapping[str, str], after: str | None, limit: int
    ) -> Sequence[AuditEntry]:
        """Return audit entries, newest first. ``where``: actor, action, kind, object_id."""
        ...

    def remembered(self, key: str, *, now_ms: int) -> tuple[bytes, bytes] | None:
        """Return fingerprint and answer kept under an idempotency key that has not expired."""
        ...


class Transaction(Reading, Protocol):
    """Change the store: everything or nothing."""

    def insert(
        self, kind: str, object_id: str, scope: Scope, document: Mapping[str, Any], unique: Mapping[str, Sequence[str]]
    ) -> StoredObject:
        """Add an object. ``unique``: values by name of constraint. Raises ConflictError."""
        ...

    def replace(
        self,
        stored: StoredObject,
        document: Mapping[str, Any],
        unique: Mapping[str, Sequence[str]],
        scope: Scope | None = None,
    ) -> StoredObject:
        """Put a new version in place of ``stored``. Raises ConflictError where that is not the current one."""
        ...

    def archive(self, stored: StoredObject) -> StoredObject:
        """Hide an object and free its unique values; it stays readable by id. Raises ConflictError."""
        ...

    def audit(self, entry: AuditEntry) -> None:
        """Add an audit entry."""
        ...

    def remember(self, key: str, fingerprint: bytes, answer: bytes, *, expires_at_ms: int) -> None:
        """Keep an answer under an idempotency key."""
        ...


class ObjectStore(Protocol):
    """Keep objects. Every method may be called from any task of the event loop."""

    async def read(self, work: Callable[[Reading], T]) -> T:
        """Run ``work`` on one consistent view, in a thread."""
        ...

    async def transact(self, work: Callable[[Transaction], T], *, is_long: bool = False) -> T:
        """Run ``work`` in a thread in one transaction, and commit it; whatever it raises rolls everything back.

        ``is_long``: work that takes a while should keep no others waiting; it may be run more than once.
        Returns once this process answers by the change; other processes do within 2 s. Raises StoreUnavailableError.
        """
        ...

    @property
    def revision(self) -> int:
        """Return a number that grows with every change this process knows of."""
        ...

    def watch(self, call: Callable[[], None]) -> None:
        """Call back, in the event loop, after every change this process has come to know of."""
        ...


class Vault(Protocol):
    """Seal secrets at rest and hold the pepper of credentials."""

    @property
    def pepper(self) -> bytes:
        """Return the key under which presented credentials are hashed."""
        ...

    def seal(self, secret: str, *, context: str) -> str:
        """Return the secret encrypted with AES-256-GCM; ``context`` (kind and id) is authenticated with it."""
        ...

    def open(self, sealed: str, *, context: str) -> str:
        """Return a sealed secret. Raises ValueError for another key, another context or damage."""
        ...


class LocalAdmin(Protocol):
    """Hand the owner of an embedded store's files the credential of its first administrator.

    Provided by a store that keeps it beside its database (``<db>.admin-token``, mode 0600), made at the first start;
    ``penstock`` run by the same user on the same machine finds it, through the runtime file of the gateway.
    """

    @property
    def admin_token(self) -> str | None:
        """Return the secret, from within the lifespan; None where it was taken away, or was never kept."""
        ...
