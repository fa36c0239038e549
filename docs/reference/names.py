"""The pages of public names: what plugins import, the sans-IO tools, the tools for tests."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import penstock
from penstock import testing
from reference.members import class_section, function_listing, module_section
from reference.source import cell, first_line, row, string_of

PUBLIC_MODULES = (
    "codings", "dialects.anthropic", "dialects.estimate", "dialects.openai", "dialects.windows", "framing", "peek",
    "splice", "sse",
)  # fmt: skip
"""Sans-IO tools whose public names plugins may use too."""
SECTIONS = {
    "What hooks get": (
        "Exchange", "Request", "RequestHead", "Headers", "Endpoint", "RequestPeek", "Response", "Principal",
        "Candidate", "Attempt", "Usage", "TraceContext", "StateKey", "Chunk", "Event", "BodyWindow",
    ),
    "For providers": (
        "Provider", "HTTPProvider", "OpenAIProvider", "AnthropicProvider", "ProviderBinding", "Timeouts", "RateLimits",
        "Fallback", "PolicyRules", "PatternRules", "GuardrailAttachment", "Secret", "Address", "Origin",
        "UpstreamRequest", "ResponseFilter", "Transport", "UpstreamResponse", "ResponseHead", "Receiver", "Translator",
        "Translated", "ReplyTranslation", "TranslatorRegistry",
    ),
    "For evaluators": (
        "Evaluator", "Check", "Subject", "Verdict", "TextEdit", "EvaluatorRegistry", "GuardrailOutcome",
        "GuardrailCounts", "GatewayCall",
    ),
    "Shared by plugins": (
        "Services", "BindingDirectory", "KeyDirectory", "KeyRecord", "KeyHasher", "Fetch", "FetchedResponse", "Mount",
    ),
    "Errors in detail": ("PenstockError", "RequestError", "UpstreamError", "PluginError", "ConfigurationError"),
}  # fmt: skip
"""Every public class, by what it is for."""
_WITH_CONSTANTS = ("evaluators", "inner", "hookspecs")
"""Modules whose public constants say below what they are."""
_KINDS = ("Exceptions", "Protocols", "Classes", "Functions", "Others")

_API_HEAD = """
# Public names

What `from penstock import …` offers. Beside it plugins may use [the sans-IO tools](tools.md), and tests
[`penstock.testing`](testing-api.md). Everything else is internal and may change in any release; changes to these lists
are in [the API changelog](api-changelog.md).

How to read the tables: where they have a column of defaults, the fields are the arguments of the constructor, in this
order, also by name (of providers by name only), and what has a default may be left out. Constructors written out,
methods and properties follow as text. Header fields, bodies and paths are bytes, names and messages str.
"""
_TOOLS_HEAD = """
# Tools

Sans-IO modules whose public names plugins may use: `from penstock.splice import replace`. Examples are in
[Write a plugin](writing.md#4-edit-json-and-events), and this one walks all choices of an answer:

```python run
import json

from penstock.splice import Span, SpliceError, children, edit, find, quote

body = b'{"choices":[{"message":{"content":"a Bluebird"}}, {"message":{"content":null}}, {"delta":{}}]}'


def renamed(body: bytes) -> bytes:
    # What is no JSON is returned as it is.
    edits = []
    try:
        choices = find(body, ("choices",))  # None: no such member, or what is on the way to it is no object
        for choice in () if choices is None else children(body, choices):  # none where it is no list
            inner = body[choice.value.start : choice.value.end]
            span = find(inner, ("message", "content"))
            text = None if span is None else json.loads(inner[span.start : span.end])
            if span is not None and isinstance(text, str) and "Bluebird" in text:
                moved = Span(choice.value.start + span.start, choice.value.start + span.end)
                edits.append((moved, quote(text.replace("Bluebird", "Kingfisher"))))
    except SpliceError:  # malformed JSON, as far as it was walked
        return body
    return edit(body, edits)


assert renamed(body) == body.replace(b"Bluebird", b"Kingfisher")
assert renamed(b'{"choices": 7}') == b'{"choices": 7}'
assert renamed(b'{"choices": [') == b'{"choices": ['
```
"""
_TESTING_HEAD = """
# Names of `penstock.testing`

What [Test a plugin](testing.md) uses, name by name. `Fields` are header fields, as a mapping of str to str or as pairs
of bytes; a `Body` is bytes, or a mapping that becomes JSON. An upstream's `exchanges` are scripts: sequences of `Step`,
or functions of a `RecordedRequest` that return one.
"""


def api_page() -> str:
    groups: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for name in penstock.__all__:
        thing = getattr(penstock, name)
        groups[_kind_of(thing)].append(row(f"`{name}`", cell(_about(name, thing))))
    text = _API_HEAD
    for kind, rows in groups.items():
        if rows:
            text += f"\n## {kind}\n\n" + row("name", "purpose") + row("---", "---") + "".join(rows)
        if kind == "Functions":
            text += "\n" + function_listing(_functions(penstock))
    for title, names in SECTIONS.items():
        text += f"\n## {title}\n" + "".join(class_section(name, getattr(penstock, name)) for name in names)
    return text


def tools_page() -> str:
    text = _TOOLS_HEAD + "\n" + row("module", "purpose") + row("---", "---")
    modules = [importlib.import_module(f"penstock.{name}") for name in PUBLIC_MODULES]
    text += "".join(row(f"`{module.__name__}`", cell(first_line(module))) for module in modules)
    return text + "".join(map(module_section, modules))


def testing_page() -> str:
    text = _TESTING_HEAD + "\n" + row("name", "purpose") + row("---", "---")
    for name in testing.__all__:
        thing = getattr(testing, name)
        text += row(f"`{name}`", cell(first_line(thing) if inspect.isroutine(thing) or isinstance(thing, type)
                                      else _constants().get(name, "")))  # fmt: skip
    text += "\n## Functions\n\n" + function_listing(_functions(testing)) + "\n## Classes\n"
    classes = [(name, getattr(testing, name)) for name in testing.__all__]
    return text + "".join(class_section(name, thing) for name, thing in classes if isinstance(thing, type))


def _functions(module: Any) -> Iterator[tuple[str, Any]]:
    for name in module.__all__:
        if inspect.isfunction(getattr(module, name)):
            yield name, getattr(module, name)


def _constants(modules: Sequence[str] = ("testing.upstream", "testing.samples")) -> dict[str, str]:
    """Return the string under each constant of modules."""
    found = {}
    for name in modules:
        importlib.import_module(f"penstock.{name}")
        body = ast.parse(inspect.getsource(sys.modules[f"penstock.{name}"])).body
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found[statement.target.id] = string_of(following) or ""
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                found[statement.targets[0].id] = string_of(following) or ""
    return found


def _kind_of(thing: object) -> str:
    if isinstance(thing, type) and issubclass(thing, BaseException):
        return "Exceptions"
    if isinstance(thing, type):
        return "Protocols" if getattr(thing, "_is_protocol", False) else "Classes"
    return "Functions" if inspect.isfunction(thing) else "Others"


def _about(name: str, thing: object) -> str:
    if name == "hookimpl":
        return "Mark a method as the implementation of a hook."
    is_code = isinstance(thing, type) or inspect.isroutine(thing)
    return first_line(thing) if is_code else _constants(_WITH_CONSTANTS).get(name) or first_line(thing)
