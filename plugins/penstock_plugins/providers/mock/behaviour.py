"""The words that make the mock slow or faulty, in a binding's settings and in model names.

model = ["mock/"] first *(";" word)
first = any model name, or a word
word  = "slow" | fault | setting "=" number
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

_FAULTS = ("reset", "cut", "error-first")
_SETTINGS: dict[str, tuple[type, float]] = {  # word → type, largest value
    "delay": (float, 3600),
    "pace": (float, 60),
    "tokens": (int, 100_000),
    "after": (int, 100_000),
    "retry-after": (int, 86_400),
}
KNOWN_SETTINGS = (*(word.replace("-", "_") for word in _SETTINGS), "fault")
_PREFIX = "mock/"
KNOWN_WORDS = (
    "slow, fault-400 … fault-599, reset, cut, error-first, "
    "delay=SECONDS, pace=SECONDS, tokens=N, after=N, retry-after=SECONDS"
)


class WordError(ValueError):
    """Say which word of a model name or of a binding's settings is not understood."""


@attrs.frozen
class Behaviour:
    """Say how the mock answers, apart from what it answers."""

    fault: str | None = None
    """``status``, ``reset``, ``cut`` or ``error-first``."""
    status: int = 200
    delay: float = 0.0
    """Seconds before the response head."""
    pace: float = 0.0
    """Seconds between two events of a stream."""
    tokens: int | None = None
    """Length of the answer's text, in tokens of four bytes; None leaves it as long as it is."""
    after: int = 3
    """Events that pass before a cut."""
    retry_after: int | None = None
    """Seconds, sent as Retry-After with a fault status."""


def read_settings(settings: Mapping[str, Any]) -> Behaviour:
    """Read a binding's settings: the numbers by name, and ``fault`` with a fault word. Raises WordError."""
    behaviour = Behaviour()
    for name, value in settings.items():
        if name == "fault":
            found = _fault(behaviour, value) if isinstance(value, str) else None
            if found is None:
                raise WordError("settings.fault: must be reset, cut, error-first or fault-400 … fault-599")
            behaviour = found
        elif name in KNOWN_SETTINGS and not isinstance(value, str | bool):
            behaviour = _set(behaviour, name.replace("_", "-"), str(value))
        else:
            raise WordError(f"settings.{name}: mock knows {', '.join(KNOWN_SETTINGS)}; all but fault are numbers")
    return behaviour


def read_model(model: str, binding: Behaviour) -> tuple[str, Behaviour]:
    """Split a model name into the name to answer with and the behaviour asked for. Raises WordError."""
    first, *words = model.removeprefix(_PREFIX).split(";")
    found = _apply(binding, first)
    behaviour = binding if found is None else found
    for word in words:
        found = _apply(behaviour, word)
        if found is None:
            raise WordError(f"The mock does not know the word {word[:100]!r}; it knows {KNOWN_WORDS}.")
        behaviour = found
    return first or "mock", behaviour


def _apply(behaviour: Behaviour, word: str) -> Behaviour | None:
    """Return the behaviour with one more word, None for a word that is none of ours."""
    if word == "slow":
        return attrs.evolve(behaviour, delay=0.5, pace=0.1)
    name, equals, value = word.partition("=")
    if equals and name in _SETTINGS:
        return _set(behaviour, name, value)
    return _fault(behaviour, word)


def _fault(behaviour: Behaviour, word: str) -> Behaviour | None:
    if word in _FAULTS:
        return attrs.evolve(behaviour, fault=word)
    if not word.startswith("fault-"):
        return None
    digits = word.removeprefix("fault-")
    if len(digits) != 3 or digits[0] not in "45" or not digits.isdecimal() or not digits.isascii():
        raise WordError(f"The mock cannot answer with {word[:100]!r}; it knows {KNOWN_WORDS}.")
    return attrs.evolve(behaviour, fault="status", status=int(digits))


def _set(behaviour: Behaviour, name: str, text: str) -> Behaviour:
    kind, largest = _SETTINGS[name]
    try:
        value = kind(text)
    except ValueError:
        value = -1
    if not 0 <= value <= largest:
        word = "whole number" if kind is int else "number"
        raise WordError(f"{name}={text[:100]}: must be a {word} from 0 to {largest:g}.")
    return attrs.evolve(behaviour, **{name.replace("-", "_"): value})
