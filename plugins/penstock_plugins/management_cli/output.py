"""What the commands print: exact JSON of the API, or tables for people.

Results go to standard output, notes to standard error. A table never leaves anything out in silence: what is cut ends
in an ellipsis, and a note says how to see all.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import click

WIDEST_CELL = 60
_UNBOUNDED = 100_000


@attrs.frozen
class Column:
    """Show one member of a row, named by a dotted path, or what ``read`` makes of the row."""

    title: str
    member: str
    read: Callable[[Mapping[str, Any]], Any] | None = None
    is_whole: bool = False
    """Never cut: ids and whatever is copied."""

    def value(self, row: Mapping[str, Any]) -> Any:
        """Return what the cell holds; None for what the row does not have."""
        if self.read is not None:
            return self.read(row)
        found: Any = row
        for name in self.member.split("."):
            found = found.get(name) if isinstance(found, Mapping) else None
        return found


def columns(*members: str) -> tuple[Column, ...]:
    """Return columns titled like the members they show; ids are never cut."""
    return tuple(Column(name, name, is_whole=name == "id" or name.endswith("_id")) for name in members)


def note(text: str) -> None:
    """Tell the user something that is no result."""
    click.echo(text, err=True)


def print_json(value: object) -> None:
    """Print JSON, indented; bytes are printed as the API spelled them."""
    import msgspec  # noqa: PLC0415

    encoded = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    click.echo(msgspec.json.format(encoded, indent=2).decode())


def print_table(rows: Sequence[Mapping[str, Any]], shown: Sequence[Column], *, empty: str) -> None:
    """Print a line per row; columns that hold nothing in any row are left out.

    Where a line would be wider than the terminal, each row is printed as facts below one another.
    """
    if not rows:
        note(empty)
        return
    cells = [[cell(column.value(row)) for column in shown] for row in rows]
    kept = [index for index in range(len(shown)) if any(line[index] for line in cells)]
    titles = [shown[index].title for index in kept]
    texts = [[line[index] if shown[index].is_whole else _cut(line[index]) for index in kept] for line in cells]
    widths = [max(map(len, column)) for column in zip(titles, *texts, strict=True)]
    if sys.stdout.isatty() and sum(widths) + 2 * len(widths) > _terminal_width():
        for number, line in enumerate(cells):
            if number:
                click.echo()
            _print_lines([(shown[index].title, line[index]) for index in kept if line[index]])
        return
    table = _table(titles)
    for line in texts:
        _add(table, line)
    _print(table)
    if any(text.endswith("…") for line in texts for text in line):
        note("… marks what is cut; --format json shows all of it")


def print_facts(found: Mapping[str, Any]) -> None:
    """Print a line per member that holds something."""
    _print_lines([(printable(name), text) for name, value in found.items() if (text := cell(value))])


def _print_lines(lines: Sequence[tuple[str, str]]) -> None:
    table = _table(None)
    table.add_column("", no_wrap=True, style="bold")
    table.add_column("", overflow="fold")
    for line in lines:
        _add(table, line)
    _print(table)


def cell(value: object) -> str:
    """Return a value as text for people, without control characters of whoever wrote it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple) and not any(isinstance(each, Mapping | list) for each in value):
        return ", ".join(cell(each) for each in value)
    if isinstance(value, Mapping) and all(isinstance(each, str | int) for each in value.values()):
        return ", ".join(f"{printable(str(name))}={cell(each)}" for name, each in value.items())
    if isinstance(value, Mapping | list | tuple):
        held = {name: each for name, each in value.items() if each is not None} if isinstance(value, Mapping) else value
        return printable(json.dumps(held, ensure_ascii=False)) if _holds(held) else ""
    return printable(str(value))


def _holds(value: object) -> bool:
    """Say whether there is anything but nulls in a value."""
    if isinstance(value, Mapping):
        return any(_holds(each) for each in value.values())
    return value is not None and value not in ([], ())


def printable(text: str) -> str:
    """Return text in which nothing can move the cursor or change colours."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST_CELL else text[: WIDEST_CELL - 1] + "…"


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns


def _table(titles: Sequence[str] | None) -> Any:
    from rich.table import Table  # noqa: PLC0415 - "penstock --help" need not load it

    table = Table(box=None, header_style="bold", show_header=titles is not None, pad_edge=False)
    for title in titles or ():
        table.add_column(title, no_wrap=True)
    return table


def _add(table: Any, cells: Sequence[str]) -> None:
    from rich.text import Text  # noqa: PLC0415

    table.add_row(*map(Text, cells))  # as text: brackets in names are no markup


def _print(table: Any) -> None:
    from rich.console import Console  # noqa: PLC0415

    if sys.stdout.isatty():
        Console().print(table)
        return
    # What goes into a pipe or file is not bent to the width of some terminal.
    console = Console(width=_UNBOUNDED, color_system=None)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())
