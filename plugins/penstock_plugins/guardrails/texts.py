"""Where the texts are in a body: strings a model reads, or wrote, found as spans so that each can be replaced alone.

Bodies are walked, not decoded: under the members that hold contents every string counts, but for those that are known
to be none (ids, types, URLs, base64). What a vendor adds tomorrow is therefore seen rather than missed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

import attrs

from penstock import TextEdit, TextKind
from penstock.splice import Span, SpliceError, children, edit, key_of, quote, root

Path = tuple[str | int, ...]
MAX_DEPTH = 100
REQUEST_ROOTS = frozenset((
    "messages", "system", "input", "instructions", "prompt", "suffix", "contents", "content", "systemInstruction",
    "system_instruction", "requests", "generateContentRequest", "generate_content_request", "batch", "instances",
    "title", "prediction", "documents",
))  # fmt: skip
"""Top-level members of requests that models read."""
ANSWER_ROOTS = frozenset((
    "choices", "content", "output", "output_text", "candidates", "text", "message", "delta", "content_block", "data",
    "error", "segments", "words", "response", "responses", "outputs", "interaction", "steps",
))  # fmt: skip
"""Top-level members of answers, and of events, that people read."""
EVENT_ROOTS = frozenset(("text", "part", "item", "response", "arguments", "refusal", "input", "error"))
"""Those of events of the Responses API that repeat what its deltas said."""
_NO_TEXT = frozenset((
    "type", "role", "id", "index", "object", "status", "model", "tool_call_id", "tool_use_id", "call_id", "item_id",
    "name", "url", "image_url", "file_url", "file_data", "file_id", "filename", "data", "signature", "thoughtSignature",
    "encrypted_content", "media_type", "mime_type", "mimeType", "format", "detail", "cache_control", "fileUri",
    "finish_reason", "finishReason", "stop_reason", "service_tier", "system_fingerprint", "logprobs", "logprobsResult",
    "b64_json", "annotations", "citations", "instructions", "tools", "metadata", "usage", "phase",
))  # fmt: skip
"""Members that are not read as text, with all below them, where the vendor decides what members there are."""
_FREE = frozenset(("input", "args", "response", "arguments", "parameters", "variables"))
"""Objects whose members the client or the model chose: every string in them counts."""
_decode = json.JSONDecoder(strict=False).decode
_OPEN, _LIST, _QUOTE = b'{["'
_LIKELIHOODS = re.compile(rb'"logprobs(?:Result)?"')


@attrs.frozen(eq=False)
class Text:
    """One string of a body."""

    path: Path
    """Members and positions, from the top."""
    span: Span
    """Its bytes, quotes included."""
    text: str = attrs.field(repr=False)
    """Decoded."""
    is_raw: bool = False
    """Whether the bytes are no JSON string but the text itself."""

    def spelled(self, text: str) -> bytes:
        """Return another text as it would stand in the body."""
        return text.encode("utf-8", "surrogatepass") if self.is_raw else quote(text)


class UnreadableError(ValueError):
    """Report a body whose texts cannot be found."""


def texts_in(body: bytes, roots: frozenset[str], *, by_index: bool = False) -> list[Text]:
    """Return the texts under the given top-level members, in order. Raises UnreadableError.

    A top-level array counts as its elements. ``by_index``: elements with a member ``index`` go by that in paths, so
    that parts of one text in several events have one path.
    """
    try:
        whole = root(body)
        tops = [whole] if body[whole.start] != _LIST else [child.value for child in children(body, whole)]
        return [text for top in tops for text in _under(body, top, roots, by_index=by_index)]
    except (SpliceError, ValueError, RecursionError) as error:
        raise UnreadableError("its JSON cannot be read") from error


def _under(body: bytes, top: Span, roots: frozenset[str], *, by_index: bool) -> Iterator[Text]:
    walker = _Walker(body, by_index=by_index)
    base: Path = ()
    members = [(key_of(body, child), child.value) for child in children(body, top)]
    if by_index:
        base = tuple(_number(body, span) for name, span in members if name in ("output_index", "index"))
    for name, span in members:
        if name in roots and body[top.start] == _OPEN:
            yield from walker.walk(span, (*base, name), is_free=False)


@attrs.frozen(eq=False)
class _Walker:
    body: bytes
    by_index: bool

    def walk(self, start: Span, path: Path, *, is_free: bool) -> Iterator[Text]:
        """Yield the strings of a value in order, whatever its depth up to the bound."""
        waiting = [(start, path, is_free)]
        while waiting:
            span, path, is_free = waiting.pop()
            first = self.body[span.start]
            if first == _QUOTE:
                yield Text(path, span, decoded(self.body[span.start : span.end]))
            elif first in (_OPEN, _LIST):
                if len(path) > MAX_DEPTH:
                    raise UnreadableError("it is nested too deeply")
                waiting += reversed(list(self._children(span, path, is_free=is_free)))

    def _children(self, span: Span, path: Path, *, is_free: bool) -> Iterator[tuple[Span, Path, bool]]:
        body = self.body
        if body[span.start] == _LIST:
            for number, child in enumerate(children(body, span)):
                yield child.value, (*path, self._place(number, child.value)), is_free
            return
        members = [(key_of(body, child), child.value) for child in children(body, span)]
        is_text = any(name == "type" and _is(body, at, "text") for name, at in members)
        for name, value in members:
            if is_free or name not in _NO_TEXT or (name == "data" and is_text):
                yield value, (*path, name), is_free or (name in _FREE and body[value.start] == _OPEN)

    def _place(self, number: int, span: Span) -> int:
        if self.by_index and self.body[span.start] == _OPEN:
            for child in children(self.body, span):
                if key_of(self.body, child) == "index":
                    return _number(self.body, child.value)
        return number


def _is(body: bytes, span: Span, text: str) -> bool:
    """Tell whether a value is this string, however it is escaped."""
    raw = body[span.start : span.end]
    return raw.startswith(b'"') and decoded(raw) == text


def decoded(raw: bytes) -> str:
    """Decode a JSON string. Raises ValueError."""
    text = raw.decode("utf-8", "surrogatepass")
    if "\\" not in text:
        return text[1:-1]
    found: str = _decode(text)
    return found


def _number(body: bytes, span: Span) -> int:
    text = body[span.start : span.end]
    return int(text) if text.isdigit() and len(text) < 10 else -1


def raw_text(body: bytes) -> Text:
    """Return a body that is no JSON as one text."""
    return Text((), Span(0, len(body)), body.decode("utf-8", "replace"), is_raw=True)


def edited(body: bytes, changes: Iterable[tuple[Text, str]]) -> bytes:
    """Return the body with texts replaced, every other byte kept; token likelihoods, which repeat it, are blanked."""
    edits = [(text.span, text.spelled(new)) for text, new in changes if new != text.text]
    if not edits:
        return body
    body = edit(body, edits)
    return _without_likelihoods(body) if _LIKELIHOODS.search(body) else body


def _without_likelihoods(body: bytes) -> bytes:
    edits: list[tuple[Span, bytes]] = []
    try:
        waiting = [root(body)]
        while waiting:
            span = waiting.pop()
            for child in children(body, span):
                first = body[child.value.start]
                if key_of(body, child) in ("logprobs", "logprobsResult"):
                    if first in (_OPEN, _LIST):
                        edits.append((child.value, b"[]" if first == _LIST else b"null"))
                elif first in (_OPEN, _LIST):
                    waiting.append(child.value)
    except SpliceError:
        return body
    return edit(body, edits) if edits else body


def joined_edits(edits: Sequence[TextEdit]) -> list[TextEdit]:
    """Return edits of one text in order, those that overlap made one with the replacement of the first given."""
    numbered = sorted(enumerate(edits), key=lambda pair: (pair[1].start, pair[1].end, pair[0]))
    found: list[tuple[int, TextEdit]] = []
    for number, each in numbered:
        if found and each.start < found[-1][1].end:
            first, last = found[-1]
            keeper = last if first <= number else each
            merged = TextEdit(last.start, max(last.end, each.end), keeper.replacement, last.text)
            found[-1] = min(first, number), merged
        else:
            found.append((number, each))
    return [each for _, each in found]


def rewritten(text: str, edits: Sequence[TextEdit]) -> str:
    """Return a text with edits that do not overlap applied."""
    pieces: list[str] = []
    position = 0
    for each in edits:
        pieces += (text[position : each.start], each.replacement)
        position = each.end
    return "".join((*pieces, text[position:]))


def difference(before: str, after: str, text: int = 0) -> TextEdit:
    """Return the one edit that makes one text of another."""
    start = 0
    most = min(len(before), len(after))
    while start < most and before[start] == after[start]:
        start += 1
    end = 0
    while end < most - start and before[-1 - end] == after[-1 - end]:
        end += 1
    return TextEdit(start, len(before) - end, after[start : len(after) - end], text)


_REASONING = frozenset(("reasoning", "reasoning_content", "reasoning_details", "thinking", "summary"))
_TOOL = frozenset(("arguments", "tool_calls", "function_call", "partial_json", "input", "args"))


def kind_of(path: Path) -> TextKind:
    """Return what a text of an answer is by its place."""
    steps = {step for step in path if isinstance(step, str)}
    if steps & _TOOL:
        return "tool"
    return "reasoning" if steps & _REASONING else "content"
