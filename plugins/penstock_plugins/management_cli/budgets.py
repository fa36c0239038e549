"""``budgets``: what scopes may spend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from penstock_plugins.management_cli.client import RefusedError, path_of
from penstock_plugins.management_cli.fields import Field, usd
from penstock_plugins.management_cli.keys import BREACHES, CALENDAR
from penstock_plugins.management_cli.output import columns
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.resources import Resource, add_action, looked_up, new_group
from penstock_plugins.management_cli.terminal import Terminal

_KINDS = {
    "organization": "organizations",
    "team": "teams",
    "project": "projects",
    "virtual_key": "virtual-keys",
    "group": "groups",
}
"""Levels that an option of the same name points out, and where to look."""
_SCOPES = [*_KINDS, "principal", "end_user"]


class _ScopeName(click.Choice[str]):
    """Take ``virtual-key`` for ``virtual_key``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(value.replace("-", "_") if isinstance(value, str) else value, param, ctx)


def _scope_options() -> list[click.Parameter]:
    options = [click.Option([f"--{kind.replace('_', '-')}", kind], metavar="ID") for kind in (*_KINDS, "principal")]
    for option in options:
        option.help = "Whose it is, with the scope of this name (id, slug, name or path)."
    return [*options]


def _put_scope(terminal: Terminal, body: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Put the id of what the scope names into ``scope_id``. Raises UsageError, RefusedError."""
    scope = body.get("scope")
    given = [kind for kind in (*_KINDS, "principal") if values.get(kind) is not None]
    if not given and ("scope_id" in body or scope is None):
        return
    wanted = ("virtual_key", "project") if scope == "end_user" else (scope,)
    spelt = " or ".join(f"--{str(kind).replace('_', '-')}" for kind in wanted)
    if len(given) != 1 or given[0] not in wanted or "scope_id" in body:
        raise click.UsageError(f"--scope {str(scope).replace('_', '-')}: say whose with {spelt}, and nothing else")
    kind = given[0]
    body["scope_id"] = (
        _principal(terminal, values[kind])
        if kind == "principal"
        else looked_up(terminal, _KINDS[kind], values[kind], f"--{kind.replace('_', '-')}")
    )


def _principal(terminal: Terminal, which: str) -> str:
    """Return the id of a user or service account."""
    kinds = ("service-accounts",) if which.startswith("svc_") else ("users", "service-accounts")
    for kind in kinds:
        try:
            return str(terminal.api.get(path_of(kind, which))["id"])
        except RefusedError as error:
            if error.status != 404:
                raise
    raise RefusedError(
        f"--principal: there is no user or service account {which!r} in sight; 'penstock users list' and "
        "'penstock service-accounts list' show those there are"
    )


BUDGETS = Resource(
    name="budgets",
    noun="budget",
    about="What an organization, team, project, key, principal, group or end user may spend in a window.",
    columns=columns("id", "name", "scope", "scope_id", "window", "limit_usd", "on_breach", "provider", "archived_at"),
    fields=(
        Field("--scope", "scope", type=_ScopeName(_SCOPES), is_required=True, only="create"),
        Field("--window", "window", type=CALENDAR, is_required=True),
        Field("--limit", "limit_usd", "USD, such as 100 or 0.25.", is_required=True, read=usd),
        Field("--on-breach", "on_breach", "Refuse with 402, or warn in a header.  [default: block]", type=BREACHES),
        Field("--name", "name", "What it is called."),
        Field("--timezone", "timezone", "IANA name for the calendar.  [default: UTC]"),
        Field("--cycle-anchor", "cycle_anchor_at", "RFC 3339; the window rolls from there."),
        Field("--provider", "provider", "Only what this binding costs counts (id or name)."),
        Field(
            "--reserve",
            "reserve",
            "What a request sets aside at first.  [default: expected]",
            type=click.Choice(["expected", "max", "none"]),
        ),
        Field("--external-id", "external_id", "Your own id for it."),
    ),
    filters=(
        Field("--scope", "scope", type=_ScopeName(_SCOPES)),
        Field("--scope-id", "scope_id", "Of this object."),
        ARCHIVED,
    ),
    scopes=_scope_options(),
    prepare=_put_scope,
)
budgets = new_group(BUDGETS)
add_action(
    budgets,
    BUDGETS,
    "reset",
    about="Begin its period anew; what was spent stays on record.",
    warning="begins its period anew, so all of it can be spent again",
)
add_action(
    budgets,
    BUDGETS,
    "spend",
    about="Show what is spent and left in its period.",
    verb="GET",
    fields=(Field("--subject", "subject", "Of this end user, or member of the group (id), who has an own allowance."),),
)
