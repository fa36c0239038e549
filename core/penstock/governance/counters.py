"""What limits are counted with: claims reserved before a provider is asked, settled once with what was really used.

A counter is named and has a period; a budget's money, a key's requests of this minute and its exchanges under way are
all counters. One process counts in memory. Several share a counter by leases: each takes a slice of what is left and
counts against that, so that the hot path makes no call and the bound still holds for all of them together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from typing import Protocol

import attrs
import msgspec


class Claim(msgspec.Struct, frozen=True, gc=False):
    """Ask for an amount of one counter."""

    counter: str
    """Name, such as ``budget:bud_…``, ``budget:bud_…:end-user``, ``rpm:vk_…`` or ``concurrency:gpc_…``."""
    period: int
    """Start of the period, seconds since the epoch; a counter whose period has moved on starts from nothing. 0 for
    counters without periods."""
    amount: int
    """What is reserved: nano-USD, requests, tokens or exchanges under way; not negative."""
    limit: int | None
    """What settled and reserved amounts must not exceed together; None only counts."""
    is_durable: bool = False
    """Money: its settled amount outlives the process, and is kept by the ledger."""
    refuses_at_limit: bool = False
    """Refuse a claim of nothing too once the limit is reached (budgets), not only what would exceed it."""


@attrs.frozen
class Exceeded:
    """Say which claim did not fit; nothing was reserved for any of them."""

    claim: Claim
    used: int
    """Settled and reserved by others, as far as is known here."""
    settled: int
    """The settled part of ``used``."""


class Reservation(Protocol):
    """Hold the claims of one exchange until they are settled."""

    @property
    def claims(self) -> Sequence[Claim]:
        """Return what is reserved."""
        ...


class Counters(Protocol):
    """Reserve and settle claims; shared by everything that limits."""

    def reserve(self, claims: Sequence[Claim]) -> Reservation | Exceeded | Awaitable[Reservation | Exceeded]:
        """Reserve all of the claims, or none.

        Returns at once where memory is enough to decide, or an awaitable where others must be asked for what is left.
        Money that another process holds and does not need is waited for (a second at most) rather than refused.
        """
        ...

    def settle(self, reservation: Reservation, amounts: Mapping[str, int] | None = None) -> None:
        """Replace what was reserved by what was used; a second call does nothing.

        ``amounts`` by name of counter; what is not in it was not used. Never waits. The settled amounts of durable
        claims are those of the ledger entry (``Ledger.settle``); they are given here too.
        """
        ...

    def used(self, counter: str, period: int) -> int:
        """Return what is settled for a period, as far as is known here: exact in one process, within 2 s elsewhere."""
        ...
