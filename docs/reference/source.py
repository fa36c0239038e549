"""Read what code says about itself: strings under attributes, types, defaults; and write table rows."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import attrs

from penstock import Secret


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the string under each attribute of a class, from its source."""
    found: dict[str, str] = {}
    tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            for statement, following in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    text = string_of(following)
                    if text is not None:
                        found[statement.target.id] = text
    return found


def string_of(node: ast.stmt) -> str | None:
    """Return the text of a statement that is nothing but a string."""
    value = node.value if isinstance(node, ast.Expr) else None
    return inspect.cleandoc(value.value) if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def tables_of(kind: type[Any], name: str) -> Iterator[tuple[str, type[Any]]]:
    """Yield each settings table reachable from a class, with its TOML heading."""
    attrs.resolve_types(kind)
    yield f"[{name}]", kind
    for field in attrs.fields(kind):
        inner, is_list = _table_in(field.type)
        if inner is not None:
            heading = f"{name}.{field.name}"
            for title, found in tables_of(inner, heading):
                yield (f"[[{heading}]]" if is_list and title == f"[{heading}]" else title), found


def _table_in(kind: Any) -> tuple[type[Any] | None, bool]:
    """Return the settings class inside an annotation, and whether there is a list of them."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for argument in arguments:
            found, is_list = _table_in(argument)
            if found is not None:
                return found, is_list
        return None, False
    if origin is tuple:
        return _table_in(arguments[0])[0], True
    return (kind, False) if isinstance(kind, type) and kind is not Secret and attrs.has(kind) else (None, False)


def default_of(field: attrs.Attribute[Any]) -> str:
    """Return a default as TOML would spell it."""
    default = field.default
    if default is attrs.NOTHING:
        return "required"
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        default = default.factory()  # type: ignore[union-attr]
    if default is None or attrs.has(type(default)) or default in ({}, ()):
        return {(): "`[]`"}.get(default, "") if isinstance(default, tuple) else ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


def first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def cell(text: str) -> str:
    """Return text for a table cell, reST literals as Markdown's."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"
