"""Count in memory: reserve, settle, and ask the database only for what memory cannot know.

With one process alive everything left of every counter is its own, and nothing is asked but the total of a durable
counter when it is first met. With several, each counts against its leases (``leases``), and asks for more in turns
(``turns``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from time import monotonic

from penstock.governance import Claim, Exceeded, Reservation
from penstock_plugins.store.accounts import Account, Ask, Held
from penstock_plugins.store.totals import Name

WAIT_SECONDS = 1.0
"""How long money that another process holds and may not need is waited for."""
_IDLE_ROUNDS_DURABLE = 10
_IDLE_ROUNDS = 90_000
"""A bit more than a day: alone, memory is the only place where the requests of a day are counted."""
_LOOKED_AT = 1000


class MemoryCounters:
    """Implement Counters; ``wake`` has the database asked soon."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.accounts: dict[Name, Account] = {}
        self.is_shared = False
        """Whether other processes count too."""
        self.asks: list[Ask] = []
        self.dirty: set[Account] = set()
        """Accounts whose lease or total must be written, where several processes count."""
        self._wake = wake
        self._latest: dict[str, tuple[int, int]] = {}
        self._to_look_at: list[Account] = []

    # --- Counters -------------------------------------------------------------------------------------------------

    def reserve(self, claims: Sequence[Claim]) -> Reservation | Exceeded | Awaitable[Reservation | Exceeded]:
        """Reserve all of the claims, or none; see ``Counters``."""
        accounts: list[Account] = []
        find, is_shared = self.accounts.get, self.is_shared
        for claim in claims:
            account = find((claim.counter, claim.period)) or self._new_account(claim)
            if not account.is_known:
                return self._ask(claims, self._undone(claims, accounts))
            account.is_touched = True
            limit, amount = claim.limit, claim.amount
            if limit is not None:
                if amount:
                    refused = account.settled + account.reserved + amount > limit
                else:
                    refused = claim.refuses_at_limit and account.settled >= limit
                if refused:
                    self._undone(claims, accounts)
                    return Exceeded(claim, account.settled + account.reserved, account.settled)
                if is_shared and amount and not _is_covered(account, claim):
                    return self._ask(claims, self._undone(claims, accounts))
            account.reserved += amount
            accounts.append(account)
        return Held(claims, accounts)

    def settle(self, reservation: Reservation, amounts: Mapping[str, int] | None = None) -> None:
        """Replace what was reserved by what was used; see ``Counters``."""
        assert isinstance(reservation, Held)
        if reservation.is_settled:
            return
        reservation.is_settled = True
        for claim, account in zip(reservation.claims, reservation.accounts):  # noqa: B905 - strict=True costs as much as the rest
            account.reserved -= claim.amount
            if amounts and claim.counter in amounts:
                used = amounts[claim.counter]
                account.settled += used
                account.unflushed += used
        if self.is_shared:
            self.dirty.update(reservation.accounts)

    def used(self, counter: str, period: int) -> int:
        """Return what is settled for a period, as far as is known here."""
        account = self.accounts.get((counter, period))
        if account is not None:
            account.is_touched = True
            return account.settled
        latest = self._latest.get(counter)
        known = self.accounts.get((counter, latest[0])) if self.is_shared and latest else None
        if known is not None:  # others may have used it: the next turn says
            self.dirty.add(self._add((counter, period), is_durable=known.is_durable, is_known=False))
        return 0

    # --- accounts -------------------------------------------------------------------------------------------------

    def _new_account(self, claim: Claim) -> Account:
        is_known = not self.is_shared and not claim.is_durable
        return self._add((claim.counter, claim.period), is_durable=claim.is_durable, is_known=is_known)

    def _add(self, name: Name, *, is_durable: bool, is_known: bool) -> Account:
        account = self.accounts[name] = Account(name, is_durable=is_durable, is_known=is_known)
        if name[1]:
            newest, previous = self._latest.get(name[0], (0, 0))
            if name[1] > newest:
                self._latest[name[0]] = (name[1], newest)
                self._drop(self.accounts.get((name[0], previous)))
        return account

    def account(self, name: Name, *, is_durable: bool) -> Account:
        """Return an account, made where there is none."""
        return self.accounts.get(name) or self._add(name, is_durable=is_durable, is_known=False)

    def _drop(self, account: Account | None) -> None:
        if account is not None and self._is_over(account) and not account.lease and account not in self.dirty:
            self.accounts.pop(account.name, None)
            latest = self._latest.get(account.name[0])
            if latest is not None and latest[0] == account.name[1]:
                del self._latest[account.name[0]]

    def _is_over(self, account: Account) -> bool:
        """Tell whether nothing is lost with an account; alone, what a volatile one has settled is written nowhere."""
        if account.is_durable or self.is_shared:
            return account.is_free
        return not account.reserved

    def look_for_idle(self) -> list[Account]:
        """Forget accounts nobody has used for long; returns those idle for a moment. Call once a second."""
        if not self._to_look_at:
            self._to_look_at = list(self.accounts.values())
        part, self._to_look_at = self._to_look_at[:_LOOKED_AT], self._to_look_at[_LOOKED_AT:]
        idle = []
        for account in part:
            account.idle = 0 if account.is_touched else account.idle + 1
            account.is_touched = False
            if account.idle > (_IDLE_ROUNDS_DURABLE if account.is_durable or not account.settled else _IDLE_ROUNDS):
                self._drop(account)
            elif account.idle:
                idle.append(account)
        return idle

    # --- asking ---------------------------------------------------------------------------------------------------

    @staticmethod
    def _undone(claims: Sequence[Claim], accounts: list[Account]) -> list[Account]:
        for claim, account in zip(claims, accounts, strict=False):
            account.reserved -= claim.amount
        return accounts

    def _ask(self, claims: Sequence[Claim], accounts: list[Account]) -> Awaitable[Reservation | Exceeded]:
        find = self.accounts.get
        missing = claims[len(accounts) :]
        accounts.extend(find((claim.counter, claim.period)) or self._new_account(claim) for claim in missing)
        return self._asked(Ask(tuple(claims), accounts, monotonic() + WAIT_SECONDS))

    async def _asked(self, ask: Ask) -> Reservation | Exceeded:
        """Wait for the answer; whoever no longer waits holds nothing."""
        self.asks.append(ask)
        self._wake()
        try:
            await ask.answered.wait()
        except BaseException:
            ask.is_abandoned = True
            if isinstance(ask.answer, Held):
                self.settle(ask.answer)
            raise
        if isinstance(ask.answer, Exception):
            raise ask.answer
        assert ask.answer is not None
        return ask.answer

    def try_again(self, ask: Ask) -> None:
        """Decide an ask from memory, once its accounts are known and nobody else counts."""
        if not ask.is_abandoned:
            answer = self.reserve(ask.claims)
            if isinstance(answer, Held | Exceeded):
                ask.decide(answer)
            else:
                self._again(ask, answer)

    def _again(self, ask: Ask, answer: object) -> None:
        answer.close()  # type: ignore[attr-defined]
        ask.accounts = [self.account((c.counter, c.period), is_durable=c.is_durable) for c in ask.claims]
        self.asks.append(ask)
        self._wake()

    # --- what the ledger tells --------------------------------------------------------------------------------------

    def charged(self, charges: Mapping[Name, int]) -> None:
        """Take note of what others than this process's exchanges were charged: corrections, and what the dead left."""
        for name, amount in charges.items():
            account = self.accounts.get(name)
            if account is not None and account.is_known:
                account.settled += amount

    def flushed(self, charges: Iterable[tuple[Name, int]]) -> None:
        """Take note of what of this process's settled amounts is in the database's totals now."""
        for name, amount in charges:
            account = self.accounts.get(name)
            if account is not None:
                account.unflushed -= amount


def _is_covered(account: Account, claim: Claim) -> bool:
    assert claim.limit is not None
    return account.reserved + account.unflushed + claim.amount <= account.lease and claim.limit >= account.lease_limit
