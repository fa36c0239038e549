"""The page of the management API, from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock_plugins.management.faults import STATUS_OF_CODE
from penstock_plugins.management.openapi import document
from penstock_plugins.management.rest.table import ROUTES
from reference.source import cell, row

GENERIC = {
    "status": "Anything but active is refused; expired follows from `expires_at`.",
    "id": "Prefix and ULID; never changes.",
    "slug": "Short name, taken wherever an id is.",
    "name": "What people call it.",
    "scope_id": "Organization, team or project it belongs to.",
    "external_id": "Your own id for it; unique in its organization, a price's in the installation.",
    "version": "One more with every change; the ETag.",
    "created_at": "RFC 3339, UTC.",
    "updated_at": "RFC 3339, UTC.",
    "archived_at": "Null while it is in use.",
    "budget": "A budget of its own: members of a budget without `scope` and `scope_id`.",
    "last_used_at": "Of the newest row of the ledger.",
    "credential": "The provider's key. Taken, sealed, and never shown.",
    "secret": "Taken or made, shown in the answer that made it and never again.",
    "rates_usd": "Rates as decimal strings, USD per million tokens; `request` in USD per request.",
    "rates": "The same in nano-USD; give one of both.",
    "price_version": "What the ledger calls this price.",
    "limit_usd": "USD as a decimal string, such as `\"12.50\"`.",
    "provider": "Type of provider.",
    "model": "Name of a model.",
    "group_by": "Up to three, by comma.",
    "bucket": "Sums by hour, day or month.",
    "timezone": "IANA name, for the buckets.",
    "since": "RFC 3339, included.",
    "until": "RFC 3339, not included.",
    "limit": "Rows on a page.",
    "cursor": "`next_cursor` of the page before.",
    "include_archived": "Archived ones too.",
    "at": "RFC 3339; the moment the price is asked for.",
    "subject": "End user, or member of the group, who has an allowance of his own.",
}  # fmt: skip
"""Meanings of members that have none at their class."""
NOT_YET = ("evaluators", "guardrails", "cache-rules", "webhooks")
"""Resources that are kept and that no plugin acts on."""
LOCKED = {route.tag: route.resource.locked for route in ROUTES if route.resource is not None}
"""Members of each resource that are given at creation and never changed."""
TITLES = {
    "virtual-keys": "Credentials that clients present. [Virtual keys](virtual-keys.md) says more.",
    "budgets": "What scopes may spend. [Budgets](budgets.md) says more.",
    "provider-bindings": "Upstream accounts. [Providers](providers.md) says more.",
    "spend-events": "The ledger, a row per exchange. [Ledger and usage](ledger-and-usage.md) says more.",
    "usage": "Sums over the ledger.",
    "ledger": "The proof that all totals follow from the rows.",
    "prices": "What models cost.",
    "audit": "Who changed what, written in the transaction of the change; secrets are never in it.",
    "api-tokens": "Credentials of this API. [Permissions](permissions.md) says more.",
    "organizations": "The root of the ownership tree.",
    "teams": "Teams own projects.",
    "projects": "Projects own virtual keys.",
    "users": "People on whose behalf keys call, and who may hold roles.",
    "service-accounts": "Programs on whose behalf keys call.",
    "groups": "Users and service accounts; each has the full allowance of the group's budgets.",
    "prices/overrides": "Your prices over the table's. Only a token for the whole installation may set them.",
    "whoami": "Who you are to the gateway.",
    "config": "All objects as one document; see [apply and export](operations.md#apply-and-export).",
    "plugins": "What runs, and which provider types it brings.",
    "openapi": "This description, for machines.",
}
_HEAD = """
# Management API

`/api/v1` on the gateway's own port, where the plugin [`management`](configuration.md#management) is enabled.
It describes itself (OpenAPI 3.1) at `/api/v1/openapi.json`, which this page is made from.
[The commands](cli.md) ask the same API.

- **Credential**: `Authorization: Bearer ps_at_…`, an api token. A virtual key is none, and a token is no virtual key.
- **Permissions** are checked for everything an operation touches, at its place in the tree; what you cannot see is
  404, what you may see and not do 403, which names the missing permission. See [Permissions](permissions.md).
- **JSON**, snake_case. Unknown members and query parameters are 400 with the nearest known name. Bodies hold at most
  1 MiB.
- **Ids** are a prefix and a ULID. In a path and wherever a member refers to another object, its slug or name does too;
  an ambiguous one is 400 and lists the ids. Teams and projects can be told apart in bodies by path, `team/project`.
- **Times** are RFC 3339 in UTC. **Money** is a decimal string in USD (`limit_usd`) beside the same in whole nano-USD
  (`limit_nano_usd`); a body gives one of both.
- **PATCH** takes what changes; null clears; objects within are merged (RFC 7386). **DELETE** archives: the object stays
  readable by id, its names become free.
- **ETag** is the version. `If-Match` on PATCH and DELETE has a change refused with 412 when another came before it.
- **Idempotency-Key** on POST: the same key and body within 24 hours get the same answer byte for byte, with
  `Idempotent-Replay: true`; another body is 409. Keys are per token.
- **Lists** have `limit` and `cursor`, and are stable while objects are added: `{"data": […], "next_cursor": …}`.
- **A change is in force** when its answer arrives, in this process; in all others within two seconds.

```sh
curl http://127.0.0.1:8080/api/v1/virtual-keys -H "Authorization: Bearer $TOKEN" \\
     -H "Content-Type: application/json" -H "Idempotency-Key: deploy-17" \\
     -d '{"name":"app","provider_bindings":["openai","anthropic"],"budget":{"window":"month","limit_usd":"100"}}'
```

## Errors

```json
{
  "error": {
    "type": "bad_request",
    "code": "bad_request",
    "message": "provider_binding: unknown member; did you mean \\"provider_bindings\\"?",
    "meta": {"field": "provider_binding"}
  }
}
```

`X-Request-Id` is on every answer (yours, if you sent one), and in the audit.

"""


def management_page() -> str:
    """Return the page: what holds everywhere, then a section per resource."""
    described = document(ROUTES)
    text = _HEAD + row("status", "codes") + row("---", "---")
    for status in sorted(set(STATUS_OF_CODE.values())):
        codes = [code for code, found in STATUS_OF_CODE.items() if found == status]
        text += row(str(status), ", ".join(f"`{code}`" for code in codes))
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    order = [*TITLES, *sorted(set(by_tag) - set(TITLES))]
    return text + "".join(_section(tag, by_tag[tag], described["components"]["schemas"]) for tag in order)


def _section(tag: str, operations: list[tuple[str, str, dict[str, Any]]], schemas: dict[str, Any]) -> str:
    view = _view_of(operations, schemas)
    text = f"\n## {tag}\n\n"
    if tag in TITLES:
        text += f"{TITLES[tag]}\n"
    if tag in NOT_YET:
        text += "**Kept and checked, and nothing acts on them yet**: what one says has no effect on traffic.\n"
    text += "\n" + row("route", "permission", "what it does") + row("---", "---", "---")
    for method, path, operation in operations:
        permission = {"public": "none", "any": "any token"}.get(operation["x-permission"])
        needed = permission or f"`{operation['x-permission']}`"
        text += row(f"{method} `{path}`", needed, cell(operation["summary"]))
    text += "".join(_filters(operations))
    for method, path, operation in operations:
        if method == "POST" and "{" in path and (table := _small_body(operation)):
            text += f"\n`{path}` takes:\n\n{table}"
    return text + ("" if view is None else _members(operations, view, LOCKED.get(tag, frozenset())))


def _view_of(operations: list[tuple[str, str, dict[str, Any]]], schemas: dict[str, Any]) -> Any:
    """Return the schema of the objects a resource shows, where it has any."""
    for method, path, operation in operations:
        if method == "GET" and path.endswith("{id}"):
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            return schemas[schema["$ref"].rpartition("/")[2]]
    return None


def _filters(operations: list[tuple[str, str, dict[str, Any]]]) -> Iterator[str]:
    for method, path, operation in operations:
        names = [one["name"] for one in operation["parameters"] if one["in"] == "query"]
        if names:
            yield f"\n{method} `{path}` can be asked with {', '.join(f'`{name}`' for name in names)}.\n"


def _small_body(operation: dict[str, Any]) -> str:
    properties = _body_of(operation).get("properties", {})
    if not properties:
        return ""
    text = row("member", "type", "default", "meaning") + row(*("---",) * 4)
    return text + "".join(row(f"`{name}`", *_described(name, schema)) for name, schema in properties.items())


def _body_of(operation: dict[str, Any]) -> dict[str, Any]:
    body = operation.get("requestBody")
    found: dict[str, Any] = {} if body is None else body["content"]["application/json"]["schema"]
    return found


def _members(operations: list[tuple[str, str, dict[str, Any]]], view: dict[str, Any], locked: frozenset[str]) -> str:
    """Return the table of all members: whether a creation and a change take them, and what they mean."""
    bodies = {
        method: _body_of(operation)
        for method, path, operation in operations
        if method == "PATCH" or (method == "POST" and "{" not in path)
    }
    creates, changes = bodies["POST"].get("properties", {}), bodies["PATCH"].get("properties", {})
    aliases = [name for name, schema in creates.items() if schema.get("description", "").startswith("Name or id, in")]
    text = "\n" + row("member", "type", "default", "given", "meaning") + row(*("---",) * 5)
    for name, schema in {**view["properties"], **creates}.items():
        if name not in aliases:
            kind, default, meaning = _described(name, schema)
            needed = name in bodies["POST"].get("required", ())
            given = _given(is_made=name in creates, is_changed=name in changes and name not in locked, is_needed=needed)
            text += row(f"`{name}`", kind, default, given, meaning)
    if aliases:
        members = [f"`{name}` ({creates[name]['description'].rpartition(' ')[2].strip('.')})" for name in aliases]
        text += f"\nIn place of the members in brackets: {', '.join(members)}.\n"
    return text


def _given(*, is_made: bool, is_changed: bool, is_needed: bool) -> str:
    """Say when a body may hold a member; one that is required says so."""
    if not is_made:
        return "shown"
    when = "created, changed" if is_changed else "created"
    return f"{when}; required" if is_needed else when


def _described(name: str, schema: dict[str, Any]) -> tuple[str, str, str]:
    """Return type, default and meaning."""
    default = schema.get("default")
    written = "" if default in (None, {}, []) or isinstance(default, dict) else f"`{_plain(default)}`"
    return cell(_type(schema)), written, cell(schema.get("description") or GENERIC.get(name, ""))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_type(each) for each in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{each}`" for each in schema["enum"])
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join("time" if each == "string" and "format" in schema else each for each in kind)
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and schema.get("properties"):
        return "{" + ", ".join(schema["properties"]) + "}"
    inner = schema.get("additionalProperties")
    if kind == "object" and isinstance(inner, dict):
        return f"object of {_type(inner)}"
    if kind == "string" and schema.get("description", "").startswith("RFC 3339"):
        return "time"
    return "time" if schema.get("format") == "date-time" else str(kind)
