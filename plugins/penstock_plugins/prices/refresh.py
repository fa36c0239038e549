"""Make ``table.json`` anew from the package genai-prices: ``python -m penstock_plugins.prices.refresh``.

Run by whoever maintains this package, with genai-prices (MIT) installed; a gateway never does. Only what tokens and
requests cost at a provider's standard rates is taken over: batch, priority and flex rates, searches, images, hours of
audio and pages are not in the table. Models that are charged by such units alone have no price.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from penstock.governance import NANO_PER_USD
from penstock_plugins.prices.table import RATE_NAMES

SOURCE = "genai-prices"
DESTINATION = Path(__file__).with_name("table.json")
_PER_MILLION = {
    "input": "input_mtok",
    "output": "output_mtok",
    "cache_read": "cache_read_mtok",
    "cache_write_5m": "cache_write_mtok",
    "cache_write_1h": "cache_write_1h_mtok",
    "input_audio": "input_audio_mtok",
    "cache_audio_read": "cache_audio_read_mtok",
    "output_audio": "output_audio_mtok",
}
"""Where each of our rates is found there."""
_PER_THOUSAND_REQUESTS = "requests_kcount"
_FLOAT_DIGITS = 15
"""A rate with as many digits was a binary float before, which has no more of them right."""


def to_rate(usd: Decimal, per: int = 1) -> int:
    """Return nano-USD for USD, divided by ``per``.

    Raises ValueError for what is negative or no whole number of nano-USD; a price with 15 and more digits went through
    binary floats where it was published, and is taken as the nearest.
    """
    nano = usd * NANO_PER_USD / per
    if not nano.is_finite() or nano < 0:
        raise ValueError(f"{usd} is no price")
    if nano == nano.to_integral_value():
        return int(nano)
    if len(usd.as_tuple().digits) < _FLOAT_DIGITS:
        raise ValueError(f"{usd} USD is no whole number of nano-USD")
    return int(nano.to_integral_value())


def clause(match: Any) -> object:
    """Return a match clause: a string equals, a list is any of, an object is the one operation it names."""
    if match is None:
        return None
    members = vars(match)
    for name, ours in (("equals", None), ("starts_with", "s"), ("ends_with", "e"), ("contains", "c"), ("regex", "r")):
        if name in members:
            text = members[name] if name == "regex" else members[name].lower()
            return text if ours is None else {ours: text}
    if "or_" in members:
        return [clause(one) for one in members["or_"]]
    return {"a": [clause(one) for one in members["and_"]]}


def rates(prices: Any, above: int | None) -> list[int | None] | None:
    """Return the rates in the order of RATE_NAMES once input is more than ``above``; None where tokens have none."""
    found: dict[str, int | None] = {}
    for name, theirs in _PER_MILLION.items():
        value = getattr(prices, theirs)
        found[name] = None if value is None else to_rate(_at(value, above))
    per_request = getattr(prices, _PER_THOUSAND_REQUESTS)
    found["request"] = None if per_request is None else to_rate(_at(per_request, above), 1000)
    if all(found[name] is None for name in ("input", "output", "input_audio", "output_audio", "request")):
        return None
    row = [found[name] for name in RATE_NAMES]
    while row[-1] is None:
        row.pop()
    return row


def _at(value: Any, above: int | None) -> Decimal:
    if isinstance(value, Decimal):
        return value
    price: Decimal = value.base
    for tier in value.tiers:
        if above is not None and tier.start <= above:
            price = tier.price
    return price


def tiers(prices: Any) -> list[list[object]]:
    """Return ``[above, rates]`` for each step."""
    steps = {tier.start for value in vars(prices).values() for tier in getattr(value, "tiers", ())}
    return [[above, rates(prices, above)] for above in sorted(steps)]


def dated(prices: Any) -> list[list[object]]:
    """Return ``[rates, tiers, start, from, until]`` for each price; the last that is in force counts.

    ``start`` in seconds since the epoch, ``from`` and ``until`` in seconds of the day (UTC), trailing blanks left out.
    """
    rows: list[list[object]] = []
    for one in prices if isinstance(prices, list) else [None]:
        found, condition = (prices, None) if one is None else (one.prices, one.constraint)
        limits = vars(condition) if condition is not None else {}
        row: list[object] = [rates(found, None), tiers(found), _start(limits), *_hours(limits)]
        while len(row) > 1 and row[-1] in (None, []):
            row.pop()
        rows.append(row)
    return rows


def _start(limits: Mapping[str, Any]) -> int | None:
    day: date | None = limits.get("start_date")
    return None if day is None else int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


def _hours(limits: Mapping[str, Any]) -> list[int | None]:
    if "start_time" not in limits:
        return [None, None]
    return [_second(limits["start_time"]), _second(limits["end_time"])]


def _second(moment: time) -> int:
    zoned = datetime.combine(date(2000, 1, 2), moment, moment.tzinfo or UTC).astimezone(UTC)
    return zoned.hour * 3600 + zoned.minute * 60 + zoned.second


def lines(providers: Any, version: str, made_on: str) -> Iterator[str]:
    """Yield the file, one model a line so that a change can be read."""
    head = {"source": SOURCE, "version": version, "date": made_on}
    yield json.dumps(head)[:-1] + ', "providers": ['
    for number, provider in enumerate(providers):
        about = {
            "id": provider.id,
            "url": provider.api_pattern,
            "owns": clause(provider.model_match),
            "borrows": provider.fallback_model_providers or [],
        }
        yield ("," if number else "") + _compact(about)[:-1] + ',"models":['
        for index, model in enumerate(provider.models):
            row = [clause(model.match), dated(model.prices), model.context_window]
            yield ("," if index else "") + _compact(row if row[-1] else row[:-1])
        yield "]}"
    yield "]}"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(prog="python -m penstock_plugins.prices.refresh", description=__doc__)
    parser.add_argument("--date", default=datetime.now(UTC).date().isoformat(), help="what the table is dated")
    arguments = parser.parse_args()
    providers = importlib.import_module("genai_prices.data").providers
    version = importlib.metadata.version(SOURCE)
    text = "\n".join(lines(providers, version, arguments.date)) + "\n"
    DESTINATION.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{DESTINATION.name}: {SOURCE} {version}, {len(text) // 1000} kB\n")


if __name__ == "__main__":
    main()
