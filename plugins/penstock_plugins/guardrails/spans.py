"""What checks that look for places in texts have in common: find spans, then block or redact them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

import attrs

from penstock import ALLOW, Check, Subject, TextEdit, Verdict

Act = Literal["block", "redact"]


@attrs.frozen
class Hit:
    """One place in a text."""

    rule: str
    start: int
    end: int


_BETWEEN = "\0"


class SpanCheck(Check):
    """Block or redact the places that ``find`` finds."""

    keeps_apart = False
    """Whether no place reaches over a null character or depends on what is beyond: then one look does for all texts."""

    def __init__(self, action: Act, replacement: str) -> None:
        self.action = action
        self.replacement = replacement
        """What stands in a redacted place; ``{rule}`` is the rule."""

    def find(self, text: str, start: int) -> Iterator[Hit]:  # noqa: ARG002
        """Yield the places from an offset on; what is before it may be looked back at."""
        raise AssertionError("to be overridden")

    def _hits(self, subject: Subject) -> Iterator[tuple[int, Hit]]:
        """Yield the number of the text and the place in it."""
        texts, before = subject.texts, subject.before
        if self.keeps_apart and len(texts) > 1 and not before:
            starts = list(accumulate((len(text) + 1 for text in texts), initial=0))
            for hit in joined_hits(self.find(_BETWEEN.join(texts), 0)):
                number = bisect_right(starts, hit.start) - 1
                yield number, Hit(hit.rule, hit.start - starts[number], hit.end - starts[number])
            return
        for number, text in enumerate(texts):
            for hit in joined_hits(self.find(before + text if before else text, len(before))):
                yield number, Hit(hit.rule, hit.start - len(before), hit.end - len(before))

    def judge(self, subject: Subject) -> Verdict:
        """Look at each text."""
        edits: list[TextEdit] = []
        rules: dict[str, None] = {}
        for number, hit in self._hits(subject):
            rules[hit.rule] = None
            edits.append(TextEdit(hit.start, hit.end, self.replacement.replace("{rule}", hit.rule), number))
        if not edits:
            return ALLOW
        return Verdict("block" if self.action == "block" else "modify", ", ".join(rules), tuple(edits))


def joined_hits(hits: Iterator[Hit]) -> Iterator[Hit]:
    """Make one of hits of one rule that follow one another and overlap: a long row of digits has very many."""
    last: Hit | None = None
    for hit in hits:
        if last is not None and hit.rule == last.rule and last.start <= hit.start < last.end:
            last = Hit(hit.rule, last.start, max(last.end, hit.end))
            continue
        if last is not None:
            yield last
        last = hit
    if last is not None:
        yield last


@lru_cache(maxsize=1024)
def compiled(pattern: str, *, ignore_case: bool = False) -> Any:
    """Return a pattern on RE2, whose time is linear in the text. Raises ValueError for what is no pattern."""
    import re2  # noqa: PLC0415 - nobody pays for it who has no guardrails

    options = re2.Options()
    options.log_errors = False
    options.case_sensitive = not ignore_case
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        raise ValueError(f"is no RE2 pattern: {str(error)[:200]}") from None


class Places:
    """Translate offsets of UTF-8 bytes into characters; what it costs is the distance from the one asked for before."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.data = text.encode("utf-8", "surrogatepass")
        self._is_plain = len(self.data) == len(text)
        self._at = (0, 0)

    def character(self, offset: int) -> int:
        """Return the character that a byte begins."""
        if self._is_plain:
            return offset
        base, count = self._at
        if base <= offset:
            count += len(self.data[base:offset].decode("utf-8", "surrogatepass"))
        else:
            count -= len(self.data[offset:base].decode("utf-8", "surrogatepass"))
        self._at = offset, count
        return count


def matches(pattern: Any, text: str, start: int) -> Iterator[tuple[int, int]]:
    """Yield the spans of a pattern's matches from an offset on, empty ones left out."""
    places = Places(text)
    at = len(text[:start].encode("utf-8", "surrogatepass"))
    for found in pattern.finditer(places.data, at):
        first, last = found.span()
        if first < last:
            yield places.character(first), places.character(last)


_PART = 32 * 1024
_PLAIN: dict[int, str | None] = {
    **dict.fromkeys((0xA0, 0xAD, *range(0x2000, 0x2010), 0x202F, 0x205F, 0x2060, 0x3000, 0xFEFF), " "),
    **dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xFE58, 0xFE63), "-"),
    **{0xFF01 + number: chr(0x21 + number) for number in range(0x5E)},
    **{zero + number: str(number) for zero in (0x660, 0x6F0, 0x966) for number in range(10)},
}
"""Blanks, dashes, digits and letters that look like others, or like nothing."""


def plainly(text: str) -> str:
    """Return a text of the same length with plain blanks and dashes, digits and letters of ASCII instead of others."""
    return text if text.isascii() else translated(text, _PLAIN)


def translated(text: str, table: Mapping[int, str | None]) -> str:
    """Translate a text a part at a time: one call for megabytes would let no other thread run meanwhile."""
    parts = (text[at : at + _PART] for at in range(0, len(text), _PART))
    return "".join(part if part.isascii() else part.translate(table) for part in parts)


@attrs.frozen
class Ending:
    """Say what the matches of one kind are made of: how one may begin, and how long it is at most."""

    letters: str
    most: int
    first: str = ""
    """With what a match may begin; empty is any of ``letters``."""

    def undecided(self, text: str) -> int:
        """Return where at a text's end a match may begin that is not complete."""
        tail = text[-self.most :]
        run = tail[len(tail.rstrip(self.letters)) :]
        if self.first:
            run = run.lstrip("".join(set(self.letters) - set(self.first)))
        return len(text) - len(run)


def first_undecided(text: str, endings: Sequence[Ending]) -> int:
    """Return where the earliest begins of what may still become a match."""
    return min((ending.undecided(text) for ending in endings), default=len(text))
