"""``providers``: the upstream accounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from penstock_plugins.management_cli.client import Answer, RefusedError
from penstock_plugins.management_cli.fields import Field, SecretField, body_of, pairs, parameters
from penstock_plugins.management_cli.output import Column, columns, note
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.resources import (
    Resource,
    add_action,
    etag_of,
    idempotency_option,
    new_group,
)
from penstock_plugins.management_cli.scopes import put_tree_scope, tree_options
from penstock_plugins.management_cli.terminal import Terminal, command

STAND_IN = "demo-stand-in:"
"""What the external id of the bindings begins with that answer in the demo for providers without a credential."""
RATES = (
    Field("--rpm", "rate_limits.rpm", "Requests a minute.", type=click.IntRange(1)),
    Field("--tpm", "rate_limits.tpm", "Tokens a minute.", type=click.IntRange(1)),
    Field("--rpd", "rate_limits.rpd", "Requests a day.", type=click.IntRange(1)),
    Field("--concurrency", "rate_limits.concurrency", "Requests at a time.", type=click.IntRange(1)),
)

BINDINGS = Resource(
    name="providers",
    path="provider-bindings",
    noun="provider binding",
    about="Upstream accounts: which provider, with which credential, for whom.",
    columns=(
        *columns("id", "name", "type"),
        Column("credential", "", lambda row: f"…{row['credential_last4']}" if row.get("credential_last4") else None),
        *columns("handle", "base_url", "models", "fallback_priority", "enabled", "archived_at"),
    ),
    fields=(
        Field("--name", "name", "What it is called.", is_required=True),
        Field("--type", "type", "Type of provider, such as openai, anthropic, mock.", is_required=True),
        SecretField("api-key", "credential", "the provider's key"),
        Field("--base-url", "base_url", "Where the API is, if not where the provider has it."),
        Field("--handle", "handle", "Routing handle: models are asked for as HANDLE/MODEL."),
        Field("--model", "models", "Model it serves; all of them.", is_many=True),
        Field("--model-map", "model_map", "ASKED=UPSTREAM names of a model.", is_many=True, read=pairs),
        Field("--region", "region"),
        Field("--api-version", "api_version"),
        Field("--header", "extra_headers", "NAME=VALUE, sent with each request.", is_many=True, read=pairs),
        *RATES,
        Field("--priority", "fallback_priority", "Lowest first, for keys that name no provider.", type=int),
        Field("--propagate-trace", "propagate_trace", "Send the trace on.", type=bool),
        Field("--enabled", "enabled", "Whether it is used.", type=bool),
        Field("--external-id", "external_id", "Your own id for it."),
    ),
    filters=(ARCHIVED,),
    scopes=tree_options(),
    prepare=put_tree_scope,
)
providers = new_group(BINDINGS, ("list", "get", "update", "archive"))
add_action(providers, BINDINGS, "test", about="Make one cheap real call, and report how it went.")


@command(
    providers,
    "create",
    [*parameters(BINDINGS.fields, "create"), *BINDINGS.scopes, idempotency_option()],
    about=(
        "Make a provider binding; prints its id.\n\nOne that is there already with the same name, type and credential "
        "is left as it is and shown; the demo's stand-in of that name becomes the real one."
    ),
)
def create(terminal: Terminal, **values: Any) -> None:
    """Make a binding, or find that it is there."""
    body = body_of(BINDINGS.fields, values)
    put_tree_scope(terminal, body, values)
    try:
        answer = terminal.api.request("POST", BINDINGS.place, body, idempotency_key=values["idempotency_key"])
    except RefusedError as error:
        if error.status != 409 or error.meta.get("field") != "name" or "id" not in error.meta:
            raise
        answer = _settled(terminal, body, error)
    terminal.show(answer)


def _settled(terminal: Terminal, body: Mapping[str, Any], conflict: RefusedError) -> Answer:
    """Return the binding of that name if it is what was asked for, or could be made so. Raises RefusedError."""
    name = body["name"]
    answer = terminal.api.request("GET", BINDINGS.one(str(conflict.meta["id"])))
    there = answer.content
    if str(there.get("external_id") or "").startswith(STAND_IN):
        change = {"external_id": None, **{member: value for member, value in body.items() if member != "name"}}
        changed = terminal.api.request("PATCH", BINDINGS.one(there["id"]), change, etag=etag_of(str(there["version"])))
        note(f"{name}: took the place of the demo's stand-in; keys that name it now reach {body.get('type')}")
        return changed
    last4 = str(body.get("credential") or "")[-4:] or None
    rest = {member: value for member, value in body.items() if member != "credential"}
    if there.get("credential_last4") == last4 and all(there.get(member) == value for member, value in rest.items()):
        note(f"{name}: is there already, with this credential; nothing was changed")
        return answer
    about = f"credential …{there['credential_last4']}" if there.get("credential_last4") else "without a credential"
    raise RefusedError(
        f"name: {name!r} is taken by {there['id']} (type {there.get('type')}, {about}); "
        f"'penstock providers update {name}' changes that one, another --name makes a second [conflict]",
        status=409,
    )
