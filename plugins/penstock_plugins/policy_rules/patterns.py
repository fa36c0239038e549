"""Policy rules compiled: RE2, so that no pattern and no input takes more than linear time.

RE2 is loaded with the first rule there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs

from penstock import PatternRules, PolicyRules, RequestError

KINDS = ("tools", "mcp", "urls", "models")
Search = Callable[[bytes], Any]


@attrs.frozen
class Fault:
    """Say which pattern does not compile, and why."""

    where: str
    """Such as ``policy_rules.tools.deny[0]``."""
    pattern: str
    reason: str
    """RE2's own words."""

    def __str__(self) -> str:
        return f"{self.where}: {self.pattern[:200]!r} is no pattern RE2 compiles: {self.reason}"


class PatternError(ValueError):
    """Report a pattern that does not compile."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@attrs.frozen(eq=False)
class Pattern:
    """One pattern of a rule."""

    rule: str
    """Where it stands, such as ``policy_rules.tools.deny[0]``."""
    text: str
    search: Search = attrs.field(repr=False)


@attrs.frozen
class Refusal:
    """Say which rule refuses a value."""

    rule: str
    """Where it stands, such as ``policy_rules.tools.deny[0]`` or ``policy_rules.tools.allow``."""
    pattern: str | None
    """The pattern that denies it; None where no pattern allows it."""
    value: str


@attrs.frozen(eq=False)
class Side:
    """The patterns of one kind: deny wins; an ``allow`` that is not None admits nothing else."""

    kind: str
    deny: tuple[Pattern, ...]
    allow: tuple[Pattern, ...] | None
    _denies: Search = attrs.field(init=False, repr=False)
    """Finds out whether any of ``deny`` matches."""
    _allows: Search = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_denies", _any_of(self.deny))
        object.__setattr__(self, "_allows", _any_of(self.allow or ()))

    def refusal(self, value: str) -> Refusal | None:
        """Return why a value is refused, None where it is admitted."""
        return self.denial(value) or self.omission(value)

    def denial(self, value: str) -> Refusal | None:
        """Return which pattern denies a value."""
        text = _bytes(value)
        if not self.deny or self._denies(text) is None:
            return None
        pattern = next(pattern for pattern in self.deny if pattern.search(text) is not None)
        return Refusal(pattern.rule, pattern.text, value)

    def omission(self, value: str) -> Refusal | None:
        """Return the allowlist that does not hold a value."""
        if self.allow is None or self._allows(_bytes(value)) is not None:
            return None
        return Refusal(f"policy_rules.{self.kind}.allow", None, value)


@attrs.frozen(eq=False)
class RuleSet:
    """Hold the compiled rules of one key or routing policy."""

    owner: str
    """Id of the key or policy."""
    noun: str
    """``virtual key`` or ``routing policy``."""
    tools: Side | None
    mcp: Side | None
    urls: Side | None
    models: Side | None

    @property
    def reads_body(self) -> bool:
        """Say whether there are rules about what a body holds."""
        return not (self.tools is None and self.mcp is None and self.urls is None)


def _bytes(value: str) -> bytes:
    return value.encode("utf-8", "replace")


def compile_pattern(text: str, where: str) -> Search:
    """Return the search of a pattern. Raises PatternError."""
    import re2  # noqa: PLC0415 - only where there are rules

    options = re2.Options()
    options.log_errors = False
    try:
        found: Search = re2.compile(text, options).search
    except UnicodeEncodeError:
        raise PatternError(Fault(where, text, "it holds text that is no Unicode")) from None
    except re2.error as error:
        reason = error.args[0] if error.args else ""
        said = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise PatternError(Fault(where, text, said)) from None
    return found


def _any_of(patterns: Sequence[Pattern]) -> Search:
    """Return one search for all of these; None is its answer where none of them matches."""
    if len(patterns) == 1:
        return patterns[0].search
    searches = [pattern.search for pattern in patterns]
    if searches:
        try:
            return compile_pattern("|".join(f"(?:{pattern.text})" for pattern in patterns), "")
        except PatternError:  # too large together
            pass
    return lambda text: next((found for search in searches if (found := search(text)) is not None), None)


def _compiled(kind: str, rules: PatternRules | None) -> Side | None:
    if rules is None or (not rules.deny and rules.allow is None):
        return None
    return Side(
        kind,
        tuple(_patterns(f"policy_rules.{kind}.deny", rules.deny or ())),
        None if rules.allow is None else tuple(_patterns(f"policy_rules.{kind}.allow", rules.allow)),
    )


def _patterns(where: str, texts: Iterable[str]) -> Iterable[Pattern]:
    for number, text in enumerate(texts):
        rule = f"{where}[{number}]"
        yield Pattern(rule, text, compile_pattern(text, rule))


def compile_rules(rules: PolicyRules, owner: str, noun: str) -> RuleSet | None:
    """Return the rules of a key or policy ready to judge, None where there are none. Raises PatternError."""
    sides = {kind: _compiled(kind, getattr(rules, kind)) for kind in KINDS}
    if all(side is None for side in sides.values()):
        return None
    return RuleSet(owner, noun, **sides)


def unusable(fault: str) -> RequestError:
    """Return the refusal of all traffic whose rules cannot be read."""
    return RequestError(
        "policy_rules_invalid",
        f"The policy rules that hold for this virtual key cannot be read: {fault}. Nothing passes until they are "
        "mended; tell the key's owner.",
    )
