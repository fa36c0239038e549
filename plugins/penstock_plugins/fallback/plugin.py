"""A breaker per binding: one that keeps failing is skipped without a dial, until a probe finds it well again.

What is tried after what is core's and routing's; here is only who is not worth asking. Breakers are local to a
process on purpose: each sees its own failures within milliseconds, and none depends on another's being up.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs

from penstock import ConfigurationError, Exchange, RequestError, Services, StateKey, hookimpl
from penstock.governance import CircuitDirectory, CircuitState
from penstock_plugins.fallback.breaker import Breaker, Thresholds
from penstock_plugins.fallback.outcomes import outcome_of

_log = logging.getLogger("penstock.fallback")
_FEW_BREAKERS = 1000
_COUNTED: StateKey[int] = StateKey("fallback.counted")
"""How many attempts of the exchange were counted."""
_PROBING: StateKey[str] = StateKey("fallback.probing")
"""The binding whose breaker has let this exchange through to see."""


@attrs.frozen(kw_only=True)
class FallbackConfig:
    """Settings of the plugin ``fallback``."""

    failures: int = 10
    """How many failures within the window open a binding's breaker."""
    window_seconds: float = 30.0
    """How far back failures count, seconds."""
    open_seconds: float = 60.0
    """How long a binding is left alone before one request is let through to see, seconds."""

    def __attrs_post_init__(self) -> None:
        faults = [
            f"{name}: must be more than 0"
            for name in ("failures", "window_seconds", "open_seconds")
            if not 0 < getattr(self, name) < math.inf
        ]
        if faults:
            raise ConfigurationError(*faults)


@attrs.define(eq=False)
class Probe:
    """Name the attempt a half-open breaker has let through: the next of its exchange."""

    exchange: Exchange
    number: int
    """Of the attempt."""


@attrs.define(eq=False)
class Breakers:
    """Hold the breakers of bindings that have failed; what a reload keeps."""

    by_binding: dict[str, Breaker] = attrs.field(factory=dict)
    most: int = _FEW_BREAKERS
    """How many are kept before those that say nothing are forgotten."""

    def of(self, binding_id: str, now: float, thresholds: Thresholds) -> Breaker:
        """Return a binding's breaker, made on its first failure."""
        breakers = self.by_binding
        breaker = breakers.get(binding_id)
        if breaker is None:
            if len(breakers) >= self.most:
                for idle in [key for key, found in breakers.items() if found.is_idle(now, thresholds)]:
                    del breakers[idle]
                self.most = max(_FEW_BREAKERS, 2 * len(breakers))
            breaker = breakers[binding_id] = Breaker()
        return breaker


@attrs.define(eq=False)
class FallbackChains:
    """Skip bindings whose breaker is open, and count what opens and closes them."""

    Config = FallbackConfig

    config: FallbackConfig
    services: Services
    clock: Callable[[], float] = time.monotonic
    """Seconds, only forwards: how long ago is all that matters."""
    _breakers: Breakers = attrs.field(factory=Breakers, init=False, repr=False)
    _thresholds: Thresholds = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        config = self.config
        self._thresholds = Thresholds(config.failures, config.window_seconds, config.open_seconds)
        self.services.provide(CircuitDirectory, self)  # type: ignore[type-abstract]

    @hookimpl
    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Go on with the breakers of the generation before."""
        async with self.services.shared.use("fallback.breakers", _new_breakers) as self._breakers:
            yield

    @hookimpl
    def admit_attempt(self, exchange: Exchange) -> RequestError | None:
        """Have a candidate skipped whose breaker is open; what failed before in this exchange counts already."""
        attempts = exchange.attempts
        if attempts:
            self._count(exchange)
        breakers = self._breakers
        candidate = exchange.candidate
        if candidate is None or not breakers.by_binding:
            return None
        breaker = breakers.by_binding.get(candidate.binding.id)
        if breaker is None or breaker.opened_at is None:
            return None
        now = self.clock()
        self._look_at_probe(candidate.binding.id, breaker, now)
        if breaker.admit(now, self._thresholds, Probe(exchange, len(attempts))):
            if breaker.opened_at is not None:
                exchange.state[_PROBING] = candidate.binding.id
            return None
        return self._refusal(exchange, breaker.wait(now, self._thresholds))

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        """Count what became of the attempts that nobody has counted yet."""
        attempts = exchange.attempts
        probing = exchange.state.pop(_PROBING, None)
        if probing is None and (not attempts or (len(attempts) == 1 and attempts[0].reason is None)):
            return
        self._count(exchange)
        breaker = None if probing is None else self._breakers.by_binding.get(probing)
        if probing is not None and breaker is not None and _is_probed_by(breaker, exchange):
            self._look_at_probe(probing, breaker, self.clock(), is_over=True)

    def states(self) -> Sequence[CircuitState]:
        """Return the breakers of bindings that failed lately."""
        breakers, thresholds = self._breakers, self._thresholds
        now = self.clock()
        found = []
        for binding_id, breaker in breakers.by_binding.items():
            self._look_at_probe(binding_id, breaker, now)
            if not breaker.is_idle(now, thresholds):
                state, failures = breaker.state(now, thresholds), breaker.recent(now, thresholds)
                found.append(CircuitState(binding_id, state, failures, breaker.wait(now, thresholds)))
        return found

    # --- counting -----------------------------------------------------------------------------------------------------

    def _count(self, exchange: Exchange) -> None:
        """Count each attempt that has ended, once."""
        attempts = exchange.attempts
        counted = exchange.state.get(_COUNTED, 0)
        exchange.state[_COUNTED] = len(attempts)
        for attempt in attempts[counted:]:
            breaker = self._breakers.by_binding.get(attempt.binding_id)
            if breaker is not None and _is_probed_by(breaker, exchange, attempt.number):
                self._look_at_probe(attempt.binding_id, breaker, self.clock())
            elif attempt.reason is not None and outcome_of(exchange, attempt) == "failed":
                now = self.clock()
                breaker = self._breakers.of(attempt.binding_id, now, self._thresholds)
                began = now - (attempt.ended_ns - attempt.started_ns) / 1e9
                if breaker.fail(began, now, self._thresholds):
                    self._tell("opened: it is skipped for %g s", attempt.binding_id, self.config.open_seconds)

    def _look_at_probe(self, binding_id: str, breaker: Breaker, now: float, *, is_over: bool = False) -> None:
        """Judge a probe as soon as its attempt has ended, be its answer still on its way to the client.

        ``is_over``: the exchange has ended, so that an attempt there is none of will never be made.
        """
        probe = breaker.probe
        if not isinstance(probe, Probe):
            return
        attempts = probe.exchange.attempts
        attempt = attempts[probe.number] if probe.number < len(attempts) else None
        if attempt is None or not (attempt.ended_ns or attempt.is_skipped):
            if is_over:
                breaker.judge_probe("neutral", now)
            return
        outcome = outcome_of(probe.exchange, attempt)
        breaker.judge_probe(outcome, now)
        if outcome == "answered":
            self._tell("closed: it answers again", binding_id)
        elif outcome == "failed":
            self._tell("stays open for another %g s: a probe failed", binding_id, self.config.open_seconds)

    def _tell(self, what: str, binding_id: str, *values: float) -> None:
        _log.warning(f"the breaker of binding %s {what}", binding_id, *values)

    # --- refusing -----------------------------------------------------------------------------------------------------

    def _refusal(self, exchange: Exchange, wait: float) -> RequestError:
        """Return why a candidate is skipped; of several skipped, the client is told the shortest wait."""
        seconds = max(1, math.ceil(wait))
        refusal = RequestError(
            "circuit_open",
            f"The provider has failed too often and is left alone; try again in {seconds} s.",
            meta={"retry_after": seconds},
            fields=((b"retry-after", b"%d" % seconds),),
        )
        excluded = exchange.excluded or {}
        for binding_id, earlier in excluded.items():
            if earlier.code == "circuit_open" and earlier.meta.get("retry_after", 0) > seconds:
                excluded[binding_id] = refusal
        return refusal


def _is_probed_by(breaker: Breaker, exchange: Exchange, number: int | None = None) -> bool:
    """Tell whether an exchange, or one attempt of it, is what a half-open breaker waits for."""
    probe = breaker.probe
    return isinstance(probe, Probe) and probe.exchange is exchange and number in (None, probe.number)


@asynccontextmanager
async def _new_breakers() -> AsyncIterator[Breakers]:
    yield Breakers()
