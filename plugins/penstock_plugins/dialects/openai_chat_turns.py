"""Chat messages as Anthropic's system prompt and alternating turns. Sans-IO.

Texts, tool arguments and schemas are carried over as they are spelled, never decoded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from penstock import RequestError
from penstock_plugins.dialects.anthropic_requests import Block, Turns, document_block, image_block
from penstock_plugins.dialects.shared import (
    UNREADABLE,
    Dropped,
    Members,
    data_url,
    is_null,
    is_text,
    read_as,
    read_member,
    refuse,
    says_nothing,
)

_MESSAGE = frozenset({
    "role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio", "function_call", "reasoning_content",
    "thinking_blocks", "cache_control",
})  # fmt: skip
_PART = frozenset({"type", "text", "refusal", "image_url", "file", "cache_control"})
_THINKING = frozenset({"thinking", "redacted_thinking"})
_NO_ID = re.compile(r"[^a-zA-Z0-9_-]")
_is_blank = re.compile(rb'"(?:[ ]|\\[nrtfb])*"').fullmatch
_read_arguments = msgspec.json.Decoder(Members).decode


class Conversation:
    """Collect what the messages of a chat request become."""

    def __init__(self, dropped: Dropped) -> None:
        self.system: list[Block] = []
        self.turns = Turns()
        self._dropped = dropped
        self._by_role: dict[str, Callable[[Members, str], None]] = {
            "system": self._add_system,
            "developer": self._add_system,
            "user": self._add_user,
            "assistant": self._add_assistant,
            "tool": self._add_result,
        }

    def read(self, raw: msgspec.Raw) -> None:
        """Take all messages. Raises RequestError."""
        for index, message in enumerate(read_as(list[Members], raw, "messages")):
            where = f"messages[{index}]"
            role = read_member(message, "role", str, where) or ""
            if role == "function":
                raise refuse(f"{where}.role", "Messages of the role function have no equivalent; use tools.")
            add = self._by_role.get(role)
            if add is None:
                raise RequestError("bad_request", f"{where}.role is none of {', '.join(self._by_role)}.", param=where)
            self._note_unknown(message, _MESSAGE, "messages[]")
            if role != "tool" and not says_nothing(message.get("name")):
                self._dropped.add("messages[].name")
            add(message, where)
        if not self.turns.messages:
            raise RequestError("bad_request", "messages holds no text by user or assistant.", param="messages")

    def _note_unknown(self, members: Members, known: frozenset[str], where: str) -> None:
        if not members.keys() <= known:
            for name in members.keys() - known:
                if not says_nothing(members[name]):
                    self._dropped.add(f"{where}.{name}")

    # --- by role --------------------------------------------------------------------------------------------------

    def _add_system(self, message: Members, where: str) -> None:
        blocks = self._content(message, where)
        if not self.turns.messages:
            self.system += blocks
        elif blocks:
            self._dropped.add("messages[].role")
            self.turns.add("user", blocks)

    def _add_user(self, message: Members, where: str) -> None:
        self.turns.add("user", self._content(message, where))

    def _add_assistant(self, message: Members, where: str) -> None:
        for name in ("audio", "function_call"):
            if not says_nothing(message.get(name)):
                raise refuse(f"{where}.{name}", f"{where}.{name} has no equivalent in Anthropic's dialect.")
        blocks: list[Any] = []
        thinking = read_member(message, "thinking_blocks", list[msgspec.Raw], where) or []
        for index, raw in enumerate(thinking):
            kind = read_member(read_as(Members, raw, where), "type", str, f"{where}.thinking_blocks[{index}]")
            if kind not in _THINKING:
                param = f"{where}.thinking_blocks[{index}].type"
                raise RequestError("bad_request", f"{param} is none of {', '.join(sorted(_THINKING))}.", param=param)
            blocks.append(raw)
        if not thinking and not says_nothing(message.get("reasoning_content")):
            self._dropped.add("messages[].reasoning_content")
        said = self._content(message, where, message.get("refusal"))
        calls = read_member(message, "tool_calls", list[Members], where) or []
        said += [self._call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        self.turns.add("assistant", blocks + _marked(said, message))

    def _add_result(self, message: Members, where: str) -> None:
        block: Block = {"type": "tool_result", "tool_use_id": _id_of(message, "tool_call_id", where)}
        content = message.get("content")
        if is_text(content):
            if not _is_blank(content):
                block["content"] = content
        else:
            blocks = self._parts(content, where)
            if blocks:
                block["content"] = blocks
        self.turns.add("user", _marked([block], message))

    # --- what is in them ------------------------------------------------------------------------------------------

    def _content(self, message: Members, where: str, refusal: msgspec.Raw | None = None) -> list[Block]:
        """Return the blocks of a message's content."""
        content = message.get("content")
        blocks = _texts(content) if is_text(content) else self._parts(content, where)
        if is_text(refusal):
            blocks += _texts(refusal)
        return _marked(blocks, message)

    def _parts(self, content: msgspec.Raw | None, where: str) -> list[Block]:
        if content is None or is_null(content):
            return []
        blocks = []
        for index, part in enumerate(read_as(list[Members], content, f"{where}.content")):
            self._note_unknown(part, _PART, "messages[].content[]")
            block = self._part(part, f"{where}.content[{index}]")
            if block is not None:
                blocks += _marked([block], part)
        return blocks

    def _part(self, part: Members, where: str) -> Block | None:
        kind = read_member(part, "type", str, where) or ""
        if kind in ("text", "refusal"):
            text = part.get(kind)
            if not is_text(text):
                raise RequestError("bad_request", f"{where}.{kind} is no text.", param=f"{where}.{kind}")
            return next(iter(_texts(text)), None)
        if kind == "image_url":
            return self._image(part, where)
        if kind == "file":
            return _file(read_member(part, "file", Members, where) or {}, f"{where}.file")
        raise refuse(
            f"{where}.type", f"{where}: parts of type {kind[:100]!r} have no equivalent in Anthropic's dialect."
        )

    def _image(self, part: Members, where: str) -> Block:
        raw = part.get("image_url", msgspec.Raw(b"null"))
        if is_text(raw):
            return image_block(read_as(str, raw, where), f"{where}.image_url")
        image = read_as(Members, raw, f"{where}.image_url")
        if read_member(image, "detail", str, where) not in (None, "auto"):
            self._dropped.add("messages[].content[].image_url.detail")
        return image_block(read_member(image, "url", str, f"{where}.image_url") or "", f"{where}.image_url.url")

    @staticmethod
    def _call(call: Members, where: str) -> Block:
        if (read_member(call, "type", str, where) or "function") != "function":
            raise refuse(
                f"{where}.type", f"{where}: only calls of functions have an equivalent in Anthropic's dialect."
            )
        function = read_member(call, "function", Members, where) or {}
        name = read_member(function, "name", str, f"{where}.function")
        if not name:
            raise RequestError("bad_request", f"{where}.function.name is missing.", param=f"{where}.function.name")
        arguments = read_member(function, "arguments", str, f"{where}.function") or ""
        block: Block = {"type": "tool_use", "id": _id_of(call, "id", where), "name": name}
        block["input"] = _input_of(arguments, f"{where}.function.arguments")
        _marked([block], call)
        return block


def _texts(raw: msgspec.Raw) -> list[Block]:
    """Return the block of a text; none for a text without a visible character, which Anthropic refuses."""
    return [] if _is_blank(raw) else [{"type": "text", "text": raw}]


def _marked(blocks: list[Any], members: Members) -> list[Any]:
    """Put the ``cache_control`` of a message, part or call onto the last of its blocks, unless that has its own."""
    marker = members.get("cache_control")
    if blocks and not is_null(marker) and "cache_control" not in blocks[-1]:
        blocks[-1]["cache_control"] = marker
    return blocks


def _id_of(members: Members, name: str, where: str) -> str:
    """Return the id of a call, with what Anthropic's pattern for ids does not allow replaced by ``_``."""
    found = read_member(members, name, str, where)
    if not found:
        raise RequestError("bad_request", f"{where}.{name} is missing.", param=f"{where}.{name}")
    return _NO_ID.sub("_", found)


def _input_of(arguments: str, param: str) -> msgspec.Raw | dict[str, Any]:
    """Return the arguments of a call, spelled as they are; they must be a JSON object, or empty."""
    if not arguments.strip():
        return {}
    encoded = arguments.encode()
    try:
        _read_arguments(encoded)
    except UNREADABLE:
        message = f"{param} is no JSON object, which is all that Anthropic's dialect takes."
        raise RequestError("bad_request", message, param=param) from None
    return msgspec.Raw(encoded)


def _file(file: Members, where: str) -> Block:
    if not says_nothing(file.get("file_id")):
        raise refuse(
            f"{where}.file_id", f"{where}.file_id: a file kept by another provider cannot be read; send file_data."
        )
    encoded = read_member(file, "file_data", str, where)
    if not encoded:
        raise RequestError("bad_request", f"{where}.file_data is missing.", param=f"{where}.file_data")
    if encoded[:5].lower() != "data:":
        encoded = data_url("application/pdf", encoded)  # bare base64, as some clients send it
    return document_block(encoded, f"{where}.file_data", read_member(file, "filename", str, where))
