"""Show a class, a function or a module as a reader needs it: constructor, fields, methods, first lines."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import attrs
import msgspec

from reference.source import cell, row, string_of

OWN = "penstock"
"""Members of other packages' classes are these packages' to document."""
_MODULE = re.compile(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])")


def class_section(name: str, kind: type[Any], *, level: int = 3) -> str:
    """Return a class as a section: its docstring, a table of its fields, its constructor and methods as text."""
    text = f"\n{'#' * level} `{name}`\n\n{prose(inspect.getdoc(kind) or '')}\n"
    defaults = _defaults(kind)
    fields = list(_fields(kind))
    if fields and defaults:
        text += "\n" + row("field", "type", "default", "meaning") + row("---", "---", "---", "---")
        text += "".join(row(name, annotation, defaults.get(name, "derived"), doc) for name, annotation, doc in fields)
    elif fields:
        text += (
            "\n" + row("field", "type", "meaning") + row("---", "---", "---") + "".join(row(*each) for each in fields)
        )
    stubs = [*_constructor(name, kind), *_methods(kind)]
    return text + (f"\n{_listing(stubs)}" if stubs else "")


def function_listing(functions: Iterator[tuple[str, Callable[..., Any]]]) -> str:
    return _listing([_stub(name, function) for name, function in functions])


def module_section(module: ModuleType) -> str:
    """Return the public functions and classes of a module, with what they say about themselves."""
    own = [
        (name, thing)
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]
    text = f"\n## `{module.__name__}`\n\n{prose(inspect.getdoc(module) or '')}\n"
    functions = [(name, thing) for name, thing in own if inspect.isfunction(thing)]
    if functions:
        text += "\n" + function_listing(iter(functions))
    for name, thing in own:
        if isinstance(thing, type):
            text += class_section(name, thing)
    return text


def prose(text: str) -> str:
    """Return a docstring as Markdown."""
    return text.replace("``", "`")


# --- fields -------------------------------------------------------------------------------------------------


def _fields(kind: type[Any]) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of each public field: what is annotated, and what a constructor documents."""
    seen = set()
    for base in kind.__mro__[::-1]:
        if base.__module__.partition(".")[0] != OWN:
            continue
        for name, (annotation, _) in _declared(base).items():
            if name.startswith("_") or name in seen or isinstance(inspect.getattr_static(kind, name, None), property):
                continue
            seen.add(name)
            doc = next((found for each in kind.__mro__ if (found := _declared(each).get(name, ("", ""))[1])), "")
            yield f"`{name}`", f"`{cell(annotation)}`" if annotation else "", cell(doc)


def _declared(kind: type[Any]) -> dict[str, tuple[str, str]]:
    """Return annotation and docstring of each attribute a class declares in its body or sets in its constructor."""
    if kind.__module__.partition(".")[0] != OWN:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[kind.__module__]))):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            found.update(_declared_in(node.body, lambda target: isinstance(target, ast.Name), needs_doc=False))
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    ours = _declared_in(method.body, lambda target: isinstance(target, ast.Attribute), needs_doc=True)
                    found.update({name: each for name, each in ours.items() if name not in found})
    return found


def _declared_in(
    body: list[ast.stmt], is_ours: Callable[[ast.expr], bool], *, needs_doc: bool
) -> dict[str, tuple[str, str]]:
    found = {}
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        doc = string_of(following)
        if isinstance(statement, ast.AnnAssign) and is_ours(statement.target) and (doc or not needs_doc):
            found[_name_of(statement.target)] = (ast.unparse(statement.annotation), doc or "")
        elif isinstance(statement, ast.Assign) and is_ours(statement.targets[0]) and doc:
            found[_name_of(statement.targets[0])] = ("", doc)
    return found


def _name_of(target: ast.expr) -> str:
    return target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else "_"


def _defaults(kind: type[Any]) -> dict[str, str]:
    """Return the default of each constructor argument that is a field, in code; "required" where there is none."""
    if not (attrs.has(kind) or issubclass(kind, msgspec.Struct)):
        return {}
    parameters = inspect.signature(kind).parameters.values()
    return {f"`{each.name}`": _default(each) for each in parameters}


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    if isinstance(parameter.default, frozenset):
        return "its own"  # in an order of its own each time
    shown = repr(parameter.default)
    return "its own" if "NOTHING" in shown or len(shown) > 60 or " at 0x" in shown else f"`{cell(shown)}`"


# --- methods ------------------------------------------------------------------------------------------------


def _constructor(name: str, kind: type[Any]) -> Iterator[str]:
    """Yield the constructor of a class that writes its own; fields are the arguments of the others."""
    if "__init__" in vars(kind) and not attrs.has(kind) and not getattr(kind, "_is_protocol", False):
        yield _stub(name, vars(kind)["__init__"], returns=False)


def _methods(kind: type[Any]) -> Iterator[str]:
    """Yield the public methods and properties of a class, those of its own bases included."""
    inherited = {
        name
        for base in kind.__mro__
        if base.__module__.partition(".")[0] != OWN and base.__module__ != "typing"
        for name in vars(base)
    }
    shown = set(inherited)
    for base in kind.__mro__:
        for name, member in vars(base).items() if base.__module__.partition(".")[0] == OWN else ():
            if (name.startswith("_") and name != "__call__") or name in shown:
                continue
            shown.add(name)
            function = _function_of(member)
            if function is not None:
                yield _stub(name, function, is_property=not inspect.isroutine(member))


def _function_of(member: object) -> Callable[..., Any] | None:
    """Return the function behind a method or property; None for any other attribute."""
    for attribute in ("fget", "func", "__func__"):
        found = getattr(member, attribute, None)
        if inspect.isfunction(found):
            return found
    return member if inspect.isfunction(member) else None


def _stub(name: str, function: Callable[..., Any], *, is_property: bool = False, returns: bool = True) -> str:
    """Return a signature and below it, indented, what the function says about itself."""
    signature = inspect.signature(function)
    result = f" -> {_annotation(signature.return_annotation)}" if returns else ""
    if is_property:
        text = f"{name}: {_annotation(signature.return_annotation)}"
    else:
        word = "async " if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function) else ""
        text = f"{word}{name}{_spelled(signature)}{result}"
    about = prose(inspect.cleandoc(function.__doc__ or ""))
    return text + (f"\n{textwrap.indent(about, '    ')}" if about else "")


def _spelled(signature: inspect.Signature) -> str:
    """Return a parameter list, over several lines where it is long."""
    parts: list[str] = []
    is_keyword = False
    for each in signature.parameters.values():
        if each.name == "self" or (each.name == "cls" and not parts):
            continue
        if each.kind is each.KEYWORD_ONLY and not is_keyword:
            is_keyword = True
            parts.append("*")
        star = "*" if each.kind is each.VAR_POSITIONAL else "**" if each.kind is each.VAR_KEYWORD else ""
        is_keyword = is_keyword or star == "*"
        annotation = "" if each.annotation is each.empty else f": {_annotation(each.annotation)}"
        default = "" if each.default is each.empty else f" = {_value(each.default)}"
        parts.append(f"{star}{each.name}{annotation}{default}")
    line = f"({', '.join(parts)})"
    return line if len(line) < 90 else "(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def _value(default: object) -> str:
    shown = repr(default)
    return "…" if len(shown) > 60 or " at 0x" in shown else shown


def _annotation(annotation: Any) -> str:
    if annotation is inspect.Signature.empty:
        return "Any"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return _MODULE.sub("", re.sub(r"ForwardRef\('(.+?)'\)", r"\1", text)).strip("'")


def _listing(stubs: list[str]) -> str:
    return "```text\n" + "\n".join(stubs) + "\n```\n"
