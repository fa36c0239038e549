"""One transaction after the other: what memory has settled and asks is written, and memory told what came of it.

A *turn* is composed in the event loop when the one before is over, so that memory and database never differ by more
than one turn. It commits ledger rows with everything derived from them, grants what is asked for, gives back what is
not needed, and changes between being exclusive and being one of several.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

import anyio
import anyio.to_thread
import attrs
from sqlalchemy import Connection, select

from penstock.governance import StoreUnavailableError
from penstock_plugins.store import leases
from penstock_plugins.store.accounts import Account, Ask, Held
from penstock_plugins.store.commits import Books, Receipt
from penstock_plugins.store.counters import MemoryCounters
from penstock_plugins.store.database import Database
from penstock_plugins.store.journal import delete
from penstock_plugins.store.leases import Change, Share
from penstock_plugins.store.ledger import JournaledLedger, Queued, charges_of
from penstock_plugins.store.ledger_tables import counters as counter_rows
from penstock_plugins.store.outages import Outage
from penstock_plugins.store.totals import Name, Total, find_or_add

GATHER_SECONDS = 0.1
"""How long entries are gathered before they are committed: a page of the database is written once for all of them."""
GATHER_MANY_SECONDS = 0.25
"""The same while there are many: a row of 600 costs half of what a row of 200 costs."""
MANY = 100
"""Entries of one turn."""
RETRY_SECONDS = 0.01
"""How soon those that wait for other processes are looked at again."""
MOST_ENTRIES = 1000
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 1.0
_PART = 500


@attrs.define(eq=False)
class Turn:
    """One transaction: what it writes, and what it finds."""

    batch: list[Queued]
    charges: dict[Name, int]
    asks: list[Ask]
    share: Share | None = None
    sharing: list[tuple[Account, int]] | None = None
    """Set when this process stops being exclusive: accounts, and the settled amounts of volatile ones."""
    loads: list[tuple[Name, bool]] = attrs.Factory(list)
    is_taking_all: bool = False
    durable: list[Account] = attrs.Factory(list)
    """Those whose totals must be right once this process is exclusive."""
    is_refused: bool = False
    """Whether it was the rows of the ledger that could not be written, and nothing beside them."""
    receipt: Receipt | None = None
    totals: dict[Name, Total] = attrs.Factory(dict)
    volatile: list[tuple[Name, int]] | None = None

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to write or to ask."""
        changes = self.share.changes if self.share else ()
        return not (self.batch or self.asks or self.sharing is not None or self.is_taking_all or changes)


class Turns:
    """Run the turns of one process."""

    def __init__(self, database: Database, books: Books, holder: str) -> None:
        self._database = database
        self._books = books
        self._holder = holder
        self.counters = MemoryCounters(self.wake_now)
        self.ledger: JournaledLedger
        """Set once, before ``run``."""
        self._is_awake = False
        self._wake = anyio.Event()
        self._urgent = anyio.Event()
        self._most = MOST_ENTRIES
        self._gather_seconds = GATHER_SECONDS
        self._answers: dict[Name, int] = {}
        self._to_give: list[Account] = []
        self._is_refresh_due = False
        self.is_registered_shared = False
        """Whether the database says that this process is one of several."""
        self.wants_all = False
        """Whether no other process is left."""
        self._outage = Outage(
            "ledger and counters could not be written, and will be", "ledger and counters are written again"
        )

    # --- waking ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Have a turn soon."""
        if not self._is_awake:
            self._is_awake = True
            self._wake.set()

    def wake_now(self) -> None:
        """Have a turn at once: somebody waits."""
        self.wake()
        self._urgent.set()

    def answer(self, wanted: Iterable[tuple[Name, bool, int, int]]) -> None:
        """Give back what others want and this process does not need."""
        for name, is_durable, counter_id, number in wanted:
            account = self.counters.account(name, is_durable=is_durable)
            account.id = counter_id
            self.counters.dirty.add(account)  # it must not be forgotten before it has answered
            self._answers[name] = number
            self.wake_now()

    def give_back(self, idle: Iterable[Account]) -> None:
        """Give back what accounts that are not used hold beyond need."""
        self._to_give = [account for account in idle if account.lease > account.held]
        if self._to_give:
            self.wake()

    def refresh(self) -> None:
        """Read what other processes have settled meanwhile."""
        self._is_refresh_due = True
        self.wake()

    async def run(self) -> None:
        """Run turns for ever."""
        pause = 0.0
        while True:
            await self._wake.wait()
            self._is_awake, self._wake = False, anyio.Event()
            with anyio.move_on_after(pause or self._gather_seconds):
                await self._urgent.wait()
                await anyio.sleep(pause)  # what somebody waits for is not gathered, but failures are not hurried
            self._urgent = anyio.Event()
            is_committed = await self.run_one()
            pause = 0.0 if is_committed else min(2 * pause, _LONGEST_PAUSE) or _FIRST_PAUSE
            if self.ledger and not self._is_awake:
                self.wake()
            if self.counters.asks and not self._urgent.is_set():
                await anyio.sleep(RETRY_SECONDS)
                self.wake_now()

    async def run_one(self) -> bool:
        """Run one turn; returns whether it was committed."""
        turn = self._compose()
        if turn.is_empty:
            return True
        over = anyio.Event()
        failed: list[BaseException] = []

        def done(error: BaseException | None) -> None:
            # Here and now, so that what comes later from the writer is applied later.
            try:
                if error is None:
                    self._apply(turn)
                else:
                    failed.append(error)
                    self._undo(turn, error)
            finally:
                over.set()

        try:
            self._database.write_soon(lambda connection: self._work(connection, turn), done)
        except StoreUnavailableError as error:
            done(error)
        with anyio.CancelScope(shield=True):
            await over.wait()
            if not failed:
                segments = self.ledger.committed(turn.batch)
                if segments:
                    await anyio.to_thread.run_sync(delete, segments)
        return not failed

    # --- composing ------------------------------------------------------------------------------------------------

    def _compose(self) -> Turn:
        counters = self.counters
        asks = [ask for ask in counters.asks if not ask.is_abandoned]
        counters.asks = []
        batch = self.ledger.take(self._most)
        self._gather_seconds = GATHER_MANY_SECONDS if len(batch) >= MANY else GATHER_SECONDS
        turn = Turn(batch, charges_of(batch), asks)
        if not counters.is_shared:
            names = {account.name: account for ask in asks for account in ask.accounts if not account.is_known}
            turn.loads = [(name, account.is_durable) for name, account in names.items()]
            return turn
        changes: dict[Name, Change] = {}
        if not self.is_registered_shared:
            turn.sharing = self._compose_sharing(changes)
        for account in counters.dirty:
            self._change(changes, account)
        counters.dirty = set()
        for name in turn.charges:
            if name in counters.accounts:
                self._change(changes, counters.accounts[name])
        self._compose_gifts(changes, asks)
        if self._is_refresh_due:
            self._is_refresh_due = False
            for account in counters.accounts.values():
                if account.is_touched or account.idle < 2:
                    self._change(changes, account).is_total_needed = True
        for change in changes.values():
            self._settle_amount(change, turn.charges.get(change.account.name, 0))
        now = monotonic()  # asks are made in callbacks too, where anyio has no clock
        expired = frozenset(id(ask) for ask in asks if ask.deadline <= now)
        turn.share = Share(self._holder, changes, asks, expired)
        turn.is_taking_all = self.wants_all and turn.sharing is None
        if turn.is_taking_all:
            turn.durable = [account for account in counters.accounts.values() if account.is_durable]
        return turn

    def _compose_sharing(self, changes: dict[Name, Change]) -> list[tuple[Account, int]]:
        """Have everything written that this process holds, from which the others count on."""
        found = []
        for account in self.counters.accounts.values():
            if account.settled or account.reserved or account.unflushed:
                change = self._change(changes, account)
                if not account.is_durable:
                    change.absorbed, change.flushed = account.unflushed, 0
                found.append((account, account.settled))
        return found

    def _compose_gifts(self, changes: dict[Name, Change], asks: list[Ask]) -> None:
        for ask in asks:
            for account in ask.accounts:
                _give(self._change(changes, account))
        for name, number in self._answers.items():
            found = self.counters.accounts.get(name)
            if found is None:  # forgotten: the call is found again
                continue
            change = self._change(changes, found)
            _give(change)
            change.answered = number
        self._answers = {}
        for account in self._to_give:
            _give(self._change(changes, account))
        self._to_give = []

    def _change(self, changes: dict[Name, Change], account: Account) -> Change:
        change = changes.get(account.name)
        if change is None:
            change = changes[account.name] = Change(account, answered=account.answered, had_id=account.id is not None)
            if not account.is_durable:
                change.flushed = account.unflushed
            if not account.is_known:
                change.is_total_needed = True
        return change

    @staticmethod
    def _settle_amount(change: Change, charged: int) -> None:
        account = change.account
        change.charged = charged
        # What was settled beyond its estimate is a fact that the lease has to cover.
        needed = account.reserved + change.unflushed
        change.amount = max(account.lease - change.flushed - charged, needed)

    # --- on the writer thread ---------------------------------------------------------------------------------------

    def _work(self, connection: Connection, turn: Turn) -> None:
        if turn.batch:
            turn.is_refused = True  # unless it gets further
            turn.receipt = self._books.append(connection, [queued.entry for queued in turn.batch])
            turn.is_refused = False
        if turn.sharing is not None:
            leases.share(connection, self._holder, turn.sharing, self._books.seed)
        if turn.share is not None:
            turn.share.run(connection, self._books.seed)
        if turn.loads:
            turn.totals = find_or_add(connection, turn.loads, self._books.seed)
        if turn.is_taking_all:
            turn.volatile = leases.take_all(connection, self._holder)
            if turn.volatile is not None:
                turn.totals = _totals_of(connection, turn.durable)

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _apply(self, turn: Turn) -> None:
        if turn.batch:
            self._most = min(2 * self._most, MOST_ENTRIES)
        # While one entry at fault is looked for, turns fail and succeed by turns.
        if self._most == MOST_ENTRIES or not self.ledger:
            self._outage.worked()
        if turn.receipt is not None:
            self._books.remember(turn.receipt)
        if turn.share is None:
            self.counters.flushed(turn.charges.items())
        else:
            self.is_registered_shared = True
            self._apply_share(turn.share, turn.charges)
        for name, total in turn.totals.items():
            account = self.counters.accounts.get(name)
            if account is not None:
                account.id = total.id
                account.settled = total.amount + account.unflushed
                account.is_known = True
        if turn.volatile is not None:
            self._be_exclusive(turn.volatile)
        if turn.share is None:
            for ask in turn.asks:
                self.counters.try_again(ask)

    def _apply_share(self, share: Share, charges: dict[Name, int]) -> None:
        counters = self.counters
        counters.flushed((name, amount) for name, amount in charges.items() if name not in share.changes)
        for change in share.changes.values():
            account = change.account
            account.unflushed = change.unflushed
            account.lease = change.amount
            account.answered = change.answered
            if change.limit is not None:
                account.lease_limit = change.limit
            if change.total is not None:
                account.settled = change.total + account.unflushed
                account.is_known = True
        for ask in share.asks:
            self._conclude(ask, share)
        for change in share.changes.values():
            if change.account.held > change.account.lease:
                counters.dirty.add(change.account)
                self.wake()

    def _conclude(self, ask: Ask, share: Share) -> None:
        counters = self.counters
        if id(ask) not in share.verdicts:
            ask.calls = share.waits.get(id(ask), ask.calls)
            counters.asks.append(ask)
            return
        verdict = share.verdicts[id(ask)]
        if verdict is not None:
            ask.decide(verdict)
            return
        for claim, account in zip(ask.claims, ask.accounts, strict=True):
            account.reserved += claim.amount
        held = Held(ask.claims, ask.accounts)
        if ask.is_abandoned:
            counters.settle(held)
        else:
            ask.decide(held)

    def _be_exclusive(self, volatile: list[tuple[Name, int]]) -> None:
        counters = self.counters
        for account in counters.accounts.values():
            account.lease = account.answered = 0
            if not account.is_durable:
                account.id = None
                account.settled = account.unflushed
                account.is_known = True
        for name, total in volatile:
            account = counters.account(name, is_durable=False)
            account.settled = total + account.unflushed
            account.is_known = True
        counters.is_shared = self.is_registered_shared = self.wants_all = False
        counters.dirty = set()
        self._answers = {}

    def _undo(self, turn: Turn, error: BaseException) -> None:
        counters = self.counters
        for change in turn.share.changes.values() if turn.share else ():
            change.account.lease += change.given
            if not change.had_id:
                change.account.id = None
            counters.dirty.add(change.account)
        for account, _ in turn.sharing or ():
            account.id = None
        unavailable = StoreUnavailableError(f"the store cannot say what is left: {error!r}")
        for ask in turn.asks:
            ask.decide(unavailable)
        is_of_rows = turn.is_refused and not isinstance(error, StoreUnavailableError)
        if is_of_rows:
            self._most = 1
        if is_of_rows and len(turn.batch) == 1:
            self.ledger.refused(turn.batch[0], error)
        else:  # where one of several is at fault, the others go without it
            self.ledger.put_back(turn.batch)
        self._outage.failed(error)


def _give(change: Change) -> None:
    """Take what an account does not need from its lease."""
    account = change.account
    spare = account.lease - account.held
    if spare > 0:
        account.lease -= spare
        change.given += spare


def _totals_of(connection: Connection, accounts: list[Account]) -> dict[Name, Total]:
    by_id = {account.id: account for account in accounts if account.id is not None}
    ids = list(by_id)
    totals = {}
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        for row in connection.execute(
            select(counter_rows.c.id, counter_rows.c.total).where(counter_rows.c.id.in_(part))
        ):
            totals[by_id[row.id].name] = Total(row.id, row.total)
    return totals
