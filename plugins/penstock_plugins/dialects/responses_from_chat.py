"""Read what chat completions answer into a response of the Responses API: bodies, chunks, errors. Sans-IO."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from penstock import UpstreamError
from penstock_plugins.dialects.responses_events import Reason, ResponseWriter, Spent
from penstock_plugins.dialects.responses_input import seal_thought
from penstock_plugins.dialects.shared import Raw, encode, openai_error, read_error

THOUGHTS = ("reasoning_content", "reasoning")
"""Members of a chat message in which servers tell what a model thinks; the first is the more widespread."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Raw = Raw(b"null")


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: Any = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice] | None = None
    model: str | None = None
    created: float | None = None
    usage: dict[str, Any] | None = None
    x_groq: dict[str, Any] | None = None
    error: Any = None


_read_completion = msgspec.json.Decoder(_Completion).decode
_INCOMPLETE: dict[str, Reason] = {
    "length": "max_output_tokens",
    "model_length": "max_output_tokens",
    "content_filter": "content_filter",
}


@attrs.define(eq=False)
class _Pending:
    """Hold a call whose name has not come yet."""

    id: str | None = None
    arguments: list[str] = attrs.Factory(list)


class ChatCompletionAnswer:
    """Read a chat completion, whole or in chunks, into a response; see ``shared.Answer``."""

    def __init__(self, writer: ResponseWriter) -> None:
        self._writer = writer
        self._finish: str | None = None
        self._usage: dict[str, Any] | None = None
        self._thought: str | None = None
        self._pending: dict[object, _Pending] = {}
        self._last: object = None

    def whole(self, body: bytes) -> bytes:
        completion = _read_completion(body)
        if not completion.choices:
            raise UpstreamError("protocol", "its answer holds no choice")
        self._take(completion)
        self._end()
        return encode(self._writer.whole)

    def error(self, status: int, body: bytes) -> bytes:
        error = read_error(body)
        return openai_error(error, status)

    def event(self, name: str | None, payload: bytes) -> bytes:
        writer = self._writer
        writer.is_stream = True
        if writer.is_ended:
            return b""
        if payload.strip() == b"[DONE]":
            if self._finish is None and not writer.has_output:
                raise UpstreamError("truncated", "its stream holds no answer")
            self._end()
            return writer.take()
        completion = _read_completion(payload)
        if completion.error or name == "error":
            error = read_error(payload)
            writer.fail(error.code or error.kind or "server_error", error.message)
            return writer.take()
        self._take(completion)
        return writer.take()

    def end(self) -> bytes:
        if not self._writer.is_ended:
            if self._finish is None:
                raise UpstreamError("truncated", "its stream ended before the answer was complete")
            self._end()
        return self._writer.take()

    def _take(self, completion: _Completion) -> None:
        created = None if completion.created is None else int(completion.created)
        self._writer.start(completion.model, created)
        usage = completion.usage or (completion.x_groq or {}).get("usage")
        if isinstance(usage, dict):
            self._usage = usage
        for choice in completion.choices or ():
            if choice.index in (0, None):
                if choice.message is not None:
                    _number(choice.message)
                self._take_message(choice.delta or choice.message or _Message())
                self._finish = choice.finish_reason or self._finish

    def _take_message(self, message: _Message) -> None:
        for kind in THOUGHTS:
            thought = getattr(message, kind)
            if isinstance(thought, str) and thought:
                self._think(kind, thought)
                break
        if isinstance(message.content, str):
            self._say(message.content)
        elif isinstance(message.content, list):
            self._take_parts(message.content)
        if message.refusal:
            self._seal()
            self._writer.refusal(message.refusal)
        for call in message.tool_calls or ():
            self._take_call(call)

    def _take_parts(self, parts: list[Any]) -> None:
        """Take content in parts, as Mistral writes it: text, and thinking that is made of texts."""
        for part in parts:
            if not isinstance(part, dict):
                continue
            if isinstance(part.get("text"), str):
                self._say(part["text"])
            elif isinstance(part.get("thinking"), list):
                texts = (each.get("text") for each in part["thinking"] if isinstance(each, dict))
                self._think("", "".join(text for text in texts if isinstance(text, str)))

    def _say(self, text: str) -> None:
        if text:
            self._seal()
            self._writer.text(text)

    def _think(self, kind: str, text: str) -> None:
        if text:
            self._thought = kind
            self._writer.reasoning(text)

    def _seal(self) -> None:
        """End the reasoning so that it can be given back in the member it came in."""
        thought, self._thought = self._thought, None
        if thought:
            self._writer.seal(seal_thought(thought))

    def _take_call(self, call: _ToolCall) -> None:
        function = call.function or _Function()
        arguments = _arguments_of(function.arguments)
        key = self._key_of(call)
        if self._writer.is_open(key):
            self._writer.arguments(key, arguments)
            return
        pending = self._pending.setdefault(key, _Pending())
        pending.id = pending.id or call.id
        pending.arguments.append(arguments)
        if function.name:
            self._seal()
            self._writer.call(key, function.name, pending.id)
            self._writer.arguments(key, "".join(pending.arguments))
            del self._pending[key]

    def _key_of(self, call: _ToolCall) -> object:
        """Return what tells calls apart: the index; of servers that send none, a new id begins a new call."""
        if call.index is not None:
            self._last = call.index
        elif call.id or self._last is None:
            self._last = call.id or object()
        elif call.function is not None and call.function.name:
            self._last = object()
        return self._last

    def _end(self) -> None:
        if self._finish == "error":
            self._writer.fail("server_error", "The provider ended its answer by an error.")
            return
        self._seal()
        self._writer.end(_spent(self._usage), _INCOMPLETE.get(self._finish or ""))


def _number(message: _Message) -> None:
    """Tell the calls of a whole message apart by their places."""
    for index, call in enumerate(message.tool_calls or ()):
        call.index = index


def _arguments_of(raw: Raw) -> str:
    """Return arguments as text; servers that send an object instead of a string are understood."""
    data = bytes(raw)
    if data == b"null":
        return ""
    return msgspec.json.decode(data, type=str) if data.startswith(b'"') else data.decode("utf-8", "replace")


def _spent(usage: dict[str, Any] | None) -> Spent | None:
    if usage is None:
        return None
    of_input, of_output = usage.get("prompt_tokens_details"), usage.get("completion_tokens_details")
    return Spent(
        _count(usage, "prompt_tokens"),
        _count(of_input, "cached_tokens") or _count(usage, "prompt_cache_hit_tokens"),
        _count(of_input, "cache_write_tokens"),
        _count(usage, "completion_tokens"),
        _count(of_output, "reasoning_tokens"),
    )


def _count(members: Any, name: str) -> int:
    found = members.get(name) if isinstance(members, dict) else None
    return found if type(found) is int else 0
