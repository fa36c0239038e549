"""``max_length``: bound how long texts are, in characters or in estimated tokens."""

from __future__ import annotations

import attrs

from penstock import ALL_DIRECTIONS, ALLOW, Check, Subject, Verdict

CHARACTERS_PER_TOKEN = 4


@attrs.frozen(kw_only=True)
class MaxLengthSettings:
    """Settings of ``max_length``; at least one of them."""

    characters: int | None = None
    """Of all texts together."""
    tokens: int | None = None
    """Of all texts together, a token for every four characters."""


class MaxLengthCheck(Check):
    """Count characters."""

    hold_back = 0

    def __init__(self, settings: MaxLengthSettings) -> None:
        bounds = [(settings.characters, "characters", 1), (settings.tokens, "tokens", CHARACTERS_PER_TOKEN)]
        self._bounds = [(most * factor, f"over {most} {unit}") for most, unit, factor in bounds if most is not None]

    def judge(self, subject: Subject) -> Verdict:
        """Block what is longer."""
        length = subject.offset + sum(map(len, subject.texts))
        rule = next((rule for most, rule in self._bounds if length > most), None)
        return ALLOW if rule is None else Verdict("block", rule)


class MaxLength:
    """Block what is too long."""

    type = "max_length"
    directions = ALL_DIRECTIONS
    settings = MaxLengthSettings

    def prepare(self, settings: MaxLengthSettings) -> MaxLengthCheck:
        """Return the check. Raises ValueError."""
        given = [("characters", settings.characters), ("tokens", settings.tokens)]
        if all(value is None for _, value in given):
            raise ValueError("characters: give characters, tokens or both")
        for name, value in given:
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1")
        return MaxLengthCheck(settings)
