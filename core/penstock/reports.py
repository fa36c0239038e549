"""What ``penstock plugins`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import msgspec

from penstock import plugins as plugin_loader
from penstock.config import Configuration, read_document, read_file
from penstock.errors import ConfigurationError
from penstock.services import Services
from penstock.structuring import describe

Row = Mapping[str, Any]


def list_plugins(path: Path | None) -> list[Row]:
    """Return one row per installed or enabled plugin; ``fault`` says why one cannot be loaded."""
    configuration = None if path is None else read_file(path)
    enabled = () if configuration is None else configuration.gateway.plugins
    names = [*enabled, *sorted(name for name in plugin_loader.installed() if name not in enabled)]
    rows: list[Row] = []
    for name in names:
        row: dict[str, Any] = {"name": name, "enabled": enabled.index(name) + 1 if name in enabled else None}
        try:
            row["name"], kind, distribution = plugin_loader.find(name, _folder(configuration))
        except ConfigurationError as error:
            row |= {"distribution": None, "hooks": [], "needs": [], "fault": str(error)}
        else:
            hooks = list(plugin_loader.hooks_of(kind))
            row |= {"distribution": distribution, "hooks": hooks, "needs": _needs(kind), "fault": _fault_of(kind)}
        rows.append(row)
    return rows


def show_plugin(name: str, path: Path | None) -> Row:
    """Return everything about one plugin, its settings included. Raises ConfigurationError."""
    configuration = None if path is None else read_file(path)
    found, kind, distribution = plugin_loader.find(name, _folder(configuration))
    needs = _needs(kind)
    return {
        "name": found,
        "distribution": distribution,
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "about": (kind.__doc__ or "").strip().partition("\n")[0],
        "hooks": list(plugin_loader.hooks_of(kind)),
        "needs": needs,
        "provider_types": _provider_types(found, kind, configuration),
        "untouched_path": not {"edits_body", "edits_chunks", "sees_chunks"} & set(needs),
        "settings": settings_of(kind),
        "fault": _fault_of(kind),
    }


def _provider_types(name: str, kind: type[Any], configuration: Configuration | None) -> list[str] | None:
    """Return the types of the providers a plugin brings; None where only settings it was not given could tell."""
    if "register_providers" not in plugin_loader.hooks_of(kind):
        return []
    if configuration is None:
        configuration = read_document({}, source="defaults", environment={})
    services = Services(configuration.gateway.namespace, configuration.gateway.usage_frame, folder=configuration.folder)
    try:
        built: Any = plugin_loader.build(name, kind, configuration, services)
        return [provider.type for provider in built.register_providers() or ()]
    except Exception:  # noqa: BLE001 - somebody else's code; penstock check says what is wrong with it
        return None


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


def _fault_of(kind: type[Any]) -> str | None:
    return "; ".join(plugin_loader.faults_of(kind)) or None


def _needs(kind: type[Any]) -> list[str]:
    return [need for need in plugin_loader.NEEDS if getattr(kind, need, False)]


def print_rows(rows: Sequence[Row], form: str) -> None:
    """Print rows as a table for people, or as one JSON array."""
    if form == "json":
        _print_json(rows)
        return
    columns = [column for column in (rows or [{}])[0] if any(row[column] not in (None, [], {}) for row in rows)]
    _print_table([columns, *([_cell(row[column]) for column in columns] for row in rows)], has_header=True)


def print_row(row: Row, form: str) -> None:
    """Print one row with a line per fact for people, or as one JSON object."""
    if form == "json":
        _print_json(row)
    else:
        _print_table([[name, _cell(value)] for name, value in row.items()], has_header=False)


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _print_table(lines: Sequence[Sequence[str]], *, has_header: bool) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, header_style="bold", show_header=has_header)
    for column in lines[0]:
        table.add_column(column if has_header else "", overflow="fold")
    for line in lines[1:] if has_header else lines:
        table.add_row(*map(Text, line))  # as text: brackets in what plugins say are no markup
    Console().print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items())
    return str(value)
