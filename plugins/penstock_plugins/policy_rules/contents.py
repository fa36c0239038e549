"""What a request body contains that rules are about: tools, MCP servers, URLs; sans-IO and read-only.

Of duplicate members every one counts, whatever a parser downstream makes of them. Each name is judged by itself, so a
tool that has both a type and a name needs both admitted.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from penstock.splice import Span, children, root

PLAIN_TYPES = frozenset(("function", "custom", "namespace", "mcp", "mcp_toolset"))
"""Types that say nothing about what a tool does; every other one names a tool the provider itself brings."""
_DECLARATIONS = ("functionDeclarations", "function_declarations")
_REQUESTS = frozenset(
    (
        "generateContentRequest",
        "generate_content_request",
        "batch",
        "inputConfig",
        "input_config",
        "requests",
        "request",
    )
)
"""Members of Gemini's batches and counts that hold requests, or lead to them."""
_OWN_TOOLS = frozenset((
    "googleSearch", "google_search", "googleSearchRetrieval", "google_search_retrieval", "codeExecution",
    "code_execution", "urlContext", "url_context", "computerUse", "computer_use", "fileSearch", "file_search",
    "googleMaps", "google_maps",
))  # fmt: skip
"""Gemini's tools as of today; in a tool without type and name every member is one."""
_SERVER_MEMBERS = ("server_label", "server_url", "connector_id", "mcp_server_name")
_MAX_DEPTH = 20
"""Of tools within tools; deeper ones are refused by who asks."""


class Found(NamedTuple):
    """One value that rules judge, and its place in the body."""

    kind: str
    """``tools`` or ``mcp``."""
    place: str
    """Such as ``tools[2].function.name``."""
    value: str


class DepthError(ValueError):
    """Report tools nested deeper than any request has them."""


def _members(body: bytes, span: Span) -> list[tuple[str, Span]]:
    if body[span.start] != ord("{"):
        return []
    return [(_string(body, child.key), child.value) for child in children(body, span)]


def _elements(body: bytes, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield what an array holds; an object counts as an array of one, as it does at Google."""
    if body[span.start] == ord("["):
        for number, child in enumerate(children(body, span)):
            yield number, child.value
    elif body[span.start] == ord("{"):
        yield 0, span


def _text(body: bytes, span: Span) -> str | None:
    return _string(body, span) if body[span.start] == ord('"') else None


def _string(body: bytes, span: Span) -> str:
    raw = body[span.start + 1 : span.end - 1].decode("utf-8", "replace")
    found: str = json.loads(f'"{raw}"', strict=False) if "\\" in raw else raw
    return found


def declared(body: bytes) -> Iterator[Found]:
    """Yield every name of a tool, and every name and URL of an MCP server, that a JSON object declares.

    Raises SpliceError for what is no JSON, DepthError for tools nested beyond reason, ValueError for a bad string.
    """
    yield from _request(body, root(body), "", 0)


def _request(body: bytes, top: Span, prefix: str, depth: int) -> Iterator[Found]:
    if depth > _MAX_DEPTH:
        raise DepthError(prefix)
    for name, span in _members(body, top):
        where = prefix + name
        if name == "tools":
            yield from _tools(body, span, where, depth)
        elif name == "functions":
            for number, each in _elements(body, span):
                yield from _strings(body, each, f"{where}[{number}]", "tools", ("name",))
        elif name == "mcp_servers":
            for number, each in _elements(body, span):
                yield from _strings(body, each, f"{where}[{number}]", "mcp", ("name", "url"))
        elif name == "web_search_options":
            yield Found("tools", where, name)
        elif name == "input":
            yield from _found_by_search(body, span, where, depth)
        elif name in _REQUESTS:
            for number, each in _elements(body, span):
                yield from _request(body, each, f"{where}[{number}].", depth + 1)


def _found_by_search(body: bytes, span: Span, place: str, depth: int) -> Iterator[Found]:
    """Yield the tools that items of a Responses request bring, such as ``tool_search_output``."""
    if body.find(b"tools", span.start, span.end) < 0 and body.find(b"\\u", span.start, span.end) < 0:
        return
    for number, each in _elements(body, span):
        for name, value in _members(body, each):
            if name == "tools":
                yield from _tools(body, value, f"{place}[{number}].tools", depth)


def _tools(body: bytes, span: Span, place: str, depth: int) -> Iterator[Found]:
    if depth > _MAX_DEPTH:
        raise DepthError(place)
    for number, each in _elements(body, span):
        yield from _tool(body, each, f"{place}[{number}]", depth)


def _tool(body: bytes, span: Span, place: str, depth: int) -> Iterator[Found]:
    members = _members(body, span)
    names = {name for name, _ in members}
    is_typed = not names.isdisjoint(("type", "name", "function"))
    for name, value in members:
        where = f"{place}.{name}"
        if name == "function":
            yield from _strings(body, value, where, "tools", ("name",))
        elif name in ("name", "type"):
            text = _text(body, value)
            if text is not None and not (name == "type" and text in PLAIN_TYPES):
                yield Found("tools", where, text)
        elif name in _SERVER_MEMBERS:
            text = _text(body, value)
            if text is not None:
                yield Found("mcp", where, text)
        elif name in _DECLARATIONS:
            for number, each in _elements(body, value):
                yield from _strings(body, each, f"{where}[{number}]", "tools", ("name",))
        elif name == "tools":
            yield from _tools(body, value, where, depth + 1)
        elif not is_typed or name in _OWN_TOOLS:  # Gemini's own tools are members: {"googleSearch": {}}
            yield Found("tools", where, name)


def _strings(body: bytes, span: Span, place: str, kind: str, names: tuple[str, ...]) -> Iterator[Found]:
    for name, value in _members(body, span):
        if name in names:
            text = _text(body, value)
            if text is not None:
                yield Found(kind, f"{place}.{name}", text)


# --- URLs -------------------------------------------------------------------------------------------------------------

# Escapes are undone whatever the number of backslashes before them: JSON within a string, such as the arguments of a
# tool call, is read as well. Each run of backslashes is looked at once, from its first.
_slashes = re.compile(rb"(?<!\\)\\++/").sub
_ascii_escapes = re.compile(rb"(?<!\\)\\++u00([0-7][0-9a-fA-F])").sub
_start = re.compile(rb"https?://").finditer
_end = re.compile(rb'[\x00-\x20"<>\x7f]|\\(?!u[0-9a-fA-F]{4})').search
_authority = re.compile(r"(https?://)([^/?#\\]*)(.*)", re.IGNORECASE | re.DOTALL).fullmatch
_TRAILING = ".,;:!?'`)]}*_~|"
"""What ends a sentence or a pair of brackets rather than a URL."""


class URL(NamedTuple):
    """One URL as rules judge it."""

    spellings: tuple[str, ...]
    """As it stands, to the next blank or quote; without what ends a sentence; all that may be denied."""
    plain: str
    """Up to the next URL within it, scheme and host in lower case, the host's percent-escapes undone."""


def urls_in(body: bytes) -> Iterator[URL]:
    """Yield every http(s) URL in a JSON text, each spelling once, in time linear in the body."""
    if b"\\u00" in body:
        body = _ascii_escapes(lambda found: bytes((int(found[1], 16),)), body)
    if b"\\/" in body:
        body = _slashes(b"/", body)
    starts = [found.start() for found in _start(body.lower())]
    if not starts:
        return
    seen: set[bytes] = set()
    number = 0
    while number < len(starts):
        start = starts[number]
        found = _end(body, start)
        end = len(body) if found is None else found.start()
        behind = bisect_left(starts, end, number)
        whole = body[start:end]
        if whole not in seen:
            seen.add(whole)
            bounds = [*starts[number:behind], end]
            for index, part_start in enumerate(bounds[:-1]):
                part = body[part_start : bounds[index + 1]]
                yield _url(part, whole if index == 0 else part)
        number = behind


def _url(part: bytes, whole: bytes) -> URL:
    text = _decoded(part)
    plain = _normal(text.rstrip(_TRAILING))
    spellings = (text,) if whole == part else (_decoded(whole), text)
    return URL(tuple(dict.fromkeys((*spellings, plain))), plain)


def _decoded(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace")
    if "\\u" not in text:
        return text
    found: str = json.loads(f'"{text}"')  # no quote, no control character and no other escape is left in it
    return found


def _normal(url: str) -> str:
    found = _authority(url)
    if found is None:
        return url
    host = unquote_to_bytes(found[2]).decode("utf-8", "replace") if "%" in found[2] else found[2]
    return f"{found[1].lower()}{host.lower()}{found[3]}"


def place_of(body: bytes, wanted: str) -> str | None:
    """Return where in a JSON text the string stands that holds a URL as ``urls_in`` spells it; None if unknown."""
    try:
        tree = json.loads(body.decode("utf-8-sig", "replace"), object_pairs_hook=_Pairs, parse_int=str, strict=False)
    except (ValueError, RecursionError):
        return None
    stack: list[tuple[str, Any]] = [("", tree)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, str):
            if _holds(value, wanted):
                return place
        elif isinstance(value, _Pairs):
            for name, each in reversed(value):
                if _holds(name, wanted):
                    return f"{place}.{name[:200]}".removeprefix(".")
                stack.append((f"{place}.{name}".removeprefix("."), each))
        elif isinstance(value, list):
            stack += [(f"{place}[{number}]", each) for number, each in reversed(list(enumerate(value)))]
    return None


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, duplicates included."""


def _holds(text: str, wanted: str) -> bool:
    if "http" not in text.lower():
        return False
    return any(
        wanted in url.spellings for url in urls_in(json.dumps(text, ensure_ascii=False).encode("utf-8", "replace"))
    )
