"""Violations in the audit: written behind the answers, by one task, and never waited for."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import attrs

from penstock import Exchange
from penstock.governance import AuditEntry, ObjectStore, Scope, StoreUnavailableError, Transaction, new_id
from penstock_plugins.policy_rules.judging import ViolationError

ACTION = "policyRules:refuse"
_MOST_WAITING = 10_000
_AT_ONCE = 500
_RETRY_SECONDS = 1.0
_LAST_SECONDS = 5.0
_log = logging.getLogger("penstock_plugins.policy_rules")


def entry_of(exchange: Exchange, violation: ViolationError, now: float) -> AuditEntry | None:
    """Return the audit entry of a refusal, without what a URL may hold of secrets; None where nobody authenticated."""
    principal = exchange.principal
    if principal is None:
        return None
    meta = dict(violation.meta)
    if violation.code == "url_not_allowed":
        meta["value"] = _without_secrets(meta["value"])
    return AuditEntry(
        id=new_id("aud_"),
        at_ms=int(now * 1000),
        actor=principal.virtual_key_id,
        action=ACTION,
        kind="virtual_key",
        object_id=principal.virtual_key_id,
        scope=Scope(principal.organization_id, principal.team_id, principal.project_id),
        before=None,
        after={"code": violation.code, **meta},
        request_id=exchange.request_id.decode(),
        source="gateway",
    )


def _without_secrets(url: str) -> str:
    """Return a URL without user, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://…"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


@attrs.define(eq=False)
class Trail:
    """Write entries of the audit in the order in which they come."""

    store: ObjectStore
    waiting: deque[AuditEntry] = attrs.field(factory=deque)
    dropped: int = 0
    """Entries lost because the store did not keep up."""
    _is_more: anyio.Event = attrs.field(factory=anyio.Event, init=False)
    _is_over: bool = attrs.field(default=False, init=False)

    def note(self, entry: AuditEntry) -> None:
        """Have an entry written."""
        if len(self.waiting) >= _MOST_WAITING:
            self.dropped += 1
            return
        self.waiting.append(entry)
        self._is_more.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write what comes; on leaving, what still waits, for a bounded time."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write)
            try:
                yield
            finally:
                self._is_over = True
                self._is_more.set()
                tasks.cancel_scope.deadline = anyio.current_time() + _LAST_SECONDS
        if self.waiting or self.dropped:
            _log.warning("the audit lacks %d violations of policy rules", len(self.waiting) + self.dropped)

    async def _write(self) -> None:
        while True:
            if not self.waiting:
                if self._is_over:
                    return
                await self._is_more.wait()
                self._is_more = anyio.Event()
                continue
            entries = [self.waiting[index] for index in range(min(_AT_ONCE, len(self.waiting)))]
            try:
                await self.store.transact(_adding(entries))
            except StoreUnavailableError:
                await anyio.sleep(_RETRY_SECONDS)
                continue
            for _ in entries:
                self.waiting.popleft()


def _adding(entries: list[AuditEntry]) -> Callable[[Transaction], None]:
    def work(change: Transaction) -> None:
        for entry in entries:
            change.audit(entry)

    return work
