"""``apply`` and ``export``: the whole configuration of the store as one document."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from penstock import ConfigurationError
from penstock_plugins.management_cli.client import path_of
from penstock_plugins.management_cli.output import Column, columns, note, print_json
from penstock_plugins.management_cli.terminal import ApiCommand, Terminal, confirm, yes_option


@click.command(
    "apply",
    cls=ApiCommand,
    params=[
        click.Option(
            ["--file", "-f", "file"], required=True, metavar="FILE", help="TOML or JSON; - for standard input."
        ),
        click.Option(["--dry-run", "is_rehearsal"], is_flag=True, help="Show what would change, and change nothing."),
        yes_option(),
    ],
    help="Make the store hold what a file says; what is there by external id or name is changed, all else is made.",
)
@click.pass_obj
def apply(terminal: Terminal, file: str, *, is_rehearsal: bool, is_sure: bool) -> None:
    """Apply a document: shown as a diff first, then done in one transaction."""
    document = _read(file)
    place = path_of("config", "apply")
    if not is_rehearsal and not is_sure and sys.stdin.isatty() and file != "-":
        _show_changes(terminal.api.post(place, {"document": document, "dry_run": True}))
        confirm("this will be done", is_sure=False)
    answer = terminal.api.request("POST", place, {"document": document, "dry_run": is_rehearsal})
    if terminal.form == "json":
        print_json(answer.raw)
        return
    _show_changes(answer.content)
    if is_rehearsal:
        note("nothing was changed (--dry-run)")


def _show_changes(found: Mapping[str, Any]) -> None:
    from penstock_plugins.management_cli.output import print_table  # noqa: PLC0415

    rows = found.get("changes") or []
    made = (*columns("action", "kind", "name", "id"), Column("secret", "secret", is_whole=True))
    print_table(rows, [*made, *columns("changes")], empty="nothing to change")
    if any("secret" in row for row in rows):
        note("Keep the secrets now: they are not shown again.")


def _read(file: str) -> dict[str, Any]:
    """Return the document. Raises ConfigurationError."""
    where = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{where}: cannot be read: {getattr(error, 'strerror', 'is no text')}") from None
    is_json = text.lstrip().startswith("{") or file.endswith(".json")
    try:
        found = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{where}: is no valid {'JSON' if is_json else 'TOML'}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{where}: must be an object")
    return found


@click.command(
    "export",
    cls=ApiCommand,
    params=[click.Option(["--output", "-o"], metavar="FILE", help="Write it here, not to standard output.")],
    help="Print the store's objects as 'penstock apply' takes them, as JSON; no secrets are in it.",
)
@click.pass_obj
def export(terminal: Terminal, output: str | None) -> None:
    """Print the document."""
    answer = terminal.api.request("GET", path_of("config", "export"))
    if output is None:
        print_json(answer.raw)
        return
    try:
        Path(output).write_text(json.dumps(answer.content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {output}: cannot be written: {error.strerror}") from None
    note(f"written to {output}")
