"""The ledger: one append-only row per exchange, and what budgets, usage and invoices are derived from.

Before a provider is asked an *intent* is made durable against the death of the process; after the exchange its *entry*
takes the intent's place, exactly once. An intent whose process died becomes an entry too: nothing that reached a
provider is missing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Literal, Protocol

import attrs
import msgspec

from penstock.models import Usage

Outcome = Literal["success", "refused", "provider_error", "client_gone", "cut", "interrupted", "adjustment"]
CostSource = Literal["priced", "unpriced", "estimated", "none", "adjustment"]


class Debit(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Say which durable counter an exchange is charged to."""

    counter: str
    """As in Claim."""
    period: int
    """As in Claim."""
    reserved: int
    """nano-USD reserved at admission."""


class Intent(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Hold what is known of an exchange when it is about to reach a provider."""

    request_id: str
    started_at_ns: int
    """Wall clock of admission, nanoseconds since the epoch; decides the period."""
    organization_id: str
    team_id: str
    project_id: str
    virtual_key_id: str
    principal_id: str
    end_user: str | None
    binding_id: str
    """The first candidate's."""
    provider: str
    """Type of the binding's provider."""
    model_asked: str | None
    model_served: str | None
    """The first candidate's."""
    estimate_nano_usd: int
    """What an interrupted exchange is entered with."""
    debits: tuple[Debit, ...] = ()
    is_stream: bool = False
    """Whether the client asked for a stream."""
    tags: tuple[str, ...] = ()


class LedgerEntry(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Hold one row of the ledger; ``request_id`` is unique, and entering one again changes nothing."""

    request_id: str
    started_at_ns: int
    duration_ns: int
    organization_id: str
    team_id: str
    project_id: str
    virtual_key_id: str
    principal_id: str
    end_user: str | None
    binding_id: str | None
    """Of the attempt that answered or failed last; None where none was made."""
    provider: str | None
    model_asked: str | None
    model_served: str | None
    usage: Usage | None
    cost_nano_usd: int
    """Negative in adjustments only."""
    cost_source: CostSource
    price_version: str | None
    """Source and date of the price, such as ``genai-prices 2026-11-01`` or ``override pr_…``."""
    status: int | None
    """What the client was answered."""
    outcome: Outcome
    error: str | None
    """Code of the gateway's refusal, or reason of the last attempt."""
    is_stream: bool
    fallback_count: int
    attempts: tuple[Mapping[str, object], ...] = ()
    """Binding, model, reason and status of each."""
    debits: tuple[Debit, ...] = ()
    """Counters it is charged to with its cost."""
    tags: tuple[str, ...] = ()
    adjusts: str | None = None
    """Request id that an adjustment corrects."""


class LedgerUnavailableError(Exception):
    """Say that an intent could not be made durable, so no provider may be asked."""


class Ledger(Protocol):
    """Write the ledger from the hot path."""

    def open(self, intent: Intent) -> None:
        """Make an intent durable against the death of this process. Never waits; raises LedgerUnavailableError."""
        ...

    def settle(self, entry: LedgerEntry) -> None:
        """Enter what became of an exchange, in place of its intent if it has one. Never waits, never raises.

        The row and the durable counters of its debits change in one transaction, within a second.
        """
        ...

    async def flush(self) -> None:
        """Return once everything settled so far is committed."""
        ...


@attrs.frozen(kw_only=True)
class UsageQuery:
    """Ask for sums over the ledger."""

    since_ns: int
    until_ns: int
    group_by: tuple[str, ...] = ()
    """Up to three of key, principal, end_user, model, provider, project, team, tag."""
    bucket: Literal["hour", "day", "month"] | None = None
    timezone: str = "UTC"
    where: Mapping[str, str] = attrs.field(factory=dict)
    """Restrict to: organization_id, team_id, project_id, virtual_key_id, principal_id, end_user, binding_id, provider,
    model, tag."""
    limit: int | None = None
    """How many rows at most; None for all."""
    after: tuple[str | None, tuple[str | None, ...]] | None = None
    """Start of the bucket and values of the group of the last row of the page before."""


@attrs.frozen(kw_only=True)
class UsageRow:
    """Hold the sums of one group and bucket."""

    group: Mapping[str, str | None]
    bucket_start: str | None
    """RFC 3339 with the offset of the time zone asked for."""
    requests: int
    errors: int
    usage: Usage
    cost_nano_usd: int
    unpriced: int
    """Requests whose model had no price."""
    estimated: int
    """Requests whose usage was estimated."""


@attrs.frozen(kw_only=True)
class Discrepancy:
    """Say where a total differs from the rows it is derived from."""

    what: str
    """Name of the counter or rollup."""
    period: int
    recorded: int
    derived: int


class LedgerReader(Protocol):
    """Read the ledger, off the hot path."""

    async def entry(self, request_id: str) -> LedgerEntry | None:
        """Return one row."""
        ...

    async def entries(
        self, where: Mapping[str, str], *, since_ns: int, until_ns: int, after: str | None, limit: int
    ) -> Sequence[LedgerEntry]:
        """Return rows, newest first; ``after`` is the request id of the last row of the page before.

        ``where`` as in UsageQuery, in any scope column.
        """
        ...

    async def usage(self, query: UsageQuery) -> Sequence[UsageRow]:
        """Return sums, in the order of bucket and group."""
        ...

    async def spent(self, counters: Sequence[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Return the committed totals of durable counters, by name and period."""
        ...

    async def last_used(self, virtual_key_ids: Sequence[str]) -> Mapping[str, int]:
        """Return when keys were last used, milliseconds since the epoch; those never used are left out."""
        ...

    async def left(self, request_id: str) -> int:
        """Return what an exchange has cost after all its corrections, nano-USD; 0 for one that is not there."""
        ...

    async def adjust(self, entry: LedgerEntry) -> None:
        """Append a correction (``adjusts`` set). Raises LookupError without the row, ValueError for one beyond it."""
        ...

    def verify(self) -> AsyncIterator[Discrepancy]:
        """Derive every total anew from the rows and yield what differs."""
        ...
