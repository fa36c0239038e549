"""Read a request of the Responses API into what both translators write from. Sans-IO.

Nothing is stored here, so whatever refers to something stored is refused; numbers keep their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import msgspec

from penstock import RequestError
from penstock_plugins.dialects.responses_events import Called
from penstock_plugins.dialects.responses_input import Entry, read_input
from penstock_plugins.dialects.responses_tools import Tool, ToolChoice, given_members, read_tool_choice, read_tools
from penstock_plugins.dialects.shared import (
    DROP_TUNING_PARAMS,
    Dropped,
    Members,
    Raw,
    read_as,
    read_members,
    refuse,
)

_REFUSED = {
    "previous_response_id": "answers are not stored here; send the whole conversation as input",
    "conversation": "conversations are not stored here; send the whole conversation as input",
    "prompt": "stored prompts are not known here; send instructions and input",
    "moderation": "the provider asked does not moderate",
}
_READ = frozenset({
    "model", "instructions", "input", "tools", "tool_choice", "parallel_tool_calls", "max_output_tokens",
    "temperature", "top_p", "reasoning", "text", "store", "include", "truncation", "user", "safety_identifier",
    "stream", "stream_options", "service_tier", "background", "top_logprobs", DROP_TUNING_PARAMS,
})  # fmt: skip
_HARMLESS = {
    "store": (b"false",),
    "truncation": (b'"disabled"',),
    "top_logprobs": (b"0",),
    "stream_options": (b"{}", b'{"include_obfuscation":false}'),
}
"""What these may say without anything being lost; else they are dropped and listed."""
_ENCRYPTED = "reasoning.encrypted_content"
_LOGPROBS = "message.output_text.logprobs"
_ECHO: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": None,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
"""What a response repeats of its request, and what it says where the request says nothing."""


class TextFormat(msgspec.Struct):
    """Hold ``text.format``."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: Raw = Raw(b"null")
    strict: bool | None = None


@attrs.define(eq=False)
class Asked:
    """Hold a request of the Responses API."""

    members: Members = attrs.field(repr=False)
    """Members that are not null, as they are spelled."""
    dropped: Dropped
    entries: list[Entry]
    """The conversation, instructions first."""
    tools: list[Tool]
    tool_choice: ToolChoice
    effort: str | None = None
    format: TextFormat | None = None
    echo: dict[str, Any] = attrs.field(factory=dict, repr=False)

    @property
    def is_stream(self) -> bool:
        return bytes(self.members.get("stream", b"")) == b"true"

    @property
    def called(self) -> Mapping[str, Called]:
        """What the client calls each tool, by the name the provider gets."""
        return {tool.name: tool.called for tool in self.tools}

    def copy(self, *names: str) -> dict[str, Any]:
        """Return those of these members that the request has, unchanged."""
        return {name: self.members[name] for name in names if name in self.members}

    def number(self, name: str) -> float | None:
        """Return a number. Raises RequestError."""
        return read_as(float, self.members[name], name) if name in self.members else None

    def whole_number(self, name: str) -> int | None:
        """Return an integer. Raises RequestError."""
        return read_as(int, self.members[name], name) if name in self.members else None

    def text(self, name: str) -> str | None:
        """Return a string. Raises RequestError."""
        return read_as(str, self.members[name], name) if name in self.members else None

    @property
    def end_user(self) -> str | None:
        """Who is asking."""
        user, identifier = self.text("user"), self.text("safety_identifier")
        if user is not None and identifier is not None and user != identifier:
            self.dropped.add("safety_identifier")
        return identifier if user is None else user

    @property
    def parallel_tool_calls(self) -> bool | None:
        raw = self.members.get("parallel_tool_calls")
        return None if raw is None else read_as(bool, raw, "parallel_tool_calls")

    def settle(self) -> tuple[str, ...]:
        """Return what was dropped. Raises RequestError where nothing may be."""
        return self.dropped.settle(self.members)


def read_request(body: bytes, model: str | None) -> Asked:
    """Return a request. Raises RequestError."""
    members = given_members(read_members(body))
    dropped = Dropped()
    _refuse_stored(members)
    _note_left_out(members, dropped)
    _read_include(members, dropped)
    tools = read_tools(members.get("tools"), dropped)
    choice = read_tool_choice(members.get("tool_choice"), tools)
    entries = read_input(members, dropped)
    asked = Asked(members, dropped, entries, choice.allowed(tools), choice)
    asked.effort = _read_reasoning(members, dropped)
    asked.format = _read_text(members, dropped)
    asked.echo = {name: _on_one_line(members[name]) if name in members else value for name, value in _ECHO.items()}
    asked.echo |= {"store": False, "model": asked.text("model") if model is None else model}
    return asked


def _refuse_stored(members: Members) -> None:
    for name, why in _REFUSED.items():
        if name in members:
            raise refuse(name, f"{name}: {why}.")
    if bytes(members.get("background", b"false")) != b"false":
        raise refuse("background", "background: answers are not stored here; ask for a stream instead.")


def _note_left_out(members: Members, dropped: Dropped) -> None:
    if bytes(members.get("top_logprobs", b"0")) != b"0":
        raise refuse("top_logprobs", "top_logprobs: log probabilities cannot be translated; leave it out.")
    for name, value in members.items():
        if name not in _READ or (name in _HARMLESS and bytes(_on_one_line(value)) not in _HARMLESS[name]):
            dropped.add(name)


def _on_one_line(value: Raw) -> Raw:
    """Return a value without white space: an event's payload has no line ends. Numbers keep their text."""
    return Raw(msgspec.json.format(bytes(value), indent=-1))


def _read_include(members: Members, dropped: Dropped) -> None:
    for name in read_as(list[str], members["include"], "include") if "include" in members else ():
        if name == _LOGPROBS:
            raise refuse("include", f"include: {_LOGPROBS} cannot be translated; leave it out.")
        if name != _ENCRYPTED:
            dropped.add("include")


def _read_reasoning(members: Members, dropped: Dropped) -> str | None:
    """Return the effort. Summaries are given whether asked for or not, of what the provider shows."""
    if "reasoning" not in members:
        return None
    reasoning = given_members(read_as(Members, members["reasoning"], "reasoning"))
    _note(reasoning, ("effort", "summary", "generate_summary"), "reasoning", dropped)
    return read_as(str, reasoning["effort"], "reasoning.effort") if "effort" in reasoning else None


def _read_text(members: Members, dropped: Dropped) -> TextFormat | None:
    """Return the format of the answer; None for plain text."""
    if "text" not in members:
        return None
    text = given_members(read_as(Members, members["text"], "text"))
    _note(text, ("format",), "text", dropped)
    if "format" not in text:
        return None
    found = read_as(TextFormat, text["format"], "text.format")
    if found.type == "text":
        return None
    if found.type not in ("json_schema", "json_object"):
        raise refuse("text.format.type", f"text.format: {found.type!r} cannot be translated.")
    if found.type == "json_schema" and not bytes(found.schema).startswith(b"{"):
        raise RequestError("bad_request", "text.format needs a schema.", param="text.format.schema")
    return found


def _note(members: Members, known: Iterable[str], where: str, dropped: Dropped) -> None:
    for name in members:
        if name not in known:
            dropped.add(f"{where}.{name}")
