"""Read the tools of a Responses request: functions, custom tools and namespaces of both. Sans-IO.

A custom tool, which takes free text, becomes a function with one string argument ``input``; its calls become custom
calls again. A tool of a namespace is called ``namespace__name`` by the provider.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import msgspec

from penstock import RequestError
from penstock_plugins.dialects.responses_events import Called
from penstock_plugins.dialects.shared import Dropped, Members, Raw, read_as, refuse

_NO_PARAMETERS = Raw(b'{"type":"object","properties":{}}')
_INPUT = Raw(
    b'{"type":"object","properties":{"input":{"type":"string","description":"The whole input of the tool, as text."}},'
    b'"required":["input"],"additionalProperties":false}'
)
_KNOWN = {
    "function": frozenset({"type", "name", "description", "parameters", "strict"}),
    "custom": frozenset({"type", "name", "description", "format"}),
    "namespace": frozenset({"type", "name", "description", "tools"}),
}


@attrs.frozen
class Tool:
    """Hold a tool as the provider gets it."""

    name: str
    called: Called
    parameters: Raw
    """A JSON schema, as the client spelled it."""
    description: str | None = None
    is_strict: bool = False


@attrs.frozen
class ToolChoice:
    """Say which tool is to be called: ``auto``, ``none``, ``required`` or ``named``."""

    mode: str = "auto"
    is_given: bool = False
    name: str | None = None
    """For ``named``: the name the provider knows."""
    only: frozenset[str] | None = None
    """Names of the tools that may be called, where the request names some."""

    def allowed(self, tools: list[Tool]) -> list[Tool]:
        """Return the tools that may be called."""
        return tools if self.only is None else [tool for tool in tools if tool.name in self.only]


class _Format(msgspec.Struct):
    type: str = "text"
    syntax: str = ""
    definition: str = ""


def read_tools(raw: Raw | None, dropped: Dropped) -> list[Tool]:
    """Return the tools. Raises RequestError ``unsupported_parameter`` for those that the vendor's own servers run."""
    if raw is None:
        return []
    return list(_tools(raw, "tools", None, dropped))


def given_members(members: Members) -> Members:
    """Return the members that are not null: null is as good as nothing."""
    return {name: value for name, value in members.items() if bytes(value) != b"null"}


def _tools(raw: Raw, where: str, namespace: str | None, dropped: Dropped) -> Iterator[Tool]:
    for number, element in enumerate(read_as(list[Raw], raw, where)):
        place = f"{where}[{number}]"
        tool = given_members(read_as(Members, element, place))
        kind = _string(tool, "type", place)
        if kind not in _KNOWN or (kind == "namespace" and namespace is not None):
            raise refuse(
                f"{place}.type",
                f"{place}: tools of type {kind[:100]!r} are run by OpenAI or need its models; the provider asked takes "
                "functions and custom tools only. Leave the tool out or turn it off in the client.",
            )
        for name in tool.keys() - _KNOWN[kind]:
            dropped.add(f"tools[].{name}")
        if kind == "namespace":
            yield from _tools(tool.get("tools", Raw(b"[]")), f"{place}.tools", _string(tool, "name", place), dropped)
        else:
            yield _tool(kind, tool, place, namespace, dropped)


def _tool(kind: str, tool: Members, place: str, namespace: str | None, dropped: Dropped) -> Tool:
    called = Called(_string(tool, "name", place), kind == "custom", namespace)
    description = _string(tool, "description", place) if "description" in tool else None
    if kind == "custom":
        described = _with_format(description, tool, place, dropped)
        return Tool(flat_name(called), called, _INPUT, described)
    is_strict = "strict" in tool and read_as(bool, tool["strict"], f"{place}.strict")
    return Tool(flat_name(called), called, tool.get("parameters", _NO_PARAMETERS), description, is_strict)


def _with_format(description: str | None, tool: Members, place: str, dropped: Dropped) -> str | None:
    """Return the description of a custom tool with its grammar, which nobody will enforce."""
    if "format" not in tool:
        return description
    found = read_as(_Format, tool["format"], f"{place}.format")
    if found.type == "text":
        return description
    dropped.add("tools[].format")
    grammar = f"The input must match this {found.syntax} grammar:\n{found.definition}"
    return f"{description}\n\n{grammar}" if description else grammar


def flat_name(called: Called) -> str:
    """Return the name under which the provider gets a tool."""
    return called.name if called.namespace is None else f"{called.namespace}__{called.name}"


def read_tool_choice(raw: Raw | None, tools: list[Tool]) -> ToolChoice:
    """Return which tool is to be called. Raises RequestError for one that is not among the tools."""
    if raw is None:
        return ToolChoice()
    found: Any = read_as(str | dict[str, Any], raw, "tool_choice")  # type: ignore[arg-type]
    if isinstance(found, str):
        if found not in ("auto", "none", "required"):
            raise RequestError("bad_request", "tool_choice is auto, none, required or an object.", param="tool_choice")
        return ToolChoice(found, is_given=True)
    kind = found.get("type")
    if kind in ("function", "custom"):
        return ToolChoice("named", is_given=True, name=_named(found, tools, "tool_choice"))
    if kind == "allowed_tools":
        mode = found.get("mode", "auto")
        listed = found.get("tools")
        if mode not in ("auto", "required") or not isinstance(listed, list):
            raise RequestError("bad_request", "tool_choice cannot be read: mode or tools.", param="tool_choice")
        only = frozenset(_named(each, tools, f"tool_choice.tools[{at}]") for at, each in enumerate(listed))
        return ToolChoice(mode, is_given=True, only=only)
    raise refuse("tool_choice.type", f"tool_choice: {str(kind)[:100]!r} is no tool the provider asked can run.")


def _named(choice: Any, tools: list[Tool], where: str) -> str:
    """Return the name the provider knows of a tool that a choice names."""
    if not isinstance(choice, dict) or choice.get("type") not in ("function", "custom"):
        raise refuse(where, f"{where} is neither a function nor a custom tool.")
    name, namespace = choice.get("name"), choice.get("namespace")
    for tool in tools:
        if tool.called.name == name and namespace in (None, tool.called.namespace):
            return tool.name
    raise RequestError("bad_request", f"{where} names a tool that is not among the tools.", param=where)


def _string(members: Members, name: str, where: str) -> str:
    return read_as(str, members.get(name, Raw(b"null")), f"{where}.{name}")
