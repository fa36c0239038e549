"""One call into the management plane: who asks, in which transaction, and what it may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from penstock import Services
from penstock.governance import AuditEntry, Reading, Scope, Transaction, Vault, new_id
from penstock_plugins.management.permissions import Actor


@attrs.frozen(eq=False)
class Means:
    """Hold what calls work with, the same for all of them."""

    services: Services
    vault: Vault

    def now_ms(self) -> int:
        """Return the time, milliseconds since the epoch."""
        return int(self.services.clock() * 1000)


@attrs.frozen(eq=False)
class Call:
    """Hold one call."""

    actor: Actor
    tx: Reading
    """The view of the store it reads from; a Transaction where it may change something."""
    means: Means
    now_ms: int
    """When, milliseconds since the epoch; the same throughout the call."""
    request_id: str | None = None
    source: str = "api"
    last_used: Mapping[str, int] = attrs.field(factory=dict)
    """When keys were last used, as far as the ledger was asked; milliseconds since the epoch."""

    @property
    def change(self) -> Transaction:
        """Return the transaction of a call that changes something."""
        assert hasattr(self.tx, "insert"), "only a call in a transaction changes anything"
        return self.tx  # type: ignore[return-value]

    def audit(
        self,
        action: str,
        place: tuple[str, str, Scope],
        *,
        before: dict[str, Any] | None,
        after: dict[str, Any] | None,
    ) -> None:
        """Enter who changed what; ``place`` is kind, id and scope of it, and neither view may hold secrets."""
        kind, object_id, scope = place
        entry = AuditEntry(
            id=new_id("aud_"),
            at_ms=self.now_ms,
            actor=self.actor.id,
            action=action,
            kind=kind,
            object_id=object_id,
            scope=scope,
            before=before,
            after=after,
            request_id=self.request_id,
            source=self.source,
        )
        self.change.audit(entry)
