"""The pages for authors of plugins: hooks and public names."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

import attrs

import penstock
from penstock import hookspecs, testing
from penstock.hooks import ONCE, PER_EXCHANGE
from penstock.plugins import NEEDS
from reference.source import cell, field_docs, first_line, row

PUBLIC_MODULES = ("codings", "dialects.anthropic", "dialects.openai", "framing", "peek", "splice", "sse")
"""Sans-IO tools whose public names plugins may use too."""

_HOOKS_HEAD = """
# Hooks

Every hook, in the order of one exchange, from `penstock.hookspecs`. A plugin implements those it needs:

```python
from penstock import Exchange, RequestError, hookimpl


class NoSecondChoices:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.request.endpoint.operation == "completions":
            raise RequestError("permission_denied", "Use /v1/chat/completions instead.")
```

"""


def hooks_page() -> str:
    text = _HOOKS_HEAD + cell_paragraphs(inspect.getdoc(hookspecs) or "")
    for title, names in (("Once, at start-up", ONCE), ("Per exchange", PER_EXCHANGE)):
        text += f"\n## {title}\n"
        for name in names:
            specification = getattr(hookspecs, name)
            text += f"\n### `{name}`\n\n```text\n{signature_of(name, specification)}\n```\n\n"
            text += cell_paragraphs(inspect.getdoc(specification) or "")
    needs = ", ".join(f"`{need}`" for need in NEEDS)
    return text + (
        "\n## Declared needs\n\n"
        f"Class attributes, each `False` unless set: {needs}. With `sees_chunks = True` the chunk hook runs on every\n"
        "exchange; without it only where `exchange.watch_chunks(name)` was called. `penstock plugins show` prints\n"
        "them and says whether the untouched path still holds.\n"
    )


def cell_paragraphs(text: str) -> str:
    """Return a docstring as Markdown, a line per `Word: …` as a list entry."""
    lines = []
    for line in text.replace("``", "`").splitlines():
        word, colon, _ = line.partition(":")
        is_entry = bool(colon) and word in ("When", "Returns", "Raises")
        lines.append(f"\n- **{word}**{line[len(word) :]}" if is_entry else line)
    return "\n".join(lines) + "\n"


def signature_of(name: str, specification: Callable[..., Any]) -> str:
    signature = inspect.signature(specification)
    taken = [f"{parameter.name}: {parameter.annotation}" for parameter in signature.parameters.values()]
    return f"def {name}({', '.join(('self', *taken))}) -> {signature.return_annotation}"


_API_HEAD = """
# Public names

What `from penstock import …` offers, and what `penstock.testing` offers to tests. Everything else is internal and may
change in any release; changes to this list are in [the API changelog](api-changelog.md).
"""
_KINDS = ("Exceptions", "Protocols", "Classes", "Functions", "Others")


def api_page() -> str:
    groups: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name in penstock.__all__:
        thing = getattr(penstock, name)
        groups[_kind_of(thing)].append(row(f"`{name}`", cell(_about(name, thing))))
    text = _API_HEAD
    for kind, rows in groups.items():
        if rows:
            text += f"\n## {kind}\n\n" + row("name", "purpose") + row("---", "---") + "".join(rows)
    text += (
        "\n## Tools\n\nSans-IO modules whose public names plugins may use: `from penstock.splice import replace`.\n\n"
    )
    text += row("module", "purpose") + row("---", "---")
    for name in PUBLIC_MODULES:
        module = importlib.import_module(f"penstock.{name}")
        text += row(f"`penstock.{name}`", cell(first_line(module)))
    text += "\n## What hooks get\n" + "".join(_members(name) for name in _DETAILED)
    return text + "\n## `penstock.testing`\n\n" + "".join(_testing_rows())


_DETAILED = ("Exchange", "Request", "Response", "Principal", "ProviderBinding", "Candidate", "Usage", "Attempt")


def _members(name: str) -> str:
    kind = getattr(penstock, name)
    attrs.resolve_types(kind, globalns=_names(kind))
    docs = field_docs(kind)
    text = f"\n### `{name}`\n\n{cell(first_line(kind))}\n\n" + row("field", "type", "meaning")
    text += row("---", "---", "---")
    for field in attrs.fields(kind):
        if not field.name.startswith("_"):
            text += row(f"`{field.name}`", f"`{_spelled(field.type)}`", cell(docs.get(field.name, "")))
    return text


def _names(kind: type[Any]) -> dict[str, Any]:
    """Return the names annotations of a class may use, those imported for type checkers only included."""
    return {**vars(penstock), **vars(sys.modules[kind.__module__])}


def _spelled(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " \\| ".join(_spelled(argument) for argument in arguments)
    if origin is Literal:
        return " \\| ".join(f'"{argument}"' for argument in arguments)
    if origin is not None:
        inner = ", ".join("…" if argument is Ellipsis else _spelled(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _kind_of(thing: object) -> str:
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return "Exceptions"
    if isinstance(thing, type):
        return "Protocols" if getattr(thing, "_is_protocol", False) else "Classes"
    return "Functions" if inspect.isfunction(thing) else "Others"


def _about(name: str, thing: object) -> str:
    if name == "hookimpl":
        return "Mark a method as the implementation of a hook."
    return first_line(thing)


def _testing_rows() -> Iterator[str]:
    yield row("name", "purpose")
    yield row("---", "---")
    for name in testing.__all__:
        thing = getattr(testing, name)
        yield row(f"`{name}`", cell(first_line(thing) if callable(thing) else "A constant."))
