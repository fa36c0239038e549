"""What checks that look for places in texts have in common: find spans, then block or redact them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
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


class SpanCheck(Check):
    """Block or redact the places that ``find`` finds."""

    def __init__(self, action: Act, replacement: str) -> None:
        self.action = action
        self.replacement = replacement
        """What stands in a redacted place; ``{rule}`` is the rule."""

    def find(self, text: str, start: int) -> Iterator[Hit]:  # noqa: ARG002
        """Yield the places from an offset on; what is before it may be looked back at."""
        raise AssertionError("to be overridden")

    def judge(self, subject: Subject) -> Verdict:
        """Look at each text."""
        edits: list[TextEdit] = []
        rules: dict[str, None] = {}
        before = subject.before
        for number, text in enumerate(subject.texts):
            for hit in self.find(before + text if before else text, len(before)):
                rules[hit.rule] = None
                start, end = hit.start - len(before), hit.end - len(before)
                edits.append(TextEdit(start, end, self.replacement.replace("{rule}", hit.rule), number))
        if not edits:
            return ALLOW
        return Verdict("block" if self.action == "block" else "modify", ", ".join(rules), tuple(edits))


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
    """Translate offsets of UTF-8 bytes into characters, asked for in any order."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.data = text.encode("utf-8", "surrogatepass")
        self._is_plain = len(self.data) == len(text)
        self._at = (0, 0)

    def character(self, offset: int) -> int:
        """Return the character that a byte begins."""
        if self._is_plain:
            return offset
        base, count = self._at if self._at[0] <= offset else (0, 0)
        count += len(self.data[base:offset].decode("utf-8", "surrogatepass"))
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
