"""Every route of the API, in the order the OpenAPI document lists them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

from anyio import to_thread

from penstock_plugins.management import budgets, declarative, exporting, keys, tokens
from penstock_plugins.management.calls import Call
from penstock_plugins.management.catalogue import RESOURCES
from penstock_plugins.management.documents import refuse_unknown, shown
from penstock_plugins.management.faults import bad_field
from penstock_plugins.management.permissions import Actor, place_of
from penstock_plugins.management.rest import crud, ledger
from penstock_plugins.management.rest.asks import Answer, Ask
from penstock_plugins.management.rest.desk import Desk, Written, written
from penstock_plugins.management.rest.routes import ANY_TOKEN, PUBLIC, Route

_NOTHING: dict[str, Any] = {"type": "object", "additionalProperties": False}
_STRINGS = {"type": "array", "items": {"type": "string"}}


def _status(status: str) -> Callable[..., Any]:
    def act(call: Call, name: str, body: Any, *, version: int | None = None) -> Any:
        return keys.set_status(call, name, status, body, version=version)

    return act


def _actions() -> list[Route]:
    key, token, budget = keys.VIRTUAL_KEYS, tokens.API_TOKENS, budgets.BUDGETS
    return [
        crud.action(key, "rotate", "rotate", keys.rotate, body=keys.Rotation, shows="secret",
                    summary="Give a key a new secret; the old one works for a grace period."),
        crud.action(key, "disable", "update", _status("disabled"), body=_NOTHING,
                    summary="Have a key refused until it is enabled."),
        crud.action(key, "enable", "update", _status("active"), body=_NOTHING,
                    summary="Let a disabled key work again."),
        crud.action(key, "revoke", "delete", _status("revoked"), body=_NOTHING, summary="Have a key refused for good."),
        crud.action(token, "revoke", "delete", tokens.revoke, body=_NOTHING, summary="End a token for good."),
        crud.action(budget, "reset", "update", budgets.reset, body=_NOTHING,
                    summary="Let a budget's period start now."),
    ]  # fmt: skip


def _whoami(call: Call, _ask: Ask) -> Answer:
    actor: Actor = call.actor
    grants = [
        {"scope_id": grant.place, "permissions": sorted(grant.permissions), "own": sorted(grant.own)}
        for grant in actor.grants
    ]
    shown = {
        "id": actor.id,
        "name": actor.name,
        "user_id": actor.user_id,
        "organization_id": actor.organization_id,
        "scope_id": place_of(actor.home),
        "grants": grants,
    }
    return Answer(shown)


def _export(call: Call, _ask: Ask) -> Answer:
    return Answer(exporting.export(call))


async def _apply(desk: Desk, ask: Ask) -> Answer | Any:
    refuse_unknown(ask.body, ("document", "dry_run"))
    is_rehearsal = ask.body.get("dry_run", False)
    if not isinstance(is_rehearsal, bool):
        raise bad_field("dry_run", f"must be true or false, not {shown(is_rehearsal)}")

    def work(call: Call, ask: Ask) -> Answer:
        done = declarative.apply(call, ask.body.get("document"), is_rehearsal=is_rehearsal)
        return Answer({"dry_run": False, "changes": done.changes})

    await desk.admit(ask, APPLY)
    try:
        return await desk.write(ask, work, APPLY)
    except declarative.RehearsedError as rehearsed:
        return Answer({"dry_run": True, "changes": rehearsed.changes})


async def _plugins(desk: Desk, ask: Ask) -> Answer:
    await desk.admit(ask, PLUGINS)
    types = desk.services.providers.types
    rows = [{"type": name, "dialects": sorted(types[name].dialects)} for name in sorted(types)]
    enabled = desk.services.plugins
    installed = {point.name for point in entry_points(group="penstock")}
    names = [*enabled, *sorted(installed.difference(enabled))]
    data = [{"name": name, "is_enabled": name in enabled} for name in names]
    return Answer({"data": data, "provider_types": rows, "next_cursor": None})


@functools.cache
def _described() -> Written:
    from penstock_plugins.management.openapi import document  # noqa: PLC0415 - made when it is asked for

    return written(Answer(document(ROUTES)))


async def _openapi(_desk: Desk, _ask: Ask) -> Written:
    """Answer anybody, so it is made once, where it holds nobody up."""
    return await to_thread.run_sync(_described)


WHOAMI = Route(
    method="GET", path="/whoami", permission=ANY_TOKEN, name="whoami", tag="whoami", reads=_whoami,
    summary="Say whom the gateway takes the caller for, and what he may do.",
    answer={"type": "object", "required": ["id", "name", "scope_id", "grants"]},
)  # fmt: skip
EXPORT = Route(
    method="GET", path="/config/export", permission="organization:view", name="export_config", tag="config",
    summary="Return the objects in sight as a document that apply takes; no secrets are in it.", reads=_export,
    answer={"type": "object", "required": ["version"]},
)  # fmt: skip
APPLY = Route(
    method="POST", path="/config/apply", permission="organization:view", name="apply_config", tag="config",
    summary="Make the store hold what a document says, in one transaction; a dry run shows the difference alone.",
    outside=_apply, is_secret=True, is_long=True,
    body={"type": "object", "required": ["document"], "additionalProperties": False, "properties": {
        "document": {"type": "object", "additionalProperties": False, "properties": {
            "version": {"type": "integer", "const": 1},
            **{name: {"type": "array", "items": {"type": "object"}} for name in declarative.SECTIONS}}},
        "dry_run": {"type": "boolean", "default": False}}},
    answer={"type": "object", "required": ["dry_run", "changes"]},
)  # fmt: skip
PLUGINS = Route(
    method="GET", path="/plugins", permission="organization:view", name="list_plugins", tag="plugins",
    summary="List the enabled plugins and the provider types they bring.", outside=_plugins,
    answer={"type": "object", "required": ["data", "provider_types"]},
)  # fmt: skip
OPENAPI = Route(
    method="GET", path="/openapi.json", permission=PUBLIC, name="openapi", tag="openapi", outside=_openapi,
    summary="Describe this API.", answer={"type": "object", "required": ["openapi", "paths"]},
)  # fmt: skip
ROUTES: tuple[Route, ...] = (
    # what has a fixed path comes before what varies
    *ledger.ROUTES,
    *_actions(),
    *(route for resource in RESOURCES for route in crud.routes_of(resource)),
    WHOAMI,
    EXPORT,
    APPLY,
    PLUGINS,
    OPENAPI,
)
"""All of them."""
