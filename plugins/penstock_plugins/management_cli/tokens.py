"""``tokens``: credentials of the management API."""

from __future__ import annotations

import click

from penstock_plugins.management_cli.fields import Field
from penstock_plugins.management_cli.output import columns
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.resources import Resource, new_group, which_argument
from penstock_plugins.management_cli.scopes import put_tree_scope, tree_options
from penstock_plugins.management_cli.terminal import Terminal, command, confirm, yes_option

TOKENS = Resource(
    name="tokens",
    path="api-tokens",
    noun="api token",
    about="Credentials of the management API: a scope, and what they may do in it.",
    columns=columns(
        "id", "name", "display_prefix", "role", "permissions", "scope_id", "expires_at", "revoked", "archived_at"
    ),
    fields=(
        Field("--name", "name", "What it is called.", is_required=True),
        Field(
            "--role",
            "role",
            "All that the role may.",
            type=click.Choice(["org_admin", "project_admin", "developer", "viewer"]),
        ),
        Field("--permission", "permissions", "Such as virtualKeys:view; all of them.", is_many=True),
        Field("--user", "user_id", "User whose own keys it may change (id or slug)."),
        Field("--expires-at", "expires_at", "RFC 3339, such as 2027-01-31T00:00:00Z."),
    ),
    filters=(ARCHIVED,),
    scopes=tree_options(),
    prepare=put_tree_scope,
)
tokens = new_group(TOKENS, ("create", "list", "get", "archive"))


@command(tokens, "revoke", [which_argument(), yes_option()], about="Have calls with it refused for good.")
def revoke(terminal: Terminal, which: str, *, is_sure: bool) -> None:
    """Take a token out of use."""
    confirm(f"api token {which} will never work again", is_sure=is_sure)
    terminal.show(terminal.api.request("POST", TOKENS.one(which, "revoke"), {}))
