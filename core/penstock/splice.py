"""Byte-exact look-ups and edits in raw JSON: every byte outside an edit stays as it came.

Nothing is parsed into a tree and written back. A scanner walks along the path asked for and skips the rest:

- Work is linear in the body; nesting is followed with an explicit stack, so only memory bounds the depth.
- Along the path the grammar is enforced. In what is skipped only strings and brackets are checked, so
  spellings that some parsers accept (``NaN``, raw control characters) never stop an edit elsewhere. A walk
  ends early once no further spelling of the wanted name can follow.
- Member names are compared after unescaping. With duplicate names a look-up takes the last one, as most
  parsers do; an edit changes all of them, so that no parser downstream can see the old value.
"""

import json
import re
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple

Path = tuple[str | int, ...]

_SPACE = b" \t\n\r"
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_BRACE, _BRACKET, _BRACE_END, _BRACKET_END = b"{[}]"
_CLOSER = {_BRACE: _BRACE_END, _BRACKET: _BRACKET_END}

# Short strings and small containers are matched inside one regex step; long strings are left to bytes.find,
# which is an order of magnitude faster per byte. Nothing is matched twice but what a failed fold has looked at,
# at most once per fold level: single classes are possessive, repeated groups stand in atomic groups (possessive
# ones match wrongly before CPython 3.11.5). Their counts are bounded because the matcher keeps some hundred
# bytes per repetition until the group ends.
_WS = rb"[ \t\n\r]*+"
_PLAIN = rb'[^"{}\[\]]*+'
_SHORT = rb'"[^"]{0,256}+(?<!\\)"'
_RUN = _PLAIN + rb"(?>(?:" + _SHORT + _PLAIN + rb"){0,2000})"
_LEAF = rb"(?:\{" + _RUN + rb"\}|\[" + _RUN + rb"\])"
_RUN2 = _PLAIN + rb"(?>(?:(?:" + _SHORT + rb"|" + _LEAF + rb")" + _PLAIN + rb"){0,2000})"
_FOLD = rb"(?:\{" + _RUN2 + rb"\}|\[" + _RUN2 + rb"\])"
_BARE = rb"[-+.\w]++"
_VALUE = rb"(" + _SHORT + rb"|" + _BARE + rb"|" + _FOLD + rb")"

_space = re.compile(_WS).match
_bare = re.compile(_BARE).match
_member = re.compile(rb"(" + _SHORT + rb")" + _WS + rb":" + _WS + _VALUE + _WS + rb"([,}])" + _WS).match
_element = re.compile(rb"()" + _VALUE + _WS + rb"([,\]])" + _WS).match
_to_bracket = re.compile(
    _PLAIN + rb"(?>(?:(?:" + _SHORT + rb"|" + _FOLD + rb")" + _PLAIN + rb'){0,2000})(["{}\[\]])'
).match
_to_name = re.compile(
    _PLAIN + rb"(?>(?:" + _SHORT + rb"(?!" + _WS + rb":)" + _PLAIN + rb'){0,2000})(?:([{}\[\]])|(?="))'
).match
# A quote that is not behind exactly one or exactly three backslashes, which is how the usual escaped ones come.
_unusual_quote = re.compile(rb'"(?<![^\\]\\")(?<![^\\]\\\\\\")').search
_rest_of_string = re.compile(rb'[^"\\]*+(?>(?:(?>(?:\\.[^"\\]*+){1,2000}))*)"', re.DOTALL).match

_Item = tuple[int, int, int, int]  # of a child: name start, name end, value start, value end


class SpliceError(ValueError):
    """Report JSON that cannot be walked, a missing member, or edits that overlap."""


class Span(NamedTuple):
    """Mark ``body[start:end]``, the bytes of one JSON value."""

    start: int
    """Offset of its first byte."""
    end: int
    """Offset behind its last byte."""


class Child(NamedTuple):
    """Mark a member (``key`` spans its quoted name) or an element (``key`` is empty) and its value."""

    key: Span
    """Of the quoted name."""
    value: Span
    """Of the value."""


def quote(text: str) -> bytes:
    """Encode text as a JSON string, UTF-8, escaping only what JSON demands (and lone surrogates)."""
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(text).encode()


def root(body: bytes) -> Span:
    """Find the top-level value; that it is one value, and nothing else, is not checked."""
    start = _after_space(body, len(_BOM) if body.startswith(_BOM) else 0)
    end = len(body.rstrip(_SPACE))
    if start >= end:
        raise SpliceError(f"offset {start}: expected a value")
    return Span(start, end)


def find(body: bytes, path: Path) -> Span | None:
    """Find the value at path, the last one where names are duplicated; negative indexes count from the end.

    None where it is not there: no such member or element, or a step that meets no object, or no array, as a name does
    in a string, null or an array. Raises SpliceError where the walk meets malformed JSON.
    """
    span = root(body)
    for depth, step in enumerate(path):
        found = list(_matches(body, span, step, whole=depth == 0))
        if not found:
            return None
        span = found[-1]
    return span


def find_all(body: bytes, path: Path) -> list[Span]:
    """Find the values at path under every duplicate of every name on it, in order of appearance."""
    spans = [root(body)]
    for depth, step in enumerate(path):
        spans = [hit for span in spans for hit in _matches(body, span, step, whole=depth == 0)]
    return spans


def children(body: bytes, span: Span) -> Iterator[Child]:
    """Walk the members or elements of the value at span; a string, number or literal has none."""
    for key_start, key_end, start, end in _walk(body, span.start, whole=False):
        yield Child(Span(key_start, key_end), Span(start, end))


def key_of(body: bytes, child: Child) -> str:
    """Decode a member's name (``""`` for an element)."""
    start, end = child.key
    return _decode_name(body[start:end], start) if start < end else ""


def edit(body: bytes, edits: Iterable[tuple[Span, bytes]]) -> bytes:
    """Apply several replacements of spans in one pass; raises SpliceError if two overlap."""
    pieces: list[bytes] = []
    position = 0
    for (start, end), value in sorted(edits, key=lambda item: item[0]):
        if start < position:
            raise SpliceError(f"offset {start}: expected edits that do not overlap")
        pieces += (body[position:start], value)
        position = end
    if not pieces:
        return body
    pieces.append(body[position:])
    return b"".join(pieces)


def replace(body: bytes, path: Path, value: bytes) -> bytes:
    """Replace the value at path, in every duplicate, by value (JSON bytes, not checked).

    Raises SpliceError if the path is absent.
    """
    spans = find_all(body, path)
    if not spans:
        raise SpliceError(f"offset 0: expected a value at {_spell(path)}")
    return edit(body, [(span, value) for span in spans])


def insert(body: bytes, path: Path, name: str, value: bytes) -> bytes:
    """Add a member at the end of the object at path, in every duplicate of it.

    White space before the closing brace is kept. A member of that name is not looked for: use put where there
    may be one. Raises SpliceError if the path is absent or no object.
    """
    spans = find_all(body, path)
    if not spans:
        raise SpliceError(f"offset 0: expected an object at {_spell(path)}")
    member = quote(name) + b":" + value
    edits = []
    for start, end in spans:
        if body[start] != _BRACE or _value_end(body, start) != end:
            raise SpliceError(f"offset {start}: expected an object")
        last = start + len(body[start : end - 1].rstrip(_SPACE))
        edits.append((Span(last, last), member if last == start + 1 else b"," + member))
    return edit(body, edits)


def append_member(body: bytes, name: str, value: bytes) -> bytes:
    """Add a member at the end of a top-level object without scanning it.

    Only for a body known to be a valid JSON object; raises SpliceError if it does not end like one.
    """
    inner = body.rstrip(_SPACE)
    if not inner.endswith(b"}"):
        raise SpliceError(f"offset {len(inner)}: expected the end of an object")
    inner = inner[:-1].rstrip(_SPACE)
    comma = b"" if inner.endswith(b"{") else b","
    return b"".join((inner, comma, quote(name), b":", value, body[len(inner) :]))


def put(body: bytes, path: Path, value: bytes) -> bytes:
    """Replace the member at path, or add it to the object above; raises SpliceError if that is absent."""
    spans = find_all(body, path)
    if spans:
        return edit(body, [(span, value) for span in spans])
    if not path or not isinstance(path[-1], str):
        raise SpliceError(f"offset 0: expected a value at {_spell(path)}")
    return insert(body, path[:-1], path[-1], value)


def remove(body: bytes, path: Path) -> bytes:
    """Remove the member or element at path, every duplicate, each with one comma; absent: the same body."""
    if not path:
        raise SpliceError("offset 0: expected a path of at least one step")
    cuts: list[tuple[Span, bytes]] = []
    for parent in find_all(body, path[:-1]):
        items = list(_walk(body, parent.start, whole=len(path) == 1))
        doomed = set(_matching(body, items, path[-1], parent.start))
        kept = False
        for index, (start, _, _, end) in enumerate(items):
            if index not in doomed:
                kept = True
            elif kept:  # with the comma in front, and the white space before that
                cuts.append((Span(items[index - 1][3], end), b""))
            else:  # with the comma behind, if there is one, and the white space after that
                cuts.append((Span(start, items[index + 1][0] if index + 1 < len(items) else end), b""))
    return edit(body, cuts)


def remove_everywhere(body: bytes, name: str) -> bytes:
    """Remove every member called name at any depth, in one pass; absent: the same body."""
    wanted = name.encode("utf-8", "surrogatepass")
    if wanted not in body and (b"\\u" if _is_plain(name) else b"\\") not in body:
        return body
    cuts: list[tuple[Span, bytes]] = []
    stack: list[list[int]] = []  # per open container: the closing bracket it needs, whether a member stays
    position = root(body).start
    while (found := _to_name(body, position)) is not None:
        position = found.end()
        if found[1]:
            _nest(body, position - 1, stack)
            continue
        end = _string_end(body, position)
        colon = _after_space(body, end)
        if body[colon : colon + 1] != b":" or not stack:
            position = end
        elif not _is_name(body, position, end, wanted):
            stack[-1][1] = True
            position = colon + 1
        else:
            position = _cut_member(body, position, colon + 1, kept=bool(stack[-1][1]), cuts=cuts)
    if stack:
        raise SpliceError(f"offset {len(body)}: expected {chr(stack[-1][0])}")
    return edit(body, cuts)


def _cut_member(body: bytes, start: int, value: int, *, kept: bool, cuts: list[tuple[Span, bytes]]) -> int:
    """Cut the member that starts at start; return where the walk goes on."""
    end = _value_end(body, _after_space(body, value))
    follower = _after_space(body, end)
    if kept:
        start -= 1
        while body[start] in _SPACE:
            start -= 1
    elif body[follower : follower + 1] == b",":
        end = follower = _after_space(body, follower + 1)
    cuts.append((Span(start, end), b""))
    return end


def _nest(body: bytes, position: int, stack: list[list[int]]) -> None:
    """Account for the bracket at position."""
    closer = _CLOSER.get(body[position])
    if closer is not None:
        stack.append([closer, False])
    elif not stack or stack.pop()[0] != body[position]:
        raise SpliceError(f"offset {position}: expected no {chr(body[position])} here")


def _spell(path: Path) -> str:
    return "/" + "/".join(map(str, path))


def _matches(body: bytes, span: Span, step: str | int, *, whole: bool) -> Iterator[Span]:
    """Yield the values of those children of the value at span that one step of a path means."""
    items = _walk(body, span.start, whole=whole)
    if isinstance(step, int) or body[span.start] != _BRACE:
        known = list(items)
        for index in _matching(body, known, step, span.start):
            yield Span(known[index][2], known[index][3])
        return
    wanted = step.encode("utf-8", "surrogatepass")
    first = True
    for key_start, key_end, start, end in items:
        if _is_name(body, key_start, key_end, wanted):
            yield Span(start, end)
            if first and _is_last(body, Span(end, span.end), step, wanted):
                return
            first = False


def _is_last(body: bytes, rest: Span, name: str, wanted: bytes) -> bool:
    """Tell cheaply that no spelling of the name occurs in the rest, so that the walk can stop."""
    return (
        _is_plain(name)
        and body.find(b'"' + wanted + b'"', rest.start, rest.end) < 0
        and body.find(b"\\u", rest.start, rest.end) < 0
    )


def _is_plain(name: str) -> bool:
    """Tell whether no character of the name has an escape other than \\uXXXX."""
    return name.isascii() and name.isidentifier()


def _matching(body: bytes, items: list[_Item], step: str | int, start: int) -> Iterator[int]:
    """Yield the indexes of those children of the value at start that one step of a path means."""
    if isinstance(step, int):
        if body[start] == _BRACKET and -len(items) <= step < len(items):
            yield step % len(items)
    elif body[start] == _BRACE:
        wanted = step.encode("utf-8", "surrogatepass")
        for index, item in enumerate(items):
            if _is_name(body, item[0], item[1], wanted):
                yield index


def _is_name(body: bytes, start: int, end: int, wanted: bytes) -> bool:
    """Compare the quoted name at body[start:end]; an escaped spelling is always the longer one."""
    length = end - start - 2
    if length == len(wanted):
        return body.startswith(wanted, start + 1) and _BACKSLASH not in wanted
    if length < len(wanted) or body.find(b"\\", start, end) < 0:
        return False
    return _decode_name(body[start:end], start).encode("utf-8", "surrogatepass") == wanted


def _decode_name(raw: bytes, offset: int) -> str:
    if b"\\" not in raw:
        return raw[1:-1].decode("utf-8", "replace")
    try:
        name: str = json.loads(raw.decode("utf-8", "replace"), strict=False)
    except ValueError:
        raise SpliceError(f"offset {offset}: expected a well-formed string") from None
    return name


def _walk(body: bytes, start: int, *, whole: bool) -> Iterator[_Item]:
    """Yield each child of the value at start.

    whole: the value is the top-level one, nothing but white space may follow it.
    """
    opener = body[start]
    closer = _CLOSER.get(opener)
    if closer is None:
        end = _value_end(body, start)
    elif body[(position := _after_space(body, start + 1)) : position + 1] == bytes((closer,)):
        end = position + 1
    else:
        end = yield from _walk_filled(body, position, opener, closer)
    if whole and _after_space(body, end) != len(body):
        raise SpliceError(f"offset {end}: expected nothing behind the value")


def _walk_filled(body: bytes, position: int, opener: int, closer: int) -> Generator[_Item, None, int]:
    """Yield the children of a container that has some, the first at position; return the container's end."""
    named = opener == _BRACE
    while True:
        found = _member(body, position) if named else _element(body, position)
        if found is None:
            item = _child(body, position, named=named)
            at = _after_space(body, item[3])
            position = at + 1
        else:
            item = (found.start(1), found.end(1), found.start(2), found.end(2))
            at = found.start(3)
            position = found.end()
        yield item
        separator = body[at] if at < len(body) else None
        if separator == closer:
            return at + 1
        if separator != _COMMA:
            raise SpliceError(f"offset {at}: expected a comma or {chr(closer)}")
        if found is None:
            position = _after_space(body, position)


def _child(body: bytes, position: int, *, named: bool) -> _Item:
    """Measure one child the slow way: one with long strings or deep nesting, or a malformed one."""
    if not named:
        return position, position, position, _value_end(body, position)
    if body[position : position + 1] != b'"':
        raise SpliceError(f"offset {position}: expected a member name")
    key_end = _string_end(body, position)
    colon = _after_space(body, key_end)
    if body[colon : colon + 1] != b":":
        raise SpliceError(f"offset {colon}: expected a colon")
    value = _after_space(body, colon + 1)
    return position, key_end, value, _value_end(body, value)


def _after_space(body: bytes, position: int) -> int:
    return _space(body, position).end()  # type: ignore[union-attr]  # it also matches nothing


def _value_end(body: bytes, position: int) -> int:
    """Find the end of the value that starts at position."""
    first = body[position] if position < len(body) else None
    if first == _QUOTE:
        return _string_end(body, position)
    if first in (_BRACE, _BRACKET):
        return _container_end(body, position)
    found = _bare(body, position)
    if found is None:
        raise SpliceError(f"offset {position}: expected a value")
    return found.end()


def _string_end(body: bytes, position: int) -> int:
    """Find the end of the string whose opening quote is at position."""
    end = body.find(b'"', position + 1)
    if end >= 0 and body[end - 1] == _BACKSLASH:
        found = _unusual_quote(body, end)
        if found and body[found.end() - 2] == _BACKSLASH:  # behind two or more than three of them: count
            before = len(body[position : found.end() - 1].rstrip(b"\\"))
            found = _rest_of_string(body, position + before)
        end = found.end() - 1 if found else -1
    if end < 0:
        raise SpliceError(f"offset {position}: expected a string that ends")
    return end + 1


def _container_end(body: bytes, position: int) -> int:
    """Find the end of the object or array that starts at position, whatever its depth."""
    stack = bytearray((_CLOSER[body[position]],))
    position += 1
    while (found := _to_bracket(body, position)) is not None:
        position = found.end()
        mark = body[position - 1]
        if mark == _QUOTE:
            position = _string_end(body, position - 1)
        elif mark in (_BRACE, _BRACKET):
            stack.append(_CLOSER[mark])
        elif stack.pop() != mark:
            raise SpliceError(f"offset {position - 1}: expected no {chr(mark)} here")
        elif not stack:
            return position
    raise SpliceError(f"offset {len(body)}: expected {chr(stack[-1])}")
