"""Read the table of prices shipped with the package, provider by provider as they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec

from penstock.governance import Price, Rates, Tier

RATE_NAMES = (
    "input",
    "output",
    "cache_read",
    "cache_write_5m",
    "cache_write_1h",
    "input_audio",
    "cache_audio_read",
    "output_audio",
    "request",
)
"""Members of Rates in the order of a row; what is missing at its end is None."""
PROVIDER_OF_TYPE = {
    "azure_openai": "azure",
    "bedrock": "aws",
    "gemini": "google",
    "vertex": "google",
    "xai": "x-ai",
}
"""What the table calls a provider type of ours; all others go by their own name."""
ANY_PROVIDER = "mock"
"""The type that costs what the model costs wherever it comes from, so that demonstrations show money."""
_COMPACT_DATE = re.compile(r"-(20\d\d)(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=[-:]|$)")

Row = list[int | None]


class _Dated(msgspec.Struct, array_like=True, gc=False):
    """One price and when it is in force."""

    rates: Row | None
    tiers: list[tuple[int, Row]] = []
    start: int | None = None
    day_from: int | None = None
    day_until: int | None = None


class _Model(msgspec.Struct, array_like=True):
    match: Any
    prices: list[_Dated]
    most_tokens: int | None = None


class _Provider(msgspec.Struct):
    id: str
    url: str
    owns: Any
    borrows: list[str]
    models: msgspec.Raw


class _Table(msgspec.Struct):
    source: str
    version: str
    date: str
    providers: list[_Provider]


_decode_table = msgspec.json.Decoder(_Table).decode
_decode_models = msgspec.json.Decoder(list[_Model]).decode


@attrs.frozen
class DatedPrice:
    """Hold one price of a model and when it is in force."""

    price: Price | None
    """None where what was asked then is not charged by tokens."""
    start: int | None
    """Seconds since the epoch."""
    hours: tuple[int, int] | None
    """From and until, seconds of the day in UTC; may go over midnight."""

    def is_in_force(self, at: float) -> bool:
        """Tell whether the price counts at a moment, seconds since the epoch."""
        if self.start is not None and at < self.start:
            return False
        if self.hours is None:
            return True
        since, until = self.hours
        second = int(at) % 86_400
        return since <= second < until if since <= until else second >= since or second < until


class PublishedPrices:
    """Find what providers publish, in the table shipped with the package or another of its form."""

    def __init__(self, text: bytes) -> None:
        table = _decode_table(text)
        self.version = f"{table.source} {table.date}"
        self._providers = {provider.id: provider for provider in table.providers}
        self._models: dict[str, list[_Model]] = {}

    def find(self, provider: str, model: str, base_url: str = "") -> tuple[DatedPrice, ...]:
        """Return every price of a provider type's model, by date; empty where it has none."""
        name = model.lower()
        dashed = _COMPACT_DATE.sub(r"-\1-\2-\3", name)
        for spelling in (name,) if dashed == name else (name, dashed):
            for one in self._candidates(provider, spelling, base_url):
                found = self._find_in(one, spelling)
                if found is not None:
                    return self._dated(found)
        return ()

    def _candidates(self, provider: str, model: str, base_url: str) -> Iterator[_Provider]:
        """Yield whose prices may be meant, the likeliest first."""
        if provider == ANY_PROVIDER:
            yield from sorted(self._providers.values(), key=lambda one: not matches(one.owns, model))
            return
        own = self._by_address(base_url) or self._providers.get(PROVIDER_OF_TYPE.get(provider, provider))
        if own is not None:
            yield own
            yield from (self._providers[lender] for lender in own.borrows if lender in self._providers)

    def _by_address(self, base_url: str) -> _Provider | None:
        if not base_url:
            return None
        return next((one for one in self._providers.values() if re.match(one.url, base_url)), None)

    def _find_in(self, provider: _Provider, model: str) -> _Model | None:
        models = self._models.get(provider.id)
        if models is None:
            models = self._models[provider.id] = _decode_models(provider.models)
        return next((one for one in models if matches(one.match, model)), None)

    def _dated(self, model: _Model) -> tuple[DatedPrice, ...]:
        rows = []
        for row in model.prices:
            price = None if row.rates is None else self._price(row.rates, row, model.most_tokens)
            hours = None if row.day_from is None or row.day_until is None else (row.day_from, row.day_until)
            rows.append(DatedPrice(price, row.start, hours))
        return tuple(rows)

    def _price(self, rates: Row, row: _Dated, most_tokens: int | None) -> Price:
        steps = tuple(Tier(above=above, rates=_rates(step)) for above, step in row.tiers)
        return Price(rates=_rates(rates), tiers=steps, version=self.version, max_output_tokens=most_tokens)


def shipped() -> PublishedPrices:
    """Return the table of this package."""
    return PublishedPrices(Path(__file__).with_name("table.json").read_bytes())


def _rates(row: Row) -> Rates:
    known = {name: value for name, value in zip(RATE_NAMES, row, strict=False) if value is not None}
    return Rates(**known)


def matches(clause: Any, text: str) -> bool:
    """Tell whether a clause matches a name in lower case (the form is the refresh script's); None matches none."""
    if isinstance(clause, str):
        return text == clause
    if isinstance(clause, list):
        return any(matches(one, text) for one in clause)
    if not clause:
        return False
    [(operation, value)] = clause.items()
    if operation == "s":
        return text.startswith(value)
    if operation == "e":
        return text.endswith(value)
    if operation == "c":
        return value in text
    if operation == "r":
        return re.search(value, text) is not None
    return all(matches(one, text) for one in value)
