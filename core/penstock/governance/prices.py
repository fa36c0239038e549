"""What tokens cost: integer rates, one rounding at the end."""

from __future__ import annotations

from typing import Literal, Protocol

import attrs

from penstock.models import Usage

PER = 1_000_000
"""Rates are nano-USD per this many tokens: 1 USD per million tokens is a rate of 1,000,000,000."""


@attrs.frozen(kw_only=True)
class Rates:
    """Hold what each class of tokens costs, in nano-USD per million tokens; None falls back as said at each."""

    input: int = 0
    cache_read: int | None = None
    """None: as ``input``."""
    cache_write_5m: int | None = None
    """None: as ``input``."""
    cache_write_1h: int | None = None
    """None: as ``cache_write_5m``."""
    output: int = 0
    input_audio: int | None = None
    """None: as ``input``."""
    cache_audio_read: int | None = None
    """None: as ``cache_read``."""
    output_audio: int | None = None
    """None: as ``output``."""
    request: int = 0
    """nano-USD per request."""


@attrs.frozen(kw_only=True)
class Tier:
    """Hold the rates that take the place of the base once a request has more input tokens than ``above``."""

    above: int
    rates: Rates


@attrs.frozen(kw_only=True)
class Price:
    """Hold the price of a model from one moment on."""

    rates: Rates
    tiers: tuple[Tier, ...] = ()
    """Ascending."""
    version: str
    """Where it comes from and of when, for the ledger."""
    max_output_tokens: int | None = None
    """The most the model puts out, where it is known."""

    def rates_for(self, usage: Usage) -> Rates:
        """Return the rates of the tier that the request's input reaches."""
        chosen = self.rates
        total = usage.all_input
        for tier in self.tiers:
            if total > tier.above:
                chosen = tier.rates
        return chosen

    def cost(self, usage: Usage, *, round_up: bool = False) -> int:
        """Return nano-USD, rounded once: half up, or always up for what is reserved."""
        rates = self.rates_for(usage)
        cache_read = rates.input if rates.cache_read is None else rates.cache_read
        write_5m = rates.input if rates.cache_write_5m is None else rates.cache_write_5m
        write_1h = write_5m if rates.cache_write_1h is None else rates.cache_write_1h
        input_audio = rates.input if rates.input_audio is None else rates.input_audio
        cache_audio = cache_read if rates.cache_audio_read is None else rates.cache_audio_read
        output_audio = rates.output if rates.output_audio is None else rates.output_audio
        total = (
            (usage.input - usage.input_audio) * rates.input
            + usage.input_audio * input_audio
            + (usage.cache_read - usage.cache_read_audio) * cache_read
            + usage.cache_read_audio * cache_audio
            + usage.cache_write_5m * write_5m
            + usage.cache_write_1h * write_1h
            + (usage.output - usage.output_audio) * rates.output
            + usage.output_audio * output_audio
        )
        half = PER - 1 if round_up else PER // 2
        return (total + half) // PER + rates.request

    def dearest(self, input_tokens: int, output_tokens: int) -> int:
        """Return the most that so many tokens can cost, whatever class they turn out to be: what ``max`` reserves."""
        most = 0
        for rates in (self.rates, *(tier.rates for tier in self.tiers)):
            known = [rates.input, rates.cache_read, rates.cache_write_5m, rates.cache_write_1h, rates.input_audio]
            dear_in = max(rate for rate in [*known, rates.cache_audio_read] if rate is not None)
            dear_out = max(rates.output, rates.output_audio or 0)
            cost = (input_tokens * dear_in + output_tokens * dear_out + PER - 1) // PER + rates.request
            most = max(most, cost)
        return most


class PriceTable(Protocol):
    """Find prices, from memory."""

    @property
    def unknown(self) -> Literal["refuse", "zero_and_flag", "estimate"]:
        """Return what to do for a model without a price."""
        ...

    def find(self, provider: str, model: str, at: float, *, base_url: str = "") -> Price | None:
        """Return the price of a provider type's model at a moment (seconds since the epoch)."""
        ...

    def estimate(self, provider: str) -> Price | None:
        """Return what stands in for a model without a price under the policy ``estimate``."""
        ...
