"""``pii``: data of persons, found by shape and, where there is one, by checksum.

Whether a place is a hit depends on itself and the characters beside it alone, so that a stream finds what a whole text
has, however it is cut.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator

import attrs

from penstock import ALL_DIRECTIONS
from penstock_plugins.guardrails.spans import (
    Act,
    Ending,
    Hit,
    Places,
    SpanCheck,
    compiled,
    first_undecided,
    plainly,
)

_DIGITS = string.digits
_LETTERS = string.ascii_letters
_WORD = frozenset(_LETTERS + _DIGITS)
_DIGITS_BESIDE = (frozenset(_DIGITS), frozenset(_DIGITS))
_GROUPS = re.compile(r"\d+")
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "BR": 29, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18,
    "EE": 20, "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26,
    "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25,
    "RO": 24, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "TR": 26, "UA": 29,
}  # fmt: skip


def luhn(digits: str) -> bool:
    """Tell whether the last digit is the check digit of cards (ISO/IEC 7812-1)."""
    doubled = [int(digit) * 2 for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(each - 9 if each > 9 else each for each in doubled)) % 10 == 0


_PLAIN_VALUE = {str(digit): digit for digit in range(10)}
_DOUBLED = {str(digit): digit * 2 - 9 if digit > 4 else digit * 2 for digit in range(10)}


def _cards(text: str, run: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the card numbers in a run of digits and separators: 13 to 19 digits that begin and end with a group.

    Sums of the digits before each are kept for both parities, so that a checksum costs two look-ups whatever its span.
    """
    digits: list[str] = []
    firsts: list[tuple[int, int]] = []  # of each group: number of its first digit, offset of that
    ends: dict[int, int] = {}  # number of a group's last digit and one: offset behind it
    for found in _GROUPS.finditer(text, *run):
        firsts.append((len(digits), found.start()))
        digits += found[0]
        ends[len(digits)] = found.end()
    sums: tuple[list[int], list[int]] = ([0], [0])  # by the parity of those that are not doubled
    for number, digit in enumerate(digits):
        plain, doubled = (0, 1) if number % 2 == 0 else (1, 0)
        sums[plain].append(sums[plain][-1] + _PLAIN_VALUE[digit])
        sums[doubled].append(sums[doubled][-1] + _DOUBLED[digit])
    for first, start in firsts:
        if digits[first] in "23456":
            for last in range(first + 13, min(first + 19, len(digits)) + 1):
                by_parity = sums[(last - 1) % 2]
                if last in ends and (by_parity[last] - by_parity[first]) % 10 == 0:
                    yield start, ends[last]


_IBANS = {
    country: re.compile(rf"[A-Z0-9](?: ?[A-Z0-9]){{{length - 1}}}(?![A-Za-z0-9])")
    for country, length in _IBAN_LENGTHS.items()
}
_AS_NUMBERS = {ord(letter): str(int(letter, 36)) for letter in string.ascii_uppercase}


def _iban_end(text: str, start: int) -> int | None:
    """Return where an IBAN that starts here ends (ISO 13616: length by country, modulus 97)."""
    pattern = _IBANS.get(text[start : start + 2])
    found = None if pattern is None else pattern.match(text, start)
    if found is None:
        return None
    compact = found[0].replace(" ", "")
    return found.end() if int((compact[4:] + compact[:4]).translate(_AS_NUMBERS)) % 97 == 1 else None


def _ssn(found: str) -> bool:
    area, group, serial = found.split("-")
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def _dni(found: str) -> bool:
    number = found[:8].replace("X", "0", 1).replace("Y", "1", 1).replace("Z", "2", 1)
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == found[-1]


def _nir(found: str) -> bool:
    digits = found.replace(" ", "")
    return 97 - int(digits[:13]) % 97 == int(digits[13:])


def _steuer_id(found: str) -> bool:
    product = 10
    for digit in found[:10]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(found[10]) and found[0] != "0"


def _pesel(found: str) -> bool:
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)
    total = sum(int(digit) * weight for digit, weight in zip(found, weights, strict=False))
    return (10 - total % 10) % 10 == int(found[10]) and 1 <= int(found[2:4]) % 20 <= 12


def _phone(found: str) -> bool:
    return 8 <= sum(letter.isdigit() for letter in found) <= 15


@attrs.frozen
class _Kind:
    """How one kind is found: a pattern, what must not stand beside it, a test, and what it is made of."""

    pattern: str
    ending: Ending
    before: frozenset[str] = frozenset(_DIGITS)
    after: frozenset[str] = frozenset(_DIGITS)
    test: Callable[[str], bool] | None = None


_EMAIL = _LETTERS + _DIGITS + "._%+-@"
_KINDS: dict[str, _Kind] = {
    "email": _Kind(
        r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,4}[A-Za-z]{2,24}", Ending(_EMAIL, 350),
        frozenset(_LETTERS + _DIGITS + "._%+-"), frozenset(),
    ),
    "phone": _Kind(
        r"\+\d(?:[ ()./-]{0,2}\d){7,14}|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}",
        Ending(_DIGITS + " ()./-+", 48, _DIGITS + "+("),
        _WORD | {"+"}, _WORD, _phone,
    ),
    "us_ssn": _Kind(r"\d{3}-\d{2}-\d{4}", Ending(_DIGITS + "-", 12, _DIGITS), _WORD | {"-"}, _WORD, _ssn),
    "es_dni": _Kind(r"[XYZ0-9]\d{7}[A-Z]", Ending(_DIGITS + string.ascii_uppercase, 10), _WORD, _WORD, _dni),
    "fr_nir": _Kind(
        r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?\d{2} ?\d{3} ?\d{3} ?\d{2}",
        Ending(_DIGITS + " ", 22, "12"), _WORD, _WORD, _nir
    ),
    "de_tax_id": _Kind(r"\d{11}", Ending(_DIGITS, 12), _WORD, _WORD, _steuer_id),
    "pl_pesel": _Kind(r"\d{11}", Ending(_DIGITS, 12), _WORD, _WORD, _pesel),
}  # fmt: skip
_OTHERS = {
    "card": Ending(_DIGITS + " -", 40, _DIGITS),
    "iban": Ending(string.ascii_uppercase + _DIGITS + " ", 68, string.ascii_uppercase),
}
KINDS = (*_KINDS, *_OTHERS)
_DEFAULT = ("email", "phone", "iban", "card", "us_ssn", "es_dni", "fr_nir")


@attrs.frozen(kw_only=True)
class PIISettings:
    """Settings of ``pii``."""

    kinds: tuple[str, ...] = _DEFAULT
    """Of ``email``, ``phone``, ``iban``, ``card``, ``us_ssn``, ``es_dni``, ``fr_nir``, ``de_tax_id``, ``pl_pesel``."""
    action: Act = "redact"
    """``block`` or ``redact``."""
    replacement: str = "[{rule}]"
    """What stands where something was redacted; ``{rule}`` is the kind."""


class PIICheck(SpanCheck):
    """Find personal data."""

    keeps_apart = True

    def __init__(self, settings: PIISettings) -> None:
        super().__init__(settings.action, settings.replacement)
        self._kinds = [(name, _KINDS[name]) for name in settings.kinds if name in _KINDS]
        self._has_cards, self._has_ibans = "card" in settings.kinds, "iban" in settings.kinds
        self._ends = [kind.ending for _, kind in self._kinds]
        self._ends += [_OTHERS[name] for name in settings.kinds if name in _OTHERS]

    def undecided(self, text: str) -> int:
        """Return where the run of characters begins that one of the kinds is made of."""
        return first_undecided(plainly(text), self._ends)

    def find(self, text: str, start: int) -> Iterator[Hit]:
        """Yield what is found, overlapping or not."""
        text = plainly(text)
        for name, kind in self._kinds:
            yield from _by_pattern(name, kind, text, start)
        if self._has_cards:
            for run in _spans(r"\d(?:[ -]?\d){12,}", text, start):
                for first, last in _cards(text, run):
                    if first >= start and not _has_beside(text, first, last, *_DIGITS_BESIDE):
                        yield Hit("card", first, last)
        if self._has_ibans:
            for first, _ in _spans(r"[A-Z]{2}\d{2}", text, start):
                end = None if first and text[first - 1] in _WORD else _iban_end(text, first)
                if end is not None:
                    yield Hit("iban", first, end)


def _by_pattern(name: str, kind: _Kind, text: str, start: int) -> Iterator[Hit]:
    """Look again one character on after each candidate, so that none hides another."""
    pattern = compiled(kind.pattern)
    places = Places(text)
    at = len(text[:start].encode("utf-8", "surrogatepass"))
    while (found := pattern.search(places.data, at)) is not None:
        first, last = places.character(found.start()), places.character(found.end())
        at = found.start() + 1
        if not _has_beside(text, first, last, kind.before, kind.after) and (
            kind.test is None or kind.test(text[first:last])
        ):
            yield Hit(name, first, last)
            at = found.end() if name == "email" else at


def _spans(pattern: str, text: str, start: int) -> Iterator[tuple[int, int]]:
    places = Places(text)
    at = len(text[:start].encode("utf-8", "surrogatepass"))
    for found in compiled(pattern).finditer(places.data, at):
        yield places.character(found.start()), places.character(found.end())


def _has_beside(text: str, first: int, last: int, before: frozenset[str], after: frozenset[str]) -> bool:
    return (first > 0 and text[first - 1] in before) or (last < len(text) and text[last] in after)


class PII:
    """Block or redact personal data."""

    type = "pii"
    directions = ALL_DIRECTIONS
    settings = PIISettings

    def prepare(self, settings: PIISettings) -> PIICheck:
        """Return the check. Raises ValueError."""
        for number, kind in enumerate(settings.kinds):
            if kind not in KINDS:
                raise ValueError(f"kinds[{number}]: {kind[:40]!r} is none of {', '.join(KINDS)}")
        if not settings.kinds:
            raise ValueError("kinds: must hold at least one")
        return PIICheck(settings)
