"""Figures, comparisons and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

import attrs
from benchmarks.machine import Facts

HEADINGS = ("row", "measured", "gateway", "nginx", "direct", "compared", "to reach", "reached")


@attrs.frozen
class Spread:
    """The median, the least and the greatest of one figure over all rounds."""

    median: float
    least: float
    greatest: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median=median(values), least=min(values), greatest=max(values), rounds=len(values))


def paired(combine: Callable[..., float], *columns: Sequence[float]) -> Spread:
    """Combine the values of each round and summarise: what drifts between rounds cancels out."""
    return Spread.of([combine(*values) for values in zip(*columns, strict=True)])


def ratio(one: float, other: float) -> float:
    """Divide; a zero divisor gives infinity, which no limit accepts."""
    return one / other if other else float("inf")


def added_ratio(gateway: Sequence[float], nginx: Sequence[float], direct: Sequence[float]) -> Spread:
    """Compare what the gateway adds to a direct call with what nginx adds to it.

    The ratio is one of medians: in a single window nginx may add next to nothing, and a ratio to next to
    nothing says nothing. Least and greatest come from the windows in which nginx added something.
    """
    by_gateway, by_nginx = paired(difference, gateway, direct), paired(difference, nginx, direct)
    middle = ratio(by_gateway.median, by_nginx.median) if by_nginx.median > 0 else float("inf")
    windows = [
        (one - base) / (other - base) for one, other, base in zip(gateway, nginx, direct, strict=True) if other > base
    ] or [middle]
    return Spread(middle, min(*windows, middle), max(*windows, middle), len(gateway))


def difference(one: float, other: float) -> float:
    """Subtract."""
    return one - other


@attrs.frozen
class Goal:
    """A limit for the compared figure."""

    limit: float
    is_least: bool = False

    def is_reached(self, value: float) -> bool:
        """Whether the value keeps the limit; infinity never does."""
        if value == float("inf"):
            return False
        return value >= self.limit if self.is_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.is_least else '≤'} {format_number(self.limit)}"


@attrs.frozen
class Row:
    """One line of the table.

    Args:
        figures: by subject (gateway, nginx, direct); a missing one was not measured.
        compared: the figure the goal is for, in `compared_unit`; None when it could not be measured.
        errors: answers that failed while this row was measured; any of them means not reached.
    """

    number: str
    name: str
    title: str
    unit: str
    figures: Mapping[str, Spread] = attrs.field(factory=dict)
    compared: Spread | None = None
    compared_unit: str = ""
    goal: Goal | None = None
    errors: int = 0
    notes: tuple[str, ...] = ()

    @property
    def is_reached(self) -> bool | None:
        """Whether the goal is reached; None without a goal or without a figure."""
        if self.goal is None:
            return None
        if self.errors:
            return False
        return None if self.compared is None else self.goal.is_reached(self.compared.median)

    def cells(self) -> tuple[str, ...]:
        """Write the row as text, in the order of the headings."""
        figures = [_format_optional(self.figures.get(name)) for name in ("gateway", "nginx", "direct")]
        compared = "-" if self.compared is None else f"{format_spread(self.compared)} {self.compared_unit}"
        goal = "-" if self.goal is None else f"{self.goal} {self.compared_unit}"
        reached = {True: "yes", False: "NO", None: "-"}[self.is_reached]
        return (self.number, f"{self.title}, {self.unit}", *figures, compared, goal, reached)


def format_number(value: float) -> str:
    """Write a number with three significant digits, and whole ones with thousands separated."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def format_spread(spread: Spread) -> str:
    """Write a spread as median [least..greatest], or as one number when it is only one."""
    if spread.rounds == 1:
        return format_number(spread.median)
    least, greatest = format_number(spread.least), format_number(spread.greatest)
    return f"{format_number(spread.median)} [{least}..{greatest}]"


def _format_optional(spread: Spread | None) -> str:
    return "-" if spread is None else format_spread(spread)


def format_text(rows: Sequence[Row]) -> str:
    """Lay the rows out in aligned columns, with their notes below."""
    table = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*(line.rstrip() for line in lines), *_format_notes(rows, "  {}: {}")])


def format_markdown(rows: Sequence[Row]) -> str:
    """Lay the rows out as a Markdown table, with their notes as a list below."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    notes = _format_notes(rows, "- row {}: {}")
    return "\n".join([*table, *([""] if notes else []), *notes])


def _format_notes(rows: Sequence[Row], form: str) -> list[str]:
    notes = [form.format(row.number, note) for row in rows for note in row.notes]
    return notes + [
        form.format(row.number, f"{row.errors} failed answers") for row in rows if row.errors and row.figures
    ]


def format_facts(facts: Facts) -> str:
    """Write the machine's facts in one line."""
    return (
        f"{facts.cores} cores, {facts.processor}; {facts.python}; nginx {facts.nginx}; "
        f"load average at the start {facts.load_average:.2f}"
    )
