"""Write an answer of the Responses API from neutral deltas: its events, and the response object they add up to.

Invariants: sequence numbers and output indexes are contiguous from 0; every item and part that is added is done;
what ``response.completed`` holds is what was streamed. A whole answer is written by the same steps, without events.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal

import attrs
import msgspec

_encode = msgspec.json.encode
_ITEM_IDS = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_HAVE_STATUS = ("message", "function_call")
_FAILURE_CODES = frozenset({"rate_limit_exceeded", "insufficient_quota", "context_length_exceeded", "invalid_prompt"})
"""Codes that clients of the Responses API act upon; all others are ``server_error``."""
Reason = Literal["max_output_tokens", "content_filter"]


@attrs.frozen
class Spent:
    """Count tokens as the Responses API does: cached ones are part of the input, reasoning is part of the output."""

    input: int = 0
    cached: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the ``usage`` member."""
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": self.cache_write},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


@attrs.frozen
class Called:
    """Say what the client calls a tool, and which kind of call it expects."""

    name: str
    is_custom: bool = False
    namespace: str | None = None


@attrs.define(eq=False)
class _Item:
    """Gather one output item."""

    index: int
    id: str
    kind: str
    members: dict[str, Any]
    pieces: list[str] = attrs.Factory(list)
    """Text of the open part, of the reasoning or of the arguments."""
    parts: list[dict[str, Any]] = attrs.Factory(list)
    """Content parts that are done."""
    part_kind: str | None = None
    """The kind of the open part."""


class ResponseWriter:
    """Build one response. Sans-IO: ``take`` gives the events written since the last call.

    ``echo``: request members the response repeats. ``tools``: what the client calls the tools, by the provider's name.
    """

    __slots__ = (
        "_call_ids", "_calls", "_created", "_echo", "_id", "_model", "_next", "_out", "_output",
        "_sequence", "_speaking", "_token", "_tools", "is_ended", "is_started", "is_stream", "whole",
    )  # fmt: skip

    def __init__(self, echo: Mapping[str, Any], tools: Mapping[str, Called]) -> None:
        self._echo = echo
        self._tools = tools
        self._token = secrets.token_hex(12)
        self._id = f"resp_{self._token}"
        self._model: str | None = None
        self._created = int(time.time())
        self._sequence = self._next = 0
        self._out: list[bytes] = []
        self._output: dict[int, dict[str, Any]] = {}
        self._speaking: _Item | None = None
        self._calls: dict[object, _Item] = {}
        self._call_ids: set[str] = set()
        self.is_started = self.is_ended = False
        self.is_stream = False
        """Whether events are written."""
        self.whole: dict[str, Any] = {}
        """The response object, once it has ended."""

    def take(self) -> bytes:
        """Return the events written since the last call."""
        written = b"".join(self._out)
        self._out.clear()
        return written

    @property
    def has_output(self) -> bool:
        """Tell whether any output item was begun."""
        return self._next > 0

    def start(self, model: str | None, created: int | None = None) -> None:
        """Take what is known when the answer begins. Calls after the first are passed over."""
        if self.is_started:
            return
        self.is_started = True
        self._model = model
        self._created = self._created if created is None else created
        opening = self._response("in_progress")
        self._emit("response.created", response=opening)
        self._emit("response.in_progress", response=opening)

    def text(self, delta: str) -> None:
        """Take visible text."""
        self._say("output_text", delta)

    def refusal(self, delta: str) -> None:
        """Take text by which the model refuses."""
        self._say("refusal", delta)

    def reasoning(self, delta: str) -> None:
        """Take what the model thinks, as far as it may be read."""
        if not delta:
            return
        item = self._reasoning_item()
        if not item.pieces:
            part = {"type": "summary_text", "text": ""}
            self._emit("response.reasoning_summary_part.added", item, summary_index=0, part=part)
        item.pieces.append(delta)
        self._emit("response.reasoning_summary_text.delta", item, summary_index=0, delta=delta)

    def seal(self, encrypted: str) -> None:
        """End the reasoning with what gives it back to whoever thought it; without reasoning, one that is hidden."""
        self._reasoning_item().members["encrypted_content"] = encrypted
        self.close_speech()

    def call(self, key: object, name: str, call_id: str | None = None) -> None:
        """Begin a tool call; ``key`` names it until it is closed."""
        self.close_speech()
        called = self._tools.get(name) or Called(name)
        kind, argument = ("custom_tool_call", "input") if called.is_custom else ("function_call", "arguments")
        if not call_id or call_id in self._call_ids:  # clients tell calls apart by it
            call_id = f"call_{self._token}{self._next:x}"
        self._call_ids.add(call_id)
        members = {"call_id": call_id, "name": called.name, argument: ""}
        if called.namespace is not None:
            members["namespace"] = called.namespace
        self._calls[key] = self._add(kind, members)

    def arguments(self, key: object, delta: str) -> None:
        """Take a part of the arguments of a call that was begun, as text."""
        item = self._calls[key]
        if not delta:
            return
        item.pieces.append(delta)
        if item.kind == "function_call":
            self._emit("response.function_call_arguments.delta", item, delta=delta)

    def has_arguments(self, key: object) -> bool:
        """Tell whether any arguments of an open call have come."""
        return bool(self._calls[key].pieces)

    def is_open(self, key: object) -> bool:
        """Tell whether a call was begun and is not closed."""
        return key in self._calls

    def close_call(self, key: object, *, is_complete: bool = True) -> None:
        """End a call. One without arguments has an empty object."""
        if is_complete and not self.has_arguments(key):
            self.arguments(key, "{}")
        item = self._calls.pop(key)
        text = "".join(item.pieces)
        if item.kind == "custom_tool_call":
            text = _custom_input(text)
            if text:
                self._emit("response.custom_tool_call_input.delta", item, delta=text)
            self._emit("response.custom_tool_call_input.done", item, input=text)
            self._done(item, {"input": text}, is_complete)
            return
        self._emit("response.function_call_arguments.done", item, name=item.members["name"], arguments=text)
        self._done(item, {"arguments": text}, is_complete)

    def close_whole_call(self, key: object) -> None:
        """End a call unless its arguments were cut: that is closed with the answer, which says why."""
        if _is_json("".join(self._calls[key].pieces) or "{}"):
            self.close_call(key)

    def close_speech(self, *, is_complete: bool = True) -> None:
        """End the text or the reasoning that is open, if any."""
        item, self._speaking = self._speaking, None
        if item is None:
            return
        if item.kind == "message":
            self._close_part(item)
            self._done(item, {"content": item.parts}, is_complete)
            return
        text = "".join(item.pieces)
        summary = [{"type": "summary_text", "text": text}] if text else []
        if text:
            self._emit("response.reasoning_summary_text.done", item, summary_index=0, text=text)
            self._emit("response.reasoning_summary_part.done", item, summary_index=0, part=summary[0])
        self._done(item, {"summary": summary}, is_complete)

    def end(self, spent: Spent | None, incomplete: Reason | None = None) -> None:
        """End the answer, all that is open with it."""
        self.start(None)
        self.close_speech(is_complete=incomplete is None)
        for key in list(self._calls):
            self.close_call(key, is_complete=incomplete is None)
        status = "completed" if incomplete is None else "incomplete"
        self._finish(status, spent, incomplete_details=incomplete and {"reason": incomplete})

    def fail(self, code: str, message: str) -> None:
        """End the answer by an error of the provider's. Before anything was written that is an error event."""
        if not self.is_started:
            self.is_ended = True
            self._emit("error", code=code, message=message, param=None)
            return
        code = code if code in _FAILURE_CODES else "rate_limit_exceeded" if "rate_limit" in code else "server_error"
        self._finish("failed", None, error={"code": code, "message": message})

    def _finish(self, status: str, spent: Spent | None, **members: Any) -> None:
        self.is_ended = True
        self.whole = self._response(status, spent, **members)
        self._emit(f"response.{status}", response=self.whole)

    def _response(self, status: str, spent: Spent | None = None, **members: Any) -> dict[str, Any]:
        response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._model if self._model is not None else self._echo["model"],
            "output": [self._output[index] for index in sorted(self._output)],
            "usage": None if spent is None else spent.as_json(),
        }
        return {**self._echo, **response, **members}

    def _say(self, kind: str, delta: str) -> None:
        if not delta:
            return
        item = self._speaking
        if item is None or item.kind != "message":
            self.close_speech()
            item = self._speaking = self._add("message", {"role": "assistant", "content": []})
        if item.part_kind != kind:
            self._close_part(item)
            item.part_kind = kind
            self._emit("response.content_part.added", item, content_index=len(item.parts), part=_part(kind, ""))
        item.pieces.append(delta)
        extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        self._emit(f"response.{kind}.delta", item, content_index=len(item.parts), delta=delta, **extra)

    def _close_part(self, item: _Item) -> None:
        kind = item.part_kind
        if kind is None:
            return
        text, index = "".join(item.pieces), len(item.parts)
        part = _part(kind, text)
        extra: dict[str, Any] = {"text": text, "logprobs": []} if kind == "output_text" else {"refusal": text}
        self._emit(f"response.{kind}.done", item, content_index=index, **extra)
        self._emit("response.content_part.done", item, content_index=index, part=part)
        item.parts.append(part)
        item.pieces.clear()
        item.part_kind = None

    def _reasoning_item(self) -> _Item:
        if self._speaking is None or self._speaking.kind != "reasoning":
            self.close_speech()
            self._speaking = self._add("reasoning", {"summary": []})
        return self._speaking

    def _add(self, kind: str, members: dict[str, Any]) -> _Item:
        item = _Item(self._next, f"{_ITEM_IDS[kind]}_{self._token}{self._next:x}", kind, members)
        self._next += 1
        self._emit("response.output_item.added", None, output_index=item.index, item=_as_json(item, "in_progress"))
        return item

    def _done(self, item: _Item, members: dict[str, Any], is_complete: bool) -> None:
        item.members |= members
        done = self._output[item.index] = _as_json(item, "completed" if is_complete else "incomplete")
        self._emit("response.output_item.done", None, output_index=item.index, item=done)

    def _emit(self, kind: str, about: _Item | None = None, **members: Any) -> None:
        if not self.is_stream:
            return
        event: dict[str, Any] = {"type": kind, "sequence_number": self._sequence}
        if about is not None:
            event |= {"item_id": about.id, "output_index": about.index}
        self._sequence += 1
        self._out.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(event | members)))


def _as_json(item: _Item, status: str) -> dict[str, Any]:
    about = {"id": item.id, "type": item.kind}
    return about | ({"status": status} if item.kind in _HAVE_STATUS else {}) | item.members


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "refusal":
        return {"type": kind, "refusal": text}
    return {"type": kind, "text": text, "annotations": [], "logprobs": []}


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (ValueError, RecursionError):
        return False
    return True


def _custom_input(arguments: str) -> str:
    """Return the text in the one argument a custom tool is given; arguments of any other shape as they are."""
    try:
        decoded = msgspec.json.decode(arguments, type=dict[str, str])
    except (ValueError, RecursionError):
        return arguments
    return decoded["input"] if decoded.keys() == {"input"} else "" if arguments == "{}" else arguments
