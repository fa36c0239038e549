"""What rate limits come to at a moment: sliding minutes in integers, and the claims that keep one key or binding.

Claims never change, so they are made once and used by every request, for as long as what they say holds. That is the
whole minute but for what the minute before leaves, which grows with every millisecond: that is weighed a few times a
second. In between a bound is too strict rather than too loose, and whoever it would refuse is weighed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import attrs

from penstock import RateLimits
from penstock.governance import Claim, Counters

Dimension = Literal["concurrency", "rpd", "rpm", "tpm"]
MINUTE_MS = 60_000
DAY = 86_400
WEIGHED_MS = 100
"""How long what the minute before leaves is believed."""


def room(limit: int, previous: int, elapsed_ms: int) -> int:
    """Return what of a limit is left for this minute by what was used in the previous one; not negative."""
    return max(0, limit - -(-previous * (MINUTE_MS - elapsed_ms) // MINUTE_MS))


def wait_ms(limit: int, amount: int, used: int, previous: int, elapsed_ms: int) -> int:
    """Return in how many milliseconds an amount fits, if nothing else is asked for or given back until then.

    ``limit`` is the whole one, of which ``used`` and ``previous`` are taken.
    """
    left = limit - amount - used
    if left >= 0:
        if previous * (MINUTE_MS - elapsed_ms) <= left * MINUTE_MS:
            return 0
        return MINUTE_MS - elapsed_ms - left * MINUTE_MS // previous
    if not used:
        return MINUTE_MS  # nothing is in its way but the limit: it never fits
    left = max(0, limit - amount)
    return 2 * MINUTE_MS - elapsed_ms - min(MINUTE_MS, left * MINUTE_MS // used)


@attrs.define(eq=False)
class Minute:
    """Count what exchanges of this process have reserved of one minute and not settled."""

    start: int
    """Seconds since the epoch."""
    requests: int = 0
    tokens: int = 0


class Bound:
    """Hold what one key or binding is bounded by, and the claims that keep it within that."""

    __slots__ = (
        "_before_start", "_counters", "_lasting", "_minutes", "amounts", "claims", "is_empty", "limits", "minute",
        "owner", "requests", "rpd", "tokens", "tokens_left", "tpm", "until_ms", "weighed_ms",
    )  # fmt: skip

    def __init__(
        self, owner: str, limits: RateLimits, counters: Counters, before_start: Mapping[tuple[str, int], int]
    ) -> None:
        """``before_start``: requests of days that the counters know nothing of, by counter and start of the day."""
        self._counters = counters
        self._before_start = before_start
        self._minutes: dict[int, Minute] = {}
        """By start: this one, the one before, and all that exchanges hold something of."""
        self.owner = owner
        """Id of the key or binding."""
        self.requests, self.rpd, self.tokens = f"rpm:{owner}", f"rpd:{owner}", f"tpm:{owner}"
        """Names of counters."""
        self.amounts = {self.requests: 1, self.rpd: 1}
        """What a request uses but for its tokens."""
        self.minute = Minute(-1)
        """The one that the claims are for."""
        self.change(limits)

    def change(self, limits: RateLimits) -> None:
        """Put other limits in force."""
        self.limits = limits
        self.is_empty = limits == RateLimits()
        """Whether nothing is bounded."""
        self.tpm = limits.tpm
        self.tokens_left = 0
        """What of ``tpm`` the minute before leaves."""
        self.claims: Sequence[Claim] = ()
        """What every request asks for; never changed, but replaced."""
        self._lasting: Sequence[Claim] = ()
        """Those of them that are good for the whole minute."""
        self.weighed_ms = self.until_ms = 0
        """From when until when all this is good, milliseconds since the epoch."""

    def weigh(self, now_ms: int) -> None:
        """Find out what is left at a moment."""
        start, elapsed = now_ms // MINUTE_MS * 60, now_ms % MINUTE_MS
        if start != self.minute.start or not self.until_ms:
            self._begin(start)
        self.claims = self._lasting
        limits = self.limits
        if limits.rpm is not None:
            left = room(limits.rpm, self.used(self.requests, start - 60), elapsed)
            self.claims = (*self._lasting, Claim(self.requests, start, 1, left))
        if limits.tpm is not None:
            self.tokens_left = room(limits.tpm, self.used(self.tokens, start - 60), elapsed)
        self.weighed_ms = now_ms
        self.until_ms = min(now_ms + WEIGHED_MS, (start + 60) * 1000)

    def _begin(self, start: int) -> None:
        """Make the claims that are good for a whole minute, and forget those minutes that are over for everybody."""
        minutes = self._minutes
        for old in [old for old, minute in minutes.items() if old < start - 60 and not minute.requests]:
            del minutes[old]
        self.minute = minutes.setdefault(start, Minute(start))
        lasting = []
        if self.limits.concurrency is not None:
            lasting.append(Claim(f"concurrency:{self.owner}", 0, 1, self.limits.concurrency))
        if self.limits.rpd is not None:
            day = start // DAY * DAY
            limit = max(0, self.limits.rpd - self._before_start.get((self.rpd, day), 0))
            lasting.append(Claim(self.rpd, day, 1, limit))
        self._lasting = tuple(lasting)

    def claims_of(self, tokens: int) -> Sequence[Claim]:
        """Return what one request of so many tokens asks for, as weighed; 0 asks for none."""
        if not tokens:
            return self.claims
        return (*self.claims, Claim(self.tokens, self.minute.start, tokens, self.tokens_left))

    def used(self, counter: str, start: int) -> int:
        """Return what a minute has used of requests or tokens: settled, and under way here."""
        settled = self._counters.used(counter, start)
        minute = self._minutes.get(start)
        if minute is None:
            return settled
        return settled + (minute.tokens if counter == self.tokens else minute.requests)

    @property
    def is_held(self) -> bool:
        """Tell whether exchanges hold something of it."""
        return any(minute.requests for minute in self._minutes.values())
