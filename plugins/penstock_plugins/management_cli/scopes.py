"""Options that say where in the ownership tree an object lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from penstock_plugins.management_cli.resources import looked_up
from penstock_plugins.management_cli.terminal import Terminal

_TREE = {"organization": "organizations", "team": "teams", "project": "projects"}


def tree_options() -> list[click.Parameter]:
    """Return ``--organization``, ``--team`` and ``--project``, of which one may be given."""
    return [
        click.Option([f"--{level}"], metavar="ID", help=f"For this {level} (id, slug, or path such as team/project).")
        for level in _TREE
    ]


def put_tree_scope(terminal: Terminal, body: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put the id of the level that was named into ``scope_id``. Raises UsageError, RefusedError."""
    given = [level for level in _TREE if values.get(level) is not None]
    if len(given) > 1:
        raise click.UsageError(" and ".join(f"--{level}" for level in given) + ": give one of them")
    for level in given:
        if "scope_id" in body:
            raise click.UsageError(f"--{level}: scope_id is given already")
        body["scope_id"] = looked_up(terminal, _TREE[level], values[level], f"--{level}")
