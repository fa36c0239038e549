"""What ``penstock plugins`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import msgspec

from penstock import plugins as plugin_loader
from penstock.config import Configuration, describe, read_file
from penstock.errors import ConfigurationError

Row = Mapping[str, Any]


def list_plugins(path: Path | None) -> list[Row]:
    """Return one row per installed or enabled plugin."""
    configuration = None if path is None else read_file(path)
    enabled = () if configuration is None else configuration.gateway.plugins
    names = [*enabled, *sorted(name for name in plugin_loader.installed() if name not in enabled)]
    rows = []
    for name in names:
        found, kind, distribution = plugin_loader.find(name, _folder(configuration))
        rows.append({
            "name": found,
            "enabled": enabled.index(name) + 1 if name in enabled else None,
            "distribution": distribution,
            "hooks": list(plugin_loader.hooks_of(kind)),
            "needs": _needs(kind),
        })
    return rows


def show_plugin(name: str, path: Path | None) -> list[Row]:
    """Return one row about a plugin, its settings included. Raises ConfigurationError for an unknown name."""
    configuration = None if path is None else read_file(path)
    found, kind, distribution = plugin_loader.find(name, _folder(configuration))
    needs = _needs(kind)
    return [{
        "name": found,
        "distribution": distribution,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "about": (kind.__doc__ or "").strip().partition("\n")[0],
        "hooks": list(plugin_loader.hooks_of(kind)),
        "needs": needs,
        "untouched_path": not {"edits_body", "edits_chunks", "sees_chunks"} & set(needs),
        "settings": settings_of(kind),
    }]


def settings_of(kind: type[Any]) -> dict[str, str]:
    """Return each setting of a plugin's Config with its type and default."""
    config = getattr(kind, "Config", None)
    if config is None or not attrs.has(config):
        return {}
    attrs.resolve_types(config)
    return {
        field.name: describe(field.type) + (", required" if field.default is attrs.NOTHING else "")
        for field in attrs.fields(config)
    }


def _folder(configuration: Configuration | None) -> Path:
    return Path() if configuration is None else configuration.folder


def _needs(kind: type[Any]) -> list[str]:
    return [need for need in plugin_loader.NEEDS if getattr(kind, need, False)]


def print_rows(rows: Sequence[Row], form: str) -> None:
    """Print rows as a table for people, or as JSON (one array; one object where there is one row to show)."""
    if form == "json":
        click.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    if not rows:
        raise ConfigurationError("there is nothing to list")
    table = Table(box=None, header_style="bold")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items())
    return str(value)
