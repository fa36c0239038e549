"""Write the ledger from the hot path: to the journal at once, to the database in batches.

What is settled waits in memory and in the journal until it is committed. While the database cannot be written it waits
on, up to a bound beyond which new exchanges are refused; what still waits when the process ends is entered by the next.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import attrs
import msgspec

from penstock import Usage
from penstock.governance import Debit, Intent, LedgerEntry, LedgerUnavailableError
from penstock_plugins.store.commits import clamped
from penstock_plugins.store.journal import Journal, Segment
from penstock_plugins.store.totals import Name

MAX_QUEUED = 50_000
"""Entries that may wait for the database."""
MOST_REFUSED = 3
"""Entries that are set aside in a row; one more that is refused is taken for a fault of the ledger, not its own."""
_CLIPPED_CHARACTERS = 64
_log = logging.getLogger("penstock.store")
_encode = msgspec.msgpack.Encoder().encode


@attrs.define(eq=False, slots=True)
class Queued:
    """One entry on its way to the database."""

    entry: LedgerEntry
    segments: tuple[Segment | None, Segment | None] | None
    """Of its intent and itself; None where it could not be journaled."""
    is_cleaned: bool = False
    """Whether the database has refused it before."""


class JournaledLedger:
    """Implement Ledger; ``wake`` has what is queued committed soon."""

    def __init__(self, journal: Journal, wake: Callable[[], None]) -> None:
        self._journal = journal
        self._wake = wake
        self._queue: deque[Queued] = deque()
        self._settled = 0
        self._committed = 0
        self._progress = anyio.Event()
        self._is_journal_whole = True
        self._refused_in_a_row = 0

    # --- Ledger ---------------------------------------------------------------------------------------------------

    def open(self, intent: Intent) -> None:
        """Make an intent durable against the death of this process. Raises LedgerUnavailableError."""
        if len(self._queue) >= MAX_QUEUED:
            raise LedgerUnavailableError("the ledger waits for its database and can take no more exchanges")
        if self._is_refused:
            raise LedgerUnavailableError("the ledger's database refuses every row")
        try:
            self._journal.add_intent(intent.request_id, _encode(intent))
        except OSError as error:
            raise LedgerUnavailableError(f"the ledger's journal cannot be written: {error.strerror}") from error

    def settle(self, entry: LedgerEntry) -> None:
        """Enter what became of an exchange; never waits, never raises."""
        try:
            payload = _encode(entry)
        except (UnicodeEncodeError, OverflowError, TypeError):
            entry = cleaned(entry)
            payload = _encode(entry)
        segments = None
        try:
            segments = self._into_journal(entry, payload)
            self._is_journal_whole = True
        except OSError as error:
            if self._is_journal_whole:
                self._is_journal_whole = False
                _log.error("ledger entries are in memory only: the journal cannot be written: %s", error.strerror)
        self._queue.append(Queued(entry, segments))
        self._settled += 1
        self._wake()

    def _into_journal(self, entry: LedgerEntry, payload: bytes) -> tuple[Segment | None, Segment | None]:
        try:
            return self._journal.add_entry(entry.request_id, payload)
        except OSError:  # for what was admitted there is room at least for what its money and its tokens were
            return self._journal.add_entry(entry.request_id, _encode(_shortened(entry)))

    async def flush(self) -> None:
        """Return once everything settled so far is committed."""
        wanted = self._settled
        while self._committed < wanted or self._is_refused:
            self._wake()
            await self._progress.wait()

    # --- batches --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Return how many entries wait."""
        return len(self._queue)

    @property
    def open_intents(self) -> int:
        """Return how many exchanges are under way."""
        return self._journal.open_intents

    @property
    def _is_refused(self) -> bool:
        """Whether the database takes no row, as far as it has been tried."""
        return self._refused_in_a_row > MOST_REFUSED

    def take(self, most: int) -> list[Queued]:
        """Return the entries that have waited longest; give them to ``committed``, ``put_back`` or ``refused``."""
        queue = self._queue
        return [queue.popleft() for _ in range(min(most, len(queue)))]

    def put_back(self, batch: list[Queued]) -> None:
        """Have a batch that was not committed wait on."""
        self._queue.extendleft(reversed(batch))

    def committed(self, batch: list[Queued]) -> list[Segment]:
        """Forget a batch; returns the segments of the journal that may be deleted."""
        journal = self._journal
        if batch:
            self._refused_in_a_row = 0
        for queued in batch:
            segments = queued.segments
            if segments is None:
                journal.release(journal.drop_intent(queued.entry.request_id))
            else:
                journal.release(segments[0])
                journal.release(segments[1])
        self._count(len(batch))
        return journal.take_done()

    def refused(self, queued: Queued, error: BaseException) -> None:
        """Try an entry that the database refuses once more, cleaned, and then leave it in the journal.

        There it outlives the process; until that ends, what was spent goes on counting in memory. When several are
        refused in a row it is the ledger that is at fault: from then on they wait, and no exchange begins.
        """
        if not queued.is_cleaned:
            self._queue.appendleft(Queued(cleaned(queued.entry), queued.segments, is_cleaned=True))
            return
        if self._refused_in_a_row < MOST_REFUSED:
            self._refused_in_a_row += 1
            self._set_aside(queued, error)
            return
        if not self._is_refused:
            self._refused_in_a_row += 1
            _log.error("the ledger waits for the database to take a row again, and no exchange begins: %r", error)
        self._queue.append(queued)  # behind the others: the first that can be written ends it

    def _set_aside(self, queued: Queued, error: BaseException) -> None:
        entry = queued.entry
        _log.error(
            "the database refuses ledger entry %s; its %d nano-USD count until the next start, but no row has them: %r",
            entry.request_id, clamped(entry.cost_nano_usd), error,
        )  # fmt: skip
        if queued.segments is None:  # its intent stands instead: the next start enters it with its estimate
            self._journal.drop_intent(entry.request_id)
        self._count(1)

    def _count(self, entries: int) -> None:
        self._committed += entries
        progress, self._progress = self._progress, anyio.Event()
        progress.set()


def charges_of(batch: list[Queued]) -> dict[Name, int]:
    """Return what a batch is charged with, by counter: the cost, so that totals are sums of the ledger."""
    charges: dict[Name, int] = {}
    for queued in batch:
        cost = clamped(queued.entry.cost_nano_usd)
        for debit in queued.entry.debits:
            name = (debit.counter, debit.period)
            charges[name] = charges.get(name, 0) + cost
    return charges


def entry_of(intent: Intent) -> LedgerEntry:
    """Return what an exchange is entered as whose process died before it was settled."""
    estimate = intent.estimate_nano_usd
    return LedgerEntry(
        request_id=intent.request_id,
        started_at_ns=intent.started_at_ns,
        duration_ns=0,
        organization_id=intent.organization_id,
        team_id=intent.team_id,
        project_id=intent.project_id,
        virtual_key_id=intent.virtual_key_id,
        principal_id=intent.principal_id,
        end_user=intent.end_user,
        binding_id=intent.binding_id,
        provider=intent.provider,
        model_asked=intent.model_asked,
        model_served=intent.model_served,
        usage=None,
        cost_nano_usd=estimate,
        cost_source="estimated",
        price_version=None,
        status=None,
        outcome="interrupted",
        error=None,
        is_stream=intent.is_stream,
        fallback_count=0,
        debits=intent.debits,
        tags=intent.tags,
    )


def cleaned(entry: LedgerEntry) -> LedgerEntry:
    """Return an entry that can be written: text without lone surrogates, numbers that fit 64 bits."""
    return LedgerEntry(**{name: _clean(getattr(entry, name)) for name in LedgerEntry.__struct_fields__})


def _shortened(entry: LedgerEntry) -> LedgerEntry:
    """Return an entry that takes little more than its intent."""
    return msgspec.structs.replace(
        entry, attempts=(), model_served=_clipped(entry.model_served), error=_clipped(entry.error),
        provider=_clipped(entry.provider), price_version=_clipped(entry.price_version),
    )  # fmt: skip


def _clipped(text: str | None) -> str | None:
    return None if text is None else text[:_CLIPPED_CHARACTERS]


def _clean(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case bool() | None:
            return value
        case int():
            return max(-(2**62), min(value, 2**62))
        case tuple() | list():
            return tuple(_clean(each) for each in value)
        case Usage():
            return attrs.evolve(value, **{each.name: _clean(getattr(value, each.name)) for each in attrs.fields(Usage)})
        case Debit():
            return Debit(**{name: _clean(getattr(value, name)) for name in Debit.__struct_fields__})
        case dict():
            return {_clean(name): _clean(each) for name, each in value.items()}
        case _:
            return value if isinstance(value, float) else repr(value)
