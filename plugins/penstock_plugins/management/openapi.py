"""The OpenAPI 3.1 document, made from the table of routes and the classes of the objects."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from penstock_plugins.management.documents import unstructure
from penstock_plugins.management.faults import STATUS_OF_CODE
from penstock_plugins.management.resources import Resource
from penstock_plugins.management.rest.routes import PUBLIC, Route

_SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    dict: {"type": "object"},
    Any: {},
}
_BOUNDS: dict[str, dict[str, Any]] = {
    "slug": {"pattern": "^[a-z0-9][a-z0-9_-]{0,62}$"},
    "name": {"maxLength": 200},
    "url": {"format": "uri"},
    "effective_at": {"format": "date-time"},
}
"""What holds for members of these names, whatever their kind."""
_part = re.compile(r"\{(\w+)\}").findall
_SECRET = {"type": "string", "description": "Shown in this answer alone."}
_TIME = {"type": "string", "format": "date-time"}
_REFUSALS = (400, 401, 403, 404, 409, 412, 413, 415, 503)


def document(routes: Sequence[Route]) -> dict[str, Any]:
    """Return the document."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Penstock management API",
            "version": "1",
            "description": "Objects, money and audit of a gateway. Ids are prefixed ULIDs; names and slugs are taken "
            "wherever ids are. Times are RFC 3339 in UTC. Amounts are decimal strings beside integers of nano-USD.",
        },
        "servers": [{"url": "/api/v1"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "An api token."}},
            "schemas": {"Error": _error_schema(), **_views(routes)},
        },
    }


def _operation(route: Route) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _part(route.path)
    ]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in route.query.items()]
    if route.method in ("PATCH", "DELETE"):
        parameters.append({"name": "If-Match", "in": "header", "schema": {"type": "string"},
                           "description": "The ETag of the version that is to be changed."})  # fmt: skip
    if route.method == "POST":
        parameters.append({"name": "Idempotency-Key", "in": "header",
                           "schema": {"type": "string", "maxLength": 255},
                           "description": "A repetition within 24 hours has no further effect."})  # fmt: skip
    found: dict[str, Any] = {
        "operationId": route.name,
        "tags": [route.tag],
        "summary": route.summary,
        "parameters": parameters,
        "responses": _responses(route),
        "x-permission": route.permission,
    }
    if route.permission == PUBLIC:
        found["security"] = []
    if route.body is not None:
        schema = body_schema(route)
        is_required = bool(schema.get("required"))
        found["requestBody"] = {"required": is_required, "content": {"application/json": {"schema": schema}}}
    return found


def _responses(route: Route) -> dict[str, Any]:
    content = {"application/json": {"schema": _answer_schema(route)}}
    found: dict[str, Any] = {str(route.status): {"description": "Done.", "content": content}}
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for status in _REFUSALS:
        found[str(status)] = {"description": _described(status), "content": refused}
    return found


def _described(status: int) -> str:
    return " or ".join(code for code, found in STATUS_OF_CODE.items() if found == status)


def _error_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["type", "code", "message", "meta"],
                "properties": {
                    "type": {"type": "string"},
                    "code": {"type": "string", "enum": list(STATUS_OF_CODE)},
                    "message": {"type": "string"},
                    "meta": {"type": "object"},
                },
            }
        },
    }


def _name_of(resource: Resource) -> str:
    return resource.kind.type.__name__


def _views(routes: Sequence[Route]) -> dict[str, Any]:
    resources = {route.resource.kind.name: route.resource for route in routes if route.resource is not None}
    return {_name_of(resource): view_schema(resource) for resource in resources.values()}


def _answer_schema(route: Route) -> dict[str, Any]:
    if isinstance(route.answer, dict):
        return route.answer
    assert route.resource is not None, "only a resource has views"
    view: dict[str, Any] = {"$ref": f"#/components/schemas/{_name_of(route.resource)}"}
    if route.answer == "list":
        return {
            "type": "object",
            "required": ["data", "next_cursor"],
            "properties": {
                "data": {"type": "array", "items": view},
                "next_cursor": {"type": ["string", "null"]},
            },
        }
    if route.answer == "secret":
        return {"allOf": [view, {"type": "object", "properties": {"secret": _SECRET}}]}
    return view


def view_schema(resource: Resource) -> dict[str, Any]:
    """Return the schema of an object as it is shown."""
    shown: dict[str, Any] = {"id": {"type": "string", "pattern": f"^{resource.kind.prefix}"}}
    hidden = {*resource.kind.secrets, *(("budget_id",) if resource.kind.name == "virtual_key" else ())}
    for name, schema in _members(resource.kind.type).items():
        if name in hidden:
            continue
        if name.endswith("_nano_usd"):
            shown[name.replace("_nano_usd", "_usd")] = {"type": "string", "description": "USD, as a decimal string."}
        shown[name] = schema
    if resource.kind.name == "virtual_key":
        shown["status"] = {"type": "string", "enum": ["active", "disabled", "revoked", "expired"]}
    for name, kind in resource.derived.items():
        shown[name] = schema_of(kind)
    shown |= {"version": {"type": "integer"}, "created_at": _TIME, "updated_at": _TIME}
    shown["archived_at"] = {"type": ["string", "null"], "format": "date-time"}
    return {
        "type": "object",
        "description": inspect.getdoc(resource.kind.type) or "",
        "required": list(shown),
        "properties": shown,
    }


def body_schema(route: Route) -> dict[str, Any]:
    """Return the schema of what a route takes."""
    if isinstance(route.body, dict):
        return route.body
    if attrs.has(route.body):
        return schema_of(route.body)
    resource = route.resource
    assert resource is not None, "only a resource has members"
    is_patch = route.body == "update"
    known = _members(resource.kind.type)
    properties: dict[str, Any] = {}
    for name in resource.known:
        if name in resource.extras:
            schema = schema_of(resource.extras[name])
        elif name in known:
            schema = known[name]
        elif name.endswith("_usd"):
            schema = {"type": "string", "description": "USD, as a decimal string."}
        else:
            schema = {"type": "string", "description": f"Name or id, in place of {resource.aliases[name]}."}
        properties[name] = _nullable(schema) if is_patch else schema
    found: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    required = [] if is_patch else [name for name in _required(resource) if name in properties]
    if required:
        found["required"] = required
    return found


def _required(resource: Resource) -> list[str]:
    """Return the members a new object needs and nothing fills in, and that have no other spelling."""
    filled = {*resource.references, *resource.fills, *resource.aliases.values()}
    spelt = {f"{name.removesuffix('_usd')}" for name in resource.extras}
    return [
        field.name
        for field in attrs.fields(resource.kind.type)
        if field.default is attrs.NOTHING
        and field.name not in filled
        and field.name not in spelt
        and not field.name.endswith("_nano_usd")
        and field.name != "scope"
    ]


def _nullable(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(schema), {"type": "null"}]}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON schema of a type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = [schema_of(each) if each is not type(None) else {"type": "null"} for each in arguments]
        return {"anyOf": found}
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": schema_of(arguments[0])}
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {"type": "object", "additionalProperties": schema_of(arguments[1]) or True}
    if attrs.has(kind):
        found_members = _members(kind)
        required = [field.name for field in attrs.fields(kind) if field.default is attrs.NOTHING]
        schema: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": found_members}
        return {**schema, "required": required} if required else schema
    return dict(_SCALARS.get(kind, {}))


def _members(kind: Any) -> dict[str, Any]:
    """Return the schema of each member, with its docstring and default."""
    hints = typing.get_type_hints(kind)
    about = _docstrings(kind)
    found = {}
    for field in attrs.fields(kind):
        schema = schema_of(hints[field.name])
        if schema.get("type") == "string":
            schema |= _BOUNDS.get(field.name, {})
        if field.name in about:
            schema["description"] = about[field.name]
        default: Any = field.default
        if default is not attrs.NOTHING and not isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            schema["default"] = unstructure(default) if attrs.has(type(default)) else _plain(default)
        found[field.name] = schema
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """Return what stands below each attribute in the class's source."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    except (OSError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    return {
        first.target.id: inspect.cleandoc(second.value.value).replace("\n", " ")
        for first, second in itertools.pairwise(body)
        if isinstance(first, ast.AnnAssign)
        and isinstance(first.target, ast.Name)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
        and isinstance(second.value.value, str)
    }
