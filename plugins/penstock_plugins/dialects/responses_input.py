"""Read ``input`` of a Responses request into entries: who says what, calls, and the results behind them. Sans-IO."""

from __future__ import annotations

import base64
from typing import Any

import attrs
import msgspec

from penstock import RequestError
from penstock_plugins.dialects.responses_events import Called
from penstock_plugins.dialects.responses_tools import flat_name, given_members
from penstock_plugins.dialects.shared import Dropped, Members, Raw, encode, read_as, refuse

_NULL = Raw(b"null")
_OURS = "penstock:"
"""What begins ``encrypted_content`` that was written here."""
_LEFT_OUT = frozenset({"web_search_call", "file_search_call"})
"""Items of tools run by OpenAI in earlier turns: what came of them is in the text behind them."""
_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})


@attrs.frozen
class Text:
    """Hold text."""

    text: str


@attrs.frozen
class Image:
    """Hold an image by URL, which may be a ``data:`` URL."""

    url: str
    param: str
    detail: str | None = None


@attrs.frozen
class File:
    """Hold a file by URL, which may be a ``data:`` URL."""

    url: str
    param: str
    name: str | None = None


Part = Text | Image | File


@attrs.frozen
class Said:
    """Hold a message."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    parts: tuple[Part, ...]


@attrs.frozen
class Thought:
    """Hold reasoning that was written here and can be given back."""

    kind: str
    """Who can take it: ``anthropic.thinking``, ``anthropic.redacted`` or the member of a chat message."""
    text: str
    seal: str = ""


@attrs.frozen
class Call:
    """Hold a tool call."""

    id: str
    name: str
    """The name the provider gets."""
    arguments: Raw
    """A JSON object, as it is spelled."""
    param: str


@attrs.frozen
class Result:
    """Hold what a tool call gave."""

    id: str
    parts: tuple[Part, ...]
    param: str


Entry = Said | Thought | Call | Result


class _Sealed(msgspec.Struct):
    kind: str
    seal: str = ""


def seal_thought(kind: str, seal: str = "") -> str:
    """Return ``encrypted_content`` by which a later request gives reasoning back to whoever thought it."""
    return _OURS + base64.b64encode(encode(_Sealed(kind, seal))).decode()


def read_input(members: Members, dropped: Dropped) -> list[Entry]:
    """Return the conversation, instructions first, each result directly behind its calls. Raises RequestError."""
    entries: list[Entry] = []
    if "instructions" in members:
        text = read_as(str, members["instructions"], "instructions")
        if text:
            entries.append(Said("system", (Text(text),)))
    raw = members.get("input")
    if raw is None:
        raise RequestError("bad_request", "input is missing.", param="input")
    if bytes(raw).startswith(b'"'):
        return [*entries, Said("user", (Text(read_as(str, raw, "input")),))]
    reader = _Reader(dropped)
    for number, element in enumerate(read_as(list[Raw], raw, "input")):
        where = f"input[{number}]"
        item = given_members(read_as(Members, element, where))
        entry = reader.read(item, where)
        if entry is not None:
            entries.append(entry)
    return _paired(entries)


def _paired(entries: list[Entry]) -> list[Entry]:
    """Put the results of calls made in a row directly behind the row: providers insist on it."""
    results = _by_call(entries)
    ordered: list[Entry] = []
    waiting: list[Result] = []
    for entry in entries:
        if isinstance(entry, Result) or (isinstance(entry, Said) and entry.role != "assistant"):
            ordered += waiting
            waiting.clear()
        if not isinstance(entry, Result):
            ordered.append(entry)
        if isinstance(entry, Call):
            waiting.append(results[id(entry)])
    return ordered + waiting


def _by_call(entries: list[Entry]) -> dict[int, Result]:
    """Return the result of each call by the call's identity; ids may be used again once they are answered."""
    calls: dict[str, Call] = {}
    results: dict[int, Result] = {}
    for entry in entries:
        if isinstance(entry, Call):
            if entry.id in calls:
                raise _unpaired(calls[entry.id].param, "call has no output")
            calls[entry.id] = entry
        elif isinstance(entry, Result):
            call = calls.pop(entry.id, None)
            if call is None:
                raise _unpaired(entry.param, "output answers no call before it")
            results[id(call)] = entry
    for call in calls.values():
        raise _unpaired(call.param, "call has no output")
    return results


def _unpaired(param: str, what: str) -> RequestError:
    return RequestError("bad_request", f"{param}: this {what}.", param=f"{param}.call_id")


class _Reader:
    """Read items one by one."""

    def __init__(self, dropped: Dropped) -> None:
        self.dropped = dropped

    def read(self, item: Members, where: str) -> Entry | None:
        """Return what an item holds, None for one that is left out. Raises RequestError."""
        kind = _string(item, "type", where) if "type" in item else "message" if "role" in item else "item_reference"
        if kind == "message":
            return self._message(item, where)
        if kind in ("function_call", "custom_tool_call"):
            return _call(kind, item, where)
        if kind in ("function_call_output", "custom_tool_call_output"):
            parts = self._parts(item.get("output", _NULL), f"{where}.output")
            return Result(_string(item, "call_id", where), parts, where)
        if kind == "reasoning":
            return self._thought(item, where)
        if kind in _LEFT_OUT:
            self.dropped.add(f"input[].{kind}")
            return None
        if kind == "item_reference":
            raise refuse(where, f"{where}: answers are not stored here; send the item itself instead of a reference.")
        raise refuse(f"{where}.type", f"{where}: an item of type {kind[:100]!r} cannot be given to the provider asked.")

    def _message(self, item: Members, where: str) -> Said:
        role = _string(item, "role", where)
        if role not in ("system", "developer", "user", "assistant"):
            raise RequestError("bad_request", f"{where}.role is none of this API.", param=f"{where}.role")
        parts = self._parts(item.get("content", _NULL), f"{where}.content")
        if role != "user" and not all(isinstance(part, Text) for part in parts):
            raise refuse(f"{where}.content", f"{where}.content: only users may send images and files.")
        return Said("system" if role == "developer" else role, parts)

    def _thought(self, item: Members, where: str) -> Thought | None:
        sealed = _unsealed(item, where)
        if sealed is None:
            self.dropped.add("input[].reasoning")
            return None
        summary = read_as(list[dict[str, Any]], item.get("summary", Raw(b"[]")), f"{where}.summary")
        return Thought(sealed.kind, "".join(str(part.get("text", "")) for part in summary), sealed.seal)

    def _parts(self, raw: Raw, where: str) -> tuple[Part, ...]:
        if bytes(raw).startswith(b'"'):
            return (Text(read_as(str, raw, where)),)
        elements = read_as(list[Members], raw, where)
        return tuple(self._part(element, f"{where}[{at}]") for at, element in enumerate(elements))

    def _part(self, given: Members, where: str) -> Part:
        part = given_members(given)
        kind = _string(part, "type", where)
        if "prompt_cache_breakpoint" in part:
            self.dropped.add("input[].content[].prompt_cache_breakpoint")
        if kind in _TEXT_PARTS:
            return Text(_string(part, "text", where))
        if kind == "refusal":
            return Text(_string(part, "refusal", where))
        if "file_id" in part:
            raise refuse(f"{where}.file_id", f"{where}: files kept by OpenAI are not known to the provider asked.")
        if kind == "input_image":
            detail = _string(part, "detail", where) if "detail" in part else None
            return Image(_string(part, "image_url", where), f"{where}.image_url", detail)
        if kind == "input_file":
            return _file(part, where)
        raise refuse(f"{where}.type", f"{where}: content of type {kind[:100]!r} cannot be translated.")


def _file(part: Members, where: str) -> File:
    name = _string(part, "filename", where) if "filename" in part else None
    if "file_url" in part:
        return File(_string(part, "file_url", where), f"{where}.file_url", name)
    url = _string(part, "file_data", where)
    if not url.startswith("data:"):
        url = f"data:application/pdf;base64,{url}"
    return File(url, f"{where}.file_data", name)


def _call(kind: str, item: Members, where: str) -> Call:
    namespace = _string(item, "namespace", where) if "namespace" in item else None
    name = flat_name(Called(_string(item, "name", where), namespace=namespace))
    call_id = _string(item, "call_id", where)
    if kind == "custom_tool_call":
        return Call(call_id, name, Raw(encode({"input": _string(item, "input", where)})), where)
    return Call(call_id, name, _arguments(_string(item, "arguments", where)), where)


def _arguments(text: str) -> Raw:
    """Return arguments as a JSON object; what a model wrote that is none becomes its only member."""
    if not text.strip():
        return Raw(b"{}")
    data = text.encode("utf-8", "replace")
    try:
        msgspec.json.decode(data, type=dict[str, Raw])
    except (ValueError, RecursionError):
        return Raw(encode({"arguments": text}))
    return Raw(data)


def _unsealed(item: Members, where: str) -> _Sealed | None:
    """Return what was sealed here; None for reasoning of others."""
    if "encrypted_content" not in item:
        return None
    text = _string(item, "encrypted_content", where)
    if not text.startswith(_OURS):
        return None
    try:
        return msgspec.json.decode(base64.b64decode(text[len(_OURS) :], validate=True), type=_Sealed)
    except ValueError:
        return None


def _string(members: Members, name: str, where: str) -> str:
    return read_as(str, members.get(name, _NULL), f"{where}.{name}")
