"""A stream of chat completions as a stream of Anthropic's events, for any order of deltas.

Anthropic sends one block after the other; chat completions may send deltas of several tool calls in turn. So blocks
wait in a queue: the first is open and its deltas pass at once, those of later ones are held until it is complete.

    message_start (content_block_start content_block_delta* content_block_stop)* message_delta message_stop
"""

from __future__ import annotations

from collections import deque
from typing import Any

import attrs

from penstock import UpstreamError
from penstock_plugins.dialects.anthropic_answers import (
    NO_USAGE,
    arguments_of,
    call_id,
    error_body,
    is_object,
    message_error,
    message_id,
    read_answer,
    status_in_stream,
    stop_of,
    text_in,
    texts_of,
    usage_in,
    whole_message,
)
from penstock_plugins.dialects.shared import read_error, sse

_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_MOST_LOOKS = 64
"""So that deltas of calls in turn cost no more than their number; a call looked at so often is complete at the end."""


@attrs.define(eq=False)
class _Block:
    """Hold a content block on its way."""

    kind: str
    id: str = ""
    name: str = ""
    waiting: list[str] = attrs.Factory(list)
    """Deltas that have not been sent."""
    arguments: list[str] = attrs.Factory(list)
    """All deltas of a tool call."""
    looks: int = 0
    """How often the arguments were read to learn whether they are complete."""
    is_open: bool = False
    is_closed: bool = False

    def is_complete(self) -> bool:
        """Tell whether nothing can follow: of text that something else began, of arguments that they are an object."""
        if self.kind != "tool_use":
            return True
        if not self.arguments or "}" not in self.arguments[-1] or self.looks == _MOST_LOOKS:
            return False
        self.looks += 1
        return is_object("".join(self.arguments))

    @property
    def start(self) -> dict[str, Any]:
        """Return the block as its start says it."""
        if self.kind == "tool_use":
            return {"type": "tool_use", "id": call_id(self.id), "name": self.name, "input": {}}
        if self.kind == "thinking":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "text", "text": ""}


@attrs.define(eq=False)
class _Blocks:
    """Write blocks one after the other."""

    out: list[bytes] = attrs.Factory(list)
    count: int = 0
    """Blocks begun."""
    _queue: deque[_Block] = attrs.Factory(deque)

    def add(self, block: _Block) -> None:
        self._queue.append(block)

    def say(self, kind: str, words: str) -> None:
        """Add words to the last block, or to a new one where that is of another kind."""
        if not self._queue or self._queue[-1].kind != kind:
            self.add(_Block(kind))
        self._queue[-1].waiting.append(words)

    def advance(self, *, is_last: bool = False) -> None:
        """Send what can be sent: all of it where nothing follows."""
        while self._queue:
            block = self._queue[0]
            if not block.is_open:
                if block.kind == "tool_use" and not block.name:
                    if not is_last:
                        return
                    self._queue.popleft()  # cut off before its name came
                    continue
                self._send("content_block_start", content_block=block.start)
                block.is_open = True
            if block.waiting:
                kind, member = _DELTAS[block.kind]
                self._send("content_block_delta", delta={"type": kind, member: "".join(block.waiting)})
                block.waiting.clear()
            if not is_last and (len(self._queue) == 1 or not block.is_complete()):
                return
            self._send("content_block_stop")
            block.is_closed = True
            self.count += 1
            self._queue.popleft()

    def _send(self, kind: str, **members: Any) -> None:
        self.out.append(sse({"type": kind, "index": self.count, **members}, kind))


@attrs.define(eq=False, kw_only=True)
class MessagesAnswer:
    """Turn one answer of chat completions into Anthropic's dialect (``shared.Answer``)."""

    shows_thinking: bool
    """Whether the client sees what the model thought."""
    stops: tuple[str, ...]
    """The request's stop sequences."""
    is_stream: bool
    """Whether the client asked for a stream: it could not read a whole body then, nor a stream else."""
    _blocks: _Blocks = attrs.field(init=False, factory=_Blocks)
    _calls: list[_Block] = attrs.field(init=False, factory=list)
    _by_index: dict[object, _Block] = attrs.field(init=False, factory=dict)
    _finish: dict[str, Any] | None = attrs.field(init=False, default=None)
    """The choice that said why the answer ended."""
    _usage: dict[str, Any] | None = attrs.field(init=False, default=None)
    _is_started: bool = attrs.field(init=False, default=False)
    _is_ended: bool = attrs.field(init=False, default=False)
    _has_refused: bool = attrs.field(init=False, default=False)

    def whole(self, body: bytes) -> bytes:
        """Return a whole answer as a message. Raises UpstreamError ``protocol``."""
        if self.is_stream:
            raise UpstreamError("protocol", "it answered with a whole body where a stream was asked for")
        return whole_message(body, self.stops, shows_thinking=self.shows_thinking)

    def error(self, status: int, body: bytes) -> bytes:
        """Return an error in Anthropic's envelope."""
        return error_body(status, body)

    def event(self, name: str | None, payload: bytes) -> bytes:
        """Return what a chunk becomes. Raises UpstreamError ``protocol`` for what cannot be read."""
        if self._is_ended:
            return b""
        if not self.is_stream:
            raise UpstreamError("protocol", "it answered with a stream that was not asked for")
        if payload.strip() == b"[DONE]":
            return self._ended() if self._is_started or self._finish is not None else b""
        chunk = read_answer(payload)
        if name == "error" or chunk.get("error"):
            self._is_ended = True
            error = read_error(payload)
            return sse(message_error(error, status_in_stream(error)), "error")
        if b'"usage"' in payload:
            self._usage = usage_in(payload) or self._usage
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices:
            return self._ended() if self._finish is not None and self._usage is not None else b""
        for choice in choices:
            if isinstance(choice, dict) and not choice.get("index"):
                self._take(chunk, choice)
        return self._written()

    def end(self) -> bytes:
        """Return the end of a stream that did not say [DONE]. Raises UpstreamError ``truncated``."""
        if self._is_ended:
            return b""
        if self._finish is None:
            raise UpstreamError("truncated", "its stream ended without a finish_reason")
        return self._ended()

    def _take(self, chunk: dict[str, Any], choice: dict[str, Any]) -> None:
        if not self._is_started:
            self._start(chunk)
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._has_refused = self._has_refused or bool(text_in(delta, "refusal"))
            for kind, words in texts_of(delta):
                if kind == "text" or self.shows_thinking:
                    self._blocks.say(kind, words)
            calls = delta.get("tool_calls")
            for call in calls if isinstance(calls, list) else ():
                if isinstance(call, dict):
                    self._take_call(call)
            self._blocks.advance()
        if text_in(choice, "finish_reason"):
            self._finish = choice

    def _take_call(self, call: dict[str, Any]) -> None:
        function = call.get("function")
        ident, name, piece = text_in(call, "id"), text_in(function, "name"), arguments_of(function)
        block = self._call_meant(call.get("index"), ident, name)
        block.id, block.name = block.id or ident, block.name or name
        if not piece:
            return
        if block.is_closed:
            if piece.strip():
                raise UpstreamError("protocol", "its stream goes on with a tool call that was complete")
            return
        block.arguments.append(piece)
        block.waiting.append(piece)
        self._blocks.advance()

    def _call_meant(self, index: object, ident: str, name: str) -> _Block:
        """Return the call a delta belongs to: some providers number none, or all of them 0."""
        key = index if isinstance(index, int) else None
        block = self._by_index.get(key)
        if block is not None and name and block.name:
            is_other = ident != block.id if ident and block.id else block.is_complete()
            block = None if is_other else block
        if block is None:
            block = _Block("tool_use")
            self._by_index[key] = block
            self._calls.append(block)
            self._blocks.add(block)
        return block

    def _start(self, chunk: dict[str, Any]) -> None:
        self._is_started = True
        message: dict[str, Any] = {
            "id": message_id(chunk),
            "type": "message",
            "role": "assistant",
            "model": text_in(chunk, "model"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {**NO_USAGE, **(self._usage or {}), "output_tokens": 0},
        }
        self._blocks.out.append(sse({"type": "message_start", "message": message}, "message_start"))

    def _ended(self) -> bytes:
        """Close what is open and end the message."""
        choice = self._finish or {}
        is_cut = text_in(choice, "finish_reason") in ("length", "model_length")
        broken = [call for call in self._calls if not (call.name and is_object("".join(call.arguments) or "{}"))]
        if broken and not is_cut:
            raise UpstreamError("protocol", "its stream calls a tool with arguments that are no JSON object")
        if not self._is_started:
            self._start({})
        self._is_ended = True
        self._blocks.advance(is_last=True)
        stop = stop_of(choice, self.stops, has_calls=bool(self._calls), has_refused=self._has_refused)
        delta = {"stop_reason": stop.reason, "stop_sequence": stop.sequence}
        usage = self._usage or NO_USAGE
        self._blocks.out.append(sse({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta"))
        self._blocks.out.append(sse({"type": "message_stop"}, "message_stop"))
        return self._written()

    def _written(self) -> bytes:
        out = b"".join(self._blocks.out)
        self._blocks.out.clear()
        return out
