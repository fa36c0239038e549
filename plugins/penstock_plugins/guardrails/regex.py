"""``regex``: patterns of the operator's own, on RE2."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from penstock import ALL_DIRECTIONS
from penstock_plugins.guardrails.spans import Act, Hit, SpanCheck, compiled, matches


@attrs.frozen(kw_only=True)
class RegexSettings:
    """Settings of ``regex``."""

    patterns: tuple[str, ...]
    """RE2 syntax, unanchored."""
    action: Act = "block"
    """``block`` or ``redact``."""
    replacement: str = "[redacted]"
    """What stands where something was redacted."""
    ignore_case: bool = False
    """Whether letters match in either case."""
    window: int = 128
    """Characters held back on streams: at least the longest text a pattern is to find there, and one."""


class RegexCheck(SpanCheck):
    """Find matches of patterns."""

    def __init__(self, settings: RegexSettings) -> None:
        super().__init__(settings.action, settings.replacement)
        self.hold_back = settings.window
        self._patterns = []
        for number, pattern in enumerate(settings.patterns):
            try:
                self._patterns.append(compiled(pattern, ignore_case=settings.ignore_case))
            except ValueError as error:
                raise ValueError(f"patterns[{number}]: {error}") from None

    def find(self, text: str, start: int) -> Iterator[Hit]:
        """Yield what matches; the rule is the number of the pattern, as patterns may be nobody's business."""
        for number, pattern in enumerate(self._patterns):
            for first, last in matches(pattern, text, start):
                yield Hit(f"pattern {number}", first, last)


class Regex:
    """Block or redact what patterns match."""

    type = "regex"
    directions = ALL_DIRECTIONS
    settings = RegexSettings

    def prepare(self, settings: RegexSettings) -> RegexCheck:
        """Return the check. Raises ValueError."""
        if not settings.patterns:
            raise ValueError("patterns: must hold at least one")
        if not 1 <= settings.window <= 16_384:
            raise ValueError("window: must be from 1 to 16384")
        return RegexCheck(settings)
