"""What counters are in memory: accounts, the reservations on them, and claims that must ask the database.

An account's *settled* amount is the database's total and what this process has settled since (*unflushed*). What it
*holds* is what it has reserved and what is unflushed. Where several processes count, it must not hold more than its
*lease*; the total and all leases together never exceed the limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import attrs

from penstock.governance import Claim, Exceeded


class Account:
    """Count one counter in one period."""

    __slots__ = (
        "answered", "id", "idle", "is_durable", "is_known", "is_touched", "lease", "lease_limit", "name", "reserved",
        "settled", "unflushed",
    )  # fmt: skip

    def __init__(self, name: tuple[str, int], *, is_durable: bool, is_known: bool) -> None:
        self.name = name
        self.is_durable = is_durable
        self.is_known = is_known
        """Whether ``settled`` includes the database's total."""
        self.id: int | None = None
        """Of the database's row, once it is known."""
        self.settled = 0
        self.unflushed = 0
        self.reserved = 0
        self.lease = 0
        self.answered = 0
        """The last call to give back that this process has answered."""
        self.lease_limit = 0
        """The least limit the lease was granted under."""
        self.is_touched = True
        self.idle = 0
        """How often it was found untouched."""

    @property
    def held(self) -> int:
        """Return what a lease must cover."""
        return self.reserved + self.unflushed

    @property
    def is_free(self) -> bool:
        """Tell whether nothing is reserved or still to be written."""
        return not self.reserved and not self.unflushed


class Held:
    """Hold the claims of one exchange."""

    __slots__ = ("accounts", "claims", "is_settled")

    def __init__(self, claims: Sequence[Claim], accounts: list[Account]) -> None:
        self.claims = claims
        self.accounts = accounts
        self.is_settled = False


@attrs.define(eq=False)
class Ask:
    """Hold claims that memory cannot decide."""

    claims: Sequence[Claim]
    accounts: list[Account]
    deadline: float
    """When money that others hold has been waited for long enough, on the monotonic clock."""
    calls: dict[int, int] = attrs.Factory(dict)
    """By row of counter, the call that its other holders must answer before it is refused."""
    is_abandoned: bool = False
    answer: Held | Exceeded | Exception | None = None
    answered: anyio.Event = attrs.Factory(anyio.Event)

    def decide(self, answer: Held | Exceeded | Exception) -> None:
        """Wake whoever waits."""
        self.answer = answer
        self.answered.set()
