"""How several processes share a counter: rows that say how much each may count up to. Runs on the writer thread.

Settled total plus all leases never exceed the limit, however many processes reserve: a lease grows only in a
transaction that sees all of them. Who finds too little left *calls*: the others give back what they hold and do not
need, and only once each has answered is a claim refused. A process that is alone leases nothing; it is *exclusive*, and
one that joins grants itself nothing until the other has said what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
from sqlalchemy import Connection, delete, insert, select, update

from penstock.governance import Claim, Exceeded, StoreUnavailableError
from penstock_plugins.store.accounts import Account, Ask
from penstock_plugins.store.bulk import add_into, add_where_id, put_into, run_many
from penstock_plugins.store.ledger_tables import calls, counters, holders, leases
from penstock_plugins.store.totals import CounterSeed, Name, find_or_add

_LEASE = ("counter_id", "holder", "amount", "answered")
_PUT_LEASE = put_into(leases, _LEASE[:2], _LEASE[2:])
_ADD_TOTAL = add_where_id(counters, "total")
_ADD_CALL = add_into(calls, ("counter_id",), ("number",))
_PART = 500
_WANTED_SHARES = 2


@attrs.define(eq=False)
class Change:
    """Hold what a turn writes and finds for one account."""

    account: Account
    given: int = 0
    """Part of the lease given back; already taken from the account."""
    flushed: int = 0
    """Volatile amounts to add to the total."""
    absorbed: int = 0
    """Volatile amounts that are in the total ``share`` wrote."""
    charged: int = 0
    """What of the unflushed amounts this turn's ledger rows add to the total."""
    amount: int = 0
    """The lease when the turn is over."""
    answered: int = 0
    """The last call answered when the turn is over."""
    is_total_needed: bool = False
    had_id: bool = True
    total: int | None = None
    """What the database says, this turn's changes included."""
    others: int = 0
    """Leases of other processes."""
    lowest_answer: int | None = None
    """The last call that all of those that hold something have answered; None where none holds any."""
    call: int = 0
    """The last call to give back."""
    is_calling: bool = False
    limit: int | None = None
    """What was granted under."""

    @property
    def is_written(self) -> bool:
        """Tell whether the row of the lease changes."""
        account = self.account
        return self.amount != account.lease + self.given or self.answered != account.answered

    @property
    def unflushed(self) -> int:
        """Return what is unflushed once the turn is over."""
        return self.account.unflushed - self.flushed - self.absorbed - self.charged


@attrs.define(eq=False)
class Share:
    """Write and read what one turn changes in the rows of counters, with several processes alive."""

    holder: str
    changes: dict[Name, Change]
    asks: Sequence[Ask]
    expired: frozenset[int]
    """Ids of asks that have waited long enough."""
    verdicts: dict[int, Exceeded | Exception | None] = attrs.Factory(dict)
    """By id of ask: refused, or granted (None); those that wait on are missing."""
    waits: dict[int, dict[int, int]] = attrs.Factory(dict)
    """By id of ask that waits on, the calls it waits for, by counter."""

    def run(self, connection: Connection, seed: CounterSeed) -> None:
        """Do it all."""
        changes = self.changes
        missing = [(name, change.account.is_durable) for name, change in changes.items() if change.account.id is None]
        for name, total in find_or_add(connection, missing, seed).items():
            changes[name].account.id = total.id
        flushed = [(change.flushed, change.account.id) for change in changes.values() if change.flushed]
        run_many(connection, _ADD_TOTAL, ("amount", "key"), flushed)
        asked = {account.name: changes[account.name] for ask in self.asks for account in ask.accounts}
        for change in asked.values():
            _read_others(connection, self.holder, change)
        _read_totals(connection, [change for change in changes.values() if change.is_total_needed])
        if asked:
            count, is_blocked = _others_alive(connection, self.holder)
            for ask in self.asks:
                self._decide(ask, is_blocked=is_blocked)
            for change in asked.values():
                _grant_slice(change, count + 1)
        called = [(change.account.id, 1) for change in asked.values() if change.is_calling]
        run_many(connection, _ADD_CALL, ("counter_id", "number"), called)
        rows = [
            (change.account.id, self.holder, change.amount, change.answered)
            for change in changes.values()
            if change.is_written
        ]
        run_many(connection, _PUT_LEASE, _LEASE, rows)

    def _decide(self, ask: Ask, *, is_blocked: bool) -> None:
        fitting: list[tuple[Change, Claim]] = []
        is_waiting = False
        waits = dict(ask.calls)
        for claim in ask.claims:
            change = self.changes[claim.counter, claim.period]
            verdict = _judge(claim, change, sum(other.amount for each, other in fitting if each is change))
            if is_blocked and claim.limit is not None and claim.amount:
                if id(ask) in self.expired:
                    verdict = StoreUnavailableError("another process counts alone and does not answer")
                else:
                    is_waiting = True
                    continue
            elif verdict is not None and claim.amount and not _has_answered(change, waits):
                is_waiting = True
                if id(ask) not in self.expired:
                    continue
            if verdict is not None:
                self.verdicts[id(ask)] = verdict
                return
            fitting.append((change, claim))
        if is_waiting:
            self.waits[id(ask)] = waits
            return
        for change, claim in fitting:
            change.amount += claim.amount
            if claim.limit is not None:
                change.limit = claim.limit
        self.verdicts[id(ask)] = None


def _judge(claim: Claim, change: Change, taken: int) -> Exceeded | Exception | None:
    """Return why a claim does not fit just now."""
    if claim.limit is None:
        return None
    assert change.total is not None
    settled = change.total + change.unflushed
    if not claim.amount:
        is_refused = claim.refuses_at_limit and settled >= claim.limit
        return Exceeded(claim, settled + change.others, settled) if is_refused else None
    used = change.total + change.others + change.amount + taken
    return Exceeded(claim, used, settled) if used + claim.amount > claim.limit else None


def _has_answered(change: Change, waits: dict[int, int]) -> bool:
    """Tell whether all others have given back what they do not need since the ask was first seen; else call them."""
    if change.lowest_answer is None:
        return True
    assert change.account.id is not None
    call = waits.get(change.account.id)
    if call is None:
        if not change.is_calling:
            change.is_calling = True
            change.call += 1
            change.answered = change.call  # what was not needed here is given back already
        waits[change.account.id] = change.call
        return False
    return change.lowest_answer >= call


def _grant_slice(change: Change, processes: int) -> None:
    """Lease more than was asked for, so that the next claims need not ask."""
    if change.limit is None:
        return
    assert change.total is not None
    left = change.limit - change.total - change.others - change.amount
    if change.call:
        # Somebody found too little once. What is taken beyond need must be given back when it is wanted still.
        if change.is_calling or left < change.limit // 2:
            return
        change.answered = change.call - 1
    if left > 0:
        change.amount += left // (_WANTED_SHARES * processes)


# --- rows ---------------------------------------------------------------------------------------------------------


def _read_others(connection: Connection, holder: str, change: Change) -> None:
    counter_id = change.account.id
    rows = connection.execute(
        select(leases.c.amount, leases.c.answered).where(leases.c.counter_id == counter_id, leases.c.holder != holder)
    ).all()
    change.others = sum(row.amount for row in rows)
    change.lowest_answer = min((row.answered for row in rows if row.amount > 0), default=None)
    change.call = connection.execute(select(calls.c.number).where(calls.c.counter_id == counter_id)).scalar() or 0
    change.answered = change.call
    change.is_total_needed = True


def _read_totals(connection: Connection, changes: list[Change]) -> None:
    by_id = {change.account.id: change for change in changes}
    ids = list(by_id)
    for start in range(0, len(ids), _PART):
        part = ids[start : start + _PART]
        for row in connection.execute(select(counters.c.id, counters.c.total).where(counters.c.id.in_(part))):
            by_id[row.id].total = row.total


def _others_alive(connection: Connection, holder: str) -> tuple[int, bool]:
    """Return how many other processes there are, and whether one of them has not yet said what it holds."""
    rows = connection.scalars(select(holders.c.is_exclusive).where(holders.c.holder != holder)).all()
    return len(rows), any(rows)


def calls_to_answer(connection: Connection, holder: str) -> tuple[int, list[tuple[Name, bool, int, int]]]:
    """Return how many other processes there are, and which counters they want given back."""
    count = len(connection.scalars(select(holders.c.holder).where(holders.c.holder != holder)).all())
    rows = connection.execute(
        select(counters.c.counter, counters.c.period, counters.c.is_durable, counters.c.id, calls.c.number)
        .join(calls, calls.c.counter_id == counters.c.id)
        .join(leases, leases.c.counter_id == counters.c.id)
        .where(leases.c.holder == holder, leases.c.answered < calls.c.number)
    ).all()
    return count, [((row.counter, row.period), row.is_durable, row.id, row.number) for row in rows]


# --- coming and going ---------------------------------------------------------------------------------------------


def join(connection: Connection, holder: str) -> bool:
    """Add a process; returns whether it is alone."""
    count, _ = _others_alive(connection, holder)
    connection.execute(insert(holders).values(holder=holder, is_exclusive=not count))
    return not count


def share(connection: Connection, holder: str, amounts: Iterable[tuple[Account, int]], seed: CounterSeed) -> None:
    """Say what an exclusive process holds: it is one among several from here on.

    ``amounts``: settled amounts of volatile counters, which take the place of the database's.
    """
    found = list(amounts)
    missing = [(account.name, account.is_durable) for account, _ in found if account.id is None]
    rows = find_or_add(connection, missing, seed)
    for account, settled in found:
        if account.id is None:
            account.id = rows[account.name].id
        if not account.is_durable:
            connection.execute(update(counters).where(counters.c.id == account.id).values(total=settled))
    connection.execute(update(holders).where(holders.c.holder == holder).values(is_exclusive=False))


def take_all(connection: Connection, holder: str) -> list[tuple[Name, int]] | None:
    """Become exclusive; returns the volatile totals, which memory takes over. None where others have come."""
    count, _ = _others_alive(connection, holder)
    if count:
        return None
    connection.execute(update(holders).where(holders.c.holder == holder).values(is_exclusive=True))
    connection.execute(delete(leases))
    connection.execute(delete(calls))
    volatile = connection.execute(
        select(counters.c.counter, counters.c.period, counters.c.total).where(counters.c.is_durable.is_(False))
    ).all()
    connection.execute(delete(counters).where(counters.c.is_durable.is_(False)))
    return [((row.counter, row.period), row.total) for row in volatile]


def leave(connection: Connection, holder: str) -> None:
    """Take a process and its leases away."""
    connection.execute(delete(leases).where(leases.c.holder == holder))
    connection.execute(delete(holders).where(holders.c.holder == holder))


def is_anyone_exclusive(connection: Connection, holder: str) -> bool:
    """Tell whether a process has not yet said what it holds."""
    return _others_alive(connection, holder)[1]


def all_holders(connection: Connection) -> list[str]:
    """Return every process that counts."""
    return list(connection.scalars(select(holders.c.holder).order_by(holders.c.holder)))


def forget_old(connection: Connection, before: int) -> None:
    """Delete volatile counters whose period is long over and that nobody leases."""
    held = select(leases.c.counter_id).where(leases.c.amount != 0)
    old = select(counters.c.id).where(
        counters.c.is_durable.is_(False), counters.c.period > 0, counters.c.period < before, counters.c.id.not_in(held)
    )
    ids = list(connection.scalars(old.limit(_PART)))
    for table, column in ((leases, leases.c.counter_id), (calls, calls.c.counter_id), (counters, counters.c.id)):
        connection.execute(delete(table).where(column.in_(ids)))
