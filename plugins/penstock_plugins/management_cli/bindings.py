"""``providers``: the upstream accounts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from penstock_plugins.management_cli.client import Answer, RefusedError, path_of
from penstock_plugins.management_cli.fields import Field, SecretField, body_of, pairs, parameters
from penstock_plugins.management_cli.output import Column, columns, note
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.resources import (
    Resource,
    add_action,
    idempotency_option,
    new_group,
)
from penstock_plugins.management_cli.scopes import put_tree_scope, tree_options
from penstock_plugins.management_cli.terminal import Terminal, command

STAND_IN = "demo-stand-in:"
"""What the external id of the bindings begins with that answer in the demo for providers without a credential."""
_ALL_HIDDEN = 8
"""Credentials up to this length show no characters at all."""
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
        return _in_place_of(terminal, there, body)
    credential = body.get("credential")
    shows_end = credential is None or len(credential) > _ALL_HIDDEN
    is_same = there.get("credential_last4") == (credential[-4:] if credential and shows_end else None)
    rest = {member: value for member, value in body.items() if member != "credential"}
    if is_same and all(there.get(member) == value for member, value in rest.items()):
        note(f"{name}: is there already, with this credential; nothing was changed")
        return answer
    about = f"credential …{there['credential_last4']}" if there.get("credential_last4") else "its credential is hidden"
    raise RefusedError(
        f"name: {name!r} is taken by {there['id']} (type {there.get('type')}, {about}); "
        f"'penstock providers update {name}' changes that one, another --name makes a second [conflict]",
        status=409,
    )


def _in_place_of(terminal: Terminal, stand_in: Mapping[str, Any], body: Mapping[str, Any]) -> Answer:
    """Make the real binding, lead the keys to it that named the demo's stand-in, and archive that. Raises RefusedError.

    The type of a binding cannot be changed, so it takes a new one.
    """
    api, name = terminal.api, body["name"]
    old = BINDINGS.one(stand_in["id"])
    api.request("PATCH", old, {"name": f"{name}-{stand_in['id'][-6:].lower()}"})
    try:
        answer = api.request("POST", BINDINGS.place, body)
    except RefusedError:
        api.request("PATCH", old, {"name": name})
        raise
    real = answer.content["id"]
    for page in list(api.pages(path_of("virtual-keys"), {"limit": 200})):
        for key in page["data"]:
            named = key.get("provider_bindings") or []
            if stand_in["id"] in named:
                changed = [real if each == stand_in["id"] else each for each in named]
                api.request("PATCH", path_of("virtual-keys", key["id"]), {"provider_bindings": changed})
    api.request("DELETE", old)
    note(f"{name}: takes the place of the demo's stand-in, for the keys that name it too")
    return answer
