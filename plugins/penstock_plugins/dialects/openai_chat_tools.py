"""The tools of a chat request, and which of them a model may or must call, as Anthropic has it. Sans-IO."""

from __future__ import annotations

from typing import Any

import msgspec

from penstock import RequestError
from penstock_plugins.dialects.anthropic_requests import Block, claude_version
from penstock_plugins.dialects.shared import Dropped, Members, is_text, read_as, read_member, refuse, says_nothing

_FUNCTION = frozenset({"name", "description", "parameters", "strict", "cache_control"})
_NO_PARAMETERS = {"type": "object", "properties": {}}


def read_tools(members: Members, model: str | None, dropped: Dropped) -> tuple[list[Block], Block]:
    """Return ``tools`` and ``tool_choice``, either empty where there is none. Raises RequestError."""
    tools = [
        _tool(tool, f"tools[{index}]", model, dropped)
        for index, tool in enumerate(read_member(members, "tools", list[Members]) or [])
    ]
    choice, allowed = _choice(members.get("tool_choice"))
    if allowed is not None:
        tools = [tool for tool in tools if tool["name"] in allowed]
    if not tools:
        if choice.get("type") in ("any", "tool"):
            raise RequestError("bad_request", "tool_choice asks for a tool, but there is none.", param="tool_choice")
        return [], {}
    if read_member(members, "parallel_tool_calls", bool) is False and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return tools, choice


def _tool(tool: Members, where: str, model: str | None, dropped: Dropped) -> Block:
    kind = read_member(tool, "type", str, where) or "function"
    if kind != "function":
        raise refuse(
            f"{where}.type", f"{where}: tools of type {kind[:100]!r} have no equivalent in Anthropic's dialect."
        )
    function = read_member(tool, "function", Members, where) or {}
    name = read_member(function, "name", str, f"{where}.function")
    if not name:
        raise RequestError("bad_request", f"{where}.function.name is missing.", param=f"{where}.function.name")
    block: Block = {"name": name}
    if not says_nothing(function.get("description")):
        block["description"] = function["description"]
    block["input_schema"] = _schema(function, where)
    if read_member(function, "strict", bool, f"{where}.function"):
        version = claude_version(model)
        if version is None or version >= (4, 1):
            block["strict"] = True
        else:
            dropped.add("tools[].function.strict")
    for found in function.keys() - _FUNCTION:
        if not says_nothing(function[found]):
            dropped.add(f"tools[].function.{found}")
    marker = tool.get("cache_control", function.get("cache_control"))
    if marker is not None and not says_nothing(marker):
        block["cache_control"] = marker
    return block


def _schema(function: Members, where: str) -> msgspec.Raw | dict[str, Any]:
    """Return the schema of a tool's arguments as it is spelled; one that does not say ``object`` is made to."""
    raw = function.get("parameters")
    if raw is None or says_nothing(raw):
        return dict(_NO_PARAMETERS)
    schema = read_as(Members, raw, f"{where}.function.parameters")
    return raw if "type" in schema else {"type": "object", **schema}


def _choice(raw: msgspec.Raw | None) -> tuple[Block, frozenset[str] | None]:
    """Return the choice, and the names that the tools are narrowed to, None for all."""
    if raw is None or says_nothing(raw):
        return {}, None
    if is_text(raw):
        return _mode(read_as(str, raw, "tool_choice"), "tool_choice"), None
    chosen = read_as(Members, raw, "tool_choice")
    kind = read_member(chosen, "type", str, "tool_choice")
    if kind == "function":
        return {"type": "tool", "name": _name(chosen, "tool_choice")}, None
    if kind == "allowed_tools":
        allowed = read_member(chosen, "allowed_tools", Members, "tool_choice") or {}
        where = "tool_choice.allowed_tools"
        listed = read_member(allowed, "tools", list[Members], where) or []
        names = frozenset(_name(tool, f"{where}.tools[{index}]") for index, tool in enumerate(listed))
        return _mode(read_member(allowed, "mode", str, where) or "auto", f"{where}.mode"), names
    raise refuse(
        "tool_choice.type", f"tool_choice.type {(kind or '')[:100]!r} has no equivalent in Anthropic's dialect."
    )


def _mode(mode: str, param: str) -> Block:
    kinds = {"auto": "auto", "none": "none", "required": "any"}
    if mode not in kinds:
        raise RequestError("bad_request", f"{param} is none of {', '.join(kinds)}.", param=param)
    return {"type": kinds[mode]}


def _name(chosen: Members, where: str) -> str:
    function = read_member(chosen, "function", Members, where) or {}
    name = read_member(function, "name", str, f"{where}.function")
    if not name:
        raise RequestError("bad_request", f"{where}.function.name is missing.", param=f"{where}.function.name")
    return name
