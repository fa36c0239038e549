"""Make a value that fits a JSON Schema: the arguments of tool calls and structured answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

JSON: TypeAlias = Any
"""A decoded JSON value."""
_MAX_DEPTH = 12
_STRINGS = {
    "date": "2025-01-01",
    "time": "12:00:00Z",
    "date-time": "2025-01-01T12:00:00Z",
    "email": "mock@example.com",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "hostname": "example.com",
    "duration": "PT1S",
}


def value_for(schema: JSON, root: JSON = None, depth: int = 0) -> JSON:
    """Return a small value for a schema: required members, first choices; ``root`` holds what $ref names.

    Types may be spelled in capitals, as Gemini does. What is no schema gives an empty object.
    """
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return {} if depth == 0 else None
    for word in ("const", "default"):
        if word in schema:
            return schema[word]
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return schema["enum"][0]
    if isinstance(schema.get("$ref"), str):
        return value_for(_resolve(root, schema["$ref"]), root, depth + 1)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list) and schema[word]:
            return value_for(schema[word][0], root, depth + 1)
    if isinstance(schema.get("allOf"), list):
        schema = _merged(schema, root)
    return _of_type(schema, root, depth)


def _of_type(schema: Mapping[str, Any], root: JSON, depth: int) -> JSON:
    kind = _type_of(schema)
    if kind == "object":
        return _object(schema, root, depth)
    if kind == "array":
        count = schema.get("minItems")
        count = min(count, 100) if isinstance(count, int) else 1
        return [value_for(schema.get("items", {"type": "string"}), root, depth + 1) for _ in range(count)]
    if kind in ("integer", "number"):
        return _number(schema)
    return {"boolean": True, "null": None}.get(kind, _string(schema) if kind == "string" else {})


def _type_of(schema: Mapping[str, Any]) -> str:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = next((word for word in kind if word != "null"), "null")
    if isinstance(kind, str):
        return kind.lower()
    return "array" if "items" in schema else "object"


def _object(schema: Mapping[str, Any], root: JSON, depth: int) -> dict[str, Any]:
    properties = schema.get("properties")
    required = schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return {}
    return {
        name: value_for(properties.get(name, {"type": "string"}), root, depth + 1)
        for name in required
        if isinstance(name, str)
    }


def _number(schema: Mapping[str, Any]) -> JSON:
    for word, step in (("minimum", 0), ("exclusiveMinimum", 1)):
        if isinstance(schema.get(word), int | float):
            return schema[word] + step
    largest = schema.get("maximum")
    return min(1, largest) if isinstance(largest, int | float) else 1


def _string(schema: Mapping[str, Any]) -> str:
    text = _STRINGS.get(str(schema.get("format")), "mock")
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    if isinstance(shortest, int):
        text = text.ljust(min(shortest, 10_000), "-")
    return text[: max(longest, 0)] if isinstance(longest, int) else text


def _merged(schema: Mapping[str, Any], root: JSON) -> dict[str, Any]:
    """Lay the parts of allOf over one another, properties and required lists joined."""
    merged: dict[str, Any] = {name: value for name, value in schema.items() if name != "allOf"}
    for part in schema["allOf"]:
        found = (
            _resolve(root, part["$ref"]) if isinstance(part, Mapping) and isinstance(part.get("$ref"), str) else part
        )
        if isinstance(found, Mapping):
            properties = {**_dict(merged.get("properties")), **_dict(found.get("properties"))}
            required = [*_list(merged.get("required")), *_list(found.get("required"))]
            merged = {**merged, **found, "properties": properties, "required": required}
    return merged


def _resolve(root: JSON, reference: str) -> JSON:
    found = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(name) if name and isinstance(found, Mapping) else found
    return found


def _dict(value: JSON) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: JSON) -> list[Any]:
    return value if isinstance(value, list) else []
