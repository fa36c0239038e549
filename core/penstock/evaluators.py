"""What a guardrail runs: an evaluator brings checks, a check judges texts and says allow, block or modify.

An evaluator is registered once per type; a check is one set of its settings, made when a guardrail is written or first
used. A check sees decoded texts and where they stand in an answer, never the bytes around them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs

from penstock.errors import ConfigurationError
from penstock.models import StateKey
from penstock.structuring import structure, suggest

if TYPE_CHECKING:
    from penstock.models import Exchange

Direction = Literal["request", "response", "stream_chunk"]
"""On which way a text is judged: ``request``, ``response`` or ``stream_chunk``."""
TextKind = Literal["content", "reasoning", "tool"]
"""What a text of an answer is: ``content``, ``reasoning`` or ``tool``."""
Action = Literal["allow", "block", "modify"]
SettingsClass = type[Any]
ALL_DIRECTIONS: frozenset[Direction] = frozenset(("request", "response", "stream_chunk"))
"""For evaluators whose checks make sense everywhere."""


@attrs.frozen
class TextEdit:
    """Replace ``texts[text][start:end]`` of a subject; offsets are characters."""

    start: int
    """Offset of the first character."""
    end: int
    """Offset behind the last."""
    replacement: str = ""
    """What stands there instead."""
    text: int = 0
    """Number of the text."""


@attrs.frozen
class Verdict:
    """Say what becomes of the texts."""

    action: Action = "allow"
    """allow, block or modify."""
    rule: str = ""
    """What decided, shown to clients and in logs, such as ``card``: never a part of the texts."""
    edits: tuple[TextEdit, ...] = ()
    """With modify: what is replaced; overlapping ones become one. With block: where the fault is, if it has a place;
    in a stream such a block waits until what it rests on can no longer change."""
    reason: str = ""
    """More, for the log only."""


ALLOW = Verdict()
"""The verdict of most checks."""


@attrs.frozen(eq=False)
class Subject:
    """Hold what a check judges."""

    direction: Direction
    """On whose way the texts are."""
    texts: tuple[str, ...] = attrs.field(repr=False)
    """All texts of a request or answer, in order; in a stream one, the part that is still held back."""
    exchange: Exchange = attrs.field(repr=False)
    """The exchange; to be read only."""
    kinds: tuple[TextKind, ...] = ()
    """Of an answer: what each text is, ``content``, ``reasoning`` or ``tool`` (arguments of a call)."""
    before: str = attrs.field(default="", repr=False)
    """In a stream: the last characters in front of the text, already judged, for patterns that look behind."""
    offset: int = 0
    """In a stream: how many characters of this answer came before the text."""
    is_end: bool = True
    """Whether nothing follows the text."""


class Check:
    """Judge texts under one set of settings. Subclass it; ``judge`` is all that must be written."""

    hold_back: int = 64
    """In a stream: how many characters at the end are kept until more is known; at least the longest match and one."""
    is_costly: bool = False
    """Whether a call costs money or seconds: counting tokens is then not judged."""

    def judge(self, subject: Subject) -> Verdict | Awaitable[Verdict]:  # noqa: ARG002
        """Return the verdict, or an awaitable of it; whatever it raises is a failure of the guardrail.

        A ``def`` runs on the event loop, and in a thread where there are many texts or long ones: it must be quick, in
        time linear in the texts, and change nothing but what is its own. An ``async def`` stays on the loop.
        """
        raise AssertionError("to be overridden")

    def undecided(self, text: str) -> int:
        """Return from which character of a stream's text on a match may begin that is not complete yet.

        What lies before it must get the same verdict whatever follows.
        """
        return max(0, len(text) - self.hold_back)


class Evaluator(Protocol):
    """Bring checks of one type."""

    @property
    def type(self) -> str:
        """Return what guardrails name it by."""
        ...

    @property
    def directions(self) -> frozenset[Direction]:
        """Return where its checks make sense."""
        ...

    @property
    def settings(self) -> SettingsClass:
        """Return an attrs class: what its settings are. Unknown and missing members are refused before ``prepare``."""
        ...

    def prepare(self, settings: Any) -> Check:
        """Return the check for an instance of ``settings``. Raises ValueError, which is shown; no I/O."""
        ...


_MEMBERS = ("type", "directions", "settings")


class EvaluatorRegistry:
    """Find evaluators by type."""

    def __init__(self) -> None:
        self._by_type: dict[str, Evaluator] = {}

    def add(self, evaluator: Evaluator) -> None:
        """Add one. Raises ConfigurationError where its type is taken, or it is none."""
        missing = [name for name in _MEMBERS if not hasattr(evaluator, name)]
        if missing or not callable(getattr(evaluator, "prepare", None)):
            raise ConfigurationError(f"registers an evaluator without {', '.join(missing) or 'prepare'}")
        if evaluator.type in self._by_type:
            raise ConfigurationError(f"evaluator type {evaluator.type!r} is registered by two plugins; enable only one")
        self._by_type[evaluator.type] = evaluator

    def get(self, type_name: str) -> Evaluator | None:
        """Return the evaluator of a type."""
        return self._by_type.get(type_name)

    @property
    def types(self) -> tuple[str, ...]:
        """Return the types there are, sorted."""
        return tuple(sorted(self._by_type))

    def prepare(
        self, type_name: str, settings: Mapping[str, Any], directions: Sequence[Direction] = (), *, where: str = ""
    ) -> Check:
        """Return the check of a type for settings, to be used in directions.

        Raises ConfigurationError, a line per fault that begins with ``where`` and the member: ``type``, ``directions``
        or ``settings.…``.
        """
        dot = f"{where}." if where else ""
        evaluator = self._by_type.get(type_name)
        if evaluator is None:
            known = ", ".join(self.types) or "none"
            shown = type_name[:80]
            hint = suggest(shown, self.types)
            raise ConfigurationError(
                f"{dot}type: no enabled plugin brings evaluator {shown!r}; there are {known}{hint}"
            )
        for direction in directions:
            if direction not in evaluator.directions:
                can = ", ".join(sorted(evaluator.directions))
                raise ConfigurationError(f"{dot}directions: {type_name!r} judges {can} only")
        try:
            return evaluator.prepare(structure(settings, evaluator.settings, where=f"{dot}settings", folder=Path()))
        except ConfigurationError as error:
            raise ConfigurationError(*(_placed(line, f"{dot}settings") for line in error.faults)) from None
        except ValueError as error:
            raise ConfigurationError(_placed(str(error), f"{dot}settings")) from None

    def __bool__(self) -> bool:
        return bool(self._by_type)

    def __iter__(self) -> Iterator[Evaluator]:
        return iter(self._by_type.values())


def _placed(line: str, where: str) -> str:
    """Return ``settings.member: rule`` for ``settings member: rule`` and ``member: rule`` alike."""
    rule = line.removeprefix(where).lstrip(" .:")
    member, colon, rest = rule.partition(": ")
    return f"{where}.{member}: {rest}" if colon and " " not in member else f"{where}: {rule}"


@attrs.frozen
class GuardrailOutcome:
    """Record what one guardrail did to an exchange."""

    guardrail: str
    """Its name."""
    direction: Direction
    """Where."""
    outcome: Literal["allow", "block", "modify", "flag", "fail_open", "fail_closed"]
    """What came of it; ``flag`` where a stream had ended before it was judged as a whole."""
    rule: str = ""
    """What decided."""


GUARDRAIL_OUTCOMES: StateKey[list[GuardrailOutcome]] = StateKey("guardrails.outcomes")
"""On an exchange: what its guardrails did, other than allow, in order."""


class GuardrailCounts:
    """Count verdicts and failures of guardrails, for whoever exports figures; only ever grows."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, guardrail: str, direction: str, outcome: str) -> None:
        """Count one outcome of a guardrail in a direction."""
        self._counts[guardrail, direction, outcome] += 1

    def of(self, guardrail: str, direction: str, outcome: str) -> int:
        """Return how often a guardrail has come to an outcome in a direction."""
        return self._counts[guardrail, direction, outcome]

    def join(self, other: GuardrailCounts) -> None:
        """Count together with another from now on."""
        other._counts.update(self._counts)
        self._counts = other._counts

    def items(self) -> Sequence[tuple[tuple[str, str, str], int]]:
        """Return ((guardrail, direction, outcome), count) of all that happened, sorted."""
        return sorted(self._counts.items())
