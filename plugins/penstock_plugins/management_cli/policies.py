"""``routing-policies``, ``cache-rules``, ``guardrails``, ``evaluators``, ``webhooks``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click

from penstock_plugins.management_cli.client import path_of
from penstock_plugins.management_cli.fields import Field, SecretField, pairs
from penstock_plugins.management_cli.output import columns
from penstock_plugins.management_cli.ownership import ARCHIVED
from penstock_plugins.management_cli.resources import Resource, etag_of, looked_up, new_group
from penstock_plugins.management_cli.scopes import put_tree_scope, tree_options
from penstock_plugins.management_cli.terminal import Terminal, command

_NAME = Field("--name", "name", "What it is called.", is_required=True)
_EXTERNAL = Field("--external-id", "external_id", "Your own id for it.")


def _entries(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Read ``binding`` or ``binding:weight``. Raises ValueError."""
    found: list[dict[str, Any]] = []
    for text in texts:
        binding, colon, weight = text.rpartition(":") if ":" in text else (text, "", "")
        if not binding or (colon and not weight.isdecimal()):
            raise ValueError(f"{text!r} is not BINDING or BINDING:WEIGHT")
        found.append({"binding_id": binding, **({"weight": int(weight)} if colon else {})})
    return found


def _object(text: str) -> Any:
    """Read a JSON object. Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")
    return found


_SETTINGS = Field("--settings", "settings", "JSON object for the evaluator.", read=_object)


def _scoped(name: str, noun: str, about: str, shown: Sequence[str], fields: Sequence[Any]) -> click.Group:
    resource = Resource(
        name=name,
        noun=noun,
        about=about,
        columns=columns("id", "name", *shown, "archived_at"),
        fields=(_NAME, *fields, _EXTERNAL),
        filters=(ARCHIVED,),
        scopes=tree_options(),
        prepare=put_tree_scope,
    )
    return new_group(resource)


routing_policies = _scoped(
    "routing-policies",
    "routing policy",
    "How keys choose among bindings.",
    ("strategy", "entries"),
    (
        Field("--strategy", "strategy", type=click.Choice(["ordered", "weighted", "least_latency", "cost"])),
        Field("--entry", "entries", "BINDING or BINDING:WEIGHT; all of them.", is_many=True, read=_entries),
        Field("--alias", "model_aliases", "ASKED=MODEL; all of them.", is_many=True, read=pairs),
    ),
)
cache_rules = _scoped(
    "cache-rules",
    "cache rule",
    "Which requests keep, lose or get prompt-cache markers.",
    ("mode", "ttl", "priority", "match"),
    (
        Field("--mode", "mode", type=click.Choice(["respect", "disable", "force"]), is_required=True),
        Field("--ttl", "ttl", "Seconds, with mode force.", type=click.IntRange(1)),
        Field("--priority", "priority", "The highest that matches wins.", type=int),
        Field("--virtual-key", "match.virtual_key_id", "Of this key."),
        Field("--key-tag", "match.key_tags", "Of keys with all these tags.", is_many=True),
        Field("--principal", "match.principal_id", "Of this user or service account."),
        Field("--model", "match.model", "Glob over the model."),
        Field("--metadata", "match.metadata", "NAME=VALUE of the request; all of them.", is_many=True, read=pairs),
    ),
)
guardrails = _scoped(
    "guardrails",
    "guardrail",
    "Evaluators that run inline.",
    ("evaluator_id", "directions", "fail_open"),
    (
        Field("--evaluator", "evaluator_id", "Id or name.", is_required=True),
        Field(
            "--direction",
            "directions",
            "On what it runs; all of them.",
            type=click.Choice(["request", "response", "stream_chunk"]),
            is_many=True,
        ),
        _SETTINGS,
        Field("--fail-open", "fail_open", "Let pass what it cannot judge.", type=bool),
        Field("--timeout-ms", "timeout_ms", type=click.IntRange(1)),
        Field("--sample-rate", "sample_rate", "Share of requests, 0 to 1.", type=click.FloatRange(0, 1)),
    ),
)
_ATTACHED = [
    click.Argument(["guardrail"]),
    click.Option(["--to", "key"], required=True, help="Virtual key, id or name."),
]
_DETACHED = [
    click.Argument(["guardrail"]),
    click.Option(["--from", "key"], required=True, help="Virtual key, id or name."),
]


def _attachments_of(terminal: Terminal, key: str) -> tuple[str, list[dict[str, Any]], str | None]:
    """Return the path of a key, what is attached to it, and its version."""
    place = path_of("virtual-keys", looked_up(terminal, "virtual-keys", key, "key"))
    found = terminal.api.get(place)
    version = found.get("version")
    return place, list(found["guardrails"]), None if version is None else str(version)


@command(
    guardrails,
    "attach",
    [
        *_ATTACHED,
        click.Option(["--fail-open/--fail-closed"], default=None, help="What a failure of it means for this key."),
    ],
    about="Have a guardrail judge what a virtual key asks and is answered, after those it has.",
)
def attach(terminal: Terminal, guardrail: str, key: str, *, fail_open: bool | None) -> None:
    """Attach a guardrail to a key, or change how it is attached."""
    place, attached, version = _attachments_of(terminal, key)
    guardrail_id = looked_up(terminal, "guardrails", guardrail, "GUARDRAIL")
    entry: dict[str, Any] = {"guardrail_id": guardrail_id, "fail_open": fail_open}
    ids = [each["guardrail_id"] for each in attached]
    if guardrail_id in ids:
        attached[ids.index(guardrail_id)] = entry
    else:
        attached.append(entry)
    terminal.show(terminal.api.request("PATCH", place, {"guardrails": attached}, etag=etag_of(version)))


@command(guardrails, "detach", _DETACHED, about="Take a guardrail off a virtual key.")
def detach(terminal: Terminal, guardrail: str, key: str) -> None:
    """Detach a guardrail from a key."""
    place, attached, version = _attachments_of(terminal, key)
    guardrail_id = looked_up(terminal, "guardrails", guardrail, "GUARDRAIL")
    left = [each for each in attached if each["guardrail_id"] != guardrail_id]
    if len(left) == len(attached):
        raise click.UsageError(f"{guardrail} is not attached to {key}")
    terminal.show(terminal.api.request("PATCH", place, {"guardrails": left}, etag=etag_of(version)))


evaluators = _scoped(
    "evaluators",
    "evaluator",
    "Installed checks and their settings.",
    ("type",),
    (Field("--type", "type", "Installed check.", is_required=True), _SETTINGS),
)
webhooks = _scoped(
    "webhooks",
    "webhook",
    "Who is told of events.",
    ("url", "events", "enabled"),
    (
        Field("--post-to", "url", "Where events are posted.", is_required=True),
        Field("--event", "events", "Kind of event; all of them.", is_many=True),
        SecretField("secret", "secret", "what signs the events"),
        Field("--enabled", "enabled", "Whether it is told.", type=bool),
    ),
)
