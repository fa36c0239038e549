"""``virtual-keys``: the credentials that clients present."""

from __future__ import annotations

from typing import Any

import click

from penstock_plugins.management_cli.bindings import RATES
from penstock_plugins.management_cli.fields import Field, pairs, usd
from penstock_plugins.management_cli.output import Column, columns
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.presets import PRESETS, rows, rules_of
from penstock_plugins.management_cli.resources import (
    Resource,
    add_action,
    new_group,
    which_argument,
)
from penstock_plugins.management_cli.terminal import Terminal, command, confirm, yes_option

BREACHES = click.Choice(["block", "warn"])
CALENDAR = click.Choice(["minute", "hour", "day", "week", "month", "total", "manual"])


def _attachments(ids: Any) -> list[dict[str, str]]:
    return [{"guardrail_id": each} for each in ids]


KEYS = Resource(
    name="virtual-keys",
    noun="virtual key",
    about="Credentials that clients present to the gateway.",
    columns=(
        *columns("id", "name", "status", "display_prefix", "env", "last_used_at", "expires_at"),
        Column("provider_bindings", "provider_bindings", is_whole=True),
    ),
    fields=(
        Field("--name", "name", "What it is called.", is_required=True),
        Field("--env", "env", "Which kind of traffic it is for.", type=click.Choice(["live", "test"]), only="create"),
        Field("--project", "project_id", "Id, slug, or path such as team/project.  [default: default]", only="create"),
        Field("--principal", "principal_id", "User or service account on whose behalf it calls.", only="create"),
        Field("--provider", "provider_bindings", "Binding, id or name; the first is the primary.", is_many=True),
        Field("--routing-policy", "routing_policy_id", "Id or name."),
        Field("--expires-at", "expires_at", "RFC 3339, such as 2027-01-31T00:00:00Z."),
        Field("--alias", "model_aliases", "ASKED=MODEL; all of them.", is_many=True, read=pairs),
        Field("--model-allowed", "models_allowed", "Glob over models; nothing else may be called.", is_many=True),
        Field("--cache-mode", "cache_mode", type=click.Choice(["respect", "disable", "force"])),
        Field("--guardrail", "guardrails", "Guardrail to attach; all of them.", is_many=True, read=_attachments),
        Field(
            "--policy-preset",
            "policy_rules",
            "Policy rules by name; all of them. 'virtual-keys presets' shows what each says.",
            type=click.Choice(list(PRESETS)),
            is_many=True,
            read=rules_of,
        ),
        *RATES,
        Field("--budget-limit", "budget.limit_usd", "Make a budget of its own, in USD.", read=usd, only="create"),
        Field("--budget-window", "budget.window", "Of that budget.", type=CALENDAR, only="create"),
        Field("--budget-on-breach", "budget.on_breach", "Of that budget.", type=BREACHES, only="create"),
        Field("--tag", "tags", "Word for rules and reports; all of them.", is_many=True),
        Field("--metadata", "metadata", "NAME=VALUE; all of them.", is_many=True, read=pairs),
        Field("--external-id", "external_id", "Your own id for it."),
    ),
    filters=(
        Field("--project", "project_id", "Of this project."),
        Field("--principal", "principal_id", "Of this user or service account."),
        Field("--status", "status", type=click.Choice(["active", "disabled", "revoked"])),
        ARCHIVED,
    ),
)
virtual_keys = new_group(KEYS)
add_action(virtual_keys, KEYS, "disable", about="Have calls with it refused until it is enabled again.")
add_action(virtual_keys, KEYS, "enable", about="Let a disabled key work again.")
add_action(virtual_keys, KEYS, "revoke", about="Have calls with it refused for good.", warning="will never work again")
add_action(
    virtual_keys,
    KEYS,
    "spend",
    about="Show what was spent with it; this month, if no time is given.",
    verb="GET",
    fields=(
        Field("--since", "since", "RFC 3339, such as 2026-11-01T00:00:00Z."),
        Field("--until", "until", "RFC 3339; not included."),
    ),
)


@command(
    virtual_keys,
    "rotate",
    [
        which_argument(),
        click.Option(
            ["--grace"],
            type=click.IntRange(0),
            metavar="SECONDS",
            help="How long the old secret works on.  [default: 24 h]",
        ),
        yes_option(),
    ],
    about="Give it a new secret, printed this one time; its id and all else stay.",
)
def rotate(terminal: Terminal, which: str, grace: int | None, *, is_sure: bool) -> None:
    """Give a key a new secret."""
    if grace == 0:
        confirm(f"the old secret of {which} will stop to work at once", is_sure=is_sure)
    body = {} if grace is None else {"grace_seconds": grace}
    terminal.show(terminal.api.request("POST", KEYS.one(which, "rotate"), body))


@command(virtual_keys, "presets", about="List the presets of policy rules; --format json shows their patterns.")
def presets(terminal: Terminal) -> None:
    """List presets."""
    page = {"data": rows(), "next_cursor": None}
    terminal.show_page(page, columns("name", "about"), noun="presets")
