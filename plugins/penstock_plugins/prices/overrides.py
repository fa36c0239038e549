"""Read the prices operators set over the published ones."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs

from penstock.governance import Price, Rates, StoredObject

KIND = "price_override"
_log = logging.getLogger("penstock.prices")
_MEMBERS = frozenset(attrs.fields_dict(Rates))


@attrs.frozen
class Override:
    """Hold one price set by an operator."""

    id: str
    provider: str
    model: re.Pattern[str]
    effective_at: float
    """Seconds since the epoch."""
    price: Price

    def covers(self, provider: str, model: str) -> bool:
        """Tell whether a provider type's model is meant; case counts for nothing."""
        return self.provider == provider and self.model.match(model.lower()) is not None


def read_overrides(stored: Iterable[StoredObject]) -> tuple[Override, ...]:
    """Return the overrides, the latest first; of those effective at one moment the last made comes first.

    One that cannot be read is left out, and logged: it must not keep the others from counting.
    """
    found = []
    for one in stored:
        try:
            found.append(_read(one.id, one.document))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _log.error("price override %s is left out: %s", one.id, error)
    return tuple(sorted(found, key=lambda override: (override.effective_at, override.id), reverse=True))


def _read(object_id: str, document: Mapping[str, Any]) -> Override:
    return Override(
        object_id,
        document["provider"],
        re.compile(fnmatch.translate(document["model"].lower())),
        _moment(document["effective_at"]),
        Price(rates=_rates(document["rates"]), version=f"override {object_id}"),
    )


def _moment(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _rates(document: Mapping[str, int | None]) -> Rates:
    unknown = sorted(document.keys() - _MEMBERS)
    if unknown:
        raise ValueError(f"there is no rate {unknown[0]!r}")
    for name, value in document.items():
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"rate {name!r} must be a whole number of nano-USD per million tokens, not negative")
    return Rates(**{name: value for name, value in document.items() if value is not None})


def in_force(overrides: Sequence[Override], at: float) -> Override | None:
    """Return the latest of overrides (latest first) that is effective at a moment, seconds since the epoch."""
    return next((override for override in overrides if override.effective_at <= at), None)
