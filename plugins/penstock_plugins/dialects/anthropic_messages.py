"""Messages of Anthropic's dialect as messages of chat completions.

Shapes: https://docs.anthropic.com/en/api/messages and https://platform.openai.com/docs/api-reference/chat. What has no
place in a chat message is left out and listed (``Dropped``), or refused where the conversation depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import msgspec

from penstock import RequestError
from penstock_plugins.dialects.shared import UNREADABLE, Dropped, Members, Raw, data_url, is_text, read_as, refuse

Part = dict[str, Any]
"""A content part of a chat message."""

_BILLING = "x-anthropic-billing-header:"
"""What begins a system block that Claude Code writes for Anthropic's accounting; it differs from call to call."""


def unsupported(param: str, why: str) -> RequestError:
    """Return the refusal of what the other dialect does not have."""
    return refuse(param, f"{param}: {why}; leave it out, or use a model whose provider speaks Anthropic Messages.")


def malformed(where: str, expected: str) -> RequestError:
    """Return the refusal of what cannot be read."""
    return RequestError("bad_request", f"{where} must be {expected}.", param=where)


# --- reading --------------------------------------------------------------------------------------------------------


def read_object(raw: Raw | None, where: str) -> Members:
    """Return the members of an object that are not null. Raises RequestError ``bad_request``."""
    try:
        members = _decode_object(raw or _NULL)
    except UNREADABLE:
        members = read_as(Members, raw or _NULL, where)  # says what is wrong
    return {name: value for name, value in members.items() if bytes(value) != b"null"}


def read_array(raw: Raw | None, where: str) -> list[Raw]:
    """Return the elements of an array. Raises RequestError ``bad_request``."""
    try:
        return _decode_array(raw or _NULL)
    except UNREADABLE:
        return read_as(list[Raw], raw or _NULL, where)


def read_text(raw: Raw | None, where: str) -> str:
    """Return a string. Raises RequestError ``bad_request``."""
    try:
        return _decode_text(raw or _NULL)
    except UNREADABLE:
        return read_as(str, raw or _NULL, where)


_NULL = Raw(b"null")
_decode_object = msgspec.json.Decoder(Members).decode
_decode_array = msgspec.json.Decoder(list[Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode
_CONTENT = "messages[].content[]"


def drop_rest(members: Iterable[str], known: frozenset[str], where: str, dropped: Dropped) -> None:
    """Note the members that nobody takes; hints and citations by their own names, wherever they stand."""
    for name in members:
        if name not in known:
            dropped.add(name if name in ("cache_control", "citations") else f"{where}.{name}")


# --- content --------------------------------------------------------------------------------------------------------

_TEXT = frozenset({"type", "text"})
_IMAGE = frozenset({"type", "source"})
_DOCUMENT = frozenset({"type", "source", "title", "context", "citations"})
_SEARCH_RESULT = frozenset({"type", "source", "title", "content", "citations"})
_TOOL_REFERENCE = frozenset({"type", "tool_name"})
_TOOL_RESULT = frozenset({"type", "tool_use_id", "content", "is_error"})
_TOOL_USE = frozenset({"type", "id", "name", "input"})


def _text_part(text: str | Raw) -> Part:
    return {"type": "text", "text": text}


def _string_of(part: Part) -> str:
    text = part["text"]
    return text if isinstance(text, str) else read_text(text, "text")


def _text_block(block: Members, where: str, dropped: Dropped) -> list[Part]:
    drop_rest(block, _TEXT, _CONTENT, dropped)
    text = block.get("text")
    if text is None or not is_text(text):
        raise malformed(f"{where}.text", "a string")
    return [_text_part(text)]


def _image_block(block: Members, where: str, dropped: Dropped) -> list[Part]:
    drop_rest(block, _IMAGE, _CONTENT, dropped)
    source = read_object(block.get("source"), f"{where}.source")
    kind = read_text(source.get("type"), f"{where}.source.type")
    if kind == "base64":
        media_type = read_text(source.get("media_type"), f"{where}.source.media_type")
        url = data_url(media_type, read_text(source.get("data"), f"{where}.source.data"))
    elif kind == "url":
        url = read_text(source.get("url"), f"{where}.source.url")
    else:
        raise unsupported(f"{where}.source", f"an image by {kind!r} cannot be sent to chat completions")
    return [{"type": "image_url", "image_url": {"url": url}}]


def _document_block(block: Members, where: str, dropped: Dropped) -> list[Part]:
    drop_rest(block, _DOCUMENT, _CONTENT, dropped)
    _note_citations(block, dropped)
    title = read_text(block["title"], f"{where}.title") if "title" in block else ""
    lines = [f"Document: {title}"] if title else []
    if "context" in block:
        lines.append(f"Context: {read_text(block['context'], f'{where}.context')}")
    preface = [_text_part("\n".join(lines))] if lines else []
    source = read_object(block.get("source"), f"{where}.source")
    kind = read_text(source.get("type"), f"{where}.source.type")
    if kind == "text":
        return [*preface, _text_part(read_text(source.get("data"), f"{where}.source.data"))]
    if kind == "content":
        return [*preface, *parts_of(source.get("content"), f"{where}.source.content", dropped)]
    if kind != "base64":
        raise unsupported(f"{where}.source", f"a document by {kind!r} cannot be sent to chat completions")
    media_type = read_text(source.get("media_type"), f"{where}.source.media_type")
    if media_type != "application/pdf":
        raise unsupported(f"{where}.source", f"chat completions take no file of type {media_type!r}")
    file_data = data_url(media_type, read_text(source.get("data"), f"{where}.source.data"))
    context = preface if "context" in block else []
    return [*context, {"type": "file", "file": {"filename": title or "document.pdf", "file_data": file_data}}]


def _search_result_block(block: Members, where: str, dropped: Dropped) -> list[Part]:
    drop_rest(block, _SEARCH_RESULT, _CONTENT, dropped)
    _note_citations(block, dropped)
    title = read_text(block.get("title"), f"{where}.title")
    source = read_text(block.get("source"), f"{where}.source")
    found = parts_of(block.get("content"), f"{where}.content", dropped)
    return [_text_part(f"Search result: {title}\nSource: {source}"), *found]


def _note_citations(block: Members, dropped: Dropped) -> None:
    """Note that citations were asked for: answers of chat completions hold none."""
    if "citations" in block and b"true" in bytes(block["citations"]):
        dropped.add("citations")


def _tool_reference_block(block: Members, where: str, dropped: Dropped) -> list[Part]:
    drop_rest(block, _TOOL_REFERENCE, _CONTENT, dropped)
    return [_text_part(f"Tool found: {read_text(block.get('tool_name'), f'{where}.tool_name')}")]


_PARTS: dict[str, Callable[[Members, str, Dropped], list[Part]]] = {
    "text": _text_block,
    "image": _image_block,
    "document": _document_block,
    "search_result": _search_result_block,
    "tool_reference": _tool_reference_block,
}


def _parts_of_block(kind: str, block: Members, where: str, dropped: Dropped) -> list[Part]:
    convert = _PARTS.get(kind)
    if convert is None:
        raise unsupported(where, f"a content block of type {kind!r} cannot be sent to chat completions")
    return convert(block, where, dropped)


def _blocks_of(content: Raw, where: str) -> Iterable[tuple[str, Members, str]]:
    """Yield type, members and place of each content block."""
    for number, raw in enumerate(read_array(content, where)):
        place = f"{where}[{number}]"
        block = read_object(raw, place)
        yield read_text(block.get("type"), f"{place}.type"), block, place


def parts_of(content: Raw | None, where: str, dropped: Dropped) -> list[Part]:
    """Return content, a string or blocks, as parts. Raises RequestError."""
    if content is None:
        return []
    if is_text(content):
        return [_text_part(content)]
    found: list[Part] = []
    for kind, block, place in _blocks_of(content, where):
        found += _parts_of_block(kind, block, place, dropped)
    return found


def system_text(content: Raw, where: str, dropped: Dropped) -> str | Raw | None:
    """Return a system prompt as one string: blocks are joined by a blank line. None for an empty one."""
    if is_text(content):
        return content
    texts = []
    for kind, block, place in _blocks_of(content, where):
        if kind != "text":
            raise unsupported(place, f"a system block of type {kind!r} cannot be sent to chat completions")
        text = _string_of(_text_block(block, place, dropped)[0])
        if text.startswith(_BILLING):
            dropped.add("system[].x-anthropic-billing-header")
        else:
            texts.append(text)
    return "\n\n".join(texts) if texts else None


# --- turns ----------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Conversation:
    """Put chat messages together, turn by turn; tool results stand directly behind the calls they answer."""

    dropped: Dropped
    messages: list[dict[str, Any]] = attrs.Factory(list)
    _held: list[dict[str, Any]] = attrs.Factory(list)
    """User and system messages since the last assistant's: behind them may still come results."""

    def add(self, message: Members, where: str) -> None:
        """Add one turn. Raises RequestError."""
        role = read_text(message.get("role"), f"{where}.role")
        content = message.get("content")
        if content is None:
            raise malformed(f"{where}.content", "a string or an array")
        drop_rest(message, frozenset({"role", "content"}), "messages[]", self.dropped)
        place = f"{where}.content"
        if role == "user":
            self._add_user(content, place)
        elif role == "assistant":
            self._release()
            self._add_assistant(content, place)
        elif role == "system":
            self.add_system(content, place)
        else:
            raise unsupported(f"{where}.role", f"chat completions know no {role!r} in this place")

    def add_system(self, content: Raw, where: str) -> None:
        """Add a system prompt. Raises RequestError."""
        text = system_text(content, where, self.dropped)
        if text is not None:
            self._held.append({"role": "system", "content": text})

    def finish(self) -> list[dict[str, Any]]:
        """Return all messages."""
        self._release()
        return self.messages

    def _release(self) -> None:
        self.messages += self._held
        self._held.clear()

    def _add_user(self, content: Raw, where: str) -> None:
        if is_text(content):
            self._held.append({"role": "user", "content": content})
            return
        attached: list[Part] = []
        own: list[Part] = []
        for kind, block, place in _blocks_of(content, where):
            if kind == "tool_result":
                attached += self._add_tool_result(block, place)
            else:
                own += _parts_of_block(kind, block, place, self.dropped)
        parts = attached + own
        if len(parts) == 1 and parts[0]["type"] == "text":
            self._held.append({"role": "user", "content": parts[0]["text"]})
        elif parts:
            self._held.append({"role": "user", "content": parts})

    def _add_tool_result(self, block: Members, where: str) -> list[Part]:
        """Add a tool message, which holds text only; returns what must follow it in a user message."""
        drop_rest(block, _TOOL_RESULT, _CONTENT, self.dropped)
        call = read_text(block.get("tool_use_id"), f"{where}.tool_use_id")
        parts = parts_of(block.get("content"), f"{where}.content", self.dropped)
        texts = [part for part in parts if part["type"] == "text"]
        attached = [part for part in parts if part["type"] != "text"]
        is_error = bytes(block.get("is_error", b"")) == b"true"
        if len(texts) == 1 and not attached and not is_error:
            text = texts[0]["text"]
        else:
            lines = [_string_of(part) for part in texts]
            if attached:
                lines.append(f"[attached in the next user message: {len(attached)}]")
            text = "\n".join(lines)
            if is_error:
                text = f"Error: {text}" if text else "Error"
        self.messages.append({"role": "tool", "tool_call_id": call, "content": text})
        return [_text_part(f"Attached to the result of tool call {call}:"), *attached] if attached else []

    def _add_assistant(self, content: Raw, where: str) -> None:
        if is_text(content):
            self.messages.append({"role": "assistant", "content": content})
            return
        texts: list[list[str]] = [[]]
        calls: list[dict[str, Any]] = []
        for kind, block, place in _blocks_of(content, where):
            if kind == "text":
                texts[-1].append(_string_of(_text_block(block, place, self.dropped)[0]))
                continue
            texts.append([])
            if kind == "tool_use":
                calls.append(self._call(block, place))
            elif kind in ("thinking", "redacted_thinking"):
                self.dropped.add(f"{_CONTENT}.{kind}")
            else:
                raise unsupported(place, f"an assistant's block of type {kind!r} cannot be sent to chat completions")
        text = "\n\n".join("".join(run) for run in texts if run)
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = calls
        if text or calls:
            self.messages.append(message)

    def _call(self, block: Members, where: str) -> dict[str, Any]:
        drop_rest(block, _TOOL_USE, _CONTENT, self.dropped)
        arguments = block.get("input", _NULL)
        read_as(Members, arguments, f"{where}.input")
        text = bytes(arguments).decode("utf-8", "replace")
        function = {"name": read_text(block.get("name"), f"{where}.name"), "arguments": text}
        return {"id": read_text(block.get("id"), f"{where}.id"), "type": "function", "function": function}


def chat_messages(body: Members, dropped: Dropped) -> list[dict[str, Any]]:
    """Return the system prompt and the turns of a request as chat messages. Raises RequestError."""
    conversation = Conversation(dropped)
    if "system" in body:
        conversation.add_system(body["system"], "system")
    role = None
    turns = read_array(body.get("messages"), "messages")
    for number, raw in enumerate(turns):
        message = read_object(raw, f"messages[{number}]")
        conversation.add(message, f"messages[{number}]")
        role = bytes(message["role"])
    if role == b'"assistant"':
        raise unsupported(f"messages[{len(turns) - 1}]", "chat completions do not continue an assistant's last message")
    return conversation.finish()
